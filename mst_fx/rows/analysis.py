"""The analysis of a graph: which nodes are row-wise, found by running them on folded fakes.

The batch folds into the rows: ``[B, S, H]`` becomes ``[1, n, H]``, ``[B*S, H]`` becomes ``[n, H]``
with ``n`` symbolic. A Dynamo node is understood by running it on such fakes under
:class:`~mst_fx.rows.tracer.RowTracer`. Ranks are kept, so positive ``dim`` arguments stay valid; the
sizes in views are taken from the fold of the result. Because ``n`` equals no other size, an operand
that does not have exactly the rows cannot slip through a broadcast.

The same :meth:`Folder.run_node` replays a region when its body is traced (:mod:`mst_fx.bodies.body`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import sympy
import torch
from torch import fx

from mst_fx.declared import DECLARED
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.formula import Formula
from mst_fx.graph.modes import Context, autocast_contexts, contexts
from mst_fx.graph.sizes import static_sizes
from mst_fx.graph.spelling import operation
from mst_fx.graph.subgraphs import function_text, is_function, subgraphs
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of, value
from mst_fx.graph.writes import mutated_storages
from mst_fx.rows.fold import Folder, fold_rank, read_operand, split_rows, type_name
from mst_fx.rows.function import prove
from mst_fx.rows.gradient_of_declared import prove_gradient
from mst_fx.rows.labels import SUMMED, Matmul, Row, is_same_size
from mst_fx.rows.tracer import RowTracer
from mst_fx.torch_api.fakes import quiet_fakes
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.symbols import expression
from mst_fx.torch_api.tensors import tree_leaves, tree_map_only

log = logging.getLogger("mst_fx")


Role = str  # how a node reads an operand: "row" (a chunk at a time) or "shared" (whole)


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a region takes from outside: a node, read a chunk at a time or whole."""

    node: fx.Node
    role: Role


@dataclasses.dataclass
class State:
    """What the analysis knows of a node.

    Attributes:
        rowwise: the node may be part of a region; otherwise ``reason`` and ``cause`` say why not.
        holds_rows: the node's value has the rows, so a region may take it as a row input.
        summed: the value is a sum over rows.
        constant: the value is computed from weights and constants alone.
        roles: how the node reads each tensor operand.
        matmuls: products of rows with shared matrices that the node runs.
        formula: of a node that applies a ``torch.autograd.Function``.
    """

    rowwise: bool = False
    holds_rows: bool = False
    summed: bool = False
    constant: bool = False
    reason: str = ""
    cause: Cause = Cause.UNPROVED
    roles: dict[fx.Node, Role] = dataclasses.field(default_factory=dict)
    matmuls: list[Matmul] = dataclasses.field(default_factory=list)
    formula: Formula | None = None


class RowAnalysis:
    """The states of all nodes of a graph for one number of rows.

    Args:
        gm: the graph; its nodes know their fake values.
        rows: the number of rows.
        known: results of nodes by content, shared between the graphs of one capture.

    Attributes:
        states: a :class:`State` a node.
        contexts: for each node the autocast regions and the grad mode it lies in.
    """

    def __init__(self, gm: fx.GraphModule, rows: Any, known: dict[Any, State] | None = None) -> None:
        self.gm, self.graph, self.rows = gm, gm.graph, rows
        self._avoid = static_sizes(gm.graph.nodes)
        self.states: dict[fx.Node, State] = {}
        self.contexts = contexts(gm.graph)
        self._mutated = mutated_storages(gm.graph)
        self._subgraphs = {name for name, _ in subgraphs(gm)}
        self._known = {} if known is None else known
        self._replaced: dict[fx.Node, fx.Node] = {}
        with torch.no_grad(), enable_python_dispatcher(), quiet_fakes():
            for node in gm.graph.nodes:
                self.states[node] = self._analyse_alone(node)

    @functools.cached_property
    def folder(self) -> Folder:
        """Made when a node must run: what is known of equal nodes needs none."""
        return Folder(self.rows, self._avoid)

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """Notes that a loop gives what a node gave, which those outside of its region read by now.

        Regions may read it as they read the old node, and none may hold it.
        """
        self.states[new] = dataclasses.replace(self.states[old], rowwise=False, reason="is a loop's")
        self._replaced[old] = new
        for user in new.users:
            if user in self.states and old in self.states[user].roles:
                state = self.states[user]
                roles = {self.current(operand): role for operand, role in state.roles.items()}
                self.states[user] = dataclasses.replace(state, roles=roles)

    def current(self, node: fx.Node) -> fx.Node:
        """What stands for a node now."""
        return self._replaced.get(node, node)

    def refused(self, node: fx.Node, reason: str, cause: Cause) -> None:
        """Notes that no region may hold a node."""
        self.states[node] = dataclasses.replace(self.states[node], rowwise=False, reason=reason, cause=cause)

    def added(self, node: fx.Node, context: Context) -> Context:
        """The modes of a node, which are ``context`` if it was added since the analysis."""
        return self.contexts.setdefault(node, context)

    def _analyse_alone(self, node: fx.Node) -> State:
        """:meth:`_analyse`; an exception of ours costs this node, which is then opaque, and not the graph."""
        try:
            return self._analyse(node)
        except Exception as error:
            log.debug("the analysis of %s failed", node.name, exc_info=True)
            return State(reason=f"could not be analysed: {error!r}", cause=Cause.DEFECT)

    def _analyse(self, node: fx.Node) -> State:
        if node.op in ("placeholder", "get_attr"):
            return self._source(node, "is an input of the graph", constant=is_weight(node))
        if node.op == "output" or not tensors_of(node):
            return State(reason="is not a tensor", constant=True)
        operands = [n for n in node.all_input_nodes if tensors_of(n)]
        if not any(self.states[n].holds_rows for n in operands):
            constant = all(self.states[n].constant for n in operands)
            return self._source(node, "does not depend on rows", constant=constant)
        try:
            self._check(node)
        except Refusal as refusal:
            return self._source(node, str(refusal), cause=refusal.cause)
        roles = {n: "row" if self.states[n].holds_rows else "shared" for n in operands}
        first: State | None = None
        for flip in self._flips(operands):
            state = self._run_known(node, {**roles, **flip})
            if state.rowwise:
                return state
            first = first or state
        assert first is not None
        return self._source(node, first.reason, cause=first.cause)

    def _flips(self, operands: list[fx.Node]) -> list[dict[fx.Node, Role]]:
        """Other readings of operands that could be rows or shared, in the order they are tried."""
        either = [n for n in operands if self.states[n].holds_rows and not self.states[n].rowwise]
        shared = [n for n in operands if not self.states[n].holds_rows and self._holds_rows(n)]
        return [{}, *({n: "row"} for n in shared), *({n: "shared"} for n in reversed(either))]

    def _check(self, node: fx.Node) -> None:
        """Refuses nodes that no operator rule sees as they are."""
        if node.op == "call_module":
            raise Refusal(f"module {node.target} is opaque", Cause.OPAQUE)
        calls = any(n.target in self._subgraphs for n in node.all_input_nodes if n.op == "get_attr")
        if calls and not is_function(node):
            raise Refusal(f"{node.target} calls a sub-graph", Cause.OPAQUE)
        for n in (node, *node.all_input_nodes):
            for fake in tensors_of(n):
                if not is_plain(fake):
                    raise Refusal(f"{n.name} is a {type_name(fake)}", Cause.NOT_PLAIN)
                if self.contexts[n].inference and not self.contexts[node].inference:
                    # Autograd saves no such tensor for a loop's backward pass.
                    raise Refusal(f"{n.name} is made in inference_mode", Cause.NOT_PLAIN)
                if storage_key(fake) in self._mutated:
                    raise Refusal(f"{n.name} is written to in place", Cause.WRITTEN)
        if operation(node) in ("multilabel_margin_loss", "multilabel_margin_loss_forward"):
            raise Refusal("gives other numbers once torch decomposes it (2.13), as any compiler does")
        if self.contexts[node].level:
            raise Refusal("lies inside of a torch.func transform", Cause.NOT_PLAIN)

    def _run_known(self, node: fx.Node, roles: dict[fx.Node, Role]) -> State:
        """:meth:`_run`, once for nodes of equal content."""

        def described(operand: fx.Node) -> Any:
            return _Description((roles.get(operand), _described(value(operand))))

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), described)
        key = repr((node.op, node.target, args, kwargs, _described(value(node)), self.contexts[node]))
        if is_function(node):
            key += "\n".join(function_text(node))
        if len(DECLARED):  # the gradient of one is proved where it is needed
            key += str(_get_gradients(roles))
        if key not in self._known:
            try:
                self._known[key] = self._run(node, roles)
            except Refusal as refusal:
                self._known[key] = State(reason=str(refusal), cause=refusal.cause)
            if not isinstance(expression(self.folder.n), sympy.Symbol):
                # The node fixed the number of rows: its result is void, and so is the stand-in.
                self._known[key] = State(reason="depends on the number of rows")
                del self.folder
        return dataclasses.replace(self._known[key], roles=roles)

    def _run(self, node: fx.Node, roles: dict[fx.Node, Role]) -> State:
        """Runs the node on folded fakes and checks that the result is the fold of its value."""
        formula = None
        if is_function(node):
            formula = prove(node, roles, Folder(self.rows, self._avoid), self.contexts[node])
        tracer = RowTracer(self.folder.n, takes_declared=True)
        operands = {operand: self._read(operand, role, tracer) for operand, role in roles.items()}
        read = functools.partial(read_operand, operands)
        for leaf in tree_leaves(list(operands.values())):
            if isinstance(leaf, torch.Tensor):
                tracer.protect(leaf)
        with self.folder.mode, autocast_contexts(self.contexts[node].autocast), tracer:
            try:
                folded = self.folder.run_node(node, read, formula)
            except Refusal:
                raise
            except Exception as error:
                log.debug("%s does not run on folded rows", node.name, exc_info=True)
                message = [*str(error).strip().splitlines(), repr(error)][0]
                raise Refusal(f"does not run on folded rows: {message}") from None
        summed = self._check_fold(node, folded, tracer)
        # What lies in a Function has no gradient of its own, but that of the Function, which is proved.
        for each in tracer.declared if self.contexts[node].grad and formula is None else ():
            prove_gradient(each, Folder(self.rows, self._avoid), *_get_gradients(roles))
        return State(
            rowwise=True, holds_rows=not summed, summed=summed, matmuls=tracer.matmuls, formula=formula
        )

    def _check_fold(self, node: fx.Node, folded: Any, tracer: RowTracer) -> bool:
        """Whether the result is a sum; refuses what is neither a sum nor the fold of the value."""
        fakes, results = tree_leaves(value(node)), tree_leaves(folded)
        if len(fakes) != len(results):
            raise Refusal("gives another structure on folded rows")
        summed = set()
        for fake, result in zip(fakes, results, strict=True):
            if not isinstance(fake, torch.Tensor):
                raise Refusal("gives something else than tensors")
            label = tracer.label(result)
            shape = fake.shape if label is SUMMED else self.folder.folded_shape(fake)
            if label is None or shape is None:
                raise Refusal(f"moves the rows out of the leading dimensions of {tuple(fake.shape)}")
            same = len(shape) == len(result.shape) and all(map(is_same_size, shape, result.shape))
            if not same or fake.dtype != result.dtype or fake.device != result.device:
                raise Refusal(f"gives {tuple(result.shape)} on folded rows, not {tuple(shape)}")
            if isinstance(label, Row) and label.dim != fold_rank(fake.shape, self.rows) - 1:
                raise Refusal("moves the rows")
            summed.add(label is SUMMED)
        if len(summed) != 1:
            raise Refusal("gives rows and sums at once")
        return summed.pop()

    def _source(
        self, node: fx.Node, reason: str, constant: bool = False, cause: Cause = Cause.UNPROVED
    ) -> State:
        """The state of a node no region contains; its value may still be a region's row input.

        A constant (a weight, a table of positions) that happens to have as many entries as there
        are rows is read whole, unless only reading its rows works.
        """
        holds_rows = not constant and self._holds_rows(node)
        return State(reason=reason, cause=cause, holds_rows=holds_rows, constant=constant)

    def _holds_rows(self, node: fx.Node) -> bool:
        fake = tensor_value(node)
        return fake is not None and is_plain(fake) and split_rows(fake.shape, self.rows) is not None

    def _read(self, operand: fx.Node, role: Role, tracer: RowTracer) -> Any:
        """A fake of an operand, folded and labelled if its rows are read."""
        if role == "shared":
            return tree_map_only(torch.Tensor, self.folder.shared, value(operand))

        def fold(fake: torch.Tensor) -> torch.Tensor:
            folded = self.folder.folded(fake)
            if folded is None:
                raise Refusal(f"{operand.name} has no rows in its leading dimensions")
            tracer.set_label(folded, Row(fold_rank(fake.shape, self.rows) - 1))
            return folded

        return tree_map_only(torch.Tensor, fold, value(operand))


def _get_gradients(roles: dict[fx.Node, Role]) -> tuple[bool, bool]:
    """Whether operands that are read by row get gradients, and whether shared ones do."""
    found = {role for operand, role in roles.items() if any(x.requires_grad for x in tensors_of(operand))}
    return "row" in found, "shared" in found


class _Description(tuple[Any, ...]):
    """Stands for an operand in the key of a node; a tuple that ``map_arg`` leaves alone."""


def _described(found: Any) -> Any:
    """Type, shape, stride and device of every tensor in a value."""
    return [
        (str(leaf.dtype), str(leaf.shape), str(leaf.stride()), str(leaf.device))
        if isinstance(leaf, torch.Tensor)
        else str(leaf)
        for leaf in tree_leaves(found)
    ]


def is_weight(node: fx.Node) -> bool:
    """Whether an input or attribute of a graph is a parameter, or an attribute of its module."""
    return node.op == "get_attr" or isinstance(value(node), torch.nn.Parameter)
