"""Runs the passes over a graph and its sub-graphs, and keeps what they did in a report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.body import Body, BodyConfig
from mst_fx.chunking import PassContext, Shared
from mst_fx.diagnose.facts import observe
from mst_fx.diagnose.warn import warn
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import copy_graph, copy_tree, drop_unused_subgraphs, eliminate_dead_code
from mst_fx.graph.fill import fill_values
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.subgraphs import function_graphs, is_function, is_graph, subgraphs
from mst_fx.graph.values import VALUE, tensors_of, value
from mst_fx.logits.put_back import Deferral, arguments_of, defer_outputs
from mst_fx.logits.take_out import defer_all
from mst_fx.options import Options, make_options
from mst_fx.passes import attention, mlp, vocab
from mst_fx.passes.buffers import keep_waves
from mst_fx.passes.canonical import join_casts, make_positional
from mst_fx.passes.embeddings import keep_embeddings_whole
from mst_fx.passes.mask_breaks import Crossing
from mst_fx.passes.scalars import numbers_to_tensors, tensors_to_numbers
from mst_fx.report import Refused, Report
from mst_fx.torch_api.autograd import without_saved_tensors_hooks
from mst_fx.torch_api.dynamo import ending_of, kept_until_reset
from mst_fx.torch_api.graphs import make_code
from mst_fx.torch_api.inductor import mode_patches

log = logging.getLogger("mst_fx")

Pass = Callable[[PassContext], None]

# Attention first, on the program with all its checkpointed layers: masks are made outside of them. The
# others run graph by graph. MLPs before the head, whose region may not take the last layer's MLP with it.
PASSES: tuple[tuple[str, Pass, str], ...] = (
    ("attention", attention.run, "program"),
    ("mlp", mlp.run, "graph"),
    ("vocab", vocab.run, "graph"),
)


@dataclasses.dataclass
class Result:
    """A rewritten graph.

    Attributes:
        gm: the rewritten graph, or the very graph that was given if no pass rewrote anything.
        report: what was done.
        deferrals: outputs of ``gm`` that its caller must get in another form.
        outputs: how many outputs the graph had.
        bodies: of the loops in ``gm``; whoever runs it must keep them (:func:`mst_fx.bodies.body.kept_alive`).
    """

    gm: fx.GraphModule
    report: Report
    deferrals: tuple[Deferral, ...] = ()
    outputs: int = 0
    bodies: tuple[Body, ...] = ()


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | Options | None = None
) -> tuple[fx.GraphModule, Report]:
    """The passes alone, on any FX graph.

    Args:
        gm: from ``torch.fx.symbolic_trace``, ``torch.export.export(...).module()`` or Dynamo; weights
            may be placeholders or attributes. It is not changed.
        example_inputs: what ``gm`` is called with, real or fake.
        options: as of ``torch.compile(..., backend="mst", options=...)``.

    Returns:
        The rewritten graph (``gm`` itself if nothing was rewritten) and the report. Where logits are
        deferred, the module returns :class:`~mst_fx.logits.tensor.DeferredLogits` in their place.

    Raises:
        OptionError: for bad options.
        Refusal: with ``strict=True``, for the first refusal.
    """
    result = run_passes(gm, example_inputs, make_options(options))
    make_code(result.gm)
    if result.bodies:  # and what is compiled from the module may outlive it
        result.gm.meta["mst_fx"] = result.bodies
        kept_until_reset().update({body.key: body for body in result.bodies})
    if result.deferrals:
        deferrals, outputs = result.deferrals, result.outputs

        def put_logits(module: Any, args: Any, results: Any) -> Any:
            return defer_outputs(results, arguments_of(deferrals, args), deferrals, outputs)

        result.gm.register_forward_hook(put_logits)
    return result.gm, result.report


@without_saved_tensors_hooks()  # nodes run on fakes, some of them with gradients
def run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None = None,
    crossing: Crossing | None = None,
) -> Result:
    """:func:`rewrite` for the backend: deferred outputs are left to the caller.

    Args:
        gm: the graph as captured.
        example_inputs: of the graph that is rewritten.
        crossing: what is rewritten instead, where masks come or go as vectors.
    """
    captured, gm = gm, crossing.gm if crossing is not None else gm
    start = time.perf_counter()
    report = Report(graphs=1)
    patches = {**mode_patches(mode), **options.inductor}
    config = BodyConfig(options.inner, options.accumulate, tuple(sorted(patches.items())))
    shared = Shared()
    try:
        prepared = _prepare(gm, example_inputs)
        runner = _Runner(options, config, report, shared, str(ending_of(gm)))
        new, _ = runner.run(prepared, "program", is_top=True)
        _for_all(new, numbers_to_tensors)
        new, deferred = runner.run_tree(new, is_top=True)
        deferrals, outputs = _finish(new, deferred) if report.rewrites else ((), 0)
    except Exception as error:
        if options.strict:
            raise
        report = Report(graphs=1, refusals=[Refused("graph", "", _defect("everything", error), Cause.DEFECT)])
    if not report.rewrites:
        new, deferrals, outputs = gm, (), 0
    report.rewrites[:0] = crossing.rewrites if crossing is not None else ()
    if report.rewrites:
        report.before.append(_text(captured))
        report.after.append(_text(new))
    else:
        report.before.append("")
        report.after.append("")
    report.seconds = time.perf_counter() - start
    _log(report)
    try:
        observe(captured, new, report)
        warn(captured, report)
    except Exception as error:
        if options.strict:
            raise
        _defect("the doctor's facts", error)
    bodies = tuple(shared.bodies.values()) if report.rewrites else ()
    return Result(new, report, deferrals, outputs, bodies)


def _for_all(gm: fx.GraphModule, change: Callable[[fx.Graph], None]) -> None:
    """Changes a graph and those that it refers to."""
    change(gm.graph)
    for _, child in subgraphs(gm):
        _for_all(child, change)
        eliminate_dead_code(child.graph)
        child.recompile()


def _finish(gm: fx.GraphModule, deferred: list[fx.Node]) -> tuple[tuple[Deferral, ...], int]:
    """Takes the logits out of a rewritten graph and makes it runnable."""
    outputs = len(gm.graph.output_node().args[0]) if deferred else 0  # type: ignore[arg-type]
    deferrals = defer_all(gm, deferred)
    _for_all(gm, tensors_to_numbers)
    keep_embeddings_whole(gm.graph)
    keep_waves(gm.graph)
    eliminate_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return deferrals, outputs


def _defect(what: str, error: Exception) -> str:
    """Logs a defect of ours, which must not stop a training run: the graph stays as it was."""
    text = f"{type(error).__name__}: {error}"
    log.warning("mst-fx skipped %s for a graph: %s", what, text)
    log.debug("the defect", exc_info=True)
    return text


def _prepare(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A copy of the graph whose nodes know their values and hide nothing in leaf modules."""
    new = copy_tree(gm)
    if any(n.op == "call_module" and not is_graph(gm, n) for n in new.graph.nodes):
        new = _inlined(new)
    nodes = [n for n in new.graph.nodes if n.op not in ("output", "get_attr")]
    if any(value(n) is None and not _returns_nothing(n) for n in nodes) and not _knows_values(new):
        fill_values(new, example_inputs)
    if any(n.op == "get_attr" and value(n) is None and not is_graph(new, n) for n in new.graph.nodes):
        fill_values(new, example_inputs)
    eliminate_dead_code(new.graph)  # a loss that nobody returns is not worth a loop
    join_casts(new.graph)
    for module in new.modules():
        if isinstance(module, fx.GraphModule):
            make_positional(module.graph)
    return new


def _knows_values(gm: fx.GraphModule) -> bool:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    known = [n for n in calls if VALUE in n.meta or "val" in n.meta]
    return all(VALUE in n.meta or "val" in n.meta for n in placeholders) and 2 * len(known) > len(calls)


def _returns_nothing(node: fx.Node) -> bool:
    return VALUE in node.meta


class _Inliner(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, fx.GraphModule)


def _inlined(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with leaf modules (``nn.Linear`` in symbolic traces) replaced by what they call."""
    make_code(gm)
    try:
        return fx.GraphModule(gm, _Inliner().trace(gm))
    except Exception as error:
        raise Refusal(f"a module of the graph cannot be traced: {error}") from error


@dataclasses.dataclass
class _Runner:
    """Runs passes and keeps what they did."""

    options: Options
    config: BodyConfig
    report: Report
    shared: Shared
    ending: str = ""

    def run_tree(self, gm: fx.GraphModule, is_top: bool) -> tuple[fx.GraphModule, list[fx.Node]]:
        """The passes over single graphs, on the graph and on those of its sub-graphs."""
        free = set(outside_transforms(gm.graph))
        inside = {operand.target for n in gm.graph.nodes if n not in free for operand in n.all_input_nodes}
        late = function_graphs(gm)  # a region may take a Function as a whole: what is left comes after
        for name, child in subgraphs(gm):
            if name in inside or name in late:  # all of a torch.func transform is inside of it
                continue
            self._run_child(gm, name, child)
        gm, deferred = self.run(gm, "graph", is_top)
        late = function_graphs(gm) - inside
        for name, child in list(subgraphs(gm)):
            if name in late:
                known = len(self.report.refusals)
                self._run_child(gm, name, child)
                self.report.refusals[known:] = _of_function(gm, name, self.report.refusals[known:])
        return gm, deferred

    def _run_child(self, gm: fx.GraphModule, name: str, child: fx.GraphModule) -> None:
        new_child, _ = self.run_tree(child, is_top=False)
        gm.set_submodule(name, new_child)

    def run(self, gm: fx.GraphModule, scope: str, is_top: bool) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Every pass of a scope; returns the graph and the logits to defer."""
        deferred: list[fx.Node] = []
        is_narrow = False
        for name, run, its_scope in PASSES:
            if name not in self.options.passes or its_scope != scope:
                continue
            copied = copy_tree(gm) if scope == "program" else copy_graph(gm)
            context = PassContext(copied, self.options, self.config, is_top, self.shared)
            context.ending, context.is_narrow = self.ending, is_narrow
            start = time.perf_counter()
            try:
                run(context)
                context.gm.graph.lint()
            except Refusal as refusal:
                if self.options.strict:
                    raise
                self.report.refusals.append(Refused(name, "", str(refusal), refusal.cause))
                continue
            except Exception as error:
                if self.options.strict:
                    raise
                self.report.refusals.append(
                    Refused(name, "", _defect(f"the {name} pass", error), Cause.DEFECT)
                )
                continue
            is_narrow = context.is_narrow
            seconds = time.perf_counter() - start
            log.debug("pass %s: %d rewrites, %.3f s", name, len(context.report.rewrites), seconds)
            context.report.rewrites.reverse()  # regions are found last first
            self.report.add(context.report)
            if context.report.rewrites:
                eliminate_dead_code(context.gm.graph)
                drop_unused_subgraphs(context.gm)
                context.gm.recompile()
                gm, deferred = context.gm, context.deferred or deferred
        return gm, deferred


def _of_function(gm: fx.GraphModule, name: str, found: list[Refused]) -> list[Refused]:
    """The refusals of a graph of a ``torch.autograd.Function``.

    What a Function gives goes on in the graph; why it is not taken as a whole was said there. Wide outputs of its
    forward graph that it does not give are those that it saves for its backward.
    """
    functions = [n for n in gm.graph.nodes if is_function(n)]
    forwards = [n for n in functions if str(n.args[0].target) == name]
    saves = any(_gives_less(node) for node in forwards)
    kept: list[Refused] = []
    for refused in found:
        if refused.cause is Cause.IS_OUTPUT and saves:
            reason = "the wide result is saved by a torch.autograd.Function for its own backward"
            kept.append(dataclasses.replace(refused, reason=reason, cause=Cause.OPAQUE))
        elif refused.cause is not Cause.IS_OUTPUT:
            kept.append(refused)
    return kept


def _gives_less(function: fx.Node) -> bool:
    """Whether nothing that a Function gives is wider than its rows, so that what is wide stays inside of it."""
    operands = [x for n in function.all_input_nodes for x in tensors_of(n)]
    most = max((hint(x.numel()) for x in operands if x.ndim and is_known(x.numel())), default=0)
    return all(is_known(x.numel()) and hint(x.numel()) <= most for x in tensors_of(function))


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _log(report: Report) -> None:
    log.info("%s (%.2f s)", report.summary(), report.seconds)
    for refused in report.refusals:
        log.info("refused %s %s: %s", refused.kind, refused.name, refused.reason)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", report, report.diff())
