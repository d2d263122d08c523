"""Takes logits out of a rewritten graph: what their caller needs to compute them becomes outputs instead.

Before: ``loss = …; logits = linear(norm(h), head); return loss, logits``. After: ``return loss, h``, and a
:class:`~mst_fx.logits.put_back.TakenLogits` with the graph ``(h, norm_weight, head) -> logits``. Where the loop of the
loss computes the gradient of ``h``, the graph returns ``h`` detached and a port (:mod:`mst_fx.ops.port`).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.graph.modes import Context, contexts, outside_transforms
from mst_fx.graph.sizes import expression, hint, static_sizes
from mst_fx.graph.subgraphs import is_graph
from mst_fx.graph.values import VALUE, tensor_value, value
from mst_fx.logits.put_back import Origin, TakenLogits
from mst_fx.ops.port import new_port
from mst_fx.rows.analysis import RowAnalysis, State
from mst_fx.torch_api.fakes import fake_mode
from mst_fx.torch_api.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED
from mst_fx.torch_api.symbols import hint_of

_Known = dict[str, dict[Any, State]]
_Ports = dict[fx.Node, tuple[fx.Node, fx.Node]]  # rows: the same without their gradient, and its port


def take_out_logits(
    gm: fx.GraphModule, logits: Sequence[fx.Node], starts: Collection[fx.Node], known: _Known
) -> tuple[TakenLogits, ...]:
    """Takes all of some logits outputs out of a graph.

    Args:
        starts: matmuls at which logits start that no loss reads; what is before them stays in the graph.
        known: what is known of nodes by their content, for each number of rows.
    """
    ports: _Ports = {}
    return tuple(_take_out(gm, node, logits, starts, ports, known) for node in logits)


def _take_out(
    gm: fx.GraphModule,
    logits: fx.Node,
    taken: Sequence[fx.Node],
    starts: Collection[fx.Node],
    ports: _Ports,
    known: _Known,
) -> TakenLogits:
    """Takes a logits output out of the graph and describes how its caller computes it.

    The nodes that only the logits need become a graph of their own, under the modes they lay in. What they
    read becomes an output, unless it is an argument of the graph anyway; the first of it takes the logits'
    place, as DDPOptimizer's parts of a graph may have no None among their outputs.

    Args:
        taken: all logits that are taken out.
        ports: those of the graph, and of this call.
    """
    output = gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    position = results.index(logits)
    chain = _only_for(logits, taken, starts)
    nodes = [node for node in gm.graph.nodes if node in chain]
    logits_graph = _LogitsGraph(gm, logits, taken, ports, results, position)
    for operand in dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes):
        if operand not in chain:
            logits_graph.read(operand)
    context = contexts(gm.graph)
    for node in nodes:
        logits_graph.add(node, context[node])
    logits_graph.end()
    shape = [_size(results, position, size) for size in value(logits).shape]
    output.args = (tuple(results),)
    fake = tensor_value(logits)
    assert fake is not None
    compute = fx.GraphModule(gm, logits_graph.graph)
    holds = inputs_with_rows(compute, known)
    return TakenLogits(
        position, gm, compute, tuple(logits_graph.inputs), holds, tuple(shape), fake.dtype, fake.device
    )


class _LogitsGraph:
    """The graph of some logits, while it is made.

    Args:
        results: the outputs of ``gm``, to which what the logits read is added.
        position: of the logits among them.

    Attributes:
        inputs: where what the graph reads is found.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        logits: fx.Node,
        taken: Sequence[fx.Node],
        ports: _Ports,
        results: list[Any],
        position: int,
    ) -> None:
        self._gm, self._logits, self._taken, self._ports = gm, logits, taken, ports
        self._results, self._position = results, position
        self._arguments = gm.graph.find_nodes(op="placeholder")
        self._env: dict[fx.Node, fx.Node] = {}
        self.graph = fx.Graph()
        self._modes = _Modes(self.graph)
        self.inputs: list[Origin] = []

    def read(self, operand: fx.Node) -> None:
        """Adds an input for what stays in the program."""
        if operand.op == "get_attr" and is_graph(self._gm, operand):
            self._env[operand] = self.graph.node_copy(operand)
            return
        self._env[operand] = self.graph.placeholder(operand.name)
        self._env[operand].meta = dict(operand.meta)
        self.inputs.append(self._origin(operand))

    def _origin(self, operand: fx.Node) -> Origin:
        if operand.op == "get_attr":
            return Origin("attribute", str(operand.target))
        results, is_argument = self._results, operand.op == "placeholder"
        has_port = not is_argument and _has_port(self._gm, operand, self._ports)
        if results[self._position] is self._logits:
            results[self._position] = self._ports[operand][0] if has_port else operand
        if is_argument:
            return Origin("argument", self._arguments.index(operand))
        if has_port:
            detached, port = self._ports[operand]
            return Origin("output", _position(results, detached), _position(results, port))
        if operand in self._taken:  # its own place will be empty
            results.append(operand)
        return Origin("output", _position(results, operand))

    def add(self, node: fx.Node, context: Context) -> None:
        self._modes.enter(context)
        self._env[node] = self.graph.node_copy(node, self._env.__getitem__)

    def end(self) -> None:
        self._modes.enter(Context((), torch.is_grad_enabled()))
        self.graph.output(self._env[self._logits])


def _position(results: list[Any], node: fx.Node) -> int:
    """Where a node is among the results, at the end if it was not there before."""
    if node not in results:
        results.append(node)
    return max(index for index, found in enumerate(results) if found is node)


def _has_port(gm: fx.GraphModule, hidden: fx.Node, ports: _Ports) -> bool:
    """Gives a port to rows that a loop computes a gradient of; false if there is no such loop.

    Before: ``loop_with_grad([h, ...]); return h``. After: ``loop_with_grad([h, ...], port=0)``
    with one more output, and ``return h.detach(), port``.
    """
    if hidden in ports:
        return True
    op = torch.ops.mst_fx.loop_with_grad.default
    for loop in hidden.users:
        if loop.target is not op or list(loop.args[0]).count(hidden) != 1:  # type: ignore[arg-type]
            continue
        at = list(loop.args[0]).index(hidden)  # type: ignore[arg-type]
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
            detached = gm.graph.call_method("detach", (hidden,))
            detached.meta[VALUE] = value(hidden).detach()
        ports[hidden] = detached, port
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
                self._graph.call_function(EXIT_AUTOCAST, (node,))
            enter = ENTER_AUTOCAST
            self._entered = [self._graph.call_function(enter, args) for args in context.autocast]
        if context.grad != self._context.grad:
            self._graph.call_function(SET_GRAD_ENABLED, (context.grad,))
        self._context = context


def inputs_with_rows(compute: fx.GraphModule, known: _Known) -> tuple[bool, ...] | None:
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
        states = RowAnalysis(compute, rows, known.setdefault(str(rows), {})).states
    except Refusal:
        return None
    calls = _calls(compute.graph)
    if any(states[n].holds_rows and not states[n].rowwise for n in calls):
        return None
    read: dict[fx.Node, set[str]] = {node: set() for node in inputs}
    for node in calls:
        for operand, role in states[node].roles.items():
            read.setdefault(operand, set()).add(role)
    if (
        not states[logits].rowwise
        or not states[logits].holds_rows
        or not _are_read_by_rows(read, states, lead)
    ):
        return None
    holds = [read[node] == {"row"} for node in inputs]
    return tuple(holds) if _takes_any_rows(compute, holds, len(lead)) else None


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute a tensor."""
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    return [n for n in calls if tensor_value(n) is not None]


def _are_read_by_rows(read: dict[fx.Node, set[str]], states: dict[fx.Node, State], lead: list[Any]) -> bool:
    """Whether nothing is read by rows and as a whole, and what is read by rows holds them; a table with an entry a row
    does not."""
    if any(len(roles) > 1 for roles in read.values()):
        return False
    by_rows = [node for node, roles in read.items() if roles == {"row"}]
    return all(_holds_rows(n, lead) if n.op == "placeholder" else states[n].rowwise for n in by_rows)


def _holds_rows(node: fx.Node, lead: list[Any]) -> bool:
    """Whether the leading sizes of an input are those of the logits."""
    return [expression(size) for size in value(node).shape[: len(lead)]] == lead


def _takes_any_rows(compute: fx.GraphModule, holds: Sequence[bool], rank: int) -> bool:
    """Whether the graph of the logits runs on other numbers of rows than it was captured with."""
    inputs = [node for node in compute.graph.nodes if node.op == "placeholder"]
    known = static_sizes(compute.graph.nodes)
    primes = [size for size in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43) if size not in known]
    vocabulary = hint(value(compute.graph.output_node().args[0]).shape[-1])  # type: ignore[arg-type]
    for lead in ([*[1] * (rank - 1), primes[0]], primes[:rank]):
        mode = fake_mode(is_symbolic=False)

        def stand_in(node: fx.Node, is_row: bool, lead: list[int] = lead) -> Any:
            found = value(node)
            if isinstance(found, torch.Tensor):
                sizes = [hint(size) for size in found.shape]
                sizes = [*lead, *sizes[rank:]] if is_row else sizes
                return torch.empty(sizes, dtype=found.dtype, device=found.device)
            return hint_of(found) if isinstance(found, (torch.SymInt, torch.SymFloat)) else found

        try:
            with mode, torch.no_grad():
                args = [stand_in(node, is_row) for node, is_row in zip(inputs, holds, strict=True)]
                out = compute(*args)
        except Exception:
            return False
        if list(out.shape) != [*lead, vocabulary]:
            return False
    return True


def _only_for(logits: fx.Node, taken: Sequence[fx.Node], starts: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes whose values reach nothing but the logits, and outputs that are taken out like them, back to
    where the logits start."""
    chain = {logits}
    for node in reversed(outside_transforms(logits.graph)):
        users = {user for user in node.users if user.op != "output" or node not in taken}
        is_call = node.op in ("call_function", "call_method") and users
        if is_call and all(user in chain and user not in starts for user in users):
            chain.add(node)
    return chain


def _size(results: list[Any], position: int, size: Any) -> Any:
    """An int, or where among the outputs a dynamic size can be read."""
    if isinstance(size, int):
        return size
    # What took the logits' place first; others are searched from the end, where logits that are to be
    # taken out yet do not stand.
    for index in (position, *reversed(range(len(results)))):
        dim = _dim_of(results[index], size)
        if dim is not None:
            return ("output", index, dim)
    raise AssertionError(f"no output has the size {size}")


def _dim_of(node: Any, size: torch.SymInt) -> int | None:
    fake = tensor_value(node) if isinstance(node, fx.Node) else None
    for dim, other in enumerate(fake.shape if fake is not None else ()):
        if isinstance(other, torch.SymInt) and expression(other) == expression(size):
            return dim
    return None
