"""The private parts of torch that mst-fx calls, in one place.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU):

- ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` calls. Public would be
  ``torch.compile`` itself, which cannot be called from inside of a backend.
- ``torch._inductor.compile_fx.compile_fx_inner``: compiles an ATen graph without tracing it again.
  ``torch._inductor.standalone_compile`` would serve, but takes a fake mode from 2.13 on only.
- ``torch._guards.TracingContext``: a fresh one keeps a body's shape environment apart from that of
  the graph whose compilation, or backward pass, happens to be under way.
- ``torch._inductor.choices.InductorChoices``, set with ``V.set_choices_handler``: one heuristic of ours.
- ``torch._functorch.config.donated_buffer``: off while graphs of ours are compiled, so that ``retain_graph=True`` works;
  ``TracingContext.fw_metadata`` tells their backward pass (the same in torch 2.8 to 2.13, by their code). Of graphs
  with tensor subclasses (DTensor) AOTAutograd asks other metadata than it shows there.
- ``torch._TorchCompileInductorWrapper``: the backend object that ``torch.compile`` makes when no other
  backend is named. ``mst_fx.enable`` replaces its ``__call__``. Two ways with public names fall
  short. ``torch._inductor.config.pre_grad_custom_pass``, which was tried, may not change what a graph returns, so
  logits that are an output (of every Hugging Face model) could not be deferred; and it runs after the
  lookup in the cache of compiled graphs, so that a second process would have the graph but not the
  bodies of its loops. ``torch.compiler.set_stance(force_backend=...)``, by its code, drops ``mode``, ``options`` and
  ``fullgraph``, and replaces backends that were named.
- ``torch._dynamo.code_context``: Dynamo's own place for what belongs to a function until ``torch._dynamo.reset()``.
- ``torch._guards.TracingContext`` also says whether guards on a symbolic size will be checked: whether its shape
  environment is that of the compilation under way. ``ShapeEnv.tracked_fakes`` knows of which sizes the user promised
  a range (``mark_dynamic(x, 1, min=…, max=…)``): a guard inside of it is an error there.
- ``torch._dynamo.symbolic_convert.TensorifyState`` and ``torch._dynamo.exc.TensorifyScalarRestartAnalysis``: how
  AOTAutograd tells Dynamo to capture anew with some floats as constants (``tensorify_python_scalars``, which runs
  when our passes and bodies are done). What it is bound to say is said before.
- The stack of Dynamo's callback (``_dynamo/convert_frame.py``, ``_dynamo/eval_frame.py``): nothing else says
  whether a graph's function is the one that was given to ``torch.compile``, or one that its caller calls.
- ``torch._subclasses.fake_tensor.unset_fake_temporarily``: constants of a graph are computed for real.
- ``GraphModule.compile_subgraph_reason``: why Dynamo ended a graph, a ``GraphCompileReason`` (2.11 and 2.13). It has no
  kind but its text, whose first line is the ``gb_type`` of Dynamo's registry of graph breaks.
- ``CheckpointHigherOrderVariable`` (``_dynamo/variables/higher_order_ops.py``): a graph break inside of a checkpointed
  layer makes Dynamo run the whole layer eagerly, and in a loop over layers skip the function, so that no backend
  is called that could say so; neither counters nor callbacks tell a checkpoint. Its ``_call_function`` (2.13) is
  watched, or ``call_function``, whichever it has; ``tx.output.compiler_fn`` and ``innermost_backend`` say whose
  compilation it is. Where a torch has none of these, nothing is said.
- ``torch.utils._python_dispatch._disable_current_modes``: deferred logits that are used first under a mode
  (selective checkpointing's, which counts operators) are not its business.
- ``torch._C._autograd._saved_tensors_hooks_set_tracing``: what AOTAutograd itself does while it traces.
  ``torch.autograd.graph.disable_saved_tensors_hooks`` raises where there are hooks, and hooks of our own may not be
  pushed where somebody else has disabled them.
- ``torch._C._storage_Use_Count``: whether somebody else still has the storage of some rows of logits
  (:mod:`mst_fx.logits.apart`). A weak reference to the storage would say it too, and take what was written there with it.
- ``torch.autograd.Variable._execution_engine.queue_callback``: what DDP and FSDP call; the only thing of ours that
  lives as long as one backward pass, also one that raises.
- ``torch._C._autograd._top_saved_tensors_default_hooks``: whether a checkpoint counts what is saved.
- ``torch.fx._lazy_graph_module``: Dynamo's own GraphModules, whose code is made when they first run. Others make it
  whenever they get a graph, which was half the time of the passes: nobody runs a copy that they work on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo import eval_frame
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._dynamo.code_context import code_context
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, Unsupported
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters
from torch._dynamo.variables import higher_order_ops
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StrictMinMaxConstraint
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("mst_fx")

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


# How the reasons begin that Dynamo gives; all that mst-fx knows of them by text.
_BREAKS = {"DDPOptimizer": "ddp", "Dynamic shape operator": "data"}


@dataclasses.dataclass(frozen=True)
class Ending:
    """Where and why Dynamo ended a graph.

    Attributes:
        kind: "" at the end of its function; "ddp" where DDP's optimizer cut it; "data" where data decide a shape; "break"
            at any other graph break.
        reason, place: Dynamo's reason, and "file:line" of the user's code; "" at the end of its function.
    """

    kind: str = ""
    reason: str = ""
    place: str = ""

    def __str__(self) -> str:
        """The end of a sentence about what leaves the graph."""
        if self.kind == "ddp":
            return "which DDP's optimizer has cut here"
        return f"which Dynamo broke at {self.place} ({self.reason})" if self.kind else ""


# Called where Dynamo gives up a checkpointed layer that a backend of ours was to compile, with why and where.
on_eager_checkpoint: list[Callable[[Ending], None]] = []


def _is_ours(backend: Any) -> bool:
    """Whether a backend, in whatever Dynamo wraps it, is one of mst-fx."""
    found = eval_frame.innermost_backend(backend)
    found = getattr(found, "compiler_fn", found)  # of a backend that was given a mode or options
    is_redirected = torch._TorchCompileInductorWrapper.__call__ is not _inductor_call
    if isinstance(found, torch._TorchCompileInductorWrapper):
        return is_redirected
    return str(getattr(found, "__module__", "")).startswith("mst_fx.")


def _tell_eager_checkpoint(tx: Any, error: Unsupported) -> None:
    """Tells the listeners; must not raise, since Dynamo is tracing."""
    try:
        is_fatal = tx.one_graph or getattr(
            tx, "error_on_graph_break", False
        )  # the user sees the error itself
        if is_fatal or not _is_ours(tx.output.compiler_fn):
            return
        stack = error.real_stack
        place = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        ending = Ending("break", [*str(error).splitlines(), ""][0], place)
        for listener in list(on_eager_checkpoint):
            listener(ending)
    except Exception:
        log.debug("a checkpointed layer runs eagerly, and could not be told of", exc_info=True)


def _watch_checkpoints() -> None:
    """Makes Dynamo tell of checkpointed layers that it gives up (once a process)."""
    variable: Any = getattr(higher_order_ops, "CheckpointHigherOrderVariable", None)
    names = [name for name in ("_call_function", "call_function") if name in vars(variable or object)]
    if not names:
        return
    before = getattr(variable, names[0])

    @functools.wraps(before)
    def call(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return before(self, tx, *args, **kwargs)
        except Unsupported as error:
            _tell_eager_checkpoint(tx, error)
            raise

    setattr(variable, names[0], call)


def ending_of(gm: fx.GraphModule) -> Ending:
    found: Any = getattr(gm, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return Ending()
    reason = [*found.reason.splitlines(), ""][0]
    kind = next((kind for start, kind in _BREAKS.items() if reason.startswith(start)), "break")
    stack = found.user_stack
    return Ending(kind, reason, f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "")


def graph_module(root: torch.nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule whose code is made when it is first asked for, as Dynamo's is."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph, class_name=name)


def make_code(gm: fx.GraphModule) -> None:
    """Makes the code of a graph, and of those in it, for who looks at it: ``fx.Tracer``, a module's new owner."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            module.code  # noqa: B018


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
    if any(is_traceable_wrapper_subclass(x) for x in example_inputs):
        functorch_config.donated_buffer = False  # for good: what the backward pass asks is out of our reach
    with functorch_config.patch(donated_buffer=False):
        if inner == "aot_eager":
            return aot_eager(gm, list(example_inputs), fw_compiler=_run_as_traced)
        patched: dict[str, Any] = _FREED_AT_ONCE | dict(patches)
        return compile_fx(gm, list(example_inputs), inner_compile=_compile_apart, config_patches=patched)  # type: ignore[return-value]


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
    _donate_nothing()
    with V.set_choices_handler(_Choices()):
        return compile_fx_inner(*args, **kwargs)


Redirection = Callable[[fx.GraphModule, Sequence[Any], Mapping[str, Any]], Compiled]

_inductor_call = torch._TorchCompileInductorWrapper.__call__


_watch_checkpoints()


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
    with (
        torch._C._ForceDispatchKeyGuard(*_neutral_keys()),
        torch.enable_grad(),
        without_saved_tensors_hooks(),
    ):
        yield


@contextlib.contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """Hides the user's ``saved_tensors_hooks`` from what autograd saves inside of the block: of fakes, and
    of values that live and die inside of an operator."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


def kept_until_reset() -> dict[Any, Any]:
    """A dict of ours that ``torch._dynamo.reset()`` forgets."""
    return code_context.get_context(kept_until_reset.__code__)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls a function when the backward pass that is under way has ended, and holds it no longer than that.

    Raises:
        RuntimeError: outside of a backward pass.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def uses_of_storage(x: torch.Tensor) -> int:
    """How many tensors, and other objects, share a tensor's storage, itself included."""
    storage = x.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1


def is_checkpointed() -> bool:
    """Whether what autograd saves now is counted by a non-reentrant checkpoint, by hooks of its own."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__module__


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


def guards_are_kept(env: ShapeEnv) -> bool:
    """Whether a guard that is added to a shape environment now will be checked before the graph runs."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return mode is not None and mode.shape_env is env


def promised_ranges(env: ShapeEnv) -> set[Any]:
    """The symbols of sizes of which the user promised a range, which no guard may narrow."""
    found: set[Any] = set()
    for tracked in env.tracked_fakes or ():
        if not isinstance(tracked.fake, torch.Tensor):
            continue
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", ())
        for size, constraint in zip(tracked.fake.shape, constraints, strict=False):
            if isinstance(constraint, StrictMinMaxConstraint) and isinstance(size, torch.SymInt):
                found |= size.node.expr.free_symbols
    return found


# Functions of Dynamo's graphs that take a float as such: AOTAutograd makes a constant of it.
_TAKE_FLOATS = {
    F.embedding,
    F.scaled_dot_product_attention,
    F.layer_norm,
    F.rms_norm,
    F.group_norm,
    F.batch_norm,
    F.dropout,
    torch.dropout,
}


def _tensorifies() -> bool:
    """Whether AOTAutograd keeps floats dynamic; torch 2.11 has no switch for it."""
    return bool(getattr(dynamo_utils, "_is_tensorify_enabled", lambda: True)())


def settle_floats(graphs: Sequence[fx.Graph]) -> None:
    """Tells torch now which floats of a graph AOTAutograd will make constants of, whatever the passes do.

    A symbol that no node reads as a number (Dynamo has one for each float64 buffer without dimensions, such as
    Gemma's embedding scale in a float64 model) is noted, and the graph stays valid.

    Args:
        graphs: of the program Dynamo captured, and of those that it refers to.

    Raises:
        TensorifyScalarRestartAnalysis: what AOTAutograd would raise for the sake of others (norms' ``eps``), and
            Dynamo awaits: it captures the frame anew.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None or mode.shape_env is None or not _tensorifies():
        return
    known = getattr(mode.shape_env, "backed_var_to_val", {})
    floats = {str(symbol) for symbol, value in known.items() if isinstance(value, sympy.Float)}
    floats = {name for name in floats if not TensorifyState.should_specialize(name)}
    read: dict[str, bool] = {}  # whether every reader takes it as a float
    for node in (node for graph in graphs for node in graph.nodes):
        found = node.meta.get("example_value")
        if not isinstance(found, (torch.SymFloat, torch.SymInt, torch.SymBool)):
            continue
        takes = all(user.target in _TAKE_FLOATS for user in node.users)
        for name in map(str, found.node._expr.free_symbols):  # ``expr`` is a number where a guard says which
            read[name] = takes and read.get(name, True)
    constants = {name for name in floats if read.get(name, True)}
    for name in constants:
        TensorifyState.specialize(name)
    if constants & read.keys():
        raise TensorifyScalarRestartAnalysis


def cache_counters() -> dict[str, int]:
    """Inductor's and AOTAutograd's cache counters of this process (hits, misses, bypasses)."""
    return {
        **{name: count for name, count in counters["inductor"].items() if "cache" in name},
        **{name: count for name, count in counters["aot_autograd"].items() if "cache" in name},
    }
