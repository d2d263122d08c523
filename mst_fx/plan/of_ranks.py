"""One memory plan for all ranks of a group that work on one sequence: what one makes again may be an exchange, which all have to make.

The first rank has the most rows and heads. It plans, for the least memory that one of them has; the others take its choices, which
are told by number: the layers of all ranks have the same choices, of other sizes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from mst_fx.group import Group
from mst_fx.plan.choices import Choice
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
        level: which of its layer's choices keeps as much.
        keeps_start: as the choice has it.
        sent: what of it goes to the host.
    """

    level: int
    keeps_start: bool
    sent: Sent


def tell(choices: Sequence[Sequence[Choice]], chosen: Sequence[Choice]) -> list[Told]:
    """What was chosen, for other ranks.

    Args:
        choices: of each layer, on the device.
        chosen: of each layer, on the device or on the host.
    """
    return [_told(those, one) for those, one in zip(choices, chosen, strict=True)]


def heard(choices: Sequence[Sequence[Choice]], told: Sequence[Told]) -> list[Choice]:
    """The same choices among this rank's."""
    return [_as(those[one.level], one) for those, one in zip(choices, told, strict=True)]


def same_choices(choices: Sequence[Sequence[Choice]]) -> str:
    """A text that is the same on ranks whose layers have the same choices."""
    return "; ".join(" < ".join(map(str, those)) for those in choices)


def least_room(group: Group, room: Room, host: int) -> tuple[Room, int]:
    """The room, on the device and on the host, that each rank has."""
    budgets, taken, hosts = zip(*of_ranks(group, (room.budget, room.taken, host)), strict=True)
    return dataclasses.replace(room, budget=min(budgets), taken=max(taken)), min(hosts)


def _told(those: Sequence[Choice], one: Choice) -> Told:
    level = next(level for level, each in enumerate(those) if each.kept == one.kept)
    found = (Told(level, one.keeps_start, sent) for sent in Sent)
    return next(each for each in found if _as(those[level], each).sent == one.sent)


def _as(choice: Choice, told: Told) -> Choice:
    found = choice if told.keeps_start else choice.without_start()
    return {Sent.NOTHING: found, Sent.AS_ASKED: found.as_asked(), Sent.ALL: found.on_host()}[told.sent]
