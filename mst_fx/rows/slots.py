"""Slot regions: what experts make of each slot, from where rows are picked for their slots to where each row's slots are added up.

Slots are rows of their own, so that the table of rules holds for them as it is, for ``N·k`` rows in place of ``N``. What is new is their
*frame*: values lie in the order of the slots (``NATURAL``), or in that of their sorted keys (an :class:`~mst_fx.rows.routing.Order`). An
operator that is row-wise gives ``f(u[p], v[p]) = f(u, v)[p]``, so all operands of a node must have one frame, and a region may be run
in any order of slots whatever; ``x[p]`` and ``y[inverse of p]`` change the frame and nothing else::

    rows[perm // k] ─┐                          ┌─ y[inverse] ─ view(N, k, H) ─ sum(1)
    slots[perm] ─────┼─ products, activations ──┤
    keys ────────────┘                          └─ zeros(N, H).index_add(0, perm // k, y)

A region is left alone, with the reason, if any of its values is read outside: the result, and all that leads to it, is what is rewritten.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.modes import Context
from mst_fx.graph.names import common_path, module_path, target_name
from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import EXPANDS, GROUPED_PRODUCTS, MATMULS, PERMUTES, argument, operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of
from mst_fx.graph.writes import mutated_storages
from mst_fx.rows.fold import split_rows
from mst_fx.rows.routing import (
    Facts,
    Inverse,
    Key,
    Keys,
    Offsets,
    Order,
    Origin,
    Permutation,
    SortedKeys,
    facts_of,
    picked,
)


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


@dataclasses.dataclass(frozen=True)
class SlotRegion:
    """Nodes that work on each slot alone.

    Attributes:
        combine: adds up the slots of each row: ``[N, ...]``.
        result: the slots that it adds up.
        nodes: in graph order, without those that only pick inputs or change the frame.
        inputs: nodes of the region's boundary, with how each is read and what holds its numbers: of a pick its source.
        same: nodes that change nothing but the frame, and their operands.
        views: transposes of what slots share, in order: made inside, so that gradients are those of the weights as they lie.
        products: of slots with the matrix of their key: the stack.
        key: the node that holds the keys, one a slot.
        slots, per, experts: how many slots there are (``N·k``), how many a row (``k``), and how many matrices.
    """

    combine: fx.Node
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: dict[fx.Node, tuple[Read, fx.Node]]
    same: dict[fx.Node, fx.Node]
    views: tuple[fx.Node, ...]
    products: dict[fx.Node, fx.Node]
    key: fx.Node
    slots: Any
    per: int
    experts: int

    @property
    def name(self) -> str:
        """The module the region computes, e.g. ``model.layers.0.mlp.experts``."""
        return name_of(self.products)

    @property
    def rows(self) -> Any:
        """The number of rows, an int or a symbolic integer."""
        fake = tensor_value(self.combine)
        assert fake is not None
        return fake.shape[0]

    def reading(self, how: Read) -> list[fx.Node]:
        """What is read in one way, each once."""
        return list(dict.fromkeys(source for read, source in self.inputs.values() if read is how))


def name_of(products: Any) -> str:
    """The module that all of some products are of."""
    first = next(iter(products))
    return common_path([module_path(node) for node in products]) or module_path(first) or first.name


class SlotRegionFinder:
    """The slot regions of a graph.

    Args:
        graph: its nodes know their fake values.
        contexts: the modes of each node.
    """

    def __init__(self, graph: fx.Graph, contexts: dict[fx.Node, Context]) -> None:
        self.graph, self.contexts = graph, contexts
        self.facts: Facts = facts_of(graph)
        self._mutated = mutated_storages(graph)
        self._constant: dict[fx.Node, bool] = {}
        self.frames: dict[fx.Node, Frame] = {}
        self._sources: dict[fx.Node, tuple[Read, fx.Node]] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._reasons: dict[fx.Node, str] = {}
        self._combines: dict[fx.Node, tuple[fx.Node, int]] = {}
        if any(map(self._is_product, graph.nodes)):
            for node in graph.nodes:
                self._follow(node)

    def regions(self) -> Iterator[tuple[list[fx.Node], SlotRegion | Refusal]]:
        """For each place where slots are added up, if they have been multiplied with the matrices of their keys: the products, and
        the region or why there is none."""
        for combine, (result, per) in self._combines.items():
            nodes = self._before(result)
            products = [node for node in nodes if self._is_product(node)]
            if not products:
                continue
            try:
                yield products, self._region(combine, result, per, nodes)
            except Refusal as refusal:
                yield products, refusal

    def why_not(self, product: fx.Node) -> str:
        """Why a product with a stack leads to no place where slots are added up."""
        if product not in self.frames:
            return self._reasons.get(
                product, "its rows are not proved to lie in the order in which they are grouped"
            )
        seen, queue = {product}, [product]
        while queue:
            for user in queue.pop(0).users:
                if user in self._reasons:
                    return self._reasons[user]
                if user not in self.frames and user not in self._combines:
                    return f"{user.name} ({target_name(user)}) reads what they give"
                if user not in seen and user in self.frames:
                    seen.add(user)
                    queue.append(user)
        return "what they give is not added up by row"

    # Frames

    def _follow(self, node: fx.Node) -> None:
        """Finds the frame of a node from those of its operands."""
        if node.op not in ("call_function", "call_method"):
            return
        if node in self.facts:
            known = self.facts[node]
            if isinstance(known, SortedKeys):
                self.frames[node] = known.order
                self._sources[node] = (Read.KEY, known.order.sort)
            return
        if self._is_repeat(node) or self._follow_pick(node):
            return
        framed = [operand for operand in node.all_input_nodes if operand in self.frames]
        if not framed:
            return
        combine = self._combined(node)
        if combine is not None:
            self._combines[node] = combine
            return
        frames = {self.frames[operand] for operand in framed}
        if len(frames) > 1:
            self._reasons[node] = f"{node.name} ({target_name(node)}) combines slots in different orders"
        elif self._holds_slots(node, framed[0]):
            (self.frames[node],) = frames

    def _follow_pick(self, node: fx.Node) -> bool:
        """Whether a node picks the elements of a vector of indices that are known."""
        found = picked(node)
        if found is None:
            return False
        source, index = found
        known = self.facts.get(index)
        fake, indices = tensor_value(source), tensor_value(index)
        assert fake is not None and indices is not None
        if isinstance(known, Origin) and _are_equal(fake.shape[0], indices.shape[0], known.per):
            self.frames[node], self._sources[node] = known.order, (Read.ROW, source)
        elif isinstance(known, Permutation) and _are_equal(fake.shape[0], indices.shape[0]):
            self.frames[node] = known.order
            if self.frames.get(source) is NATURAL and self._sources.get(source, (None,))[0] is not Read.ROW:
                self._same[node] = source
            else:
                self._sources[node] = self._sources.get(source, (Read.SLOT, source))
        elif isinstance(known, Inverse) and self.frames.get(source) == known.order:
            if known.order.sort in self._single:
                self._combines[node] = (source, 1)
            else:
                self.frames[node], self._same[node] = NATURAL, source
        elif isinstance(known, (SortedKeys, Keys)) and self._is_constant(source):
            self.frames[node] = known.order if isinstance(known, SortedKeys) else NATURAL
        else:
            return False
        return True

    @functools.cached_property
    def _single(self) -> set[fx.Node]:
        """The sorts of slots of which each row has one: in their own order they are rows."""
        return {known.order.sort for known in self.facts.values() if isinstance(known, Origin) and known.per == 1}

    def _is_repeat(self, node: fx.Node) -> bool:
        """Whether a node gives each row's slots the row: ``rows.repeat_interleave(k, 0)``."""
        source: Any = node.args[0] if node.args else None
        per = argument(node, "repeats")
        if operation(node) != "repeat_interleave" or argument(node, "dim") != 0 or type(per) is not int:
            return False
        if not isinstance(source, fx.Node) or tensor_value(source) is None:
            return False
        self.frames[node], self._sources[node] = NATURAL, (Read.ROW, source)
        return True

    def _holds_slots(self, node: fx.Node, like: fx.Node) -> bool:
        """Whether all that a node gives has as many slots as an operand."""
        slots = self._slots_of(like)
        fakes = tensors_of(node)
        return bool(fakes) and all(is_plain(x) and split_rows(x.shape, slots) is not None for x in fakes)

    def _slots_of(self, node: fx.Node) -> Any:
        """How many slots the values of a framed node are of."""
        while node in self._same:
            node = self._same[node]
        frame = self.frames[node]
        if isinstance(frame, Order):
            fake = tensor_value(frame.sort.args[0])  # type: ignore[arg-type]
            assert fake is not None
            return fake.shape[0]
        fakes = tensors_of(node)
        if node in self._sources or picked(node) is not None:
            return fakes[0].shape[0]
        return self._slots_of(next(n for n in node.all_input_nodes if n in self.frames))

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
            if isinstance(known, Origin) and self.frames.get(slots) == known.order and is_zero and is_plain_sum:
                assert fake is not None
                count = self._slots_of(slots)  # type: ignore[arg-type]
                return (slots, known.per) if _are_equal(fake.shape[0], count, known.per) else None  # type: ignore[return-value]
        return None

    def _summed(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """``slots[N, k, ...].sum(1)``."""
        slots: Any = node.args[0]
        fake, out, dim = tensor_value(slots), tensor_value(node), argument(node, "dim")
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        if fake is None or out is None or not isinstance(dim, int) or self.frames.get(slots) is not NATURAL:
            return None
        is_wide = fake.ndim >= 2 and isinstance(fake.shape[1], int)
        if not is_wide or dim % fake.ndim != 1 or argument(node, "keepdim", False) or out.dtype != fake.dtype:
            return None
        per = int(fake.shape[1])
        return (slots, per) if _are_equal(fake.shape[0], self._slots_of(slots), per) else None

    # The region before it

    def _before(self, result: fx.Node) -> list[fx.Node]:
        """The framed nodes that lead to a result, in graph order."""
        found, queue = {result}, [result]
        while queue:
            node = queue.pop()
            if node in self._sources:
                continue
            for operand in node.all_input_nodes:
                if operand in self.frames and operand not in found:
                    found.add(operand)
                    queue.append(operand)
        return [node for node in self.graph.nodes if node in found]

    def _region(self, combine: fx.Node, result: fx.Node, per: int, before: list[fx.Node]) -> SlotRegion:
        inputs: dict[fx.Node, tuple[Read, fx.Node]] = {}
        same = {node: self._same[node] for node in before if node in self._same}
        nodes = [node for node in before if node not in same and node not in self._sources]
        products = {node: self._stack_of(node) for node in nodes if self._is_product(node)}
        slots = self._slots_of(result)
        views: dict[fx.Node, None] = {}
        for node in before:
            if node in self._sources:
                inputs[node] = self._sources[node]
            elif node not in same:
                inputs |= self._operands(node, products, slots, views)
        keys = {self._key_of(node) for node in products}
        orders = {frame for node in before if isinstance(frame := self.frames[node], Order)}
        if len(keys) != 1 or len(orders) > 1:
            raise Refusal("slots of several keys meet", Cause.EXPERTS)
        (key,) = keys
        stacks = [tensor_value(stack) for stack in products.values()]
        experts = {stack.shape[0] for stack in stacks if stack is not None}
        if len(experts) != 1:
            raise Refusal("its stacks have different numbers of matrices", Cause.EXPERTS)
        inputs = {node: (read, key if read is Read.KEY else source) for node, (read, source) in inputs.items()}
        region = SlotRegion(
            combine, result, tuple(nodes), inputs, same, tuple(views), products, key, slots, per, experts.pop()
        )
        self._check(region, {*before, combine})
        return region

    def _operands(
        self, node: fx.Node, products: dict[fx.Node, fx.Node], slots: Any, views: dict[fx.Node, None]
    ) -> dict[fx.Node, tuple[Read, fx.Node]]:
        """What a node of a region reads from outside of it; of a transpose of weights, which is noted, the weights."""
        found: dict[fx.Node, tuple[Read, fx.Node]] = {}
        for operand in node.all_input_nodes:
            if operand in self.frames or not tensors_of(operand):
                continue
            if isinstance(self.facts.get(operand), Keys):
                found[operand] = (Read.KEY, operand)
                continue
            if isinstance(self.facts.get(operand), Offsets) and node in products:
                continue
            fake = tensor_value(operand)
            if fake is None:
                raise Refusal(f"{operand.name} is no tensor", Cause.EXPERTS)
            holds = not self._is_constant(operand) and split_rows(fake.shape, slots) is not None
            if holds and self.frames[node] is not NATURAL:
                raise Refusal(f"{operand.name} is read by its place among sorted slots", Cause.EXPERTS)
            source = operand if holds else self._untransposed(operand, views)
            found[source] = (Read.SLOT if holds else Read.SHARED, source)
        return found

    def _untransposed(self, weights: fx.Node, views: dict[fx.Node, None]) -> fx.Node:
        chain = []
        while operation(weights) in PERMUTES and self._is_constant(weights):
            chain.append(weights)
            weights = weights.args[0]  # type: ignore[assignment]
        views.update(dict.fromkeys(chain[::-1]))
        return weights

    def _check(self, region: SlotRegion, inside: set[fx.Node]) -> None:
        for node in (*region.nodes, *region.same, *region.inputs, *region.reading(Read.ROW)):
            for fake in tensors_of(node):
                if not is_plain(fake):
                    raise Refusal(f"{node.name} is no plain tensor", Cause.NOT_PLAIN)
                if storage_key(fake) in self._mutated:
                    raise Refusal(f"{node.name} is written to in place", Cause.WRITTEN)
        for node in (*region.nodes, *region.same):
            if self.contexts[node].level:
                raise Refusal(f"{node.name} lies inside of a torch.func transform", Cause.NOT_PLAIN)
            outside = [user for user in node.users if user not in inside]
            if outside:
                what = outside[0].name if outside[0].op != "output" else "the output of the graph"
                raise Refusal(f"{what} reads {node.name}, a value of each slot", Cause.EXPERTS)
        if len({self.contexts[node].grad for node in (*region.nodes, region.combine)}) > 1:
            raise Refusal("a part of it runs without gradients", Cause.NO_GRAD)
        if len({self.contexts[node].inference for node in (*region.nodes, region.combine)}) > 1:
            raise Refusal("lies partly in inference_mode", Cause.NO_GRAD)

    # Products

    def _is_product(self, node: fx.Node) -> bool:
        return operation(node) in GROUPED_PRODUCTS or self._picked_stack(node) is not None

    def _picked_stack(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Of a product of each slot with a matrix that was picked by its key: what picked it, and the stack."""
        if operation(node) not in MATMULS:
            return None
        for operand in node.all_input_nodes:
            found = picked(operand)
            if found is None:
                continue
            fake = tensor_value(found[0])
            if isinstance(self.facts.get(found[1]), (Keys, SortedKeys)) and fake is not None and fake.ndim == 3:
                return operand, found[0]
        return None

    def _stack_of(self, product: fx.Node) -> fx.Node:
        """The stack of matrices of a product that is one of groups by their keys.

        Raises:
            Refusal: if it is not proved to be one.
        """
        by_pick = self._picked_stack(product)
        if by_pick is not None:
            return by_pick[1]
        stack, offsets = product.args[1], argument(product, "offs")
        known, frame = self.facts.get(offsets), self.frames.get(product.args[0])  # type: ignore[arg-type]
        fake = tensor_value(stack) if isinstance(stack, fx.Node) else None
        if fake is None or fake.ndim != 3 or not self._is_constant(stack):
            raise Refusal(f"{product.name} multiplies by no stack of weights", Cause.EXPERTS)
        if not isinstance(known, Offsets):
            raise Refusal(
                f"the groups of {product.name} are not proved to be those of keys below {fake.shape[0]}", Cause.EXPERTS
            )
        if not isinstance(frame, Order) or frame.key != known.key:
            raise Refusal(
                f"{product.name} groups slots by something else than the key that they are sorted by", Cause.EXPERTS
            )
        if known.bins != fake.shape[0]:
            raise Refusal(
                f"{product.name} has {fake.shape[0]} matrices for {known.bins} groups", Cause.EXPERTS
            )
        unknown = [name for name in ("bias", "scale_a", "scale_b") if argument(product, name) is not None]
        if unknown or argument(product, "out_dtype") not in (None, fake.dtype):
            raise Refusal(f"{product.name} ({target_name(product)}) does more than multiply", Cause.EXPERTS)
        return stack  # type: ignore[return-value]

    def _key_of(self, product: fx.Node) -> fx.Node:
        """The node that holds the keys of a product's slots, in the order of the slots."""
        by_pick = self._picked_stack(product)
        known = self.facts[picked(by_pick[0])[1] if by_pick is not None else argument(product, "offs")]  # type: ignore[index]
        if isinstance(known, SortedKeys):
            return known.order.sort.args[0]  # type: ignore[return-value]
        if isinstance(known, Keys):
            return picked(by_pick[0])[1]  # type: ignore[index]
        return self.frames[product.args[0]].sort.args[0]  # type: ignore[index, union-attr, return-value]

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a value is computed from weights and constants alone."""
        if node not in self._constant:
            if node.op in ("placeholder", "get_attr"):
                fake = tensor_value(node)
                found = node.op == "get_attr" or isinstance(fake, torch.nn.Parameter)
            elif operation(node) in ("arange",):
                found = False
            else:
                tensors = [n for n in node.all_input_nodes if tensors_of(n)]
                found = bool(tensors) and all(map(self._is_constant, tensors))
            self._constant[node] = found
        return self._constant[node]


_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))


def _are_equal(size: Any, slots: Any, per: int = 1) -> bool:
    """Whether a size, ``per`` times, is the number of slots for all values of their symbols."""
    return bool(sympy.expand(expression(size) * per - expression(slots)) == 0)


def _unexpanded(index: Any) -> Any:
    """The vector ``i`` of an index ``i[:, None].expand(-1, H)``."""
    while isinstance(index, fx.Node) and operation(index) in EXPANDS | {"unsqueeze", "view", "reshape", "getitem"}:
        fake, source = tensor_value(index), index.args[0]
        if fake is None or fake.ndim < 2 or not isinstance(source, fx.Node):
            break
        index = source
    return index
