"""Keeps what fits, and makes the rest again: the memory plan of a step, in the graph of both passes.

Before: the backward pass reads what the partitioner, or checkpointing in the model, lets it read. After: of each layer it reads what
the plan keeps, and clones of forward nodes behind gates (:mod:`mst_fx.plan.recompute`). Loss and gradients are the same to
the bit: the same operators run on the same numbers. Where everything fits that a graph with loops can keep, loops may be un-chunked too
(:mod:`mst_fx.plan.unchunk`), and loss and gradients are the same to rounding.

Left alone: graphs without tensors through which all rows pass (one graph a layer, where Dynamo broke it).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from mst_fx.context import JointContext
from mst_fx.errors import BudgetError, Cause, Refusal, defect
from mst_fx.options import Options, bytes_in
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.costs import Device, device_of
from mst_fx.plan.joint_graph import JointGraph, is_attention
from mst_fx.plan.layers import Layer, layers_of
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import make_again
from mst_fx.plan.room import Room, room_for
from mst_fx.plan.solve import Kind, Option, solve
from mst_fx.plan.unchunk import Unchunking
from mst_fx.report import MemoryPlan, Planned, human_bytes
from mst_fx.torch_api.joint import copied, must_save

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
    wanted = {node for node in joint.forward if must_save(node)} | joint.reads_written
    choices = [choices_of(layer, wanted) for layer in layers[:-1]]
    room = room_for(None if memory == "auto" else bytes_in(memory), joint)
    chosen, peak, is_all = _fastest(context.graph, choices, room)
    unchunking = _unchunking(context, joint, layers, wanted) if is_all else None
    if unchunking is not None:
        chosen, peak = _faster(context.graph, choices, unchunking, room) or (chosen, peak)
    _write(context.graph, {node: node for node in context.graph.nodes}, chosen, unchunking, is_trial=False)
    context.tell(_said(chosen, room, peak))
    return True


def _fastest(
    graph: fx.Graph, choices: Sequence[Sequence[Choice]], room: Room
) -> tuple[list[Choice], int, bool]:
    """The choice of each layer, the peak of the graph with them, and whether nothing would be faster: loops stay as they are."""
    device = device_of(room.device)
    options = [tuple(Option(c.bytes, c.cost.seconds(device)) for c in those) for those in choices]
    least = [those[0] for those in choices]
    peak = _peak_with(graph, least)
    if peak > room.bytes:
        raise BudgetError(_too_little(room, peak - room.bytes))
    low = sum(those[0].bytes for those in options)
    return _searched(graph, choices, options, low, room) or (least, peak, False)


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
    low = sum(those[-1].bytes for those in choices)
    found = _searched(graph, every, options, low, room, unchunking)
    return found[:2] if found is not None else None


def _searched(
    graph: fx.Graph,
    choices: Sequence[Sequence[Choice]],
    options: Sequence[tuple[Option, ...]],
    low: int,
    room: Room,
    unchunking: Unchunking | None = None,
) -> tuple[list[Choice], int, bool] | None:
    """The fastest choices whose peak fits, that peak, and whether they are the fastest of all; None if none was found.

    How many bytes fit between the two passes follows from no sum: the peak may be at either end of the backward pass, where gradients
    are, or in the forward pass. So plans of several sizes are written and looked at.

    Args:
        low: bytes for all that is kept, which are known to fit.
    """
    found = None
    middle = high = most = sum(max(option.bytes for option in those) for those in options)
    for _ in range(_HALVINGS):
        taken = _solved(options, middle)
        chosen = [those[index] for those, index in zip(choices, taken, strict=True)]
        peak = _peak_with(graph, chosen, unchunking)
        if peak <= room.bytes:
            found, low = (chosen, peak, middle == most), middle
        else:
            high = middle
        if low == high:
            break
        middle = (low + high) // 2
    return found


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


def _solved(options: Sequence[tuple[Option, ...]], size: int) -> list[int]:
    """Which option each layer takes; of equal layers the early ones, kept for longest, keep less.

    Args:
        size: bytes for all that is kept.
    """
    kinds = list(dict.fromkeys(options))
    found = solve([Kind(options.count(kind), kind) for kind in kinds], size)
    turns = {
        kind: iter([index for index, count in enumerate(counts) for _ in range(count)])
        for kind, counts in zip(kinds, found, strict=True)
    }
    return [next(turns[those]) for those in options]


def _too_little(room: Room, missing: int) -> str:
    return (
        f"no memory plan fits: with least kept, a step needs {human_bytes(missing)} more than the"
        f" {human_bytes(room.budget)} of the mst option 'memory', of which {human_bytes(room.taken)} are allocated"
    )


def _said(chosen: Sequence[Choice], room: Room, peak: int) -> MemoryPlan:
    device: Device = device_of(room.device)
    found: dict[Planned, int] = {}
    for choice in chosen:
        one = Planned(1, str(choice), choice.bytes, choice.cost.flops, choice.cost.seconds(device))
        found[one] = found.get(one, 0) + 1
    layers = [
        Planned(count, one.again, one.kept_bytes, one.flops, one.seconds) for one, count in found.items()
    ]
    ordered = sorted(layers, key=lambda one: one.kept_bytes)
    return MemoryPlan(tuple(ordered), room.budget, room.taken, room.taken + peak)
