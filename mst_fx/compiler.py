"""The private parts of torch that mst-fx calls, in one place.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU):

- ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` calls. Public would be
  ``torch.compile`` itself, which cannot be called from inside of a backend.
- ``torch._inductor.compile_fx.compile_fx_inner``: compiles an ATen graph without tracing it again.
  ``torch._inductor.standalone_compile`` would serve, but takes a fake mode from 2.13 on only.
- ``torch._guards.TracingContext``: a fresh one keeps a body's shape environment apart from that of
  the graph whose compilation, or backward pass, happens to be under way.
- ``torch._inductor.choices.InductorChoices``, set with ``V.set_choices_handler``: one heuristic of ours.
- ``torch._functorch.config.donated_buffer``: off, so that ``retain_graph=True`` works.
- ``torch._TorchCompileInductorWrapper``: the backend object that ``torch.compile`` makes when no other
  backend is named. ``mst_fx.enable`` replaces its ``__call__``. Two ways with public names fall
  short. ``torch._inductor.config.pre_grad_custom_pass``, which was tried, may not change what a graph returns, so
  logits that are an output (of every Hugging Face model) could not be deferred; and it runs after the
  lookup in the cache of compiled graphs, so that a second process would have the graph but not the
  bodies of its loops. ``torch.compiler.set_stance(force_backend=...)``, by its code, drops ``mode``, ``options`` and
  ``fullgraph``, and replaces backends that were named.
- The stack of Dynamo's callback (``_dynamo/convert_frame.py``, ``_dynamo/eval_frame.py``): nothing else says
  whether a graph's function is the one that was given to ``torch.compile``, or one that its caller calls.
- ``torch._subclasses.fake_tensor.unset_fake_temporarily``: constants of a graph are computed for real.
- ``torch.utils._python_dispatch._disable_current_modes``: deferred logits that are used first under a mode
  (selective checkpointing's, which counts operators) are not its business.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

Compiled = Callable[..., Any]

# Inductor keeps a buffer that is dead for the next one of its size, and so keeps it while a loop runs in
# between, of whose memory it knows nothing: 2 to 3 tensors of S x H in the backward pass of a checkpointed
# layer. Freed, its block goes back to torch's allocator, which is as fast.
_FREED_AT_ONCE: dict[str, Any] = {"allow_buffer_reuse": False}


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
    # Set for good, not for this compilation: the check for retain_graph reads it in the backward pass.
    torch._functorch.config.donated_buffer = False
    if inner == "aot_eager":
        return aot_eager(gm, list(example_inputs))
    patched: dict[str, Any] = _FREED_AT_ONCE | dict(patches)
    return compile_fx(gm, list(example_inputs), inner_compile=_compile_apart, config_patches=patched)  # type: ignore[return-value]


class _Choices(InductorChoices):
    """Inductor's heuristics, but for one: what lies on two sides of a loop is not put into one kernel.

    Nothing makes the recomputation of a checkpointed layer wait for the backward pass of the next, and both
    read the same sines and cosines. Fused with it, it holds its values all that time. Inductor knows the
    danger, and looks how many nodes lie between (``Scheduler.are_long_distant_nodes``): a loop is one node.
    """

    @staticmethod
    def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: Any) -> bool:
        loops = _loops(scheduler)
        first, last = sorted((node1, node2), key=lambda node: node.max_order)
        if any(first.max_order < order < last.min_order for order in loops.values()):
            return False
        # Recomputation stands right behind the backward pass that it does not wait for.
        if loops.keys() & node1.ancestors != loops.keys() & node2.ancestors:
            return False
        return InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)


def _loops(scheduler: Any) -> dict[str, int]:
    """The names of mst-fx's loops and attentions among a scheduler's nodes, and where they stand."""
    found: dict[str, int] | None = getattr(scheduler, "_mst_fx_loops", None)
    if found is None:
        loops = [node for node in scheduler.nodes if _is_loop(getattr(node.node, "op_overload", None))]
        found = scheduler._mst_fx_loops = {node.get_name(): node.min_order for node in loops}
    return found


def _is_loop(operator: Any) -> bool:
    is_ours = isinstance(operator, torch._ops.OpOverload) and operator.namespace == "mst_fx"
    return is_ours and any(part in operator.name() for part in ("loop", "attention"))


@functools.wraps(compile_fx_inner)
def _compile_apart(*args: Any, **kwargs: Any) -> Any:
    with V.set_choices_handler(_Choices()):
        return compile_fx_inner(*args, **kwargs)


Redirection = Callable[[fx.GraphModule, Sequence[Any], Mapping[str, Any]], Compiled]

_inductor_call = torch._TorchCompileInductorWrapper.__call__


def redirect_inductor(instead: Redirection | None) -> None:
    """Makes ``torch.compile`` with its default backend call a function in place of Inductor.

    Args:
        instead: gets the graph, its example inputs and the Inductor config patches that the mode and the
            options of ``torch.compile`` stand for. ``None`` puts Inductor back.
    """

    def call(wrapper: Any, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        assert instead is not None
        return instead(gm, inputs, {**wrapper.config, **(kwargs.get("config_patches") or {})})

    torch._TorchCompileInductorWrapper.__call__ = _inductor_call if instead is None else call  # type: ignore[method-assign, assignment]


def decompositions(inner: str) -> dict[Any, Any]:
    """The decompositions a body is traced with, so that ``inner`` can compile it."""
    return dict(select_decomp_table()) if inner == "inductor" else {}


def compile_body(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: str, patches: Mapping[str, Any]
) -> Compiled:
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
    with _apart(mode), inductor_config.patch(_FREED_AT_ONCE | dict(patches)):
        return compile_fx_inner(gm, list(inputs), cudagraphs=False, is_inference=True)  # type: ignore[arg-type]


@functools.cache
def _neutral_keys() -> tuple[Any, Any]:
    """The dispatch keys a thread starts with: autograd on, autocast off."""

    def read() -> tuple[Any, Any]:
        return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(read).result()


@contextlib.contextmanager
def outside_of_kernels() -> Iterator[None]:
    """Runs its block as if not called from inside of an op's kernel.

    Bodies are traced and compiled when a loop first runs: below autograd, which must work in the trace.
    Another thread would be cleaner, and would wait forever: on CUDA a backward kernel runs on the
    device's autograd thread, which the gradient in the trace needs too. From that thread itself the
    engine takes it as a reentrant backward pass.
    """
    with torch._C._ForceDispatchKeyGuard(*_neutral_keys()), torch.enable_grad():
        yield


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Runs its block under no dispatch mode."""
    with _disable_current_modes():
        yield


def returns_to_user() -> bool:
    """Whether the function that is being captured is the very one that was given to ``torch.compile``.

    Others are called by Python code that Dynamo did not capture as a whole.
    """
    frame: FrameType | None = sys._getframe()
    is_inside = False
    while frame is not None:
        place = frame.f_code.co_filename
        if is_inside and not place.endswith("convert_frame.py"):
            return place.endswith("eval_frame.py")
        is_inside = place.endswith("convert_frame.py") and frame.f_code.co_name == "__call__"
        frame = frame.f_back
    return True


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Runs its block on real tensors, whatever fake mode is active."""
    with unset_fake_temporarily(), torch.no_grad():
        yield


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
