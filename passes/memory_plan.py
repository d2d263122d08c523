"""Keeps what fits, and makes the rest again: the memory plan of a step, in the graph of both passes.

Before: the backward pass reads what the partitioner, or checkpointing in the model, lets it read. After: of each layer it reads what
the plan keeps, and clones of forward nodes behind gates (:mod:`mst_fx.plan.recompute`). Loss and gradients are the same to
the bit: the same operators run on the same numbers.

Left alone: graphs without tensors through which all rows pass (one graph a layer, where Dynamo broke it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from mst_fx.context import JointContext
from mst_fx.errors import BudgetError, Cause, Refusal
from mst_fx.options import Options, bytes_in
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.costs import Device, device_of
from mst_fx.plan.joint_graph import JointGraph, is_attention
from mst_fx.plan.layers import layers_of
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import make_again
from mst_fx.plan.room import Room, room_for
from mst_fx.plan.solve import Kind, Option, solve
from mst_fx.plan.timeline import timeline_of, with_most_kept
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
    layers = layers_of(joint)[:-1]
    if not layers:
        if any(map(is_attention, joint.forward)):
            raise Refusal("there are no layers: no two tensors through which all rows pass", Cause.NO_LAYERS)
        return False
    memory = context.options.memory
    wanted = {node for node in joint.forward if must_save(node)} | joint.reads_written
    choices = [choices_of(layer, wanted) for layer in layers]
    room = room_for(None if memory == "auto" else bytes_in(memory), joint)
    taken, peak = _fastest(context.graph, choices, room)
    chosen = [those[index] for those, index in zip(choices, taken, strict=True)]
    before = timeline_of(with_most_kept(context.graph))
    make_again(joint, chosen)
    said = _said(chosen, room, peak)
    context.tell(dataclasses.replace(said, before=before, after=timeline_of(joint)))
    return True


def _fastest(graph: fx.Graph, choices: Sequence[Sequence[Choice]], room: Room) -> tuple[Sequence[int], int]:
    """The choice of each layer, and the peak of the graph with them.

    How many bytes fit between the two passes follows from no sum: the peak may be at either end of the backward pass, where gradients
    are, or in the forward pass. So plans of several sizes are written and looked at.
    """
    device = device_of(room.device)
    options = [tuple(Option(c.bytes, c.cost.seconds(device)) for c in those) for those in choices]
    low = sum(those[0].bytes for those in options)
    high = sum(those[-1].bytes for those in options)
    found = [0] * len(choices)
    peak = _peak_with(graph, choices, found)
    if peak > room.bytes:
        raise BudgetError(_too_little(room, peak - room.bytes))
    middle = high
    for _ in range(_HALVINGS):
        taken = _solved(options, middle)
        looked_at = _peak_with(graph, choices, taken)
        if looked_at <= room.bytes:
            found, peak, low = taken, looked_at, middle
        else:
            high = middle
        if low == high:
            break
        middle = (low + high) // 2
    return found, peak


def _peak_with(graph: fx.Graph, choices: Sequence[Sequence[Choice]], taken: Sequence[int]) -> int:
    """The peak of a graph whose layers take the choices of these numbers."""
    trial = JointGraph(copied(graph))
    copies = dict(zip(graph.nodes, trial.graph.nodes, strict=True))
    make_again(trial, [those[index].of_copies(copies) for those, index in zip(choices, taken, strict=True)])
    return peak_of(trial)


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
