"""Runs the passes over a graph and its sub-graphs, and keeps what they did in a report."""

from __future__ import annotations

import dataclasses
import logging
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import mst_fx.loop  # noqa: F401  (registers the ops)
from mst_fx.body import BodyConfig
from mst_fx.chunking import PassContext, Shared
from mst_fx.compiler import mode_patches
from mst_fx.embedding import keep_embeddings_whole
from mst_fx.errors import Refusal
from mst_fx.fold import (
    Context,
    RowAnalysis,
    contexts,
    eliminate_dead_code,
    expression,
    static_sizes,
)
from mst_fx.graph import VALUE, attribute, copy_tree, fill_values, hint, subgraphs, tensor_value, value
from mst_fx.logits import Deferral, Origin, arguments_of, defer_outputs
from mst_fx.options import Options, make_options
from mst_fx.passes import attention, mlp, vocab
from mst_fx.port import new_port
from mst_fx.report import Refused, Report

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
    """

    gm: fx.GraphModule
    report: Report
    deferrals: tuple[Deferral, ...] = ()
    outputs: int = 0


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
        deferred, the module returns :class:`~mst_fx.logits.DeferredLogits` in their place.

    Raises:
        OptionError: for bad options.
        Refusal: with ``strict=True``, for the first refusal.
    """
    result = run_passes(gm, example_inputs, make_options(options))
    if result.deferrals:
        deferrals, outputs = result.deferrals, result.outputs

        def put_logits(module: Any, args: Any, results: Any) -> Any:
            return defer_outputs(results, arguments_of(deferrals, args), deferrals, outputs)

        result.gm.register_forward_hook(put_logits)
    return result.gm, result.report


def run_passes(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None = None
) -> Result:
    """:func:`rewrite` for the backend: deferred outputs are left to the caller."""
    start = time.perf_counter()
    report = Report(graphs=1)
    patches = {**mode_patches(mode), **options.inductor}
    config = BodyConfig(options.inner, options.accumulate, tuple(sorted(patches.items())))
    try:
        prepared = _prepare(gm, example_inputs)
        runner = _Runner(options, config, report, Shared())
        new, _ = runner.run(prepared, "program", is_top=True)
        new, deferred = runner.run_tree(new, is_top=True)
    except Exception as error:
        if options.strict:
            raise
        report = Report(graphs=1, refusals=[Refused("graph", "", _defect("everything", error))])
        new, deferred = gm, []
    deferrals: tuple[Deferral, ...] = ()
    outputs = 0
    if report.rewrites:
        outputs = len(new.graph.output_node().args[0]) if deferred else 0  # type: ignore[arg-type]
        ports: _Ports = {}
        deferrals = tuple(_defer(new, node, deferred, ports) for node in deferred)
        keep_embeddings_whole(new.graph)
        eliminate_dead_code(new.graph)
        new.graph.lint()
        new.recompile()
        report.before.append(_text(gm))
        report.after.append(_text(new))
    else:
        new = gm
        report.before.append("")
        report.after.append("")
    report.seconds = time.perf_counter() - start
    _log(report)
    return Result(new, report, deferrals, outputs)


def _defect(what: str, error: Exception) -> str:
    """Logs a defect of ours, which must not stop a training run: the graph stays as it was."""
    text = f"{type(error).__name__}: {error}"
    log.warning("mst-fx skipped %s for a graph: %s", what, text)
    log.debug("the defect", exc_info=True)
    return text


def _prepare(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A copy of the graph whose nodes know their values and hide nothing in leaf modules."""
    new = copy_tree(gm)
    eliminate_dead_code(new.graph)  # a loss that nobody returns is not worth a loop
    if any(n.op == "call_module" and not _is_graph(gm, n) for n in new.graph.nodes):
        new = _inlined(new)
    nodes = [n for n in new.graph.nodes if n.op not in ("output", "get_attr")]
    if any(value(n) is None and not _returns_nothing(n) for n in nodes) and not _knows_values(new):
        fill_values(new, example_inputs)
    if any(n.op == "get_attr" and value(n) is None and not _is_graph(new, n) for n in new.graph.nodes):
        fill_values(new, example_inputs)
    return new


def _knows_values(gm: fx.GraphModule) -> bool:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    known = [n for n in calls if VALUE in n.meta or "val" in n.meta]
    return all(VALUE in n.meta or "val" in n.meta for n in placeholders) and 2 * len(known) > len(calls)


def _returns_nothing(node: fx.Node) -> bool:
    return VALUE in node.meta


def _is_graph(gm: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(attribute(gm, str(node.target)), fx.GraphModule)


class _Inliner(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, fx.GraphModule)


def _inlined(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with leaf modules (``nn.Linear`` in symbolic traces) replaced by what they call."""
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

    def run_tree(self, gm: fx.GraphModule, is_top: bool) -> tuple[fx.GraphModule, list[fx.Node]]:
        """The passes over single graphs, on the graph and on those of its sub-graphs."""
        for name, child in subgraphs(gm):
            new_child, _ = self.run_tree(child, is_top=False)
            gm.set_submodule(name, new_child)
        return self.run(gm, "graph", is_top)

    def run(self, gm: fx.GraphModule, scope: str, is_top: bool) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Every pass of a scope; returns the graph and the logits to defer."""
        deferred: list[fx.Node] = []
        for name, run, its_scope in PASSES:
            if name not in self.options.passes or its_scope != scope:
                continue
            context = PassContext(copy_tree(gm), self.options, self.config, is_top, self.shared)
            start = time.perf_counter()
            try:
                run(context)
                context.gm.graph.lint()
            except Refusal as refusal:
                if self.options.strict:
                    raise
                self.report.refusals.append(Refused(name, "", str(refusal)))
                continue
            except Exception as error:
                if self.options.strict:
                    raise
                self.report.refusals.append(Refused(name, "", _defect(f"the {name} pass", error)))
                continue
            seconds = time.perf_counter() - start
            log.debug("pass %s: %d rewrites, %.3f s", name, len(context.report.rewrites), seconds)
            context.report.rewrites.reverse()  # regions are found last first
            self.report.add(context.report)
            if context.report.rewrites:
                eliminate_dead_code(context.gm.graph)
                context.gm.recompile()
                gm, deferred = context.gm, context.deferred or deferred
        return gm, deferred


_Ports = dict[fx.Node, tuple[fx.Node, fx.Node]]  # rows: the same without their gradient, and its port


def _defer(gm: fx.GraphModule, logits: fx.Node, deferred: Sequence[fx.Node], ports: _Ports) -> Deferral:
    """Takes a logits output out of the graph and describes how its caller computes it.

    The nodes that only the logits need become a graph of their own; what they read becomes an output,
    unless it is an argument of the graph anyway.

    Args:
        deferred: all logits that are taken out.
        ports: those of the graph, and of this call.
    """
    output = gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    position = results.index(logits)
    chain = _only_for(logits, deferred)
    arguments = [node for node in gm.graph.nodes if node.op == "placeholder"]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs: list[Origin] = []
    for node in (n for n in gm.graph.nodes if n in chain):
        for operand in node.all_input_nodes:
            if operand in env or operand in chain:
                continue
            if operand.op == "get_attr" and _is_graph(gm, operand):
                env[operand] = graph.node_copy(operand)
                continue
            env[operand] = graph.placeholder(operand.name)
            env[operand].meta = dict(operand.meta)
            if operand.op == "get_attr":
                inputs.append(Origin("attribute", str(operand.target)))
            elif operand.op == "placeholder":
                inputs.append(Origin("argument", arguments.index(operand)))
            elif _has_port(gm, operand, ports):
                rows, port = (_position(results, node) for node in ports[operand])
                inputs.append(Origin("output", rows, port))
            else:
                if operand in deferred:  # its own place will be empty
                    results.append(operand)
                inputs.append(Origin("output", _position(results, operand)))
    modes = _Modes(graph)
    context = contexts(gm.graph)
    for node in (n for n in gm.graph.nodes if n in chain):
        modes.enter(context[node])
        env[node] = graph.node_copy(node, env.__getitem__)
    modes.enter(Context((), torch.is_grad_enabled()))
    graph.output(env[logits])
    results[position] = None
    shape = [_size(results, size) for size in value(logits).shape]
    output.args = (tuple(results),)
    fake = tensor_value(logits)
    assert fake is not None
    compute = fx.GraphModule(gm, graph)
    return Deferral(
        position, gm, compute, tuple(inputs), row_inputs(compute), tuple(shape), fake.dtype, fake.device
    )


def _position(results: list[Any], node: fx.Node) -> int:
    """Where a node is among the results, at the end if it was not there before."""
    if node not in results:
        results.append(node)
    return max(index for index, found in enumerate(results) if found is node)


def _has_port(gm: fx.GraphModule, rows: fx.Node, ports: _Ports) -> bool:
    """Gives a port to rows that a loop computes a gradient of; false if there is no such loop.

    Before: ``loop_with_grad([rows, ...]); return rows``. After: ``loop_with_grad([rows, ...], port=0)``
    with one more output, and ``return rows.detach(), port``.
    """
    if rows in ports:
        return True
    op = torch.ops.mst_fx.loop_with_grad.default
    for loop in rows.users:
        if loop.target is not op or list(loop.args[0]).count(rows) != 1:  # type: ignore[arg-type]
            continue
        at = list(loop.args[0]).index(rows)  # type: ignore[arg-type]
        *others, port_of = loop.args
        if port_of != -1 or not loop.args[2][at]:  # type: ignore[index]
            continue
        loop.args = (*others, at)
        fakes = [*value(loop), new_port()]
        loop.meta[VALUE] = fakes
        with gm.graph.inserting_after(loop):
            port = gm.graph.call_function(operator.getitem, (loop, len(fakes) - 1))
            port.meta[VALUE] = fakes[-1]
        with gm.graph.inserting_after(port):
            detached = gm.graph.call_method("detach", (rows,))
            detached.meta[VALUE] = value(rows).detach()
        ports[rows] = detached, port
        return True
    return False


class _Modes:
    """Writes the changes of autocast and grad mode into a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph, self._context = graph, Context((), torch.is_grad_enabled())
        self._entered: list[fx.Node] = []

    def enter(self, context: Context) -> None:
        if context.autocast != self._context.autocast:
            for node in reversed(self._entered):
                self._graph.call_function(torch.amp.autocast_mode._exit_autocast, (node,))
            enter = torch.amp.autocast_mode._enter_autocast
            self._entered = [self._graph.call_function(enter, args) for args in context.autocast]
        if context.grad != self._context.grad:
            self._graph.call_function(torch._C._set_grad_enabled, (context.grad,))
        self._context = context


def row_inputs(compute: fx.GraphModule) -> tuple[bool, ...] | None:
    """For each input of the logits' graph whether it holds their rows; None where rows are not independent.

    The proof that each row of the logits depends on one row of each row input is the analysis', on
    folded rows; that the graph has no size of the batch or sequence in it is tried on other sizes.
    """
    logits = compute.graph.output_node().args[0]
    assert isinstance(logits, fx.Node)
    shape = value(logits).shape
    lead, rows = [expression(size) for size in shape[:-1]], 1
    for size in shape[:-1]:
        rows = rows * size
    inputs = [node for node in compute.graph.nodes if node.op == "placeholder"]
    try:
        states = RowAnalysis(compute, rows).states
    except Refusal:
        return None
    read: dict[fx.Node, set[str]] = {node: set() for node in inputs}
    for node in compute.graph.nodes:
        state = states[node]
        if node.op in ("placeholder", "get_attr", "output") or tensor_value(node) is None:
            continue
        for operand, role in state.roles.items():
            read.setdefault(operand, set()).add(role)
    holds = [read[node] == {"row"} for node in inputs]
    if not states[logits].rowwise or not states[logits].rows or any(len(r) > 1 for r in read.values()):
        return None
    for node, roles in read.items():
        is_row = roles == {"row"}
        if is_row and node.op != "placeholder" and not states[node].rowwise:
            return None  # a table with an entry a row
        if is_row and node.op == "placeholder":
            leading = [expression(size) for size in value(node).shape[: len(lead)]]
            if leading != lead:
                return None
    return tuple(holds) if _takes_any_rows(compute, holds, len(lead)) else None


def _takes_any_rows(compute: fx.GraphModule, holds: Sequence[bool], rank: int) -> bool:
    """Whether the graph of the logits runs on other numbers of rows than it was captured with."""
    inputs = [node for node in compute.graph.nodes if node.op == "placeholder"]
    known = static_sizes(compute.graph.nodes)
    primes = [size for size in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43) if size not in known]
    vocabulary = hint(value(compute.graph.output_node().args[0]).shape[-1])  # type: ignore[arg-type]
    for lead in ([*[1] * (rank - 1), primes[0]], primes[:rank]):
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def stand_in(node: fx.Node, is_row: bool, lead: list[int] = lead) -> Any:
            found = value(node)
            if isinstance(found, torch.Tensor):
                sizes = [hint(size) for size in found.shape]
                sizes = [*lead, *sizes[rank:]] if is_row else sizes
                return torch.empty(sizes, dtype=found.dtype, device=found.device)
            return found.node.hint if isinstance(found, (torch.SymInt, torch.SymFloat)) else found

        try:
            with mode, torch.no_grad():
                args = [stand_in(node, is_row) for node, is_row in zip(inputs, holds, strict=True)]
                out = compute(*args)
        except Exception:
            return False
        if list(out.shape) != [*lead, vocabulary]:
            return False
    return True


def _only_for(logits: fx.Node, deferred: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes whose values reach nothing but the logits, and outputs that are taken out like them."""
    chain = {logits}
    for node in reversed(list(logits.graph.nodes)):
        users = {user for user in node.users if user.op != "output" or node not in deferred}
        if node.op in ("call_function", "call_method") and users and users <= chain:
            chain.add(node)
    return chain


def _size(results: list[Any], size: Any) -> Any:
    """An int, or where among the outputs a dynamic size can be read."""
    if isinstance(size, int):
        return size
    # From the end, where hidden rows were appended: other logits may be taken out yet.
    for index, node in reversed(list(enumerate(results))):
        fake = tensor_value(node) if isinstance(node, fx.Node) else None
        for dim, other in enumerate(fake.shape if fake is not None else ()):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return ("output", index, dim)
    raise AssertionError(f"no output has the size {size}")


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _log(report: Report) -> None:
    log.info("%s (%.2f s)", report.summary(), report.seconds)
    for refused in report.refusals:
        log.info("refused %s %s: %s", refused.kind, refused.name, refused.reason)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", report, report.diff())
