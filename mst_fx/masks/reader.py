"""Reads a mask in a graph: from its nodes to a formula and the nodes of the vectors that it names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.names import plain_name
from mst_fx.graph.sizes import expression, is_one, is_same
from mst_fx.graph.spelling import CASTS, COPIES, EXPANDS, operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value, value
from mst_fx.masks import formula
from mst_fx.masks.constants import fill_of, number_in
from mst_fx.masks.formula import TRUE, Compare, Constant, Holds, Mask


@dataclasses.dataclass(frozen=True)
class _Number:
    """A key or query vector plus an offset; without a vector a number."""

    name: str = ""
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class _Difference:
    """``key - query + offset`` (``sign`` 1) or ``query - key + offset`` (-1)."""

    key: str
    query: str
    sign: int
    offset: int
    absolute: bool = False


class Reader:
    """Reads mask nodes of one attention shape.

    Args:
        queries, keys: Q and K, ints or Dynamo's symbolic integers.
        resolve: maps a node to the node it stands for (a placeholder of a checkpointed layer to the
            operand of its call); the identity otherwise.
        constant: the value of a node that depends on no input; None for others.
        mutated: storages that something writes to: what they hold depends on when it is read.
        batch_first: a mask of three dimensions is [B, Q, K]; otherwise they count from the last one, as
            everywhere in torch, and the first is that of heads.

    Attributes:
        key_nodes, query_nodes: the nodes that ``k0``, … and ``q0``, … name.
    """

    def __init__(
        self,
        queries: Any,
        keys: Any,
        resolve: Callable[[fx.Node], fx.Node],
        constant: Callable[[fx.Node], Any],
        mutated: Collection[int] = (),
        batch_first: bool = False,
    ) -> None:
        self.queries, self.keys, self._resolve, self._constant = queries, keys, resolve, constant
        self._mutated, self._batch_first = mutated, batch_first
        self.key_nodes: list[fx.Node] = []
        self.query_nodes: list[fx.Node] = []

    def read(self, node: fx.Node) -> Mask:
        """The formula of a Boolean mask.

        Raises:
            Refusal: naming the node that is not understood.
        """
        node = self._resolve(node)
        fake = tensor_value(node)
        if fake is None or fake.dtype != torch.bool:
            raise Refusal(f"{node.name} ({plain_name(node)}) in the mask is not Boolean", Cause.MASK)
        if fill_of(node, self._mutated) is not None:
            return Constant(bool(fill_of(node)))
        kind = self._kind(node)
        known = self._constant(node) if kind != "full" else None
        if isinstance(known, Tensor) and bool(known.all()):
            return TRUE
        if isinstance(known, Tensor) and not bool(known.any()):
            return formula.FALSE
        if kind in ("keys", "queries"):
            return Holds(self._vector(node, kind))
        found = self._combined(node)
        if found is not None:
            return found
        source = _passed_on(node)
        if source is not None:
            with self._behind(node, source):
                return self.read(source)
        if kind == "number":
            raise Refusal(
                f"{node.name} ({plain_name(node)}) in the mask has neither keys nor queries", Cause.MASK
            )
        raise self._not_understood(node)

    def _combined(self, node: fx.Node) -> Mask | None:
        """The formula of a node that combines masks, or compares; None for others."""
        name, count = operation(node), len(node.args)
        if name in _AND and count == 2:
            return formula.both([self._part(part) for part in node.args])
        if name in _OR and count == 2:
            return formula.either([self._part(part) for part in node.args])
        if name in _NOT and count == 1:
            return formula.negated(self._part(node.args[0]))
        if name in formula.COMPARE and count == 2:
            return self._of_choice(name, *node.args) or self._compare(name, *node.args)
        return self._of_choice("ne", node.args[0], 0) if name in CASTS and count else None

    def _of_choice(self, op: str, left: Any, right: Any) -> Mask | None:
        """The formula of ``where(mask, a, b) op number``; None for others."""
        number = number_in(right, self._mutated)
        node = self._choice_behind(left)
        if number is None or node is None:
            return None
        fakes = [x for x in (tensor_value(left), tensor_value(node)) if x is not None and is_plain(x)]
        numbers = [number_in(x, self._mutated) for x in node.args[1:]]
        if None in numbers or len(fakes) < 2 or fakes[0].dtype != fakes[1].dtype:
            return None
        if any(storage_key(x) in self._mutated for x in fakes):
            return None
        found = [formula.COMPARE[op](x, number) for x in numbers]
        if found[0] == found[1]:
            return Constant(bool(found[0]))
        return self._part(node.args[0]) if found[0] else formula.negated(self._part(node.args[0]))

    def _choice_behind(self, node: Any) -> fx.Node | None:
        """The ``where(mask, a, b)`` whose values a node has."""
        while isinstance(node, fx.Node) and operation(node) != "where":
            source = _passed_on(node)
            node = self._resolve(source) if source is not None else None
        is_function = isinstance(node, fx.Node) and node.op == "call_function" and len(node.args) == 3
        return node if is_function else None

    def _not_understood(self, node: fx.Node) -> Refusal:
        outside = made_outside(node, self._resolve, self.queries, self.keys)
        if outside is not None:
            return Refusal(*outside)
        if operation(node).startswith("scatter") and any(map(_is_choice, node.all_input_nodes)):
            reason = (
                "lets each query see the keys that scored highest (top-k), which no formula of positions says"
            )
            return Refusal(f"{node.name}: the mask {reason}", Cause.MASK)
        return Refusal(f"{node.name} ({plain_name(node)}) in the mask is not understood", Cause.MASK)

    def _part(self, operand: Any) -> Mask:
        if isinstance(operand, bool):
            return Constant(operand)
        if isinstance(operand, fx.Node):
            return self.read(operand)
        raise Refusal(f"a mask is joined with {operand!r}", Cause.MASK)

    @contextlib.contextmanager
    def _behind(self, node: fx.Node, source: fx.Node) -> Iterator[None]:
        """Reads the source of a node that only adds dimensions: [B, Q, K] of [B, 1, Q, K] perhaps."""
        before = self._batch_first
        self._batch_first = before or gives_heads(node, source)
        try:
            yield
        finally:
            self._batch_first = before

    def _kind(self, node: fx.Node) -> str:
        """Which of Q and K a value varies with: "full", "keys", "queries" or "number"."""
        fake = tensor_value(node)
        if fake is None:
            raise Refusal(f"{node.name} ({plain_name(node)}) in the mask is not a tensor", Cause.MASK)
        if not is_plain(fake):
            raise Refusal(f"{node.name} ({plain_name(node)}) in the mask is no plain tensor", Cause.NOT_PLAIN)
        if storage_key(fake) in self._mutated:
            raise Refusal(f"{node.name} ({plain_name(node)}) in the mask is written to in place", Cause.MASK)
        sizes = [1] * (4 - fake.ndim) + list(fake.shape)
        if self._batch_first and fake.ndim == 3:
            sizes = [fake.shape[0], 1, *fake.shape[1:]]
        if fake.ndim > 4 or not is_one(sizes[1]):
            raise Refusal(f"{node.name} ({plain_name(node)}) in the mask differs between heads", Cause.MASK)
        height, width = sizes[2], sizes[3]
        if is_one(height) and is_one(width):
            if not is_one(sizes[0]):
                raise Refusal(
                    f"{node.name} ({plain_name(node)}) in the mask is one number a sequence", Cause.MASK
                )
            return "number"
        if is_one(height) and is_same(width, self.keys):
            return "keys"
        if is_one(width) and is_same(height, self.queries):
            return "queries"
        if is_same(height, self.queries) and is_same(width, self.keys):
            return "full"
        raise Refusal(
            f"{node.name} ({plain_name(node)}) in the mask has the shape {tuple(fake.shape)}", Cause.MASK
        )

    def _vector(self, node: fx.Node, kind: str) -> str:
        nodes = self.key_nodes if kind == "keys" else self.query_nodes
        if node not in nodes:
            nodes.append(node)
        return f"{kind[0]}{nodes.index(node)}"

    def _compare(self, op: str, left: Any, right: Any) -> Mask:
        a, b = self._number(left), self._number(right)
        if isinstance(b, _Difference):
            op, a, b = formula.MIRRORED[op], b, a
        if isinstance(a, _Difference):
            if isinstance(b, _Difference) or b.name:
                raise Refusal("a mask compares three vectors", Cause.MASK)
            return self._compare_difference(op, a, b.offset)
        assert isinstance(b, _Number)
        if b.name.startswith("k") or (a.name.startswith("q") and not b.name):
            op, a, b = formula.MIRRORED[op], b, a
        if a.name[:1] == b.name[:1]:
            raise Refusal("a mask compares two vectors of the same tokens", Cause.MASK)
        return Compare(op, a.name, b.name, b.offset - a.offset)

    def _compare_difference(self, op: str, difference: _Difference, bound: int) -> Mask:
        if difference.absolute:
            if op not in ("le", "lt"):
                raise Refusal("a mask compares a distance otherwise than by < and <=", Cause.MASK)
            plain = dataclasses.replace(difference, absolute=False)
            low = self._compare_difference("ge" if op == "le" else "gt", plain, -bound)
            return formula.both([self._compare_difference(op, plain, bound), low])
        shift = bound - difference.offset
        if difference.sign > 0:  # key - query <= shift
            return Compare(op, difference.key, difference.query, shift)
        return Compare(formula.MIRRORED[op], difference.key, difference.query, -shift)

    def _number(self, operand: Any) -> _Number | _Difference:
        if isinstance(operand, int) and not isinstance(operand, bool):
            return _Number(offset=operand)
        if not isinstance(operand, fx.Node):
            raise Refusal(f"a mask compares with {operand!r}", Cause.MASK)
        node = self._resolve(operand)
        _check_integer(node)
        kind = self._kind(node)
        if kind in ("keys", "queries"):
            return self._shifted(node, operation(node)) or _Number(self._vector(node, kind))
        found = self._of_both(node) if kind == "full" else None
        if found is None:
            raise self._not_understood(node)
        return found

    def _of_both(self, node: fx.Node) -> _Number | _Difference | None:
        """A number for each query and key."""
        name = operation(node)
        if name == "sub" and len(node.args) == 2 and not node.kwargs:  # alpha
            return self._difference(*node.args)
        if name == "abs":
            inner = self._number(node.args[0])
            if isinstance(inner, _Difference) and not inner.absolute and not inner.offset:
                return dataclasses.replace(inner, absolute=True)
        source = _passed_on(node)
        fake = tensor_value(node)
        if source is None or fake is None or fake.dtype not in _WIDE_INTEGERS:
            return None
        with self._behind(node, source):
            return self._number(source)

    def _shifted(self, node: fx.Node, name: str) -> _Number | None:
        """A vector plus or minus a number that is known."""
        if name not in ("add", "sub") or len(node.args) != 2 or node.kwargs:
            return None
        source, shift = node.args
        if not isinstance(source, fx.Node) or not isinstance(shift, int) or isinstance(shift, bool):
            return None
        if self._kind(self._resolve(source)) not in ("keys", "queries"):
            return None
        found = self._number(source)
        if not isinstance(found, _Number):
            return None
        return _Number(found.name, found.offset + (shift if name == "add" else -shift))

    def _difference(self, left: Any, right: Any) -> _Difference:
        a, b = self._number(left), self._number(right)
        if isinstance(a, _Number) and isinstance(b, _Number):
            if a.name.startswith("k") and b.name.startswith("q"):
                return _Difference(a.name, b.name, 1, a.offset - b.offset)
            if a.name.startswith("q") and b.name.startswith("k"):
                return _Difference(b.name, a.name, -1, a.offset - b.offset)
        raise Refusal("a mask subtracts something else than keys and queries", Cause.MASK)


_AND = {"bitwise_and", "logical_and", "mul"}
_OR = {"bitwise_or", "logical_or"}
_NOT = {"bitwise_not", "logical_not", "not_"}
# Ops that leave the values alone; the result's shape says whether keys and queries stay in place.
_PASSING = CASTS | COPIES | EXPANDS | {"unsqueeze", "view", "reshape"}


# Of others a cast may change the values.
_WIDE_INTEGERS = (torch.int32, torch.int64)


def _check_integer(node: fx.Node) -> None:
    if isinstance(value(node), torch.SymInt):
        raise Refusal(f"a mask compares with the dynamic integer {node.name}", Cause.MASK)
    fake = tensor_value(node)
    if fake is None or fake.is_floating_point() or fake.is_complex():
        raise Refusal(f"{node.name} ({plain_name(node)}) in the mask is not an integer", Cause.MASK)


def _passed_on(node: fx.Node) -> fx.Node | None:
    """The node whose values a node has, with other dimensions or of another type perhaps; None: it has others."""
    source = node.args[0] if node.args else None
    is_same = operation(node) in _PASSING or _only_adds_dims(node)
    return source if is_same and isinstance(source, fx.Node) else None


def _is_choice(node: fx.Node) -> bool:
    """Whether a node is the indices of ``topk``, through casts and more dimensions."""
    while operation(node) in _PASSING | {"getitem"} and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return operation(node) in ("topk", "sort", "argsort")


def _only_adds_dims(node: fx.Node) -> bool:
    """Whether an index only adds dimensions (``mask[None, None]``, ``mask[:, :, :, :K]`` of K keys)."""
    source = node.args[0] if node.args else None
    if operation(node) != "getitem" or not isinstance(source, fx.Node):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    fake, out = tensor_value(source), tensor_value(node)
    only = all(i is None or i is Ellipsis or (isinstance(i, slice) and i.start in (None, 0)) for i in index)
    if not only or fake is None or out is None:
        return False
    steps = all(i.step in (None, 1) for i in index if isinstance(i, slice))
    return steps and expression(fake.numel()) == expression(out.numel())


def gives_heads(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is ``[B, 1, Q, K]`` of a source ``[B, Q, K]`` (``source[:, None]``)."""
    fake, inner = tensor_value(node), tensor_value(source)
    if fake is None or inner is None or (fake.ndim, inner.ndim) != (4, 3) or not is_one(fake.shape[1]):
        return False
    has_sizes = all(is_same(fake.shape[to], inner.shape[at]) for to, at in ((0, 0), (2, 1), (3, 2)))
    return has_sizes and operation(node) in ("getitem", "unsqueeze", "view", "reshape")


def made_outside(
    node: fx.Node, resolve: Callable[[fx.Node], fx.Node], queries: Any, keys: Any
) -> tuple[str, Cause] | None:
    """Why a mask that depends on Q x K values which are an input of the graph is refused; None: it does not."""
    stack, seen = [node], set()
    while stack:
        current = resolve(stack.pop())
        if current in seen:
            continue
        seen.add(current)
        fake = tensor_value(current)
        if fake is None or fake.ndim < 2:
            continue
        if current.op not in ("placeholder", "get_attr"):
            stack += current.all_input_nodes
        elif is_same(fake.shape[-2], queries) and is_same(fake.shape[-1], keys):
            reason = "the mask is an input of this graph (S² elements), made outside of it"
            return f"{current.name}: {reason}", Cause.MASK_INPUT
    return None
