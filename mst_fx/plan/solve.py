"""Which choice each layer takes: the fewest seconds in the bytes that there are. Numbers only."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence

try:
    from scipy.optimize import Bounds, LinearConstraint, milp
except ImportError:  # an extra: mst-fx[plan]
    milp = None


@dataclasses.dataclass(frozen=True)
class Option:
    """What one layer of a kind may take: bytes that it keeps on the device and on the host, and seconds that it makes again."""

    bytes: int
    seconds: float
    host: int = 0


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers that are equal.

    Attributes:
        count: how many.
        options: what each may take; the first is of the least bytes of those that keep no more than they must on the host.
    """

    count: int
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Host:
    """The host's memory.

    Attributes:
        bytes: for all that is kept there.
        bandwidth: bytes a second, each way.
        hides: seconds of computation, beside which copies cost nothing.
    """

    bytes: int = 0
    bandwidth: float = 1.0
    hides: float = 0.0

    def seconds(self, size: float) -> float:
        """What copies of some bytes cost: where they end later than the computation beside them, the rest. (A ten-thousandth of
        the others, so that of equals the plan of fewer copies is taken.)"""
        return max(0.0, size / self.bandwidth - self.hides) + _TIE * size / self.bandwidth


_TIE = 1e-4
# Options of all kinds up to which the best plan is found; of more (LoRA's layers have dozens of small products) one that costs so much
# more, of what is made again and of what copies hide behind: the very best took up to half a minute a program.
_FEW, _GAP = 60, 0.001


class TooLittle(Exception):
    """No choice fits; the argument says how many bytes are missing."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


def solve(kinds: Sequence[Kind], room: int, host: Host = Host()) -> list[list[int]]:
    """How many layers of each kind take each of its options, so that what is made again takes the fewest seconds.

    Exact with scipy (HiGHS, a mixed-integer program), to 0.1 % of a step where there are very many options; without it a ladder,
    which takes steps by seconds a byte and may leave less than one step's bytes free. Of plans with equal seconds the one of fewest bytes.

    Args:
        room: bytes for all that is kept on the device.

    Raises:
        TooLittle: if not even the least of every layer fits.
    """
    fastest = _fastest(kinds)
    if _fits(kinds, fastest, room, Host()):
        return fastest
    ladder = _ladder(kinds, room, host)
    exact = None if milp is None else _program(kinds, room, host)
    found = [plan for plan in (exact, ladder) if plan is not None]
    if not found:
        raise TooLittle(sum(kind.count * min(o.bytes for o in kind.options) for kind in kinds) - room)
    return min(found, key=lambda plan: _seconds(kinds, plan, host))


def _fastest(kinds: Sequence[Kind]) -> list[list[int]]:
    """What is best where there is room for everything: of equals what keeps least on the host, and then on the device."""
    found = [[0] * len(kind.options) for kind in kinds]
    for kind, counts in zip(kinds, found, strict=True):
        options = kind.options
        counts[
            min(range(len(options)), key=lambda i: (options[i].seconds, options[i].host, options[i].bytes))
        ] = kind.count
    return found


def _is_worse(option: Option, other: Option) -> bool:
    return other.bytes < option.bytes and other.seconds <= option.seconds and other.host <= option.host


def _taken(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Option]]:
    """How many layers take an option, of each."""
    for kind, found in zip(kinds, counts, strict=True):
        yield from zip(found, kind.options, strict=True)


def _seconds(kinds: Sequence[Kind], counts: Sequence[Sequence[int]], host: Host) -> float:
    made = math.fsum(count * option.seconds for count, option in _taken(kinds, counts))
    return made + host.seconds(sum(count * option.host for count, option in _taken(kinds, counts)))


def _fits(kinds: Sequence[Kind], counts: Sequence[Sequence[int]], room: int, host: Host) -> bool:
    device = sum(count * option.bytes for count, option in _taken(kinds, counts))
    return (
        device <= room and sum(count * option.host for count, option in _taken(kinds, counts)) <= host.bytes
    )


def _program(kinds: Sequence[Kind], room: int, host: Host) -> list[list[int]] | None:
    """The variables: how many layers take each option, and the seconds of copies that nothing hides."""
    flat = [(index, option) for index, kind in enumerate(kinds) for option in kind.options]
    most = max(option.seconds for _, option in flat) or 1.0
    size = max(max(option.bytes, option.host) for _, option in flat) or 1
    costs = [(option.seconds + _TIE * option.host / host.bandwidth) / most for _, option in flat]
    rows = [
        *([float(index == row) for index, _ in flat] + [0.0, 0.0] for row in range(len(kinds))),
        [option.bytes / size for _, option in flat] + [0.0, 0.0],
        [option.host / size for _, option in flat] + [0.0, 0.0],
        [option.host / host.bandwidth / most for _, option in flat] + [-1.0, 0.0],
    ]
    counts = [float(kind.count) for kind in kinds]
    limits = LinearConstraint(
        rows,
        [*counts, -math.inf, -math.inf, -math.inf],
        [*counts, room / size, host.bytes / size, host.hides / most],
    )
    # The last variable is 1: what is computed in any case, beside which a gap is small or not.
    bounds = Bounds([0] * (len(flat) + 1) + [1], [*_most_of(kinds), math.inf, 1])
    whole = [1] * len(flat) + [0, 0]
    gap = {"mip_rel_gap": 0.0 if len(flat) <= _FEW else _GAP}
    found = milp(
        [*costs, 1.0, host.hides / most], constraints=limits, integrality=whole, bounds=bounds, options=gap
    )
    if found.x is None:
        return None
    counted = iter(round(x) for x in found.x)
    result = [[next(counted) for _ in kind.options] for kind in kinds]
    return result if _fits(kinds, result, room, host) else None  # rounded up


def _most_of(kinds: Sequence[Kind]) -> list[float]:
    """How many layers may take each option: of equals the one that keeps less, so what keeps more for nothing is not taken."""
    return [
        0.0 if any(_is_worse(option, other) for other in kind.options) else float(kind.count)
        for kind in kinds
        for option in kind.options
    ]


def _ladder(kinds: Sequence[Kind], room: int, host: Host) -> list[list[int]] | None:
    """Where the least does not fit, layers go to the host one by one; then each step lets one layer keep more: the step that
    saves most seconds a byte goes first."""
    found = _least(kinds, room, host)
    if found is None:
        return None
    while True:
        taken = list(_taken(kinds, found))
        left = room - sum(count * option.bytes for count, option in taken)
        left_there = host.bytes - sum(count * option.host for count, option in taken)
        steps = [
            (
                (here.seconds - there.seconds) / max(there.bytes - here.bytes + there.host - here.host, 1),
                index,
                now,
                then,
            )
            for index, now, then, here, there in _steps(kinds, found)
            if there.seconds < here.seconds
            and there.bytes - here.bytes <= left
            and there.host - here.host <= left_there
        ]
        if not steps:
            return found
        _, index, now, then = max(steps, key=operator.itemgetter(0))  # of equals the first
        found[index][now] -= 1
        found[index][then] += 1


def _least(kinds: Sequence[Kind], room: int, host: Host) -> list[list[int]] | None:
    """A plan that keeps little on the device; None if none fits."""
    found = [[kind.count, *[0] * (len(kind.options) - 1)] for kind in kinds]
    room -= sum(kind.count * kind.options[0].bytes for kind in kinds)
    left = host.bytes - sum(kind.count * kind.options[0].host for kind in kinds)
    while room < 0 <= left:
        ways = [
            (here.bytes - there.bytes, here.host - there.host, index, then)
            for index, now, then, here, there in _steps(kinds, found)
            if now == 0 and there.bytes < here.bytes and there.host - here.host <= left
        ]
        if not ways:
            return None
        freed, taken, index, then = max(ways)
        found[index][0] -= 1
        found[index][then] += 1
        room, left = room + freed, left + taken
    return found if left >= 0 else None


def _steps(
    kinds: Sequence[Kind], counts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int, int, Option, Option]]:
    """What one layer may take instead of what it takes: its kind, both options by number, and both options."""
    for index, (kind, found) in enumerate(zip(kinds, counts, strict=True)):
        for (now, here), (then, there) in itertools.permutations(enumerate(kind.options), 2):
            if found[now]:
                yield index, now, then, here, there
