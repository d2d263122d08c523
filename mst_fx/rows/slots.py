"""Slot regions: what experts make of each slot, from where rows are picked for their slots to where each row's slots are added up.

Slots are rows of their own, so that the table of rules holds for them as it is, for ``N·k`` rows in place of ``N``. What is new is their
order, their *frame* (:mod:`mst_fx.rows.frames`)::

    rows[perm // k] ─┐                          ┌─ y[inverse] ─ view(N, k, H) ─ sum(1)
    slots[perm] ─────┼─ products, activations ──┤
    keys ────────────┘                          └─ zeros(N, H).index_add(0, perm // k, y)

A region is left alone, with the reason, if any of its values is read outside: the result, and all that leads to it, is what is rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.modes import Context
from mst_fx.graph.names import common_path, module_path, target_name
from mst_fx.graph.spelling import PERMUTES, argument, operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of
from mst_fx.graph.writes import mutated_storages
from mst_fx.rows.fold import split_rows
from mst_fx.rows.frames import NATURAL, Frames, Read, are_equal, factors
from mst_fx.rows.routing import Keys, Offsets, Order, picked


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
        self.frames = Frames(graph)
        self._mutated = mutated_storages(graph)
        self._leading = {
            combine: self._before(result) for combine, (result, _) in self.frames.combines.items()
        }

    def regions(self) -> Iterator[tuple[list[fx.Node], SlotRegion | Refusal]]:
        """For each place where slots are added up, if they have been multiplied with the matrices of their keys: the products, and
        the region or why there is none."""
        for combine, (result, per) in self.frames.combines.items():
            nodes = self._leading[combine]
            products = [node for node in nodes if self.frames.is_product(node)]
            if not products:
                continue
            try:
                yield products, self._region(combine, result, per, nodes)
            except Refusal as refusal:
                yield products, refusal

    def left_out(self) -> Iterator[tuple[fx.Node, str]]:
        """The products with stacks that lead to no place where slots are added up, and why."""
        led = {node for nodes in self._leading.values() for node in nodes}
        for node in self.graph.nodes:
            if self.frames.is_product(node) and node not in led:
                yield node, self._why_not(node)

    def _why_not(self, product: fx.Node) -> str:
        if product not in self.frames.of:
            try:
                self._stack_of(product)
            except Refusal as refusal:
                return str(refusal)
            return self.frames.reasons.get(product, f"{product.name} reads slots whose order is not known")
        seen, queue = {product}, [product]
        while queue:
            for user in queue.pop(0).users:
                if user in self.frames.reasons:
                    return self.frames.reasons[user]
                if user not in self.frames.of and user not in self.frames.combines:
                    return f"{user.name} ({target_name(user)}) reads what they give"
                if user not in seen and user in self.frames.of:
                    seen.add(user)
                    queue.append(user)
        return "what they give is not added up by row"

    # The region before it

    def _before(self, result: fx.Node) -> list[fx.Node]:
        """The framed nodes that lead to a result, in graph order."""
        found, queue = {result}, [result]
        while queue:
            node = queue.pop()
            if node in self.frames.sources:
                continue
            for operand in node.all_input_nodes:
                if operand in self.frames.of and operand not in found:
                    found.add(operand)
                    queue.append(operand)
        return [node for node in self.graph.nodes if node in found]

    def _region(self, combine: fx.Node, result: fx.Node, per: int, before: list[fx.Node]) -> SlotRegion:
        inputs: dict[fx.Node, tuple[Read, fx.Node]] = {}
        same = {node: self.frames.same[node] for node in before if node in self.frames.same}
        nodes = [node for node in before if node not in same and node not in self.frames.sources]
        products = {node: self._stack_of(node) for node in nodes if self.frames.is_product(node)}
        slots = self.frames.slots_of(result)
        views: dict[fx.Node, None] = {}
        for node in before:
            if node in self.frames.sources:
                inputs[node] = self.frames.sources[node]
            elif node not in same:
                inputs |= self._operands(node, products, slots, views)
        key, experts = self._agreed(before, products)
        self._check_sources(inputs, key, slots, per)
        inputs = {
            node: (read, key if read is Read.KEY else source) for node, (read, source) in inputs.items()
        }
        region = SlotRegion(
            combine,
            result,
            tuple(nodes),
            inputs,
            same,
            tuple(views),
            products,
            key,
            slots,
            per,
            experts,
        )
        self._check(region, {*before, combine})
        return region

    def _agreed(self, before: list[fx.Node], products: dict[fx.Node, fx.Node]) -> tuple[fx.Node, int]:
        """The one key of all products, and how many matrices their stacks have."""
        keys = {self._key_of(node) for node in products}
        orders = {frame for node in before if isinstance(frame := self.frames.of[node], Order)}
        if len(keys) != 1 or len(orders) > 1:
            raise Refusal("slots of several keys meet", Cause.EXPERTS)
        stacks = [tensor_value(stack) for stack in products.values()]
        experts = {stack.shape[0] for stack in stacks if stack is not None}
        if len(experts) != 1:
            raise Refusal("its stacks have different numbers of matrices", Cause.EXPERTS)
        return keys.pop(), experts.pop()

    def _check_sources(
        self, inputs: dict[fx.Node, tuple[Read, fx.Node]], key: fx.Node, slots: Any, per: int
    ) -> None:
        """Rows have as many slots as are added up, and what is looked up is so by the keys of the products."""
        for node, (read, source) in inputs.items():
            fake, known = tensor_value(source), self.frames.facts.get(node)
            if read is Read.ROW and (fake is None or not are_equal(fake.shape[0], slots, per)):
                raise Refusal(
                    f"{source.name} has other rows than those whose slots are added up", Cause.EXPERTS
                )
            if isinstance(known, Keys) and known != self.frames.facts.get(key):
                raise Refusal(f"{node.name} holds other keys than those of the experts", Cause.EXPERTS)

    def _operands(
        self, node: fx.Node, products: dict[fx.Node, fx.Node], slots: Any, views: dict[fx.Node, None]
    ) -> dict[fx.Node, tuple[Read, fx.Node]]:
        """What a node of a region reads from outside of it; of a transpose of weights, which is noted, the weights."""
        found: dict[fx.Node, tuple[Read, fx.Node]] = {}
        looked_up = (picked(node) or (None,))[0]
        for operand in node.all_input_nodes:
            if operand in self.frames.of or not tensors_of(operand):
                continue
            if isinstance(self.frames.facts.get(operand), Keys):
                found[operand] = (Read.KEY, operand)
                continue
            if isinstance(self.frames.facts.get(operand), Offsets) and node in products:
                continue
            fake = tensor_value(operand)
            if fake is None:
                raise Refusal(f"{operand.name} is no tensor", Cause.EXPERTS)
            is_whole = (
                operand is products.get(node) or operand is looked_up or self.frames.is_constant(operand)
            )
            holds = not is_whole and split_rows(fake.shape, slots) is not None
            if holds and self.frames.of[node] is not NATURAL:
                raise Refusal(f"{operand.name} is read by its place among sorted slots", Cause.EXPERTS)
            source = operand if holds else self._untransposed(operand, views)
            found[source] = (Read.SLOT if holds else Read.SHARED, source)
        return found

    def _untransposed(self, weights: fx.Node, views: dict[fx.Node, None]) -> fx.Node:
        chain = []
        while operation(weights) in PERMUTES and self.frames.is_constant(weights):
            chain.append(weights)
            weights = weights.args[0]  # type: ignore[assignment]
        views.update(dict.fromkeys(chain[::-1]))
        return weights

    def _check(self, region: SlotRegion, inside: set[fx.Node]) -> None:
        sources = [source for _, source in region.inputs.values()]
        for node in (*region.nodes, *region.same, *region.inputs, *sources):
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
        picks = [
            node
            for node, (read, source) in region.inputs.items()
            if node is not source and read is not Read.KEY
        ]
        run = (*picks, *region.views, *region.nodes, *region.same, region.combine)
        if len({self.contexts[node].grad for node in run}) > 1:
            raise Refusal("a part of it runs without gradients", Cause.NO_GRAD)
        if len({self.contexts[node].inference for node in run}) > 1:
            raise Refusal("lies partly in inference_mode", Cause.NO_GRAD)

    # Products

    def _stack_of(self, product: fx.Node) -> fx.Node:
        """The stack of matrices of a product that is one of groups by their keys.

        Raises:
            Refusal: if it is not proved to be one.
        """
        by_pick = self.frames.picked_stack(product)
        if by_pick is not None:
            return by_pick[1]
        source, stack = factors(product)
        known, frame = self.frames.facts.get(argument(product, "offs")), self.frames.of.get(source)
        fake = tensor_value(stack)
        if fake is None or fake.ndim != 3 or stack in self.frames.of:
            raise Refusal(f"{product.name} multiplies by no stack of weights", Cause.EXPERTS)
        if not isinstance(known, Offsets):
            raise Refusal(
                f"the groups of {product.name} are not proved to be those of keys below {fake.shape[0]}",
                Cause.EXPERTS,
            )
        if not isinstance(frame, Order) or frame.key != known.key:
            raise Refusal(
                f"{product.name} groups slots by something else than the key that they are sorted by",
                Cause.EXPERTS,
            )
        if known.bins != fake.shape[0]:
            raise Refusal(
                f"{product.name} has {fake.shape[0]} matrices for {known.bins} groups", Cause.EXPERTS
            )
        unknown = [name for name in ("bias", "scale_a", "scale_b") if argument(product, name) is not None]
        if unknown or argument(product, "out_dtype") not in (None, fake.dtype):
            raise Refusal(f"{product.name} ({target_name(product)}) does more than multiply", Cause.EXPERTS)
        return stack

    def _key_of(self, product: fx.Node) -> fx.Node:
        """The node that holds the keys of a product's slots, in the order of the slots."""
        by_pick = self.frames.picked_stack(product)
        if by_pick is not None:
            index = picked(by_pick[0])[1]  # type: ignore[index]
            known = self.frames.facts[index]
            return index if isinstance(known, Keys) else _sorted_keys(known.order)  # type: ignore[union-attr]
        return _sorted_keys(self.frames.of[factors(product)[0]])


def _sorted_keys(order: Any) -> fx.Node:
    """What an order sorts."""
    assert isinstance(order, Order)
    keys = order.sort.args[0]
    assert isinstance(keys, fx.Node)
    return keys
