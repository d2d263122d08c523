"""Which choice each layer takes: plans are written on trial, and their peaks are looked at.

How many bytes fit between the two passes follows from no sum: the peak may be at either end of the backward pass, where gradients
are, or in the forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from mst_fx.errors import BudgetError
from mst_fx.plan.choices import Choice
from mst_fx.plan.costs import cost_of, device_of
from mst_fx.plan.room import Room
from mst_fx.plan.solve import Host, Kind, Option, TooLittle, solve
from mst_fx.report import human_bytes

# Halvings of the bytes that all layers keep together: after these they are known to 2 %.
_HALVINGS = 6
# Of the seconds of all forward passes: what saves less is not looked for.
_SMALL = 1e-4
# What another search must promise to save, of the same.
_MUCH = 0.02

PeakWith = Callable[[Sequence[Choice]], int]


def host_beside(choices: Sequence[Sequence[Choice]], room: Room, size: int) -> Host:
    """The host's memory, beside forward passes that take what the layers' do."""
    device = device_of(room.device)
    forward = sum(cost_of(those[0].layer.nodes).seconds(device) for those in choices)
    return Host(size, device.link, forward)


def with_host(choices: Sequence[Sequence[Choice]], size: int) -> list[list[Choice]]:
    """The choices of each layer on the device and, but for the last layer, whose backward pass comes at once, on the host.

    Args:
        size: bytes of the host's memory.
    """
    asked = sum(those[0].as_asked().host_bytes for those in choices[:-1])
    has_host = 0 < size >= asked
    return [*(_placed(those, has_host) for those in choices[:-1]), list(choices[-1])]


def _placed(those: Sequence[Choice], has_host: bool) -> list[Choice]:
    if not has_host or not those[0].layer.readers:
        return list(those)
    return [*(each.as_asked() for each in those), *(each.on_host() for each in those)]


def by_number(choices: Sequence[Sequence[Choice]], taken: Sequence[int]) -> list[Choice]:
    """The choice of each layer."""
    return [those[index] for those, index in zip(choices, taken, strict=True)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which choice each layer takes, by number, what that costs, and the peak of the graph with it."""

    taken: Sequence[int]
    seconds: float
    peak: int


@dataclasses.dataclass(frozen=True)
class Way:
    """What layers may choose from.

    Attributes:
        choices: of each layer.
        beside: bytes that are there at a time beside what layers keep: the starts of a group's layers.
    """

    choices: Sequence[Sequence[Choice]]
    beside: int = 0


def fastest(
    choices: Sequence[Sequence[Choice]], room: Room, host: Host, peak_with: PeakWith
) -> tuple[Sequence[int], int]:
    """The choice of each layer, by number, and the peak of the graph with them: as :func:`fastest_of` one way."""
    _, plan = _fastest_of([Way(choices)], room, host, peak_with)
    return plan.taken, plan.peak


def fastest_of(ways: Sequence[Way], room: Room, host: Host, peak_with: PeakWith) -> tuple[list[Choice], int]:
    """The choice of each layer, and the peak of the graph with them.

    What comes back from the host is on the device for two layers at a time. So plans are looked for that send at most so much of a
    layer: from the most on, until one fits; and one that sends as little as can be. Of the best of them, late layers then do better as far as
    that fits.

    Args:
        ways: a later one is looked at where those before have no plan that fits, or by its sum of bytes it is faster.
        peak_with: the peak of the graph whose layers take these choices.

    Raises:
        BudgetError: if none fits.
    """
    way, plan = _fastest_of(ways, room, host, peak_with)
    return by_number(way.choices, plan.taken), plan.peak


def _fastest_of(ways: Sequence[Way], room: Room, host: Host, peak_with: PeakWith) -> tuple[Way, Plan]:
    known: list[dict[tuple[int, ...], int]] = [{} for _ in ways]  # the same plan comes up for many sizes

    def peak_of(number: int, taken: tuple[int, ...]) -> int:
        if taken not in known[number]:
            known[number][taken] = peak_with(by_number(ways[number].choices, taken))
        return known[number][taken]

    least = []
    for limit in (room.bytes, room.most):  # without a margin only where nothing fits with it
        found: tuple[Way, _Search, Plan] | None = None
        left = [
            (way, _Search(way.choices, room.device, limit, host, functools.partial(peak_of, number)))
            for number, way in enumerate(ways)
        ]
        while left:
            way, search = left.pop(0)
            plan = search.best()
            least.append(plan.peak)
            if plan.peak <= limit and (found is None or plan.seconds < found[2].seconds):
                found = way, search, plan
            if found is not None:
                left = _promising(left, found[0], found[2])
        if found is not None:
            way, search, plan = found
            return way, search.with_faster_choices(plan)
    raise BudgetError(_too_little(room, host, min(least) - room.most))


def _promising(others: Sequence[tuple[Way, _Search]], way: Way, plan: Plan) -> list[tuple[Way, _Search]]:
    """The ways that by their sum of bytes are faster than a plan, the fastest first."""
    size = way.beside + sum(choice.device_bytes for choice in by_number(way.choices, plan.taken))
    seconds = {search: search.seconds_within(size - other.beside) for other, search in others}
    better = [each for each in others if seconds[each[1]] < plan.seconds - _MUCH * each[1].host.hides]
    return sorted(better, key=lambda each: seconds[each[1]])


def largest(
    plan_of: Callable[[int], Plan], low: int, options: Sequence[tuple[Option, ...]], limit: int
) -> Plan | None:
    """The plan of most bytes on the device whose peak fits; None if none was found.

    Args:
        plan_of: the fastest plan that keeps so many bytes on the device.
        low: bytes that are known to fit.
        limit: of the peak.
    """
    found = None
    high = middle = sum(max(option.bytes for option in those) for those in options)
    for _ in range(_HALVINGS):
        plan = plan_of(middle)
        if plan.peak <= limit:
            found, low = plan, middle
        else:
            high = middle
        if low == high:
            break
        middle = (low + high) // 2
    return found


def solved(options: Sequence[tuple[Option, ...]], size: int, host: Host) -> list[int]:
    """Which option each layer takes; of equal layers the early ones, kept for longest, are on the host, or keep less.

    Args:
        size: bytes for all that is kept on the device.
    """
    kinds = list(dict.fromkeys(options))
    found = solve([Kind(options.count(kind), kind) for kind in kinds], size, host)
    turns = {kind: iter(_turns(kind, counts)) for kind, counts in zip(kinds, found, strict=True)}
    return [next(turns[those]) for those in options]


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    choices: Sequence[Sequence[Choice]]
    device: str
    limit: int
    host: Host
    peak_of: Callable[[tuple[int, ...]], int]

    def best(self) -> Plan:
        """The fastest plan that fits, or the one of the lowest peak, if none does."""
        fastest = self._fastest()
        if fastest is not None and fastest.peak <= self.limit:
            return fastest
        least_sent = max(min(choice.host_bytes for choice in those) for those in self.choices)
        sizes = {choice.host_bytes for those in self.choices for choice in those}
        fitting: list[Plan] = []
        missing: list[Plan] = []
        for most in sorted((size for size in sizes if size >= least_sent), reverse=True):
            if most == least_sent or not fitting:
                plan = self.sending(most)
                (fitting if plan.peak <= self.limit else missing).append(plan)
        if fitting:
            return min(fitting, key=lambda plan: plan.seconds)
        return min(missing, key=lambda plan: plan.peak)

    def _fastest(self) -> Plan | None:
        """What is best where there is room for everything; None if some of it goes to the host. (Where there is no room, a search for the
        largest plan begins with it.)"""
        taken = [
            min(range(len(those)), key=lambda i: (those[i].seconds, those[i].host, those[i].bytes))
            for those in self._options
        ]
        return None if any(each.host for each in self._taken(taken)) else self._plan(taken)

    @functools.cached_property
    def _options(self) -> list[tuple[Option, ...]]:
        device = device_of(self.device)
        return [
            tuple(Option(c.device_bytes, c.cost.seconds(device), c.host_bytes) for c in those)
            for those in self.choices
        ]

    def _taken(self, taken: Sequence[int]) -> list[Option]:
        return [those[index] for those, index in zip(self._options, taken, strict=True)]

    def _seconds(self, taken: Sequence[int]) -> float:
        found = self._taken(taken)
        return sum(each.seconds for each in found) + self.host.seconds(sum(each.host for each in found))

    def _plan(self, taken: Sequence[int]) -> Plan:
        return Plan(taken, self._seconds(taken), self.peak_of(tuple(taken)))

    def seconds_within(self, size: int) -> float:
        """Of the fastest plan that keeps so many bytes on the device, whatever its peak is."""
        try:
            return self._seconds(solved(self._options, size, self.host))
        except TooLittle:
            return math.inf

    def sending(self, most: int) -> Plan:
        """The fastest plan that fits, or the least one, if none does.

        Args:
            most: bytes that a layer may send to the host.
        """
        allowed = [[i for i, each in enumerate(those) if each.host <= most] for those in self._options]
        options = [tuple(those[i] for i in few) for those, few in zip(self._options, allowed, strict=True)]

        def plan_of(size: int) -> Plan:
            taken = solved(options, size, self.host)
            return self._plan([few[i] for few, i in zip(allowed, taken, strict=True)])

        low = _least_size(options, self.host)
        found = plan_of(low)
        if found.peak > self.limit:
            return found
        return largest(plan_of, low, options, self.limit) or found

    def with_faster_choices(self, plan: Plan) -> Plan:
        """A plan that fits, with faster choices from some layer on.

        The same bytes for every layer are what the end of the backward pass leaves, where the gradients of all weights are there. The
        backward pass of late layers is over by then. So of each choice, the fastest first, it is found from which layer on all that
        were slower can take it.
        """
        ranks = [sorted(range(len(those)), key=lambda i: those[i].seconds) for those in self._options]
        for rank in range(max(map(len, ranks))):
            wanted = [order[min(rank, len(order) - 1)] for order in ranks]
            plan = self._from_earliest(plan, wanted)
        return plan

    def _from_earliest(self, plan: Plan, wanted: Sequence[int]) -> Plan:
        """A plan in which as many late layers as can take a wanted choice, of those that it makes faster."""
        pairs = zip(self._options, wanted, plan.taken, strict=True)
        slower = [i for i, (those, new, old) in enumerate(pairs) if those[new].seconds < those[old].seconds]
        best, low, high = plan, 0, len(slower)
        middle = high - 1  # often not even the last can
        while low < high:
            better = self._with(plan, wanted, slower[middle:])
            if better is None:
                low = middle + 1
            else:
                best, high = better, middle
            middle = (low + high) // 2
        return best

    def _with(self, plan: Plan, wanted: Sequence[int], places: Sequence[int]) -> Plan | None:
        """A plan with other choices in some places; None if that does not fit, or saves nothing."""
        found = [wanted[i] if i in places else old for i, old in enumerate(plan.taken)]
        if sum(each.host for each in self._taken(found)) > self.host.bytes:
            return None
        if self._seconds(found) >= plan.seconds - _SMALL * self.host.hides:
            return None  # before it is written on trial
        better = self._plan(found)
        return better if better.peak <= self.limit else None


def _least_size(options: Sequence[tuple[Option, ...]], host: Host) -> int:
    """The fewest bytes on the device, to a hundredth, with which there is a plan."""
    low = sum(min(option.bytes for option in those) for those in options)
    high = sum(those[0].bytes for those in options)  # with nothing on the host
    while low < high:
        middle = (low + high) // 2
        try:
            solved(options, middle, host)
        except TooLittle:
            low = middle + 1
        else:
            high = middle
        if high - low < low // 100:
            break
    return high


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
