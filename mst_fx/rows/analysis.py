"""The analysis of a graph: which nodes are row-wise, found by running them on folded fakes.

The batch folds into the rows: ``[B, S, H]`` becomes ``[1, n, H]``, ``[B*S, H]`` becomes ``[n, H]``
with ``n`` symbolic. A Dynamo node is understood by running it on such fakes under
:class:`~mst_fx.rows.rules.RowTracer`. Ranks are kept, so positive ``dim`` arguments stay valid; the
sizes in views are taken from the fold of the result. Because ``n`` equals no other size, an operand
that does not have exactly the rows cannot slip through a broadcast.

The same :meth:`Folder.run_node` replays a region when its body is traced (:mod:`mst_fx.bodies.body`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import logging
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.effects import has_effects, inference_change, level_change
from mst_fx.graph.formula import Formula
from mst_fx.graph.values import (
    call,
    function_text,
    hint,
    is_function,
    is_known,
    is_plain,
    row_bytes,
    storage_key,
    storage_keys,
    subgraphs,
    tensor_value,
    tensors_of,
    value,
)
from mst_fx.rows.rules import SUMMED, Matmul, Row, RowTracer, is_same_size
from mst_fx.torch_api.fakes import fake_mode, quiet_fakes, symbolic_size
from mst_fx.torch_api.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED, enable_python_dispatcher
from mst_fx.torch_api.ops import OpOverload, OpOverloadPacket, schema
from mst_fx.torch_api.symbols import expression as expression
from mst_fx.torch_api.symbols import guards_of, unguarded
from mst_fx.torch_api.tensors import tree_leaves, tree_map_only

aten = torch.ops.aten
log = logging.getLogger("mst_fx")

# Stands for the number of rows while tracing: a prime that no size of the region equals.
_ROW_HINTS = (2053, 2063, 2069, 2081, 2083, 2087, 2089, 2099)

_RESHAPES = {
    "view",
    "reshape",
    "view_as",
    "reshape_as",
    "unflatten",
    torch.reshape,
    torch.unflatten,
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.Tensor.unflatten,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
}
_EXPANDS = {"expand", "expand_as", torch.Tensor.expand, aten.expand.default}
_DROPOUTS = {F.dropout: 0.5, torch.dropout: None, aten.dropout.default: None}

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
        rows: the node's value holds the rows, so a region may take it as a row input.
        summed: the value is a sum over rows.
        constant: the value is computed from weights and constants alone.
        roles: how the node reads each tensor operand.
        matmuls: products of rows with shared matrices that the node runs.
        formula: of a node that applies a ``torch.autograd.Function``.
    """

    rowwise: bool = False
    rows: bool = False
    summed: bool = False
    constant: bool = False
    reason: str = ""
    cause: Cause = Cause.UNPROVED
    roles: dict[fx.Node, Role] = dataclasses.field(default_factory=dict)
    matmuls: list[Matmul] = dataclasses.field(default_factory=list)
    formula: Formula | None = None


def fold_rank(shape: Sequence[Any], rows: Any) -> int:
    """How many leading dimensions hold the rows; 0 if they do not."""
    product, wanted = sympy.Integer(1), expression(rows)
    for rank, size in enumerate(shape, start=1):
        product = product * expression(size)
        if product == wanted or (not product.is_number and sympy.expand(product - wanted) == 0):
            return rank
        if isinstance(rows, torch.SymInt) and not product.is_number and _are_guarded_equal(rows, product):
            return rank
    return 0


def _are_guarded_equal(rows: torch.SymInt, product: Any) -> bool:
    """Whether a guard says that two numbers of rows are one, as a loss says of its logits and labels.

    If batch and length both change, each input has symbols of its own, and only products are known to be equal.
    """
    wanted = expression(rows)
    if wanted.is_number or product.free_symbols & wanted.free_symbols:
        return False
    pair = {product, wanted}
    return any(isinstance(guard, sympy.Eq) and set(guard.args) == pair for guard in guards_of(rows))


def settled(sizes: Iterable[Any]) -> tuple[Any, ...]:
    """Sizes, with ints for symbols that Dynamo has found to be one number since it made them (an input's width)."""
    return tuple(int(expr) if (expr := expression(size)).is_number else size for size in sizes)


class RowGuards:
    """What a shape environment has assumed of a symbolic number of rows so far."""

    def __init__(self, n: Any) -> None:
        self._symbol = unguarded(n)
        self._guards = guards_of(n)

    def failed(self, rows: int) -> list[Any]:
        """The guards that do not hold for a number of rows."""
        return [guard for guard in self._guards if guard.subs(self._symbol, rows) is sympy.false]


_SAMPLE_ROWS = (2, 3, 64, 1_000_003)


def check_guards(folder: Folder) -> None:
    """Refuses what was traced under an assumption about its number of rows."""
    if not isinstance(expression(folder.n), sympy.Symbol):
        raise Refusal("depends on the number of rows")
    guards = RowGuards(folder.n)
    for failed in (guard for rows in _SAMPLE_ROWS for guard in guards.failed(rows)):
        raise Refusal(f"depends on the number of rows ({failed})")


class Folder:
    """Runs nodes on folded fakes in a private fake mode.

    Args:
        rows: the number of rows of the graph's tensors, an int or Dynamo's symbolic integer.
        avoid: sizes that the stand-in for the number of rows must not equal.
        hint: the least that the stand-in shall be.
    """

    def __init__(self, rows: Any, avoid: set[int] | None = None, hint: int | None = None) -> None:
        self.rows = rows
        self.mode = fake_mode(is_symbolic=True)
        candidates = _ROW_HINTS if hint is None else filter(sympy.isprime, itertools.count(hint))
        stand_in = next(size for size in candidates if size not in (avoid or ()))
        self.n = symbolic_size(self.mode, stand_in)

    def folded_shape(self, tensor: torch.Tensor, n: Any = None) -> tuple[Any, ...] | None:
        """``[B, S, H]`` → ``(1, n, H)``; None when the leading dimensions do not hold the rows."""
        rank = fold_rank(tensor.shape, self.rows)
        rest = settled(tensor.shape[rank:])
        if not rank or any(isinstance(size, torch.SymInt) for size in rest):
            return None
        return (*[1] * (rank - 1), self.n if n is None else n, *rest)

    def folded(self, tensor: torch.Tensor) -> torch.Tensor | None:
        shape = self.folded_shape(tensor)
        if shape is None or not is_plain(tensor):
            return None
        with self.mode:
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """A private fake of an operand that all rows share.

        Raises:
            Refusal: for dynamic sizes and for tensor subclasses.
        """
        shape, stride = settled(tensor.shape), settled(tensor.stride())
        if any(isinstance(size, torch.SymInt) for size in (*shape, *stride)):
            raise Refusal(f"a shared operand has the dynamic shape {shape}")
        if not is_plain(tensor):
            raise Refusal(f"an operand is a {_type_name(tensor)}")
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)

    def run_node(
        self, node: fx.Node, read: Callable[[fx.Node], Any], formula: Formula | None = None, n: Any = None
    ) -> Any:
        """Runs ``node`` on folded operands; sizes in views follow from the node's own value.

        Args:
            formula: runs in place of a ``torch.autograd.Function``.
            n: the number of rows where that is not this folder's.
        """

        def arg(operand: fx.Node) -> Any:
            found = value(operand)
            if isinstance(found, (torch.SymFloat, torch.SymBool)):
                # Adds a guard to Dynamo's shape environment: another value compiles anew.
                return float(found) if isinstance(found, torch.SymFloat) else bool(found)
            return read(operand)

        if formula is not None:
            operands = [each for each in node.args if isinstance(each, fx.Node) and tensors_of(each)]
            return formula.apply(self.n if n is None else n, [arg(operand) for operand in operands])
        out = tensor_value(node)
        if out is not None and node.target in _RESHAPES | _EXPANDS and not _is_dtype_view(node):
            shape = self.folded_shape(out)
            if shape is not None:
                source = arg(node.args[0])  # type: ignore[arg-type]
                return source.expand(shape) if node.target in _EXPANDS else torch.reshape(source, shape)
        if is_identity_dropout(node):
            return arg(node.args[0])  # type: ignore[arg-type]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), arg)
        return call(node.op, node.target, args, kwargs)


def _type_name(tensor: torch.Tensor) -> str:
    kind = type(tensor).__name__
    if type(tensor) is torch.Tensor and storage_key(tensor) is None:
        return "tensor inside of a torch.func transform"
    return kind if kind != "FakeTensor" else f"{tensor.layout} tensor"


def _is_dtype_view(node: fx.Node) -> bool:
    return len(node.args) > 1 and isinstance(node.args[1], torch.dtype)


def dropout_probability(node: fx.Node) -> float | None:
    """The probability with which a dropout drops, 0 when not training; None for other nodes."""
    if node.target not in _DROPOUTS:
        return None
    default = _DROPOUTS[node.target]
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", default)
    training = (
        node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    )
    if training is False:
        return 0.0
    return float(p) if isinstance(p, (int, float)) and training is True else None


def is_identity_dropout(node: fx.Node) -> bool:
    """Whether a dropout is the identity: probability 0, or not training."""
    return dropout_probability(node) == 0


@contextlib.contextmanager
def autocast_contexts(contexts: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """The autocast regions (``_enter_autocast`` nodes' arguments) a node lies in."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in contexts:
            stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        yield


@contextlib.contextmanager
def in_context(context: Context) -> Iterator[None]:
    """The modes of a node, for values that are made in its place."""
    with autocast_contexts(context.autocast), torch.set_grad_enabled(context.grad):
        yield


def static_sizes(nodes: Iterable[fx.Node]) -> set[int]:
    """All sizes of the tensors of some nodes, but for symbolic ones."""
    return {size for n in nodes for t in tensors_of(n) for size in settled(t.shape) if isinstance(size, int)}


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
        self.folder = Folder(rows, self._avoid)
        self.states: dict[fx.Node, State] = {}
        self.contexts = contexts(gm.graph)
        self._mutated = mutated_storages(gm.graph)
        self._subgraphs = {name for name, _ in subgraphs(gm)}
        self._known = {} if known is None else known
        with torch.no_grad(), enable_python_dispatcher(), quiet_fakes():
            for node in gm.graph.nodes:
                self.states[node] = self._analyse_alone(node)

    def _analyse_alone(self, node: fx.Node) -> State:
        """:meth:`_analyse`; an exception of ours costs this node, which is then opaque, and not the graph."""
        try:
            return self._analyse(node)
        except Exception as error:
            log.debug("the analysis of %s failed", node.name, exc_info=True)
            return State(reason=f"could not be analysed: {error!r}", cause=Cause.DEFECT)

    def _analyse(self, node: fx.Node) -> State:
        if node.op in ("placeholder", "get_attr"):
            return self._source(node, "is an input of the graph", constant=_is_weight(node))
        if node.op == "output" or not tensors_of(node):
            return State(reason="is not a tensor", constant=True)
        operands = [n for n in node.all_input_nodes if tensors_of(n)]
        if not any(self.states[n].rows for n in operands):
            constant = all(self.states[n].constant for n in operands)
            return self._source(node, "does not depend on rows", constant=constant)
        try:
            self._check(node)
        except Refusal as refusal:
            return self._source(node, str(refusal), cause=refusal.cause)
        roles = {n: "row" if self.states[n].rows else "shared" for n in operands}
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
        either = [n for n in operands if self.states[n].rows and not self.states[n].rowwise]
        shared = [n for n in operands if not self.states[n].rows and self._has_rows(n)]
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
                    raise Refusal(f"{n.name} is a {_type_name(fake)}", Cause.NOT_PLAIN)
                if self.contexts[n].inference and not self.contexts[node].inference:
                    # Autograd saves no such tensor for a loop's backward pass.
                    raise Refusal(f"{n.name} is made in inference_mode", Cause.NOT_PLAIN)
                if storage_key(fake) in self._mutated:
                    raise Refusal(f"{n.name} is written to in place", Cause.WRITTEN)
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
        if key not in self._known:
            try:
                self._known[key] = self._run(node, roles)
            except Refusal as refusal:
                self._known[key] = State(reason=str(refusal), cause=refusal.cause)
            if not isinstance(expression(self.folder.n), sympy.Symbol):
                # The node fixed the number of rows: its result is void, and so is the stand-in.
                self._known[key] = State(reason="depends on the number of rows")
                self.folder = Folder(self.rows, self._avoid)
        return dataclasses.replace(self._known[key], roles=roles)

    def _run(self, node: fx.Node, roles: dict[fx.Node, Role]) -> State:
        """Runs the node on folded fakes and checks that the result is the fold of its value."""
        formula = None
        if is_function(node):
            from mst_fx.rows.function import (
                prove,  # imports this module, whose Folder runs the Function's nodes
            )

            formula = prove(node, roles, Folder(self.rows, self._avoid), self.contexts[node])
        tracer = RowTracer(self.folder.n)
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
                message = [*str(error).strip().splitlines(), repr(error)][0]
                raise Refusal(f"does not run on folded rows: {message}") from None
        summed = self._check_fold(node, folded, tracer)
        return State(rowwise=True, rows=not summed, summed=summed, matmuls=tracer.matmuls, formula=formula)

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
        rows = not constant and self._has_rows(node)
        return State(reason=reason, cause=cause, rows=rows, constant=constant)

    def _has_rows(self, node: fx.Node) -> bool:
        fake = tensor_value(node)
        return fake is not None and is_plain(fake) and self.folder.folded_shape(fake) is not None

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


def read_operand(operands: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    """The value of an operand of a node that runs on folded fakes.

    Raises:
        Refusal: if it is an integer that Dynamo keeps dynamic (row counts in views are not read).
    """
    if node in operands:
        return operands[node]
    if isinstance(value(node), torch.SymInt):
        raise Refusal(f"{node.name} is a dynamic integer")
    return value(node)


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


@dataclasses.dataclass(frozen=True)
class Context:
    """The modes a node of a Dynamo graph runs in, beside the ambient ones."""

    autocast: tuple[tuple[Any, ...], ...]
    grad: bool
    level: int = 0  # of torch.func transforms (vmap, grad, jvp): no region may begin, end or be put there
    inference: bool = False  # in inference_mode, where there is no grad either


def contexts(graph: fx.Graph) -> dict[fx.Node, Context]:
    """The modes of every node; the graph starts in the ambient ones."""
    current = Context((), torch.is_grad_enabled())
    outer: list[Context] = []  # of regions of inference_mode
    contexts = {}
    for node in graph.nodes:
        if node.target is ENTER_AUTOCAST:
            current = dataclasses.replace(current, autocast=(*current.autocast, tuple(node.args)))
        elif node.target is EXIT_AUTOCAST:
            current = dataclasses.replace(current, autocast=current.autocast[:-1])
        elif node.target is SET_GRAD_ENABLED:
            current = dataclasses.replace(current, grad=bool(node.args[0]))
        elif change := level_change(node):
            current = dataclasses.replace(current, level=max(0, current.level + change))
        elif (change := inference_change(node)) > 0:
            outer.append(current)
            current = dataclasses.replace(current, grad=False, inference=True)
        elif change < 0 and outer:
            current = outer.pop()
        contexts[node] = current
    return contexts


def outside_transforms(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in no ``torch.func`` transform: all that a pass may touch."""
    return [node for node, context in contexts(graph).items() if not context.level]


_INPLACE_NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"),
    "setitem",
)
_INPLACE_OPERATORS = {getattr(operator, name) for name in _INPLACE_NAMES}
_INPLACE_METHODS = {f"__{name}__" for name in _INPLACE_NAMES}


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node may write to one of its arguments."""
    if isinstance(node.target, OpOverload):
        return bool(schema(node.target).is_mutable)
    if isinstance(node.target, OpOverloadPacket):
        return bool(_written_by_schema(node))
    if node.target in _INPLACE_OPERATORS | _INPLACE_METHODS or node.kwargs.get("out") is not None:
        return True
    place = _inplace_place(node.target)
    if node.kwargs.get("inplace") or any(node.args[place : place + 1]):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_, not_ write to nothing
        return False
    return node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")


@functools.cache
def _inplace_place(target: Any) -> int:
    """Where ``inplace`` stands among the arguments of a function such as ``F.relu``; beyond them if nowhere."""
    if not isinstance(target, types.FunctionType):
        return sys.maxsize - 1
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else sys.maxsize - 1


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Removes nodes without readers: not those that write to an argument or have effects, and none inside
    of a ``torch.func`` transform, where a value is marked by passing through functions.

    ``fx.Graph.eliminate_dead_code`` takes a test of impurity, but goes on into sub-graphs (bodies of
    activation checkpoints) without it, and there removes ``scatter_`` and ``x[i] = y``.
    """
    for node in reversed(outside_transforms(graph)):
        if not node.users and not has_effects(node) and not writes_in_place(node):
            graph.erase_node(node)


def mutated_storages(graph: fx.Graph) -> set[int]:
    """The storages that some node writes to; what reads them depends on when it runs."""
    storages = set()
    for node in graph.nodes:
        if not writes_in_place(node):
            continue
        for operand in _written(node):
            storages |= storage_keys(operand)
            if not all(map(is_plain, tensors_of(operand))):
                storages |= _storages_behind(operand)
    return storages


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node in place may write to."""
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return _written_by_schema(node)
    if node.kwargs.get("out") is not None:
        return node.all_input_nodes
    first = [leaf for leaf in tree_leaves(node.args[:1]) if isinstance(leaf, fx.Node)]
    return first or node.all_input_nodes[:1]


def _written_by_schema(node: fx.Node) -> list[fx.Node]:
    """The operands of an operator, or of a packet of overloads, that a schema says it writes to."""
    target: Any = node.target
    is_packet = isinstance(target, OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if is_packet else [target]
    found: list[fx.Node] = []
    for overload in overloads:
        for index, argument in enumerate(schema(overload).arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                is_positional = index < len(node.args) and not argument.kwarg_only
                given = node.args[index] if is_positional else node.kwargs.get(argument.name)
                found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, fx.Node)]
    return found


def _storages_behind(node: fx.Node) -> set[int]:
    """The storages of the plain tensors that a value that is none was made from, or that were made from it."""
    found, seen, waiting = set(), {node}, [node]
    while waiting:
        current = waiting.pop()
        for other in (*current.all_input_nodes, *current.users):
            if other in seen or other.op == "output":
                continue
            seen.add(other)
            if all(map(is_plain, tensors_of(other))):
                found |= storage_keys(other)
            else:
                waiting.append(other)
    return found


def _is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(value(node), torch.nn.Parameter)


def row_counts(graph: fx.Graph) -> list[Any]:
    """The numbers of rows in a graph: those of the tensors that meet a weight matrix."""
    counts: list[Any] = []
    for node in graph.nodes:
        count = _rows_at_matrix(node)
        if count is None or not is_known(count):
            continue
        if hint(count) > 1 and not any(fold_rank([count], known) for known in counts):
            counts.append(count)
    return counts


def products_of_unknown_rows(graph: fx.Graph) -> list[fx.Node]:
    """The products with a matrix whose number of rows depends on data: how many tokens were picked."""
    return [
        node for node in graph.nodes if (count := _rows_at_matrix(node)) is not None and not is_known(count)
    ]


_MATRIX_PRODUCTS = {
    F.linear: (0, 1),
    aten.linear.default: (0, 1),
    torch.matmul: (0, 1),
    operator.matmul: (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    torch.mm: (0, 1),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    torch.addmm: (1, 2),
    aten.addmm.default: (1, 2),
    "addmm": (1, 2),
    torch.einsum: (1, 2),
}


def _rows_at_matrix(node: fx.Node) -> Any:
    places = _MATRIX_PRODUCTS.get(node.target)
    if places is None or len(node.args) <= max(places):
        return None
    source, matrix = (node.args[place] for place in places)
    if not isinstance(source, fx.Node) or not isinstance(matrix, fx.Node):
        return None
    rows, weight = tensor_value(source), tensor_value(matrix)
    if rows is None or weight is None or rows.ndim < 2 or weight.ndim != 2:
        return None
    count: Any = 1
    for size in rows.shape[:-1]:
        count = count * size
    return count


def bytes_a_row(node: fx.Node, rows: Any) -> int:
    """Bytes a row of a node's value."""
    return sum(row_bytes(fake, hint(rows)) for fake in tensors_of(node))
