"""One memory plan for all ranks of a group that work on one sequence: what one makes again may be an exchange, which all have to make.

The first rank has the most rows and heads. It plans, for the least memory that one of them has; the others take its choices. Graphs of
ranks have the same layers with the same operators, of other sizes; beside them some that make sizes even (padding of DTensors). So what is
kept is told as the operators of a layer that make it: which, and the how manieth of its kind.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Sequence

from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.spelling import operation
from mst_fx.group import Group
from mst_fx.plan.choices import Choice, keeping
from mst_fx.plan.joint_graph import is_under_way
from mst_fx.plan.layers import Layer
from mst_fx.plan.room import Room
from mst_fx.ranks.agreement import of_ranks


class Sent(enum.Enum):
    """What of that which is kept goes to the host's memory."""

    NOTHING = enum.auto()
    AS_ASKED = enum.auto()
    ALL = enum.auto()


@dataclasses.dataclass(frozen=True)
class Told:
    """A :class:`~mst_fx.plan.choices.Choice`, without nodes.

    Attributes:
        kept: the operators whose results are kept, and of each the how manieth it is in its layer.
        keeps_start: as the choice has it.
        sent: what of it goes to the host.
    """

    kept: tuple[tuple[str, int], ...]
    keeps_start: bool
    sent: Sent


def tell(chosen: Sequence[Choice]) -> list[Told]:
    """What was chosen of each layer, for other ranks."""
    return [_told(one) for one in chosen]


def heard(layers: Sequence[Layer], told: Sequence[Told]) -> list[Choice]:
    """The same choices for this rank's layers.

    Raises:
        Refusal: if a layer has no such operator.
    """
    return [_heard(layer, one) for layer, one in zip(layers, told, strict=True)]


def exchanges_of(layers: Sequence[Layer]) -> str:
    """What is exchanged in each layer, in order: the same text on all ranks."""
    return "; ".join(
        " ".join(operation(node) for node in layer.nodes if is_under_way(node)) for layer in layers
    )


def least_room(group: Group, room: Room, host: int) -> tuple[Room, int]:
    """The room, on the device and on the host, that each rank has."""
    budgets, taken, hosts = zip(*of_ranks(group, (room.budget, room.taken, host)), strict=True)
    return dataclasses.replace(room, budget=min(budgets), taken=max(taken)), min(hosts)


def _numbered(layer: Layer) -> dict[fx.Node, tuple[str, int]]:
    """Each call of a layer as its operator, and the how manieth of that it is."""
    counts: collections.Counter[str] = collections.Counter()
    found = {}
    for node in layer.nodes:
        name = str(node.target)
        found[node] = name, counts[name]
        counts[name] += 1
    return found


def _told(one: Choice) -> Told:
    numbered = _numbered(one.layer)
    kept = tuple(sorted(numbered[node] for node in one.kept))
    return Told(kept, one.keeps_start, next(sent for sent in Sent if _sending(one, sent).sent == one.sent))


def _heard(layer: Layer, told: Told) -> Choice:
    nodes = {number: node for node, number in _numbered(layer).items()}
    missing = [number for number in told.kept if number not in nodes]
    if missing:
        raise Refusal(f"the layers of the ranks differ: one has no {missing[0][0]}", Cause.NO_LAYERS)
    choice = keeping(layer, [nodes[number] for number in told.kept])
    return _sending(choice if told.keeps_start else choice.without_start(), told.sent)


def _sending(choice: Choice, sent: Sent) -> Choice:
    if sent is Sent.NOTHING:
        return dataclasses.replace(choice, sent=())
    return choice.as_asked() if sent is Sent.AS_ASKED else choice.on_host()
