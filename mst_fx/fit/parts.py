"""A step as a row of parts, each of one layer and pass: so that few layers tell what many take.

What is alive while a layer runs is what was alive before it, and what is its own. So of each part of a joint graph two numbers do: how far its
highest moment lies above its start, and what its end does; the peak of any number of layers, whatever each of them keeps, is a walk over these.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import fx

from mst_fx.fit.costs import cost_of_node
from mst_fx.graph.spelling import argument, operation
from mst_fx.plan.choices import Choice
from mst_fx.plan.costs import Cost, plus
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.layers import Layer
from mst_fx.plan.peak import calls_of, held_by, scratch_of
from mst_fx.plan.recompute import make_again
from mst_fx.plan.unchunk import Unchunking
from mst_fx.torch_api.joint import copied


class Key(NamedTuple):
    """A choice of a layer, by its number, from the least on; whether it is kept on the host, and whether it is one without loops."""

    level: int
    on_host: bool = False
    unchunked: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a step.

    Attributes:
        rise: bytes of its highest moment above what is alive before it.
        change: what it leaves behind, less what it found, in bytes.
        cost: of its calls.
    """

    rise: int
    change: int
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a step all of whose layers take choices of one number.

    Attributes:
        before: up to the first layer.
        forward, backward: of each layer, in the order of the forward pass; the last one's backward part includes the embedding's.
        head: between the two passes.
        sent: bytes that each layer sends to the host.
    """

    before: Part
    forward: tuple[Part, ...]
    head: Part
    backward: tuple[Part, ...]
    sent: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Whole:
    """What many layers take together.

    Attributes:
        peak: bytes at the highest moment, beside inputs.
        kept: bytes alive between the passes.
        cost: of the step.
    """

    peak: int
    kept: int
    cost: Cost


def parts_with(
    graph: fx.Graph,
    chosen: Sequence[Choice],
    head: fx.Node,
    unchunking: Unchunking | None = None,
    is_planned: bool = True,
) -> Parts:
    """The parts of a joint graph whose layers, all in order, take choices.

    Args:
        head: the waist behind the last layer.
        unchunking: of this graph; needed where choices are of it.
        is_planned: by a plan, and not by checkpointing.
    """
    trial = copied(graph)
    copies = dict(zip(graph.nodes, trial.nodes, strict=True))
    end = Choice(Layer(head, (), (), ""), frozenset(), (), 0, Cost())
    if unchunking is None:
        moved = [choice.of_copies(copies) for choice in (*chosen, end)]
    else:
        moved = unchunking.written(trial, copies, [*chosen, end], is_trial=True)
    joint = JointGraph(trial)
    make_again(joint, moved[:-1], is_planned)
    return _parts_of(joint, [choice.layer for choice in moved], [choice.host_bytes for choice in chosen])


def _parts_of(joint: JointGraph, layers: Sequence[Layer], sent: Sequence[int]) -> Parts:
    """
    Args:
        layers: with what is behind the last.
        sent: bytes that each of the others sends to the host.
    """
    calls = calls_of(joint)
    place = {node: index for index, node in enumerate(calls)}
    starts = [place[layer.start] + 1 for layer in layers]
    ends = [_first_read_backward(joint, layer, place) for layer in layers[:-1]]
    cuts = [0, *starts, *reversed(ends), len(calls)]
    assert cuts == sorted(cuts), "layers run one after the other"
    found = list(_cut(joint, calls, cuts))
    count = len(layers) - 1
    return Parts(
        before=found[0],
        forward=tuple(found[1 : count + 1]),
        head=found[count + 1],
        backward=tuple(reversed(found[count + 2 :])),
        sent=tuple(sent),
    )


def _first_read_backward(joint: JointGraph, layer: Layer, place: Mapping[fx.Node, int]) -> int:
    """The first call of the backward pass that reads what belongs to a layer, or brings it back from the host."""
    own = {layer.start, *layer.nodes}
    hosts = {
        result
        for node in own
        for call in node.users
        if operation(call) == "mst_fx::stash" and not own.isdisjoint(argument(call, "kept"))
        for result in call.users
    }
    reads = [user for node in own for user in node.users if user in joint.backward]
    reads += [user for host in hosts for user in host.users if host in (argument(user, "hosts") or ())]
    return min(place[user] for user in reads if user in joint.backward and user in place)


def _cut(joint: JointGraph, calls: Sequence[fx.Node], cuts: Sequence[int]) -> Iterator[Part]:
    held = held_by(joint)
    made = {each.node for each in held}
    first, last = [0] * (len(calls) + 1), [0] * (len(calls) + 1)
    for each in held:
        first[each.first] += each.bytes
        last[each.last] += each.bytes
    costs = [cost_of_node(node, made) for node in calls]
    alive = 0
    for start, end in itertools.pairwise(cuts):
        before, highest = alive, alive
        for index in range(start, end):
            alive += first[index]
            highest = max(highest, alive + scratch_of(calls[index]))
            alive -= last[index] if index < len(calls) - 1 else 0
        yield Part(highest - before, alive - before, plus(costs[start:end]))


def whole_of(joint: JointGraph) -> Whole:
    """What a step takes whose plan is written."""
    calls = calls_of(joint)
    forward = sum(node not in joint.backward for node in calls)
    first, then = _cut(joint, calls, [0, forward, len(calls)])
    return Whole(max(first.rise, first.change + then.rise), first.change, plus([first.cost, then.cost]))


def together(known: Callable[[Key], Parts], stands_for: Sequence[int], taken: Sequence[Key]) -> Whole:
    """What many layers take.

    Args:
        known: the parts of a step all of whose layers take a choice.
        stands_for: which of the known layers each layer is like.
        taken: what each layer keeps; those that keep on the host come first.
    """
    ends = known(taken[-1])  # what is between the passes depends on how the last layer ends
    layers = list(zip(stands_for, taken, strict=True))
    forward = [known(key).forward[like] for like, key in layers]
    backward = [known(key).backward[like] for like, key in layers]
    sent = [known(key).sent[like] for like, key in layers]
    last = max((index for index, size in enumerate(sent) if size), default=len(layers))
    if last + 2 < len(layers):
        # What the last of them sends is gone when the next layer has run, and comes back beside its backward pass.
        gone, back = _then(forward[last + 1], -sent[last]), _then(backward[last + 2], sent[last])
        forward[last + 1], backward[last + 2] = gone, back
    order = [ends.before, *forward, ends.head, *reversed(backward)]
    alive = list(itertools.accumulate((part.change for part in order), initial=0))
    peak = max(before + part.rise for before, part in zip(alive, order, strict=False))
    return Whole(peak, alive[len(forward) + 1], plus(part.cost for part in order))


def _then(part: Part, change: int) -> Part:
    return dataclasses.replace(part, change=part.change + change)
