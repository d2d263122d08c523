"""Keeps what fits, and makes the rest again: the memory plan of a step, in the graph of both passes.

Before: the backward pass reads what the partitioner, or checkpointing in the model, lets it read. After: of each layer it reads what
the plan keeps, and clones of forward nodes behind gates (:mod:`mst_fx.plan.recompute`). Loss and gradients are the same to
the bit: the same operators run on the same numbers. Where everything fits that a graph with loops can keep, loops may be un-chunked too
(:mod:`mst_fx.plan.unchunk`), and loss and gradients are the same to rounding.

Left alone: graphs without tensors through which all rows pass (one graph a layer, where Dynamo broke it).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import fx

from mst_fx.context import JointContext
from mst_fx.errors import Cause, Refusal, defect
from mst_fx.graph.sizes import hint
from mst_fx.group import Group
from mst_fx.ops.arena import ARENA
from mst_fx.options import Options, bytes_in
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.costs import Cost, Device, cost_of, device_of, plus
from mst_fx.plan.groups import ways_in_groups
from mst_fx.plan.joint_graph import JointGraph, bytes_of, is_attention, tensor_of
from mst_fx.plan.layers import Layer, layers_of
from mst_fx.plan.of_ranks import Told, exchanges_of, heard, least_room, tell
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import make_again, on_trial
from mst_fx.plan.room import Room, host_bytes, room_for
from mst_fx.plan.search import (
    PeakWith,
    Plan,
    Way,
    by_number,
    fastest_of,
    host_beside,
    largest,
    solved,
    with_host,
)
from mst_fx.plan.solve import Host, Option
from mst_fx.plan.timeline import timeline_of
from mst_fx.plan.unchunk import Unchunking
from mst_fx.process import only_new_garbage
from mst_fx.ranks.agreement import decided, of_ranks, tried
from mst_fx.report import MemoryPlan, Planned, Timeline
from mst_fx.torch_api.guards import guard_at_most
from mst_fx.torch_api.joint import copied

log = logging.getLogger("mst_fx")
T = TypeVar("T")


def is_wanted(options: Options, gm: fx.GraphModule) -> bool:
    return options.memory is not None


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a plan is made of.

    Attributes:
        layers: with what is behind the last: the head, whose loop has computed its gradient already.
        wanted: what is kept in any case.
        choices: of each layer, on the device.
        before: the memory of the step without a plan; None if nobody asks.
    """

    joint: JointGraph
    layers: list[Layer]
    wanted: set[fx.Node]
    choices: list[list[Choice]]
    before: Timeline | None


def run(context: JointContext) -> bool:
    """Writes the plan into the graph; one without attention (a head, where Dynamo broke the model) has nothing to plan.

    Raises:
        Refusal: if the graph has no layers.
        BudgetError: if no plan fits.
    """
    group = context.options.group
    start = _together(
        group, lambda: _start(context), lambda found: exchanges_of(found.layers) if found else ""
    )
    if start is None:
        return False
    room, host = _room(context, start.joint)
    chosen, peak = _planned(group, start, room, host)
    # (Whether loops can be un-chunked depends on how many rows a rank has.)
    is_all = group is None and are_fastest(chosen, start.choices, device_of(room.device))
    unchunking = (
        unchunking_of(start.joint, start.layers, start.wanted, context.options.strict) if is_all else None
    )
    if unchunking is not None:
        peak_with = functools.partial(_peak_with, context.graph, unchunking=unchunking)
        found = faster(start.choices, unchunking.choices, unchunking.again, room, peak_with)
        chosen, peak = found or (chosen, peak)
    said = _said(chosen, room, peak)
    same = {node: node for node in context.graph.nodes}
    write = functools.partial(_write, context.graph, same, chosen, unchunking, is_trial=False)
    written = _together(group, write, lambda _: "written")
    _hold_up_to(start.layers[0], room, peak)
    after = timeline_of(written) if context.is_told else None
    context.tell(dataclasses.replace(said, before=start.before, after=after))
    return True


def _start(context: JointContext) -> _Start | None:
    """None if there is nothing to plan.

    Raises:
        Refusal: if the graph has no layers.
    """
    joint = JointGraph(context.graph, is_of_all_ranks=context.options.group is not None)
    layers = layers_of(joint)
    if len(layers) < 2:
        if any(map(is_attention, joint.forward)):
            raise Refusal("there are no layers: no two tensors through which all rows pass", Cause.NO_LAYERS)
        return None
    wanted = joint.kept_anyway
    choices = [choices_of(layer, wanted) for layer in layers[:-1]]
    before = None
    if context.is_told:
        before = timeline_of(on_trial(context.graph, [those[-1] for those in choices])[0])
    return _Start(joint, layers, wanted, choices, before)


def _together(group: Group | None, function: Callable[[], T], said: Callable[[T], str]) -> T:
    """What a function gives, on all ranks of a group or none.

    Raises:
        Refusal: on all ranks, if they say different things of it.
    """
    if group is None:
        return function()
    found, texts = tried(group, function, said)
    if len(set(texts)) > 1:
        raise Refusal("the layers of the ranks exchange different things", Cause.NO_LAYERS)
    return found


def _room(context: JointContext, joint: JointGraph) -> tuple[Room, int]:
    """What there is, on the device and on the host, for each rank of a group."""
    memory = context.options.memory
    room = room_for(None if memory == "auto" else bytes_in(memory), joint)
    host = host_bytes(_host_option(context.options.host_memory), room)
    group = context.options.group
    return (room, host) if group is None else least_room(group, room, host)


def _hold_up_to(layer: Layer, room: Room, peak: int) -> None:
    """The plan is for as many rows as it holds: what a step makes grows no faster than they do."""
    rows = tensor_of(layer.start)
    assert rows is not None
    guard_at_most(rows.numel(), hint(rows.numel()) * room.most // peak)


@only_new_garbage()  # of trials
def _planned(group: Group | None, start: _Start, room: Room, host: int) -> tuple[list[Choice], int]:
    """The choice of each layer, and the peak of the graph with them; the host memory that they take is there.

    Args:
        host: bytes that may be kept there.
    """
    while True:
        if group is None:
            chosen, peak = fastest_choices(start.joint, start.choices, room, host)
        else:
            chosen, peak = _chosen_by_first(group, start, room, host)
        lacking = _reserved([bytes_of(node) for choice in chosen for node in choice.sent], room)
        lacks = [lacking] if group is None else of_ranks(group, lacking)
        if not any(lacks):
            return chosen, peak
        log.warning("mst-fx: the memory plan does without host memory: %s", next(filter(None, lacks)))
        host = 0


def _chosen_by_first(group: Group, start: _Start, room: Room, host: int) -> tuple[list[Choice], int]:
    """What the first rank of a group chooses."""

    def choose() -> tuple[list[Told], int]:
        chosen, peak = fastest_choices(start.joint, start.choices, room, host)
        return tell(chosen), peak

    told, peak = decided(group, choose)
    return _together(group, lambda: heard(start.layers[:-1], told), lambda _: "heard"), peak


def _reserved(sizes: Sequence[int], room: Room) -> str:
    """Takes host memory; empty, or why there is none."""
    if not sizes:
        return ""
    try:
        ARENA.reserve(sizes, room.is_gpu)
    except MemoryError as error:
        return str(error)
    return ""


def fastest_choices(
    joint: JointGraph, choices: Sequence[Sequence[Choice]], room: Room, host: int
) -> tuple[list[Choice], int]:
    """The choice of each layer, alone or in groups, and the peak of the graph with them.

    Args:
        choices: of each layer, on the device.
        host: bytes that may be kept on the host.

    Raises:
        BudgetError: if no plan fits.
    """
    every = (Way(choices), *ways_in_groups(joint, choices))
    ways = [Way(with_host(way.choices, host), way.beside) for way in every]
    peak_with = functools.partial(_peak_with, joint.graph)
    return fastest_of(ways, room, host_beside(choices, room, host), peak_with)


def _host_option(value: str | int) -> int | None:
    return None if value == "auto" else bytes_in(value) or 0


def are_fastest(chosen: Sequence[Choice], choices: Sequence[Sequence[Choice]], device: Device) -> bool:
    """Whether every layer keeps so much on the device that it makes nothing again that it need not."""
    least = [min(each.cost.seconds(device) for each in those) for those in choices]
    found = zip(chosen, least, strict=True)
    return all(not choice.host_bytes and choice.cost.seconds(device) <= most for choice, most in found)


def unchunking_of(
    joint: JointGraph, layers: Sequence[Layer], wanted: Collection[fx.Node], strict: bool
) -> Unchunking | None:
    """None if no loop can be un-chunked."""
    try:
        found = Unchunking(joint, layers, wanted)
    except Exception as error:
        if strict:
            raise
        defect("left the loops of a graph with memory to spare as they were", error)
        return None
    return found if any(found.choices) else None


def faster(
    choices: Sequence[Sequence[Choice]],
    unchunked: Sequence[Sequence[Choice]],
    again: Sequence[Cost],
    room: Room,
    peak_with: PeakWith,
) -> tuple[list[Choice], int] | None:
    """The same where the best of these choices fit: layers whose loops are un-chunked may be faster.

    What a loop makes again, while it is there, counts here: it is what those layers save.

    Args:
        unchunked, again: of each layer (:class:`~mst_fx.plan.unchunk.Unchunking`).
        peak_with: the peak of the graph whose layers take these choices, with loops or without.
    """
    device = device_of(room.device)
    every, options = [], []
    for those, more, made in zip(choices, unchunked, again, strict=True):
        loops = made.seconds(device)
        best = those[-1].bytes, those[-1].cost.seconds(device) + loops
        better = [c for c in more if c.bytes > best[0] and c.cost.seconds(device) < best[1]]
        every.append([*those, *better])
        options.append(
            tuple(Option(c.bytes, c.cost.seconds(device) + (0 if c in better else loops)) for c in every[-1])
        )

    def plan_of(size: int) -> Plan:
        taken = solved(options, size, Host())
        seconds = sum(those[index].seconds for those, index in zip(options, taken, strict=True))
        return Plan(taken, seconds, peak_with(by_number(every, taken)))

    found = largest(plan_of, sum(those[-1].bytes for those in choices), options, room.bytes)
    return None if found is None else (by_number(every, found.taken), found.peak)


def _peak_with(graph: fx.Graph, chosen: Sequence[Choice], unchunking: Unchunking | None = None) -> int:
    """The peak of a graph whose layers take these choices."""
    trial = copied(graph)
    copies = dict(zip(graph.nodes, trial.nodes, strict=True))
    return peak_of(_write(trial, copies, chosen, unchunking, is_trial=True))


def _write(
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    chosen: Sequence[Choice],
    unchunking: Unchunking | None,
    is_trial: bool,
) -> JointGraph:
    """Lets the layers of a graph, or of a copy of it on trial, take these choices.

    Args:
        copies: what each node of the graph is there.
    """
    if unchunking is None:
        here = [choice.of_copies(copies) for choice in chosen]
    else:
        here = unchunking.written(graph, copies, chosen, is_trial)
    joint = JointGraph(graph)
    make_again(joint, here)
    return joint


def planned_layers(chosen: Sequence[Choice], room: Room) -> tuple[Planned, ...]:
    """What layers do, those together that do the same, the least kept first."""
    device: Device = device_of(room.device)
    found: dict[Planned, int] = {}
    for before, choice in zip([*chosen[:1], *chosen], chosen, strict=False):  # the first keeps its start
        cost = choice.cost
        if not choice.keeps_start:
            cost = plus([cost_of(choice.again), cost_of(before.onward)])
        one = Planned(1, str(choice), choice.bytes, choice.host_bytes, cost.flops, cost.seconds(device))
        found[one] = found.get(one, 0) + 1
    layers = [dataclasses.replace(one, layers=count) for one, count in found.items()]
    return tuple(sorted(layers, key=lambda one: one.kept_bytes))


def _said(chosen: Sequence[Choice], room: Room, peak: int) -> MemoryPlan:
    return MemoryPlan(planned_layers(chosen, room), room.budget, room.taken, room.taken + peak)
