"""The private parts of torch that mst-fx calls, in one place.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU):

- ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` calls. Public would be
  ``torch.compile`` itself, which cannot be called from inside of a backend.
- ``torch._inductor.compile_fx.compile_fx_inner``: compiles an ATen graph without tracing it again.
  ``torch._inductor.standalone_compile`` would serve, but takes a fake mode from 2.13 on only.
- ``torch._guards.TracingContext``: a fresh one keeps a body's shape environment apart from that of
  the graph whose compilation, or backward pass, happens to be under way.
- ``torch._functorch.config.donated_buffer``: off, so that ``retain_graph=True`` works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

Compiled = Callable[..., Any]
T = TypeVar("T")


def mode_patches(mode: str | None) -> dict[str, Any]:
    """The Inductor config patches of ``torch.compile(mode=...)``.

    Raises:
        ValueError: for an unknown mode.
    """
    return {} if mode in (None, "default") else dict(list_mode_options(mode))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str, patches: Mapping[str, Any]
) -> Compiled:
    """Compiles a rewritten Dynamo graph, forward and (later) backward.

    Args:
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        patches: Inductor config patches.
    """
    if inner == "eager":
        return gm.forward
    with torch._functorch.config.patch(donated_buffer=False):
        if inner == "aot_eager":
            return aot_eager(gm, list(example_inputs))
        return compile_fx(gm, list(example_inputs), config_patches=dict(patches))


def decompositions(inner: str) -> dict[Any, Any]:
    """The decompositions a body is traced with, so that ``inner`` can compile it."""
    return dict(select_decomp_table()) if inner == "inductor" else {}


def compile_body(gm: fx.GraphModule, inputs: Sequence[Any], inner: str, patches: Mapping[str, Any]) -> Compiled:
    """Compiles an ATen graph with a symbolic number of rows.

    Args:
        gm: traced by ``make_fx`` with :func:`decompositions`; its first input is the number of rows.
        inputs: the fake inputs it was traced with.

    Returns:
        A function of the list of inputs that empties the list, as Inductor's do.
    """
    if inner != "inductor":
        return lambda args: gm(*args)
    mode = next(x.fake_mode for x in inputs if isinstance(x, torch.Tensor))  # type: ignore[attr-defined]
    with _apart(mode), inductor_config.patch(dict(patches)):
        return compile_fx_inner(gm, list(inputs), cudagraphs=False, is_inference=True)  # type: ignore[arg-type]


def in_fresh_thread(function: Callable[[], T], device: torch.device) -> T:
    """Runs a function as if at the top of a program.

    Bodies are traced and compiled when a loop first runs, which is inside of an op's kernel: autograd
    is excluded there, and autocast, dispatch modes and a compilation may be active. All of that state
    is the thread's.
    """

    def run() -> T:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return function()

    with ThreadPoolExecutor(1, thread_name_prefix="mst-fx") as pool:
        return pool.submit(run).result()


@contextlib.contextmanager
def _apart(mode: FakeTensorMode) -> Iterator[None]:
    """Outside of any compilation that is under way."""
    with tracing(TracingContext(mode)), torch.no_grad():
        yield


def cache_counters() -> dict[str, int]:
    """Inductor's and AOTAutograd's cache counters of this process (hits, misses, bypasses)."""
    return {
        **{name: count for name, count in counters["inductor"].items() if "cache" in name},
        **{name: count for name, count in counters["aot_autograd"].items() if "cache" in name},
    }
