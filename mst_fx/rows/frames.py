"""In which order the slots of each value lie: its *frame*.

Values lie in the order of the slots (``NATURAL``), or in that of their sorted keys (an :class:`~mst_fx.rows.routing.Order`). An operator
that is row-wise gives ``f(u[p], v[p]) = f(u, v)[p]``, so all operands of a node must have one frame, and what a slot region is made of
may be run in any order of slots whatever; ``x[p]`` and ``y[inverse of p]`` change the frame and nothing else.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from typing import Any

import sympy
from torch import fx

from mst_fx.graph.names import target_name
from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import EXPANDS, GROUPED_PRODUCTS, MATMULS, PERMUTES, argument, operation
from mst_fx.graph.values import is_plain, tensor_value, tensors_of
from mst_fx.rows.analysis import is_weight
from mst_fx.rows.fold import split_rows
from mst_fx.rows.routing import Facts, Inverse, Keys, Order, Origin, Permutation, SortedKeys, facts_of, picked


class _Natural(enum.Enum):
    NATURAL = "natural"


NATURAL = _Natural.NATURAL
Frame = Order | _Natural


class Read(enum.Enum):
    """How a loop over slots reads an input: the row of each slot, the slot, its key, or the whole."""

    ROW = "row"
    SLOT = "slot"
    KEY = "key"
    SHARED = "shared"


class Frames:
    """The frames of the values of a graph that has products with stacks of matrices (:func:`has_stacks`).

    Attributes:
        facts: what is known of the graph's integers.
        of: the frame of each node that has one.
        sources: where slots begin: nodes that give each slot something, how a loop would read it, and from which node.
        same: nodes that change the frame and nothing else, and their operands.
        combines: nodes that add up the slots of each row: the slots, and how many a row has.
        reasons: why a node with framed operands has no frame.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.facts: Facts = facts_of(graph)
        self.of: dict[fx.Node, Frame] = {}
        self.sources: dict[fx.Node, tuple[Read, fx.Node]] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.combines: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.reasons: dict[fx.Node, str] = {}
        self._constant: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            self._follow(node)

    def _follow(self, node: fx.Node) -> None:
        """Finds the frame of a node from those of its operands."""
        if node.op not in ("call_function", "call_method"):
            return
        if node in self.facts:
            known = self.facts[node]
            if isinstance(known, SortedKeys):
                self.of[node] = known.order
                self.sources[node] = (Read.KEY, known.order.sort)
            return
        if self._is_repeat(node) or self._follow_pick(node):
            return
        framed = [operand for operand in node.all_input_nodes if operand in self.of]
        if not framed:
            return
        combine = self._combined(node)
        if combine is not None:
            self.combines[node] = combine
            return
        frames = {self.of[operand] for operand in framed}
        if len(frames) > 1:
            self.reasons[node] = f"{node.name} ({target_name(node)}) combines slots in different orders"
        elif self._holds_slots(node, framed[0]):
            (self.of[node],) = frames

    def _follow_pick(self, node: fx.Node) -> bool:
        """Whether a node picks the elements of a vector of indices that are known."""
        found = picked(node)
        if found is None:
            return False
        source, index = found
        known = self.facts.get(index)
        fake, indices = tensor_value(source), tensor_value(index)
        assert fake is not None and indices is not None
        if isinstance(known, Origin) and are_equal(fake.shape[0], indices.shape[0], known.per):
            self.of[node], self.sources[node] = known.order, (Read.ROW, source)
        elif isinstance(known, Permutation) and are_equal(fake.shape[0], indices.shape[0]):
            self.of[node] = known.order
            if self.of.get(source) is NATURAL and self.sources.get(source, (None,))[0] is not Read.ROW:
                self.same[node] = source
            else:
                self.sources[node] = self.sources.get(source, (Read.SLOT, source))
        elif isinstance(known, Inverse) and self.of.get(source) == known.order:
            if known.order.sort in self._single:
                self.combines[node] = (source, 1)
            else:
                self.of[node], self.same[node] = NATURAL, source
        elif isinstance(known, (SortedKeys, Keys)) and self.is_constant(source):
            self.of[node] = known.order if isinstance(known, SortedKeys) else NATURAL
        else:
            return False
        return True

    @functools.cached_property
    def _single(self) -> set[fx.Node]:
        """The sorts of slots of which each row has one: in their own order they are rows."""
        return {
            known.order.sort for known in self.facts.values() if isinstance(known, Origin) and known.per == 1
        }

    def _is_repeat(self, node: fx.Node) -> bool:
        """Whether a node gives each row's slots the row: ``rows.repeat_interleave(k, 0)``."""
        source: Any = node.args[0] if node.args else None
        per = argument(node, "repeats")
        if operation(node) != "repeat_interleave" or argument(node, "dim") != 0 or type(per) is not int:
            return False
        if not isinstance(source, fx.Node) or tensor_value(source) is None:
            return False
        self.of[node], self.sources[node] = NATURAL, (Read.ROW, source)
        return True

    def _holds_slots(self, node: fx.Node, like: fx.Node) -> bool:
        """Whether all that a node gives has as many slots as an operand."""
        slots = self.slots_of(like)
        fakes = tensors_of(node)
        return bool(fakes) and all(is_plain(x) and split_rows(x.shape, slots) is not None for x in fakes)

    def slots_of(self, node: fx.Node) -> Any:
        """How many slots the values of a framed node are of."""
        while node in self.same:
            node = self.same[node]
        frame = self.of[node]
        if isinstance(frame, Order):
            fake = tensor_value(frame.sort.args[0])  # type: ignore[arg-type]
            assert fake is not None
            return fake.shape[0]
        fakes = tensors_of(node)
        if node in self.sources or picked(node) is not None:
            return fakes[0].shape[0]
        return self.slots_of(next(n for n in node.all_input_nodes if n in self.of))

    # The end of a region

    def _combined(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """The slots that a node adds up by row, and how many each row has."""
        name = operation(node)
        if name == "sum":
            return self._summed(node)
        if name in ("index_add", "scatter_add") and argument(node, "dim") == 0:
            slots = argument(node, "source" if name == "index_add" else "src")
            known = self.facts.get(_unexpanded(argument(node, "index")))  # type: ignore[arg-type]
            is_zero = isinstance(node.args[0], fx.Node) and operation(node.args[0]) in _ZEROS
            is_plain_sum = argument(node, "alpha", 1) == 1
            fake = tensor_value(node)
            if name == "scatter_add" and not _have_one_shape(argument(node, "index"), slots):
                return None  # only a part of the slots, or of their columns
            if isinstance(known, Origin) and self.of.get(slots) == known.order and is_zero and is_plain_sum:
                assert fake is not None
                count = self.slots_of(slots)  # type: ignore[arg-type]
                return (slots, known.per) if are_equal(fake.shape[0], count, known.per) else None  # type: ignore[return-value]
        return None

    def _summed(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """``slots[N, k, ...].sum(1)``."""
        slots: Any = node.args[0]
        fake, out, dim = tensor_value(slots), tensor_value(node), argument(node, "dim")
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        if fake is None or out is None or not isinstance(dim, int) or self.of.get(slots) is not NATURAL:
            return None
        is_wide = fake.ndim >= 2 and isinstance(fake.shape[1], int)
        if not is_wide or dim % fake.ndim != 1 or argument(node, "keepdim", False) or out.dtype != fake.dtype:
            return None
        per = int(fake.shape[1])
        return (slots, per) if are_equal(fake.shape[0], self.slots_of(slots), per) else None

    # Products and weights

    def is_product(self, node: fx.Node) -> bool:
        return operation(node) in GROUPED_PRODUCTS or self.picked_stack(node) is not None

    def picked_stack(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Of a product of each slot with a matrix that was picked by its key: what picked it, and the stack."""
        for operand, (stack, index) in _picked_matrices(node):
            if isinstance(self.facts.get(index), (Keys, SortedKeys)):
                return operand, stack
        return None

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a value is computed from weights and constants alone."""
        if node not in self._constant:
            if node.op in ("placeholder", "get_attr"):
                found = is_weight(node)
            else:
                tensors = [n for n in node.all_input_nodes if tensors_of(n)]
                found = bool(tensors) and all(map(self.is_constant, tensors))
            self._constant[node] = found
        return self._constant[node]


def has_stacks(graph: fx.Graph) -> bool:
    """Whether any product of a graph may be one of rows with the matrices of their keys."""
    return any(operation(n) in GROUPED_PRODUCTS or any(_picked_matrices(n)) for n in graph.nodes)


def _picked_matrices(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, fx.Node]]]:
    """The operands of a product that indices pick from a stack of matrices, or transposes of such, with the stack and the indices."""
    for operand in node.all_input_nodes if operation(node) in MATMULS else ():
        while operation(operand) in PERMUTES and isinstance(operand.args[0], fx.Node):
            operand = operand.args[0]
        found = picked(operand)
        fake = tensor_value(found[0]) if found is not None else None
        if found is not None and fake is not None and fake.ndim == 3:
            yield operand, found


_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))


def are_equal(size: Any, slots: Any, per: int = 1) -> bool:
    """Whether a size, ``per`` times, is the number of slots for all values of their symbols."""
    return bool(sympy.expand(expression(size) * per - expression(slots)) == 0)


def _unexpanded(index: Any) -> Any:
    """The vector ``i`` of an index ``i[:, None].expand(-1, H)``."""
    while isinstance(index, fx.Node) and (fake := tensor_value(index)) is not None and fake.ndim >= 2:
        source = index.args[0] if index.args else None
        parts = index.args[1] if operation(index) == "getitem" else ()
        is_whole = all(
            part in (None, Ellipsis, _FULL) for part in (parts if isinstance(parts, tuple) else (parts,))
        )
        is_same = operation(index) in EXPANDS | _WITH_A_COLUMN and is_whole
        known = tensor_value(source) if isinstance(source, fx.Node) else None
        if not is_same or known is None or not are_equal(known.shape[0], fake.shape[0]):
            break
        index = source
    return index


_FULL = slice(None, None, None)
_WITH_A_COLUMN = frozenset(("unsqueeze", "view", "reshape", "getitem"))


def _have_one_shape(*nodes: Any) -> bool:
    fakes = [tensor_value(node) if isinstance(node, fx.Node) else None for node in nodes]
    return len({str(fake.shape) if fake is not None else None for fake in fakes}) == 1


def factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What a product of groups multiplies, and by which stack."""
    left, right = (
        product.args[place]
        if len(product.args) > place
        else next(filter(None, map(product.kwargs.get, names)))
        for place, names in enumerate((("input", "self", "mat_a"), ("weight", "mat2", "mat_b")))
    )
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right
