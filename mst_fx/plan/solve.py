"""Which choice each layer takes: the fewest seconds in the bytes that there are. Numbers only."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence

try:
    from scipy.optimize import Bounds, LinearConstraint, milp
except ImportError:  # an extra: mst-fx[plan]
    milp = None


@dataclasses.dataclass(frozen=True)
class Option:
    """What one layer of a kind may take: bytes that it keeps, and seconds that it makes again."""

    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers that are equal.

    Attributes:
        count: how many.
        options: what each may take; the first keeps least.
    """

    count: int
    options: tuple[Option, ...]


class TooLittle(Exception):
    """No choice fits; the argument says how many bytes are missing."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


def solve(kinds: Sequence[Kind], room: int) -> list[list[int]]:
    """How many layers of each kind take each of its options, so that what is made again takes the fewest seconds.

    Exact with scipy (HiGHS, a mixed-integer program); without it a ladder, which takes steps by seconds a byte and
    may leave less than one step's bytes free. Of plans with equal seconds the one of fewest bytes.

    Args:
        room: bytes for all that is kept.

    Raises:
        TooLittle: if not even the least of every layer fits.
    """
    least = sum(kind.count * kind.options[0].bytes for kind in kinds)
    if least > room:
        raise TooLittle(least - room)
    ladder = _ladder(kinds, room)
    if milp is None:
        return ladder
    exact = _program(kinds, room)
    return exact if exact is not None and _seconds(kinds, exact) <= _seconds(kinds, ladder) else ladder


def _is_worse(option: Option, other: Option) -> bool:
    return other.bytes < option.bytes and other.seconds <= option.seconds


def _taken(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Option]]:
    """How many layers take an option, of each."""
    for kind, found in zip(kinds, counts, strict=True):
        yield from zip(found, kind.options, strict=True)


def _seconds(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> float:
    return math.fsum(count * option.seconds for count, option in _taken(kinds, counts))


def _bytes(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> int:
    return sum(count * option.bytes for count, option in _taken(kinds, counts))


def _program(kinds: Sequence[Kind], room: int) -> list[list[int]] | None:
    flat = [(index, option) for index, kind in enumerate(kinds) for option in kind.options]
    most = max(option.seconds for _, option in flat) or 1.0
    size = max(option.bytes for _, option in flat) or 1
    costs = [option.seconds / most for _, option in flat]
    # Of equals the one that keeps less: what keeps more for nothing is not taken.
    most_of = [
        0.0 if any(_is_worse(option, other) for other in kinds[index].options) else float(kinds[index].count)
        for index, option in flat
    ]
    rows = [[float(index == row) for index, _ in flat] for row in range(len(kinds))]
    counts = [float(kind.count) for kind in kinds]
    rows.append([option.bytes / size for _, option in flat])
    limits = LinearConstraint(rows, [*counts, -math.inf], [*counts, room / size])
    found = milp(costs, constraints=limits, integrality=[1] * len(flat), bounds=Bounds(0, most_of))
    if found.x is None:
        return None
    whole = iter(round(x) for x in found.x)
    result = [[next(whole) for _ in kind.options] for kind in kinds]
    return result if _bytes(kinds, result) <= room else None  # rounded up


def _ladder(kinds: Sequence[Kind], room: int) -> list[list[int]]:
    """Each step lets one layer keep more; the step that saves most seconds a byte goes first."""
    found = [[kind.count, *[0] * (len(kind.options) - 1)] for kind in kinds]
    room -= sum(kind.count * kind.options[0].bytes for kind in kinds)
    while True:
        steps = []
        for index, kind in enumerate(kinds):
            for now, here in enumerate(kind.options):
                for then in range(now + 1, len(kind.options)):
                    more = kind.options[then].bytes - here.bytes
                    saved = here.seconds - kind.options[then].seconds
                    if found[index][now] and saved > 0 and more <= room:
                        steps.append((saved / max(more, 1), index, now, then, more))
        if not steps:
            return found
        _, index, now, then, more = max(steps, key=operator.itemgetter(0))  # of equals the first
        found[index][now] -= 1
        found[index][then] += 1
        room -= more
