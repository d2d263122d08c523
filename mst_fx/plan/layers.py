"""The layers of a joint graph: what lies between two *waists*, the tensors through which all rows pass."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import networkx
from torch import fx

from mst_fx.plan.joint_graph import (
    JointGraph,
    bytes_of,
    is_attention,
    is_cheap,
    is_exchange,
    is_view,
    tensor_of,
)
from mst_fx.plan.loops import Loop

_SINK = "sink"


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What is made from one waist up to the next.

    Attributes:
        start: the waist: kept, or made again before the layer is.
        nodes: the forward pass behind it, up to the next layer's start, in order; with what only gradients read.
        readers: the nodes of the backward pass that read one of ``nodes``, and which.
        kind: the same for layers of equal operators and shapes.
        unchunked: the loops in whose place their insides are (:mod:`mst_fx.plan.unchunk`).
        end: the next waist; None where it is not known.
    """

    start: fx.Node
    nodes: tuple[fx.Node, ...]
    readers: tuple[tuple[fx.Node, fx.Node], ...]
    kind: str
    unchunked: tuple[Loop, ...] = ()
    end: fx.Node | None = None

    def of_copies(self, copies: Mapping[fx.Node, fx.Node]) -> Layer:
        """The same of a copy of the graph."""
        return Layer(
            copies[self.start],
            tuple(copies[node] for node in self.nodes),
            tuple((copies[user], copies[node]) for user, node in self.readers),
            self.kind,
            self.unchunked,
            None if self.end is None else copies.get(self.end),
        )


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where the backward pass of a layer begins.

    Attributes:
        first: its first node: what it reads of the forward pass is there before.
        after: a gradient that is there by then, and not much earlier.
    """

    first: fx.Node
    after: fx.Node


def begins_of(joint: JointGraph, layers: Sequence[Layer]) -> dict[int, Begin]:
    """Where the backward passes of layers begin, by number: of those that have one."""
    order = {node: index for index, node in enumerate(joint.graph.nodes)}
    found: dict[int, Begin] = {}
    for number, layer in enumerate(layers):
        readers = [user for user, _ in layer.readers]
        readers += [user for user in layer.start.users if user in joint.backward]
        if readers:
            first = min(readers, key=order.__getitem__)
            found[number] = Begin(first, arriving(joint, first)[0])
    return found


def arriving(joint: JointGraph, node: fx.Node) -> list[fx.Node]:
    """The gradients that a node reads."""
    return [n for n in node.all_input_nodes if n in joint.backward and tensor_of(n) is not None]


def layers_of(joint: JointGraph) -> list[Layer]:
    """The layers of a graph, in order, and what is behind the last; none if there are no two tensors through which all rows
    pass."""
    starts = _starts(joint)
    place = {start: index for index, start in enumerate(starts)}
    layer_of: dict[fx.Node, int] = {}
    for node in joint.forward:
        read = [place.get(source, layer_of.get(source, -1)) for source in node.all_input_nodes]
        if max(read, default=-1) >= 0:
            layer_of[node] = max(read)
    layer_of |= _of_first_reader(joint, layer_of)
    parts: list[list[fx.Node]] = [[] for _ in starts]
    for node in joint.forward:
        if node in layer_of and node not in place:
            parts[layer_of[node]].append(node)
    readers: list[list[tuple[fx.Node, fx.Node]]] = [[] for _ in starts]
    for user, node in joint.read_backward():
        if node in layer_of and node not in place:
            readers[layer_of[node]].append((user, node))
    return [
        Layer(start, tuple(nodes), tuple(read), _kind(start, nodes, read), end=end)
        for start, nodes, read, end in itertools.zip_longest(starts, parts, readers, starts[1:])
    ]


def _of_first_reader(joint: JointGraph, layer_of: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """The layers of weights that are gathered from all ranks: those that read them first. (What else is made of inputs alone, all
    layers read, as RoPE's tables.)"""
    gathered: set[fx.Node] = set()
    for node in joint.forward:
        if node not in layer_of and (is_exchange(node) or not gathered.isdisjoint(node.all_input_nodes)):
            gathered.add(node)
    found: dict[fx.Node, int] = {}
    for node in reversed(joint.forward):
        if node in gathered:
            users = [user for user in node.users if user.op != "output" and user not in joint.backward]
            readers = [found.get(user, layer_of.get(user, -1)) for user in users]
            if min(readers, default=-1) >= 0:
                found[node] = min(readers)
    return found


def _kind(start: fx.Node, nodes: Sequence[fx.Node], readers: Sequence[tuple[fx.Node, fx.Node]]) -> str:
    number = {start: 0} | {node: index for index, node in enumerate(nodes, 1)}
    found = hashlib.sha256()
    for node in nodes:
        value = tensor_of(node)
        shape = (tuple(value.shape), value.dtype) if value is not None else ()
        found.update(
            repr((str(node.target), shape, [number.get(n, -1) for n in node.all_input_nodes])).encode()
        )
    found.update(repr([number[node] for _, node in readers]).encode())
    return found.hexdigest()[:8]


def _starts(joint: JointGraph) -> list[fx.Node]:
    """The waists at which layers begin."""
    waists = _waists(joint)
    if len(waists) < 2:
        return []
    forward = joint.forward
    place = {node: index for index, node in enumerate(forward)}
    parts = [forward[place[a] + 1 : place[b] + 1] for a, b in itertools.pairwise(waists)]
    # Of a chain of pointwise operators the last one is the waist.
    is_joined = [all(map(is_cheap, part)) for part in parts]
    waists = [w for w, joined in zip(waists, [*is_joined, False], strict=True) if not joined]
    parts = [forward[place[a] + 1 : place[b] + 1] for a, b in itertools.pairwise(waists)]
    attends = [any(map(is_attention, part)) for part in parts]
    if not any(attends):
        return waists
    return [w for w, has_attention in zip(waists, attends, strict=False) if has_attention] + waists[-1:]


def _waists(joint: JointGraph) -> list[fx.Node]:
    """Tensors of the same size that lie on every way from the first rows to the loss.

    They are the post-dominators of the first rows: Lengauer and Tarjan, as in ``networkx.immediate_dominators``.
    """
    forward = joint.forward
    flow = networkx.DiGraph()
    for node in forward:
        flow.add_edges_from((node, source) for source in node.all_input_nodes if source.op == "call_function")
    flow.add_edges_from((_SINK, out) for out in _results(joint) if out in flow)
    if _SINK not in flow:
        return []
    above = networkx.immediate_dominators(flow, _SINK)
    chain: list[fx.Node] = []
    at: Any = _first_rows(forward, above)
    while at is not None and at != _SINK:
        chain.append(at)
        at = above[at]
    made = [n for n in chain if (value := tensor_of(n)) is not None and value.ndim > 1 and not is_view(n)]
    sizes = collections.Counter(bytes_of(n) for n in made if bytes_of(n))
    most_common = sizes.most_common(1)[0][0] if sizes else 0
    return [n for n in made if bytes_of(n) == most_common > 0]


def _results(joint: JointGraph) -> list[fx.Node]:
    """What the gradients start from: losses, or where there are none all that comes out."""
    made = [(out, value) for out in joint.outputs if (value := tensor_of(out)) is not None]
    losses = [out for out, value in made if not value.ndim and value.is_floating_point()]
    return losses or [out for out, _ in made if bytes_of(out)]


def _is_part(node: fx.Node) -> bool:
    """Whether a call only shows a part of a value, or brings together those of all ranks."""
    return is_view(node) or is_exchange(node)


def _is_given(node: fx.Node) -> bool:
    """Whether a value is an input, a part of one, or one whose parts other ranks have."""
    while node.op != "placeholder":
        if not _is_part(node) or len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes
    return True


def _first_rows(forward: Sequence[fx.Node], above: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The call that reads inputs alone and from which most bytes are made: the embedding, not a weight's view."""
    calls = [node for node in forward if node in above]
    entries = [n for n in calls if not _is_part(n) and all(map(_is_given, n.all_input_nodes))]
    best, most = None, 0
    for entry in entries:
        reached, made = {entry}, bytes_of(entry)
        for node in calls:
            if node not in reached and not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
                made += bytes_of(node)
        if made > most:
            best, most = entry, made
    return best
