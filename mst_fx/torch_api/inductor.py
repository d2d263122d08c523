"""Inductor: how a rewritten graph, and the body of a loop, is compiled.

- ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` calls. Public would be
  ``torch.compile`` itself, which cannot be called from inside of a backend.
- ``torch._inductor.compile_fx.compile_fx_inner``: compiles an ATen graph without tracing it again.
  ``torch._inductor.standalone_compile`` would serve, but takes a fake mode from 2.13 on only.
- ``torch._guards.TracingContext``: a fresh one keeps a body's shape environment apart from that of
  the graph whose compilation, or backward pass, happens to be under way.
- ``torch._inductor.lowering.make_fallback``: what Inductor does when it meets an operator that it does not know.
- ``torch._inductor.choices.InductorChoices``, set with ``V.set_choices_handler``: one heuristic of ours.
- ``torch._functorch.config.donated_buffer``: off while graphs of ours are compiled, so that ``retain_graph=True`` works;
  ``TracingContext.fw_metadata`` tells their backward pass (the same in torch 2.8 to 2.13, by their code). Of graphs
  with tensor subclasses (DTensor) AOTAutograd asks other metadata than it shows there.
- ``torch._dynamo.backends.debugging.aot_eager``: what ``backend="aot_eager"`` calls, by AOTAutograd but without Inductor;
  public would be its name as a backend, which cannot be told what compiles the forward graph.
- ``torch._TorchCompileInductorWrapper``: the backend object that ``torch.compile`` makes when no other
  backend is named. ``mst_fx.enable`` replaces its ``__call__``. Two ways with public names fall
  short. ``torch._inductor.config.pre_grad_custom_pass``, which was tried, may not change what a graph returns, so
  logits that are an output (of every Hugging Face model) could not be deferred; and it runs after the
  lookup in the cache of compiled graphs, so that a second process would have the graph but not the
  bodies of its loops. ``torch.compiler.set_stance(force_backend=...)``, by its code, drops ``mode``, ``options`` and
  ``fullgraph``, and replaces backends that were named.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import bisect
import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import ExternKernelOut, InvokeSubgraph
from torch._inductor.lowering import (  # type: ignore[attr-defined]
    get_layout_constraint_tag,
    lowerings,
    make_fallback,
    tag_to_layout_constraint,
)
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mst_fx.torch_api.called_graphs import Layer, Repetition, call_layers, call_repetitions
from mst_fx.torch_api.overwriting import write_over_dead_operands
from mst_fx.torch_api.quick_cuts import quick_cuts
from mst_fx.torch_api.settled_views import settled_views
from mst_fx.torch_api.written_in_place import written_in_place

Compiled = Callable[..., Any]
FindRepetitions = Callable[[fx.Graph], Sequence[Repetition]]

# Inductor keeps a buffer that is dead for the next one of its size, and so keeps it while a loop runs in
# between, of whose memory it knows nothing: 2 to 3 tensors of S x H in the backward pass of a checkpointed
# layer. Freed, its block goes back to torch's allocator, which is as fast.
_FREED_AT_ONCE: dict[str, Any] = {"allow_buffer_reuse": False}
# Inductor would put each wait for a collective behind it, to free what was sent.
AS_ORDERED: dict[str, Any] = {"reorder_for_peak_memory": False}


def mode_patches(mode: str | None) -> dict[str, Any]:
    """The Inductor config patches of ``torch.compile(mode=...)``.

    Raises:
        ValueError: for an unknown mode.
    """
    return {} if mode in (None, "default") else dict(list_mode_options(mode))


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner: str,
    patches: Mapping[str, Any],
    layers: Mapping[str, Layer] | None = None,
    repetitions: FindRepetitions | None = None,
) -> Compiled:
    """Compiles a rewritten Dynamo graph, forward and (later) backward.

    Args:
        inner: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        patches: Inductor config patches.
        layers: by their keys those that operators of the graph name (:mod:`mst_fx.torch_api.called_graphs`).
        repetitions: of a graph that goes to Inductor those that are compiled once.
    """
    if inner == "eager":
        return gm.forward
    if any(is_traceable_wrapper_subclass(x) for x in example_inputs):
        functorch_config.donated_buffer = False  # for good: what the backward pass asks is out of our reach
    with functorch_config.patch(donated_buffer=False), quick_cuts():
        if inner == "aot_eager":
            return aot_eager(gm, list(example_inputs), fw_compiler=_run_as_traced)
        patched: dict[str, Any] = _FREED_AT_ONCE | dict(patches)
        apart = _compile_apart(layers or {}, repetitions or _no_repetitions)
        return compile_fx(gm, list(example_inputs), inner_compile=apart, config_patches=patched)  # type: ignore[return-value]


def compile_plainly(
    gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str, patches: Mapping[str, Any]
) -> Compiled:
    """Compiles a Dynamo graph as ``torch.compile(backend=inner)`` does, with nothing of ours."""
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        return aot_eager(gm, list(example_inputs))
    return compile_fx(gm, list(example_inputs), config_patches=dict(patches))  # type: ignore[return-value]


def unknown_patches(patches: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of some Inductor config patches those that it does not know, each with names that look like it.

    ``get_config_copy``: all names there are; Inductor itself looks at them when it compiles, and other compilers never.
    """
    known: dict[str, Any] = inductor_config.get_config_copy() if patches else {}  # type: ignore[attr-defined]
    unknown = [
        name for name in patches if not hasattr(inductor_config, name)
    ]  # aliases of other configs are not in the copy
    return {name: difflib.get_close_matches(str(name), known, n=3) for name in unknown}


def _donate_nothing() -> None:
    """Tells the backward pass of the graph that AOTAutograd is compiling that no saved tensor is given away.

    The check for ``retain_graph`` would take "nobody asked" for "some are", unless the option is off for the whole
    process. To be called while the forward graph is compiled.
    """
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []


@functools.wraps(boxed_nop)
def _run_as_traced(*args: Any, **kwargs: Any) -> Any:
    _donate_nothing()
    return boxed_nop(*args, **kwargs)


class _Choices(InductorChoices):
    """Inductor's heuristics, but for one: what lies on two sides of a loop is not put into one kernel.

    Nothing makes the recomputation of a checkpointed layer wait for the backward pass of the next, and both
    read the same sines and cosines. Fused with it, it holds its values all that time. Inductor knows the
    danger, and looks how many nodes lie between (``Scheduler.are_long_distant_nodes``): a loop is one node.
    """

    @staticmethod
    def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: Any) -> bool:
        if not InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score):
            return False
        loops = _loops(scheduler)
        first, last = sorted((node1, node2), key=lambda node: node.max_order)
        if any(first.max_order < order < last.min_order for order in loops.values()):
            return False
        # Recomputation stands right behind the backward pass that it does not wait for.
        if loops.keys() & node1.ancestors != loops.keys() & node2.ancestors:
            return False
        # The sums for two norms' weights, on two sides of an MLP that is not chunked: the second's products would come first, and what they
        # make be held up to the products for weights.
        return last.ancestors.isdisjoint(_products_between(scheduler, first.max_order, last.min_order))


def _loops(scheduler: Any) -> dict[str, int]:
    """The names of mst-fx's loops and attentions, and of layers that hold some, among a scheduler's nodes, and where they stand."""
    found: dict[str, int] | None = getattr(scheduler, "_mst_fx_loops", None)
    if found is None:
        loops = [node for node in scheduler.nodes if _holds_loops(node.node)]
        found = scheduler._mst_fx_loops = {node.get_name(): node.min_order for node in loops}
    return found


def _products_between(scheduler: Any, start: int, end: int) -> Sequence[str]:
    """The names of the matrix products that stand between two places."""
    found: tuple[list[int], list[str]] | None = getattr(scheduler, "_mst_fx_products", None)
    if found is None:
        products = [x for x in scheduler.nodes if x.is_template() or isinstance(x.node, ExternKernelOut)]
        places = sorted((each.min_order, each.get_name()) for each in products)
        found = scheduler._mst_fx_products = [at for at, _ in places], [name for _, name in places]
    orders, names = found
    return names[bisect.bisect_right(orders, start) : bisect.bisect_left(orders, end)]


def _holds_loops(node: Any) -> bool:
    return isinstance(node, InvokeSubgraph) or _is_loop(getattr(node, "op_overload", None))


def _is_loop(operator: Any) -> bool:
    is_ours = isinstance(operator, torch._ops.OpOverload) and operator.namespace == "mst_fx"
    return is_ours and any(part in operator.name() for part in ("loop", "attention"))


def _know_operators(graph: fx.Graph) -> None:
    """Tells Inductor of the operators of ours in a graph what it would find out when it meets them.

    It would write the operands into a log as a text first (torch 2.11, whatever the level), and that of what an operand is made of,
    and so on: of results that feed each other, as a plan's copies do, exponentially many.
    """
    for node in graph.nodes:
        target = node.args[0] if node.target is auto_functionalized else node.target
        is_ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "mst_fx"
        if is_ours and target not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(target, with_default=True))
            make_fallback(target, layout_constraint=constraint, warn=False)


def _no_repetitions(graph: fx.Graph) -> Sequence[Repetition]:
    return ()


def _compile_apart(layers: Mapping[str, Layer], repetitions: FindRepetitions) -> Compiled:
    """What compiles a forward or backward graph of ours."""

    @functools.wraps(compile_fx_inner)
    def compile_apart(*args: Any, **kwargs: Any) -> Any:
        _donate_nothing()
        call_layers(args[0], layers, _know_operators)
        call_repetitions(args[0], repetitions(args[0].graph), _know_operators)
        write_over_dead_operands(args[0].graph)
        _know_operators(args[0].graph)
        with V.set_choices_handler(_Choices()), settled_views(), written_in_place():
            return compile_fx_inner(*args, **kwargs)

    return compile_apart


Redirection = Callable[[fx.GraphModule, Sequence[Any], Mapping[str, Any]], Compiled]

_inductor_call = torch._TorchCompileInductorWrapper.__call__


def is_redirected() -> bool:
    """Whether ``torch.compile`` with its default backend calls a function of ours now."""
    return torch._TorchCompileInductorWrapper.__call__ is not _inductor_call


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
    """The decompositions a body is traced with, so that ``inner`` can compile it.

    ``select_decomp_table``: Inductor lowers no operator that its own table takes apart.
    """
    return dict(select_decomp_table()) if inner == "inductor" else {}


def decompositions_of(operators: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """torch's own decompositions of some operators, for every ``inner``.

    ``torch._decomp.get_decompositions``; the public ``torch.export.default_decompositions`` is one table for all of export.
    """
    return get_decompositions(operators)


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
    with (
        _apart(mode),
        settled_views(),
        written_in_place(),
        inductor_config.patch(_FREED_AT_ONCE | dict(patches)),
    ):
        return compile_fx_inner(gm, list(inputs), cudagraphs=False, is_inference=True)  # type: ignore[arg-type]


@contextlib.contextmanager
def _apart(mode: FakeTensorMode) -> Iterator[None]:
    """Outside of any compilation that is under way."""
    with tracing(TracingContext(mode)), torch.no_grad():
        yield


def cache_counters() -> dict[str, int]:
    """Inductor's and AOTAutograd's cache counters of this process (hits, misses, bypasses).

    ``torch._dynamo.utils.counters``: there is no public way to ask whether a compilation came from a cache.
    """
    return {
        **{name: count for name, count in counters["inductor"].items() if "cache" in name},
        **{name: count for name, count in counters["aot_autograd"].items() if "cache" in name},
    }
