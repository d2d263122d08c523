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

from torch import fx

from mst_fx.context import JointContext
from mst_fx.errors import BudgetError, Cause, Refusal, defect
from mst_fx.graph.sizes import hint
from mst_fx.ops.arena import ARENA
from mst_fx.options import Options, bytes_in
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.costs import Device, cost_of, device_of
from mst_fx.plan.joint_graph import JointGraph, bytes_of, is_attention, tensor_of
from mst_fx.plan.layers import Layer, layers_of
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import make_again, on_trial
from mst_fx.plan.room import Room, host_bytes, room_for
from mst_fx.plan.solve import Host, Kind, Option, TooLittle, solve
from mst_fx.plan.timeline import timeline_of
from mst_fx.plan.unchunk import Unchunking
from mst_fx.report import MemoryPlan, Planned, human_bytes
from mst_fx.torch_api.guards import guard_at_most
from mst_fx.torch_api.joint import copied

log = logging.getLogger("mst_fx")

# Halvings of the bytes that all layers keep together: after these they are known to 2 %.
_HALVINGS = 6


def is_wanted(options: Options) -> bool:
    return options.memory is not None


def run(context: JointContext) -> bool:
    """Writes the plan into the graph; one without attention (a head, where Dynamo broke the model) has nothing to plan.

    Raises:
        Refusal: if the graph has no layers.
        BudgetError: if no plan fits.
    """
    joint = JointGraph(context.graph)
    # Behind the last waist is the head, whose loop has computed its gradient already.
    layers = layers_of(joint)
    if len(layers) < 2:
        if any(map(is_attention, joint.forward)):
            raise Refusal("there are no layers: no two tensors through which all rows pass", Cause.NO_LAYERS)
        return False
    memory = context.options.memory
    wanted = joint.kept_anyway
    choices = [choices_of(layer, wanted) for layer in layers[:-1]]
    room = room_for(None if memory == "auto" else bytes_in(memory), joint)
    before = timeline_of(on_trial(context.graph, [those[-1] for those in choices])[0])
    chosen, peak = _planned(context, choices, room)
    is_all = _are_fastest(chosen, choices, device_of(room.device))
    unchunking = _unchunking(context, joint, layers, wanted) if is_all else None
    if unchunking is not None:
        chosen, peak = _faster(context.graph, choices, unchunking, room) or (chosen, peak)
    same = {node: node for node in context.graph.nodes}
    written = _write(context.graph, same, chosen, unchunking, is_trial=False)
    _hold_up_to(layers[0], room, peak)
    said = _said(chosen, room, peak)
    context.tell(dataclasses.replace(said, before=before, after=timeline_of(written)))
    return True


def _hold_up_to(layer: Layer, room: Room, peak: int) -> None:
    """The plan is for as many rows as it holds: what a step makes grows no faster than they do."""
    rows = tensor_of(layer.start)
    assert rows is not None
    guard_at_most(rows.numel(), hint(rows.numel()) * room.most // peak)


def _planned(
    context: JointContext, choices: Sequence[Sequence[Choice]], room: Room
) -> tuple[list[Choice], int]:
    """The choice of each layer, and the peak of the graph with them; the host memory that they take is there."""
    host = host_bytes(_host_option(context.options.host_memory), room)
    while True:
        placed = [*(_placed(those, host > 0) for those in choices[:-1]), list(choices[-1])]
        peak_with = functools.partial(_peak_with, context.graph)
        taken, peak = fastest(placed, room, host_beside(choices, room, host), peak_with)
        chosen = _of(placed, taken)
        sizes = [bytes_of(node) for choice in chosen for node in choice.sent]
        if not sizes:
            return chosen, peak
        try:
            ARENA.reserve(sizes, room.is_gpu)
        except MemoryError as error:
            log.warning("mst-fx: the memory plan does without host memory: %s", error)
            host = 0
        else:
            return chosen, peak


def _host_option(value: str | int) -> int | None:
    return None if value == "auto" else bytes_in(value) or 0


def host_beside(choices: Sequence[Sequence[Choice]], room: Room, size: int) -> Host:
    """The host's memory, beside forward passes that take what the layers' do."""
    device = device_of(room.device)
    forward = sum(cost_of(those[0].layer.nodes).seconds(device) for those in choices)
    return Host(size, device.link, forward)


def _placed(those: Sequence[Choice], has_host: bool) -> list[Choice]:
    """The choices of a layer on the device, and on the host."""
    if not has_host or not those[0].layer.readers:
        return list(those)
    return [*those, *(dataclasses.replace(each, is_on_host=True) for each in those)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which choice each layer takes, by number, what that costs, and the peak of the graph with it."""

    taken: Sequence[int]
    seconds: float
    peak: int


PeakWith = Callable[[Sequence[Choice]], int]


def fastest(
    choices: Sequence[Sequence[Choice]], room: Room, host: Host, peak_with: PeakWith
) -> tuple[Sequence[int], int]:
    """The choice of each layer, and the peak of the graph with them.

    What comes back from the host is on the device for two layers at a time. So plans are looked for that send at most so much of a
    layer: from the most on, until one fits; and one that sends nothing.

    Args:
        peak_with: the peak of the graph whose layers take these choices.

    Raises:
        BudgetError: if none fits.
    """
    sizes = sorted({choice.host_bytes for those in choices for choice in those}, reverse=True)
    fitting: list[_Plan] = []
    missing: list[_Plan] = []
    for most in sizes:
        if most == 0 or not fitting:
            allowed = [[c for c in those if c.host_bytes <= most] for those in choices]
            plan = _fitting(allowed, room, host, peak_with)
            plan = dataclasses.replace(
                plan,
                taken=[
                    those.index(few[i]) for those, few, i in zip(choices, allowed, plan.taken, strict=True)
                ],
            )
            (fitting if plan.peak <= room.bytes else missing).append(plan)
    if fitting:
        best = min(fitting, key=lambda plan: plan.seconds)
        return best.taken, best.peak
    least = min(missing, key=lambda plan: plan.peak)
    if least.peak > room.most:
        raise BudgetError(_too_little(room, host, least.peak - room.most))
    return least.taken, least.peak


def _fitting(choices: Sequence[Sequence[Choice]], room: Room, host: Host, peak_with: PeakWith) -> _Plan:
    """The fastest plan of some choices that fits, or the least one, if none does.

    How many bytes fit between the two passes follows from no sum: the peak may be at either end of the backward pass, where gradients
    are, or in the forward pass. So plans of several sizes are written and looked at.
    """
    device = device_of(room.device)
    options = [
        tuple(Option(c.device_bytes, c.cost.seconds(device), c.host_bytes) for c in those)
        for those in choices
    ]

    def plan_of(size: int) -> _Plan:
        taken = _solved(options, size, host)
        found = [those[index] for those, index in zip(options, taken, strict=True)]
        seconds = sum(each.seconds for each in found) + host.seconds(sum(each.host for each in found))
        return _Plan(taken, seconds, peak_with(_of(choices, taken)))

    low = _least_size(options, host)
    found = plan_of(low)
    if found.peak > room.bytes:
        return found
    return _largest(plan_of, low, options, room) or found


def _largest(
    plan_of: Callable[[int], _Plan], low: int, options: Sequence[tuple[Option, ...]], room: Room
) -> _Plan | None:
    """The plan of most bytes on the device whose peak fits; None if none was found.

    Args:
        plan_of: the fastest plan that keeps so many bytes on the device.
        low: bytes that are known to fit.
    """
    found = None
    high = middle = sum(max(option.bytes for option in those) for those in options)
    for _ in range(_HALVINGS):
        plan = plan_of(middle)
        if plan.peak <= room.bytes:
            found, low = plan, middle
        else:
            high = middle
        if low == high:
            break
        middle = (low + high) // 2
    return found


def _least_size(options: Sequence[tuple[Option, ...]], host: Host) -> int:
    """The fewest bytes on the device, to a hundredth, with which there is a plan."""
    low = sum(min(option.bytes for option in those) for those in options)
    high = sum(those[0].bytes for those in options)  # with nothing on the host
    while low < high:
        middle = (low + high) // 2
        try:
            _solved(options, middle, host)
        except TooLittle:
            low = middle + 1
        else:
            high = middle
        if high - low < low // 100:
            break
    return high


def _are_fastest(chosen: Sequence[Choice], choices: Sequence[Sequence[Choice]], device: Device) -> bool:
    """Whether every layer keeps so much on the device that it makes nothing again that it need not."""
    least = [min(each.cost.seconds(device) for each in those) for those in choices]
    found = zip(chosen, least, strict=True)
    return all(not choice.host_bytes and choice.cost.seconds(device) <= most for choice, most in found)


def _unchunking(
    context: JointContext, joint: JointGraph, layers: Sequence[Layer], wanted: Collection[fx.Node]
) -> Unchunking | None:
    """None if no loop can be un-chunked."""
    try:
        found = Unchunking(joint, layers, wanted)
    except Exception as error:
        if context.options.strict:
            raise
        defect("left the loops of a graph with memory to spare as they were", error)
        return None
    return found if any(found.choices) else None


def _faster(
    graph: fx.Graph, choices: Sequence[Sequence[Choice]], unchunking: Unchunking, room: Room
) -> tuple[list[Choice], int] | None:
    """The same where the best of these choices fit: layers whose loops are un-chunked may be faster.

    What a loop makes again, while it is there, counts here: it is what those layers save.
    """
    device = device_of(room.device)
    every, options = [], []
    for those, more, again in zip(choices, unchunking.choices, unchunking.again, strict=True):
        loops = again.seconds(device)
        best = those[-1].bytes, those[-1].cost.seconds(device) + loops
        better = [c for c in more if c.bytes > best[0] and c.cost.seconds(device) < best[1]]
        every.append([*those, *better])
        options.append(
            tuple(Option(c.bytes, c.cost.seconds(device) + (0 if c in better else loops)) for c in every[-1])
        )

    def plan_of(size: int) -> _Plan:
        taken = _solved(options, size, Host())
        seconds = sum(those[index].seconds for those, index in zip(options, taken, strict=True))
        return _Plan(taken, seconds, _peak_with(graph, _of(every, taken), unchunking))

    found = _largest(plan_of, sum(those[-1].bytes for those in choices), options, room)
    return None if found is None else (_of(every, found.taken), found.peak)


def _of(choices: Sequence[Sequence[Choice]], taken: Sequence[int]) -> list[Choice]:
    """The choice of each layer, by its number."""
    return [those[index] for those, index in zip(choices, taken, strict=True)]


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


def _solved(options: Sequence[tuple[Option, ...]], size: int, host: Host) -> list[int]:
    """Which option each layer takes; of equal layers the early ones, kept for longest, are on the host, or keep less.

    Args:
        size: bytes for all that is kept on the device.
    """
    kinds = list(dict.fromkeys(options))
    found = solve([Kind(options.count(kind), kind) for kind in kinds], size, host)
    turns = {kind: iter(_turns(kind, counts)) for kind, counts in zip(kinds, found, strict=True)}
    return [next(turns[those]) for those in options]


def _turns(kind: tuple[Option, ...], counts: Sequence[int]) -> list[int]:
    """An option for each layer of a kind, in order of the layers."""
    every = [index for index, count in enumerate(counts) for _ in range(count)]
    return sorted(every, key=lambda index: not kind[index].host)


def _too_little(room: Room, host: Host, missing: int) -> str:
    there = f" and {human_bytes(host.bytes)} of the host's" if host.bytes else ""
    return (
        f"no memory plan fits: with least kept, a step needs {human_bytes(missing)} more than the"
        f" {human_bytes(room.budget)} of the mst option 'memory', of which {human_bytes(room.taken)} are allocated{there}"
    )


def planned_layers(chosen: Sequence[Choice], room: Room) -> tuple[Planned, ...]:
    """What layers do, those together that do the same, the least kept first."""
    device: Device = device_of(room.device)
    found: dict[Planned, int] = {}
    for choice in chosen:
        cost = choice.cost
        one = Planned(1, str(choice), choice.bytes, choice.host_bytes, cost.flops, cost.seconds(device))
        found[one] = found.get(one, 0) + 1
    layers = [dataclasses.replace(one, layers=count) for one, count in found.items()]
    return tuple(sorted(layers, key=lambda one: one.kept_bytes))


def _said(chosen: Sequence[Choice], room: Room, peak: int) -> MemoryPlan:
    return MemoryPlan(planned_layers(chosen, room), room.budget, room.taken, room.taken + peak)
