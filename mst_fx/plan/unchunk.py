"""Loops un-chunked: what runs inside of them stands in the joint graph in their place, of all rows at once.

Before: ``loop(x, weights) … loop_backward(x, weights, tangent)``, which makes the inside again, a chunk at a time. After: the inside, where
the loop was, and its gradient, where that was. What of it is kept, and what is made again behind gates, is a layer's choice as any other.
Numbers agree to rounding: a weight's gradient is one product, and no sum over chunks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.edit import copy_provenance
from mst_fx.graph.fill import fake_mode_of
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.costs import plus
from mst_fx.plan.joint_graph import JointGraph, source_of
from mst_fx.plan.layers import Layer
from mst_fx.plan.loops import Inside, Insides, Loop, loops_of
from mst_fx.torch_api.joint import copied, is_of_pass_of
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.symbols import expression


class Unchunking:
    """The layers of a joint graph, as they are without their loops, and graphs in which some layers have none.

    Attributes:
        choices: of each layer, what may be kept of it un-chunked; none where it has no loop that can be.
        again: of each layer, the cost of what its loops make again while they stand there.
    """

    def __init__(self, joint: JointGraph, layers: Sequence[Layer], wanted: Collection[fx.Node]) -> None:
        """
        Args:
            layers: with what is behind the last.
            wanted: what is kept in any case (:func:`mst_fx.plan.choices.choices_of`).
        """
        self._insides = Insides()
        loops = loops_of(joint, wanted)
        by_layer = [_loops_in(layer, after, loops) for layer, after in itertools.pairwise(layers)]
        self.again = [plus(self._insides.of(loop).again for loop in loops) for loops in by_layer]
        graph = copied(joint.graph)
        copies = dict(zip(joint.graph.nodes, graph.nodes, strict=True))
        self._all = self._inlined(graph, copies, itertools.chain(*by_layer), is_trial=True)
        gone = {node for loop in self._all.pieces for node in loop.nodes}
        kept = {self._all.instead[node] for node in wanted if node not in gone}
        self.choices = [
            choices_of(layer, kept) if layer.unchunked else []
            for layer in self._layers(JointGraph(graph), layers, by_layer, gone)
        ]

    def _layers(
        self, joint: JointGraph, old: Sequence[Layer], loops: Sequence[Sequence[Loop]], gone: set[fx.Node]
    ) -> list[Layer]:
        """The layers, in the graph in which all loops are inlined."""
        instead, pieces = self._all.instead, self._all.pieces
        starts = {instead[layer.start] for layer in old}
        own: dict[fx.Node, int] = {}
        of_loop: dict[fx.Node, int] = {}
        for index, (layer, inside) in enumerate(zip(old, loops, strict=False)):
            own |= {instead[node]: index for node in layer.nodes if node not in gone}
            of_loop |= {node: index for loop in inside for node in pieces[loop]}
        begun = {instead[layer.start]: index for index, layer in enumerate(old)}
        for node in joint.forward:
            # What reads weights alone is no layer's, as elsewhere (layers_of).
            read = [begun.get(source, own.get(source)) for source in node.all_input_nodes]
            if node in of_loop and of_loop[node] in read and node not in starts:
                own[node] = of_loop[node]
        nodes: list[list[fx.Node]] = [[] for _ in loops]
        readers: list[list[tuple[fx.Node, fx.Node]]] = [[] for _ in loops]
        for node in joint.forward:
            if node in own:
                nodes[own[node]].append(node)
        for user, node in joint.read_backward():
            if node in own:
                readers[own[node]].append((user, node))
        return [
            Layer(instead[layer.start], tuple(made), tuple(read), layer.kind, tuple(inside))
            for layer, made, read, inside in zip(old, nodes, readers, loops, strict=False)
        ]

    def written(
        self, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], chosen: Sequence[Choice], is_trial: bool
    ) -> list[Choice]:
        """Inlines the loops of the layers that are to have none, in a copy of the graph, or in the graph itself.

        Args:
            copies: what each node of the graph is there.
            chosen: choices of layers of the graph, and of ours.
            is_trial: whether that graph is only looked at: making values of its own for each node is most of the time.

        Returns:
            The same choices, of that graph.
        """
        loops = itertools.chain(*(choice.layer.unchunked for choice in chosen))
        here = self._inlined(graph, copies, loops, is_trial)
        nodes = here.instead | here.from_other(self._all)
        return [choice.of_copies(nodes) for choice in chosen]

    def _inlined(
        self, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], loops: Iterable[Loop], is_trial: bool
    ) -> _Inlined:
        found = _Inlined(graph, dict(copies), {}, is_trial)
        for loop in loops:
            found.inline(loop, self._insides.of(loop))
        return found


def _loops_in(layer: Layer, after: Layer, loops: Sequence[Loop]) -> list[Loop]:
    """Those that run between the start of one layer and that of the next, which may be what a loop gives."""
    nodes = {*layer.nodes, source_of(after.start)}
    return [loop for loop in loops if loop.forward in nodes]


@dataclasses.dataclass
class _Inlined:
    """A graph without some of the loops that another one has.

    Attributes:
        graph: it.
        instead: what each node of the other graph is here; of a loop's results and gradients, what replaces them.
        pieces: the nodes that came for each loop, in the same order in every graph.
        is_trial: whether these share their values with those of equal loops.
    """

    graph: fx.Graph
    instead: dict[fx.Node, fx.Node]
    pieces: dict[Loop, list[fx.Node]]
    is_trial: bool

    def __post_init__(self) -> None:
        sizes = [(node, node.meta.get("val")) for node in self.graph.find_nodes(op="placeholder")]
        self._sizes = {expression(size): node for node, size in sizes if isinstance(size, torch.SymInt)}

    def from_other(self, other: _Inlined) -> dict[fx.Node, fx.Node]:
        """What the nodes of another graph, in which these loops and more are inlined, are here."""
        gone = {node for loop in other.pieces for node in loop.nodes}
        results = {node for loop in other.pieces for node, _ in (*loop.results, *loop.gradients)}
        found = {other.instead[node]: self.instead[node] for node in results}
        found |= {other.instead[node]: here for node, here in self.instead.items() if node not in gone}
        for loop, pieces in self.pieces.items():
            found |= zip(other.pieces[loop], pieces, strict=True)
        return found

    def inline(self, loop: Loop, inside: Inside) -> None:
        """Puts what is inside of a loop and of its gradient in their places."""
        forward, backward = self.instead[loop.forward], self.instead[loop.backward]
        given = (self.instead[node] for node in loop.operands)
        here = dict(zip(inside.graph.find_nodes(op="placeholder"), given, strict=True))
        mode = fake_mode_of(node.meta["val"] for node in here.values())
        assert mode is not None
        pieces: list[fx.Node] = []
        self.pieces[loop] = pieces
        with mode, torch.no_grad(), enable_python_dispatcher():
            for node in inside.graph.nodes:
                if node.op == "call_function":
                    found = self._size(node)
                    if found is None:
                        found = self._copy(node, here, backward if node in inside.backward else forward)
                        copy_provenance(forward, found)
                        pieces.append(found)
                    here[node] = found
        self._replace({self.instead[node]: here[inside.outputs[index]] for node, index in loop.results})
        self._replace({self.instead[node]: here[inside.gradients[index]] for node, index in loop.gradients})
        self.graph.erase_node(backward)
        if loop.forward not in dict(loop.results):
            self.graph.erase_node(forward)

    def _replace(self, news: Mapping[fx.Node, fx.Node]) -> None:
        """Lets others read what replaces some nodes, which are erased."""
        for old, new in news.items():
            old.replace_all_uses_with(new)
            self.graph.erase_node(old)
        self.instead = {node: news.get(here, here) for node, here in self.instead.items()}

    def _size(self, node: fx.Node) -> fx.Node | None:
        """The input that has the symbolic size which a call gives."""
        value = node.meta.get("val")
        return self._sizes.get(expression(value)) if isinstance(value, torch.SymInt) else None

    def _copy(self, node: fx.Node, here: Mapping[fx.Node, fx.Node], place: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), here.__getitem__)
        with self.graph.inserting_before(place):
            new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {"val": node.meta["val"] if self.is_trial else _value(new)}
        is_of_pass_of(new, place)
        return new


def _value(node: fx.Node) -> Any:
    """What a call gives on fakes, in their mode."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    return node.target(*args, **kwargs)  # type: ignore[operator]
