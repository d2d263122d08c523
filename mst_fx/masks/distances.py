"""A bias that depends on the distance of key and query alone, as a vector of distances.

Before (T5; ALiBi likewise, with a slope a head in place of the table)::

    distance = arange(K)[None, :] - arange(Q)[:, None]                          # [Q, K]
    bias = embedding(bucket(distance), table).permute(2, 0, 1).unsqueeze(0)     # [1, H, Q, K]

After: the same nodes, of each distance once; ``bias[h, q, k] = of_distances[h, k - q + Q - 1]``::

    distance = arange(1 - Q, K)[None, :]                                        # [1, Q + K - 1]
    of_distances = embedding(bucket(distance), table).permute(2, 0, 1).unsqueeze(0).squeeze(2)

That is the same number, if each node between the two works on each (q, k) by itself: pointwise, a pick from a table, or another order of
dimensions. Which dimensions are those of queries and keys is known at the end, and followed from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import add_call
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.levels import Level
from mst_fx.graph.names import plain_name
from mst_fx.graph.sizes import expression, is_one
from mst_fx.graph.spelling import CASTS, COPIES, EMBEDDINGS, EXPANDS, SIZED_VIEWS, argument, operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of
from mst_fx.graph.writes import writes_in_place
from mst_fx.masks.counted import EXACT, first_position
from mst_fx.masks.places import Place, order_of, picked, viewed, widened

_NAMES_OF_POINTWISE = """
    abs neg add sub rsub mul div floor_divide remainder pow square sqrt rsqrt reciprocal exp exp2 log log2 log10 log1p
    min max minimum maximum clamp clamp_min clamp_max where masked_fill sign floor ceil round trunc relu gelu silu tanh sigmoid
    eq ne le lt ge gt bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not
    zeros_like ones_like full_like
"""
_POINTWISE = frozenset(_NAMES_OF_POINTWISE.split()) | CASTS | COPIES
# Written in place of a value that nobody else reads, they are what they are without.
_OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": torch.neg,
}
_MAKE_NEW_ONES = frozenset(("add", "sub", "rsub", "mul", "div", "where", "neg", "abs"))


@dataclasses.dataclass(frozen=True)
class _Difference:
    """``±(key - query) + shift``, and the vectors whose lengths are Q and K."""

    sign: int
    shift: int
    query: fx.Node
    key: fx.Node


@dataclasses.dataclass(frozen=True)
class Distances:
    """A bias ``[.., Q, K]``, as :func:`read_distances` has read it.

    Attributes:
        bias: its node.
        nodes: those that make it of differences, in order, with their place; it is the last.
        differences: what they begin with.
    """

    bias: fx.Node
    nodes: tuple[tuple[fx.Node, Place], ...]
    differences: dict[fx.Node, _Difference]

    def vector(self) -> fx.Node:
        """``[b, h, Q + K - 1]``, of nodes that are put behind the bias.

        Raises:
            Refusal: if a node gives something else for distances than for pairs.
        """
        graph, made = self.bias.graph, dict[fx.Node, fx.Node]()
        with graph.inserting_before(self.bias.next):
            for node, place in self.nodes:
                found = self.differences.get(node)
                new = _again(node, place, made) if found is None else _counted(node, place, found)
                _check_same(node, new, place)
                made[node] = new
            return flat_heads(made[self.bias])


def flat_heads(bias: fx.Node) -> fx.Node:
    """``[b, h, L]`` of ``[b, h, 1, L]``, or of fewer dimensions; at the graph's insertion point."""
    fake = tensor_value(bias)
    assert fake is not None
    graph = bias.graph
    if fake.ndim > 1:
        bias = add_call(graph, torch.squeeze, bias, fake.ndim - 2)
    for _ in range(max(0, 3 - max(1, fake.ndim - 1))):
        bias = add_call(graph, torch.unsqueeze, bias, 0)
    return bias


def _counted(node: fx.Node, place: Place, found: _Difference) -> fx.Node:
    """All distances, in the place of a difference: from that of the first key and the last query on."""
    graph, fake = node.graph, tensor_value(node)
    assert fake is not None
    queries, keys = (_length(vector) for vector in (found.query, found.key))
    first = 1 - queries if isinstance(queries, int) else add_call(graph, operator.sub, 1, queries)
    with fake_mode_of(tensors_of(node)) or contextlib.nullcontext():
        new = add_call(graph, torch.arange, first, keys, dtype=fake.dtype, device=fake.device)
    if found.sign < 0:
        new = add_call(graph, torch.neg, new)
    if found.shift:
        new = add_call(graph, torch.add, new, found.shift)
    for _ in range(place.keys):
        new = add_call(graph, torch.unsqueeze, new, 0)
    for _ in range(fake.ndim - 1 - place.keys):
        new = add_call(graph, torch.unsqueeze, new, -1)
    return new


def _length(vector: fx.Node) -> Any:
    fake = tensor_value(vector)
    assert fake is not None
    dim = next(i for i, size in enumerate(fake.shape) if not is_one(size))
    size = fake.shape[dim]
    return size if isinstance(size, int) else add_call(vector.graph, "size", vector, dim)


def _again(node: fx.Node, place: Place, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node, of distances."""
    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
    if writes_in_place(node):
        target = _OUT_OF_PLACE[operation(node)]
    if operation(node) in EXPANDS:
        fake = tensor_value(node)
        assert fake is not None
        sizes = [-1 if at in (place.queries, place.keys) else size for at, size in enumerate(fake.shape)]
        if not all(isinstance(size, int) for size in sizes):
            raise Refusal(f"{node.name} in the bias has dynamic sizes", Cause.MASK)
        target, args, kwargs = "expand", (args[0], *sizes), {}
    if operation(node) == "getitem" and not isinstance(args[1], fx.Node):
        args = (args[0], _of_whole(args[1]))
    if operation(node) in SIZED_VIEWS:
        fake = tensor_value(node)
        assert fake is not None
        sizes = [
            1 if at == place.queries else -1 if at == place.keys else size
            for at, size in enumerate(fake.shape)
        ]
        if not all(isinstance(size, int) for size in sizes):
            raise Refusal(f"{node.name} in the bias has dynamic sizes", Cause.MASK)
        target, args, kwargs = torch.reshape, (args[0], sizes), {}
    return add_call(node.graph, target, *args, **kwargs)


def _of_whole(index: Any) -> Any:
    """An index without the sizes that it says: ``[:, :, :Q, :K]`` → ``[:, :, :, :]``. One that picks from a table has none."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return tuple(slice(None) if isinstance(part, slice) else part for part in parts)


def _check_same(node: fx.Node, new: fx.Node, place: Place) -> None:
    was, fake = tensor_value(node), tensor_value(new)
    assert was is not None
    wanted = [
        None if at == place.keys else 1 if at == place.queries else expression(size)
        for at, size in enumerate(was.shape)
    ]
    sizes = (
        []
        if fake is None
        else [None if at == place.keys else expression(x) for at, x in enumerate(fake.shape)]
    )
    if fake is None or fake.dtype != was.dtype or sizes != wanted:
        raise Refusal(
            f"{node.name} ({plain_name(node)}) in the bias depends on more than distances", Cause.MASK
        )
    if (
        new is not node and fake.requires_grad != was.requires_grad
    ):  # the new nodes are all where the last one is
        raise Refusal(
            f"{node.name} ({plain_name(node)}) in the bias is made under no_grad, and has a table",
            Cause.NO_GRAD,
        )


def read_distances(bias: fx.Node, level: Level, mutated: Collection[int]) -> Distances:
    """How a bias ``[.., Q, K]`` is made of differences of positions.

    Raises:
        Refusal: naming the node that is not understood.
    """
    fake = tensor_value(bias)
    assert fake is not None
    reader = _Reader(bias, level, mutated)
    reader.visit(bias, Place(fake.ndim - 2, fake.ndim - 1))
    reader.check_depends(bias)
    return Distances(bias, tuple(reader.places.items()), reader.differences)


class _Reader:
    """Follows a bias back to the differences.

    Attributes:
        places: the nodes that have queries and keys, operands first.
        differences: those of them that are differences.
    """

    def __init__(self, bias: fx.Node, level: Level, mutated: Collection[int]) -> None:
        self._bias, self._level, self._mutated = bias, level, mutated
        self.places: dict[fx.Node, Place] = {}
        self.differences: dict[fx.Node, _Difference] = {}

    def visit(self, node: fx.Node, place: Place) -> None:
        if self.places.get(node, place) != place:
            raise Refusal(f"{node.name} in the bias is read as it is and transposed", Cause.MASK)
        fake = tensor_value(node)
        if fake is None or node in self.places:
            return
        if all(map(is_one, place.of(node))):
            self._check_unwritten(node)
            return
        if (
            not is_plain(fake)
            or node.op not in ("call_function", "call_method")
            or node.graph is not self._bias.graph
        ):
            raise self._refusal(node)
        found = self._difference(node, place)
        if found is not None:
            self._check_unwritten(node)
            self.places[node], self.differences[node] = place, found
            return
        if writes_in_place(node):
            if not self._is_only_write(node, node.args[0]):
                raise Refusal(
                    f"{node.name} ({plain_name(node)}) in the bias is written to in place", Cause.MASK
                )
        else:
            self._check_unwritten(node)
        for operand, where in self._operands(node, place):
            self.visit(operand, where)
        for operand in node.all_input_nodes:  # the table, say: it is read once more, and later
            if operand not in self.places:
                self._check_unwritten(operand)
        self.places[node] = place

    def check_depends(self, bias: fx.Node) -> None:
        """Refuses a bias that no distance makes: what is the same for all queries and keys has the shape of none."""
        depends = set(self.differences)
        for node in self.places:
            if not depends.isdisjoint(node.all_input_nodes):
                depends.add(node)
        if bias not in depends:
            raise Refusal(
                f"{bias.name} ({plain_name(bias)}): a bias that does not depend on distances", Cause.MASK
            )

    def _refusal(self, node: fx.Node) -> Refusal:
        """Of what is no formula of distances."""
        return Refusal(
            f"{node.name} ({plain_name(node)}): a bias of S² elements that is not known to depend on distances alone",
            Cause.MASK,
        )

    def _check_unwritten(self, node: fx.Node) -> None:
        fake = tensor_value(node)
        if fake is None or storage_key(fake) not in self._mutated:
            return
        if len(node.users) != 1 or not self._is_only_write(next(iter(node.users)), node):
            raise Refusal(f"{node.name} ({plain_name(node)}) in the bias is written to in place", Cause.MASK)

    def _is_only_write(self, write: fx.Node, source: Any) -> bool:
        """Whether a node writes to a value that was made for it, and nobody else does."""
        fake = tensor_value(write)
        is_known = operation(write) in _OUT_OF_PLACE and not write.kwargs and write.args[0] is source
        if fake is None or not is_known or not isinstance(source, fx.Node) or list(source.users) != [write]:
            return False
        writers = [
            node
            for node in write.graph.nodes
            if writes_in_place(node) and any(storage_key(x) == storage_key(fake) for x in tensors_of(node))
        ]
        return writers == [write] and operation(source) in _MAKE_NEW_ONES

    def _operands(self, node: fx.Node, place: Place) -> Iterator[tuple[fx.Node, Place]]:
        """The operands of a node that may have queries and keys, and where those lie."""
        name, fake = operation(node), tensor_value(node)
        assert fake is not None
        if name in _POINTWISE or name in EXPANDS:
            if name in ("min", "max") and (len(node.args) != 2 or not isinstance(node.args[1], fx.Node)):
                raise self._refusal(node)
            for operand in node.all_input_nodes:
                inner = tensor_value(operand)
                if inner is not None:
                    yield operand, place.moved(inner.ndim - fake.ndim)
        elif name in EMBEDDINGS:
            yield self._index(node), place
        elif name == "linear" and max(place.queries, place.keys) < fake.ndim - 1:  # of features of a distance
            yield self._source(node), place
        elif name in SIZED_VIEWS:
            yield self._viewed(node, place)
        elif name == "getitem":
            yield self._indexed(node, place)
        elif name == "unsqueeze":
            dim = argument(node, "dim") % fake.ndim
            yield self._source(node), Place(*(at - (at > dim) for at in self._without(node, place, dim)))
        elif name in ("permute", "transpose", "getattr", "t"):
            order = order_of(node, fake.ndim)
            if order is None:
                raise self._refusal(node)
            yield self._source(node), Place(order[place.queries], order[place.keys])
        else:
            raise self._refusal(node)

    def _source(self, node: fx.Node) -> fx.Node:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            raise self._refusal(node)
        return source

    def _viewed(self, node: fx.Node, place: Place) -> tuple[fx.Node, Place]:
        """What a view only gives more, or fewer, dimensions of size 1."""
        source = self._source(node)
        found = viewed(node, source, place)
        if found is None:
            raise self._refusal(node)
        return source, found

    def _without(self, node: fx.Node, place: Place, dim: int) -> tuple[int, int]:
        if dim in (place.queries, place.keys):
            raise self._refusal(node)
        return place.queries, place.keys

    def _index(self, node: fx.Node) -> fx.Node:
        """What picks from a table: with options that count how often, or write to it, a row of distances is not one of pairs."""
        options = [argument(node, name) for name in ("max_norm", "scale_grad_by_freq", "sparse")]
        index, weight = argument(node, "input"), argument(node, "weight")
        if not isinstance(index, fx.Node) or tensor_value(index) is None or operation(node) != "embedding":
            raise self._refusal(node)
        if weight is index or any(options):
            raise self._refusal(node)
        return index

    def _indexed(self, node: fx.Node, place: Place) -> tuple[fx.Node, Place]:
        """``table[index]``, ``table[:, index]``, or an index that only adds dimensions."""
        source, index = self._source(node), node.args[1]
        parts = list(index) if isinstance(index, (tuple, list)) else [index]
        found = (
            picked(parts, place) if isinstance(parts[-1], fx.Node) else widened(node, source, parts, place)
        )
        if found is None:
            raise self._refusal(node)
        return found

    def _difference(self, node: fx.Node, place: Place) -> _Difference | None:
        """``keys - queries`` or ``queries - keys`` of positions that count tokens."""
        if operation(node) != "sub" or len(node.args) != 2 or node.kwargs or writes_in_place(node):
            return None
        left, right = node.args
        fake = tensor_value(node)
        if (
            not isinstance(left, fx.Node)
            or not isinstance(right, fx.Node)
            or fake is None
            or fake.dtype not in EXACT
        ):
            return None
        kinds = [self._varies(operand, place, fake.ndim) for operand in (left, right)]
        if sorted(kinds) != ["keys", "queries"]:
            return None
        starts = [first_position(operand, self._level, self._mutated) for operand in (left, right)]
        if None in starts:
            raise Refusal(
                f"{node.name} in the bias is no difference of positions that count tokens", Cause.MASK
            )
        sign = 1 if kinds[0] == "keys" else -1
        key, query = (left, right) if sign > 0 else (right, left)
        return _Difference(sign, starts[0] - starts[1], query, key)  # type: ignore[operator]

    def _varies(self, node: fx.Node, place: Place, ndim: int) -> str:
        """Along which of the two a value varies, if along one of them alone."""
        fake = tensor_value(node)
        if fake is None:
            return ""
        wide = {at + ndim - fake.ndim for at, size in enumerate(fake.shape) if not is_one(size)}
        return {place.queries: "queries", place.keys: "keys"}.get(*wide, "") if len(wide) == 1 else ""  # type: ignore[call-overload,no-any-return]
