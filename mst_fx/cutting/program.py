"""A walk through a program in which each rank of a group keeps its own tokens.

Every node of the graph as it was captured works on all tokens. The walk writes behind it what works on this rank's (its
:class:`~mst_fx.cutting.values.Standing`), starting at the embedding of token ids, and takes away what was superseded:

- what works on each token alone reads this rank's. An operand that all ranks have whole is cut where it meets them: as far up as its
  producers work on each token alone, at best integers (of RoPE's tables the position ids);
- a sum over tokens is added up over the ranks;
- attention gets all tokens of some heads (:mod:`mst_fx.cutting.sites`);
- a checkpointed layer is walked through in turn;
- what else reads several tokens, or is not understood, has them gathered: the operands without which it would be row-wise, or else all.

Nothing here depends on which rank it is but sizes and offsets: graphs of all ranks have the same nodes in the same order.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.cutting import readings
from mst_fx.cutting.facts import cut_again, index_of, is_activation, is_given, why_not
from mst_fx.cutting.foreign import give_true_gradient, is_foreign
from mst_fx.cutting.layers import is_layer, walk_through
from mst_fx.cutting.sites import exchange, is_site
from mst_fx.cutting.values import (
    Leaf,
    Share,
    Standing,
    add_gather,
    add_narrow,
    local_fake,
    shape_of,
)
from mst_fx.errors import Refusal
from mst_fx.graph.edit import add_call, eliminate_dead_code
from mst_fx.graph.levels import placeholders_of
from mst_fx.graph.modes import contexts
from mst_fx.graph.names import module_path
from mst_fx.graph.spelling import EMBEDDINGS, dropout_probability, operation
from mst_fx.graph.values import VALUE, storage_keys, tensor_value, tensors_of
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.group import Group
from mst_fx.rows.labels import SUMMED
from mst_fx.rows.tokens import Prover, Tokens

Refuse = Callable[[fx.Node, str], None]


class Cutter:
    """The walk through one graph.

    Args:
        gm: is changed.
        group: with more than one rank.
        prover: of the program.
        refuse: is told of each node that has its operands gathered, and why.
        call, above: of a checkpointed layer the node that runs it, and the walk that this is a part of.

    Attributes:
        now: what stands for the nodes that were captured, where it is not they themselves.
        seeds, sites: the embeddings, or inputs, at which tokens were cut, and by name the attention that was put between exchanges;
            with the number of tokens.
        modes: those that each node lies in.
        imported: of a layer the operands of its call that were added.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        group: Group,
        prover: Prover,
        refuse: Refuse,
        call: fx.Node | None = None,
        above: Cutter | None = None,
    ) -> None:
        self.gm, self.graph, self.group, self.prover, self.refuse = gm, gm.graph, group, prover, refuse
        self.call, self.above = call, above
        self.now: dict[fx.Node, Standing] = {}
        self.seeds: list[tuple[fx.Node, Tokens]] = above.seeds if above is not None else []
        self.sites: list[tuple[str, int]] = above.sites if above is not None else []
        self.modes = contexts(self.graph)
        self._captured = set(self.graph.nodes)
        self._mutated = mutated_storages(self.graph)
        self._gathered: dict[fx.Node, fx.Node] = {}
        self._leaf_of: dict[fx.Node, Leaf] = {}  # of a gathered value
        self._cut: dict[tuple[fx.Node, Tokens], fx.Node] = {}
        self.imported: list[fx.Node] = []

    # The walk

    def run(self) -> None:
        captured = list(self.graph.nodes)
        if self.above is None and not any(map(self._is_seed, captured)):
            self._start_at_activations()
        for node in captured:
            if node.op in ("call_function", "call_method", "call_module"):
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        known = [operand for operand in node.all_input_nodes if operand in self.now]
        is_cut = any(self.now[operand].is_cut for operand in known)
        if node.target is operator.getitem and known and self.now[known[0]].is_tuple:
            self.now[node] = Standing((self.now[known[0]].leaves[node.args[1]],))  # type: ignore[index]
        elif is_cut and (same := readings.joined_with_nothing(node)) is not None:
            self.now[node] = self.now[same]
        elif not is_cut and self._is_seed(node):
            self._seed(node)
        elif not is_cut:
            self._rewire(node)
        elif is_layer(self.gm, node):
            walk_through(self, node)
        elif is_site(node) and self._is_plain(node):
            self._exchange(node)
        else:
            self._cut_or_gather(node)

    def outputs(self, nodes: Iterable[Any]) -> list[Any]:
        """What stands for some outputs."""
        found = []
        for node in nodes:
            known = self.now.get(node) if isinstance(node, fx.Node) else None
            found.append(node if known is None or self._is_whole_too(node) else known.leaves[0])
        return found

    def _is_whole_too(self, node: fx.Node) -> bool:
        """Whether a node was left as it is, and what it gives was cut again."""
        return self._gathered.get(self.now[node].leaves[0].node) is node

    def finish(self) -> None:
        """Takes away what was superseded."""
        for node in reversed(list(self.graph.nodes)):
            known = self.now.get(node)
            if known is not None and known.leaves[0].node is not node and not self._is_whole_too(node):
                self.graph.erase_node(node)
        for node in filter(is_foreign, list(self.graph.nodes)):
            if node in self._captured and self.modes[node].grad:
                give_true_gradient(self.graph, node, self.group)
        eliminate_dead_code(self.graph)
        self.gm.recompile()

    # Where tokens come in

    def _is_seed(self, node: fx.Node) -> bool:
        """Whether a node is the embedding of token ids that were given: of so many that each rank has two."""
        if operation(node) not in EMBEDDINGS or self.above is not None or not self._is_plain(node):
            return False
        ids = index_of(node)
        fake = tensor_value(ids) if ids is not None else None
        if ids is None or fake is None or fake.ndim == 0 or not is_given(ids):
            return False
        return shape_of(ids)[-1] >= 2 * self.group.ranks

    def _seed(self, node: fx.Node) -> None:
        ids = index_of(node)
        assert ids is not None
        place = Tokens(len(shape_of(ids)) - 1, 1, shape_of(ids)[-1])
        whole = [operand for operand in readings.sources(node) if operand is not ids]
        if self._write_first(node, [{ids: (place,), **dict.fromkeys(whole, (None,))}]) is None:
            self.seeds.append((node, place))
        else:
            self._rewire(node)

    def _start_at_activations(self) -> None:
        """Cuts what a graph is given instead of token ids: embeddings that the caller made, or what comes over a graph break, ``[B, S, E]``."""
        count = 0
        for node in placeholders_of(self.gm):
            fake = tensor_value(node)
            if fake is None or not is_activation(fake) or not self._is_plain(node):
                continue
            shape = shape_of(node)
            if shape[1] < 2 * self.group.ranks or count not in (0, shape[1]):
                continue
            place, count = Tokens(1, 1, shape[1]), shape[1]
            mine = Leaf(self.cut(node, place, node.next), place)
            self.now[node], self._gathered[mine.node] = Standing((mine,)), node
            self.seeds.append((node, place))

    # Nodes

    def _exchange(self, node: fx.Node) -> None:
        query = self.now.get(node.all_input_nodes[0])
        try:
            exchange(self, node)
        except Refusal as refusal:
            self._whole(node, str(refusal))
        else:
            place = query.leaves[0].place if query is not None else None
            assert place is not None
            names = (module_path(each) for each in (node, *node.users))
            self.sites.append((next(filter(None, names), node.name), place.count))

    def _cut_or_gather(self, node: fx.Node) -> None:
        """Writes a node that works on this rank's tokens; if there is none, it works on those of all ranks."""
        operands = readings.sources(node)
        cut = [operand for operand in operands if operand in self.now and self.now[operand].is_cut]
        free = [operand for operand in operands if operand not in cut]
        why: Refusal | None = Refusal(why_not(node) or "is not understood")
        if self._is_plain(node) and why_not(node) is None and len(cut) == len(set(cut)):
            why = self._write_first(node, self._readings(cut, free))
        if why is not None:
            self._whole(node, str(why))

    def _readings(self, cut: Sequence[fx.Node], free: Sequence[fx.Node]) -> Iterable[dict[fx.Node, Any]]:
        """Ways to read operands: as they are, then with one gathered, those with the fewest bytes first."""
        small_first = sorted(cut, key=lambda operand: sum(x.numel() for x in tensors_of(operand)))
        for gathered in (None, *small_first) if len(cut) > 1 else (None,):
            kept = {x: self.now[x].places for x in cut if x is not gathered}
            counts = {place.count for places in kept.values() for place in places if place is not None}
            if len(counts) == 1:
                whole = {gathered: (None,) * len(tensors_of(gathered))} if gathered is not None else {}
                yield from readings.choices({**kept, **whole}, free, counts.pop())

    def _write_first(self, node: fx.Node, ways: Iterable[dict[fx.Node, Any]]) -> Refusal | None:
        """Writes a node as it is in the first reading that is proved; None, or why there is none."""
        first: Refusal | None = None
        for reading in ways:
            try:
                found = readings.labels(node, reading, self.prover, self.modes[node])
            except Refusal as refusal:
                first = first or refusal
                continue
            for operand, places in reading.items():
                if operand in self.now and self.now[operand].is_cut and not any(places):
                    self.refuse(node, f"reads the tokens of all ranks of {operand.name}: {first}")
            self._write(node, reading, found)
            return None
        return first or Refusal("has tokens of several sequences")

    def _write(self, node: fx.Node, reading: dict[fx.Node, Any], found: Sequence[Any]) -> None:
        def given(operand: fx.Node) -> Any:
            if operand in reading and any(reading[operand]):
                return self._local(operand, reading[operand], node)
            return self.whole(operand)

        places = [None if label is SUMMED else label for label in found]
        one = places[0] if tensor_value(node) is not None else None
        args = {operand: given(operand) for operand in node.all_input_nodes}
        with self.graph.inserting_before(node):
            new = readings.write(self.graph, node, args.__getitem__, one, self.group, self.modes[node])
            self.modes[new] = self.modes[node]
            leaves = self.leaves_of(new, places)
            leaves = [
                Leaf(
                    add_call(self.graph, torch.ops.mst_fx.sum_over_ranks.default, leaf.node, self.group.name)
                )
                if label is SUMMED
                else leaf
                for leaf, label in zip(leaves, found, strict=True)
            ]
        self._check(node, leaves)
        self.now[node] = Standing(tuple(leaves), tensor_value(node) is None)

    def leaves_of(self, new: fx.Node, places: Sequence[Tokens | None]) -> list[Leaf]:
        """The tensors of a new node, at the graph's insertion point."""
        if tensor_value(new) is not None:
            return [Leaf(new, places[0])]
        members = [add_call(self.graph, operator.getitem, new, index) for index in range(len(places))]
        return [Leaf(member, place) for member, place in zip(members, places, strict=True)]

    def _check(self, node: fx.Node, leaves: Sequence[Leaf]) -> None:
        """What a node gives on this rank has the shape that its label says; else the proof has a defect."""
        for was, leaf in zip(tensors_of(node), leaves, strict=True):
            share = Share.of(self.group, leaf.place.count) if leaf.place is not None else None
            wanted = local_fake(was, leaf.place, share).shape
            found = shape_of(leaf.node)
            assert tuple(map(int, wanted)) == found, f"{node.format_node()}: {found}, not {tuple(wanted)}"

    def _whole(self, node: fx.Node, why: str) -> None:
        """Leaves a node as it is, on the tokens of all ranks; what it gives is cut again if it has them at the same place."""
        places = [
            (shape_of(operand), leaf.place)
            for operand in node.all_input_nodes
            if operand in self.now
            for leaf in self.now[operand].leaves[:1]
            if leaf.place is not None and tensor_value(operand) is not None
        ]
        self.refuse(node, f"reads the tokens of all ranks: {why}")
        self._rewire(node)
        fake = tensor_value(node)
        if fake is None or not fake.is_floating_point() or not self._is_plain(node):
            return
        for shape, place in places:
            count = cut_again(shape, place, shape_of(node))
            if count >= 2 * self.group.ranks:
                again = Tokens(place.dim, place.batch, count)
                mine = Leaf(self.cut(node, again, node.next), again)
                self.now[node], self._gathered[mine.node] = Standing((mine,)), node
                return

    def _rewire(self, node: fx.Node) -> None:
        """Lets a node read what stands for its operands, of all ranks."""
        wanted = {operand: self.whole(operand) for operand in node.all_input_nodes}
        if any(new is not operand for operand, new in wanted.items()):
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), wanted.__getitem__)

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a node is a function of its operands alone, and lies in no transform."""
        around = (node, *node.all_input_nodes)
        touched = set().union(*map(storage_keys, around))
        is_written = writes_in_place(node) or not self._mutated.isdisjoint(touched)
        return not is_written and not self.modes[node].level

    # Values

    def whole(self, operand: fx.Node) -> Any:
        """What stands for a value on all ranks."""
        known = self.now.get(operand)
        if known is None:
            return operand
        found = [self._gather(leaf) for leaf in known.leaves]
        return tuple(found) if known.is_tuple else found[0]

    def _local(self, operand: fx.Node, places: Sequence[Tokens | None], user: fx.Node) -> Any:
        known = self.now.get(operand)
        if known is not None and known.is_cut:
            found = [leaf.node for leaf in known.leaves]
            return tuple(found) if known.is_tuple else found[0]
        (place,) = places
        assert place is not None
        return self.cut(self.whole(operand), place, user)

    def _gather(self, leaf: Leaf) -> fx.Node:
        if leaf.place is None:
            return leaf.node
        if leaf.node not in self._gathered:
            behind = placeholders_of(self.gm)[-1] if leaf.node.op == "placeholder" else leaf.node
            with self.graph.inserting_after(behind):
                new = add_gather(self.graph, leaf, self.group)
            self._gathered[leaf.node] = new
            self._leaf_of[new] = leaf
        return self._gathered[leaf.node]

    def cut(self, node: fx.Node, place: Tokens, user: fx.Node) -> fx.Node:
        """This rank's tokens of a value that all ranks have, for a node that reads them."""
        leaf = self._leaf_of.get(node)
        if leaf is not None and leaf.place == place:
            return leaf.node
        share = Share.of(self.group, place.count)
        if not self._mutated.isdisjoint(storage_keys(node)):
            with self.graph.inserting_before(user):
                return add_narrow(self.graph, node, place, share)
        if (node, place) not in self._cut:
            self._cut[node, place] = self._pushed(node, place) or self._narrowed(node, place, share)
        return self._cut[node, place]

    def _narrowed(self, node: fx.Node, place: Tokens, share: Share) -> fx.Node:
        behind = placeholders_of(self.gm)[-1] if node.op == "placeholder" else node
        with self.graph.inserting_before(behind.next):
            return add_narrow(self.graph, node, place, share)

    def _pushed(self, node: fx.Node, place: Tokens) -> fx.Node | None:
        """The node on this rank's tokens of its operands, if it works on each token alone; None: cut what it gives."""
        fake = tensor_value(node)
        if fake is None or node not in self._captured or node in self.now:
            return None
        if not fake.is_floating_point() and fake.numel() <= place.batch * place.count:
            return None
        if node.op == "placeholder" and self.above is not None:
            return self._import(node, place)
        if node.op not in ("call_function", "call_method") or why_not(node) or not self._is_plain(node):
            return None
        if dropout_probability(node):  # what all ranks have whole is drawn once
            return None
        for reading in self._readings_back(node, place):
            try:
                (found,) = readings.labels(node, reading, self.prover, self.modes[node])
            except Refusal:
                continue
            if found == place:
                args = {
                    operand: self.cut(operand, reading[operand][0], node)
                    if operand in reading and reading[operand][0]
                    else operand
                    for operand in node.all_input_nodes
                }
                with self.graph.inserting_before(node.next):
                    new = readings.write(
                        self.graph, node, args.__getitem__, place, self.group, self.modes[node]
                    )
                self.modes[new] = self.modes[node]
                self._check(node, [Leaf(new, place)])
                return new
        return None

    def _readings_back(self, node: fx.Node, place: Tokens) -> Iterable[dict[fx.Node, Any]]:
        sources = [x for x in readings.sources(node) if tensor_value(x) is not None]
        found = (
            readings.choices({}, sources, place.count) if len(sources) == len(readings.sources(node)) else ()
        )
        return itertools.islice((way for way in found if any(p[0] for p in way.values())), 16)

    # Checkpointed layers

    def inside(self, layer_graph: fx.GraphModule, call: fx.Node) -> Cutter:
        """The walk through a layer that a node calls."""
        return Cutter(layer_graph, self.group, self.prover, self.refuse, call, self)

    def _import(self, node: fx.Node, place: Tokens) -> fx.Node:
        """This rank's tokens of an operand of a layer, cut outside of it."""
        assert self.above is not None and self.call is not None
        operand = self.call.args[1 + self._given().index(node)]
        assert isinstance(operand, fx.Node)
        outer = self.above.cut(self.above.whole(operand), place, self.call)
        with self.graph.inserting_after(placeholders_of(self.gm)[-1]):
            new = self.graph.placeholder(f"{node.name}_of_rank")
        fake = tensor_value(node)
        assert fake is not None
        new.meta[VALUE] = local_fake(fake, place, Share.of(self.group, place.count))
        self.imported.append(outer)
        return new

    def _given(self) -> list[fx.Node]:
        """The inputs of a layer that it was captured with."""
        return [node for node in placeholders_of(self.gm) if node in self._captured]

    def enter(self, inner: fx.Node, place: Tokens) -> None:
        """Says of an input that it is this rank's tokens."""
        fake = tensor_value(inner)
        assert fake is not None
        inner.meta[VALUE] = local_fake(fake, place, Share.of(self.group, place.count))
        self.now[inner] = Standing((Leaf(inner, place),))
