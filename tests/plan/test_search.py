"""The search for a plan, on peaks that are sums: beside all plans that there are."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mst_fx.errors import BudgetError
from mst_fx.plan.room import Room
from mst_fx.plan.search import Way, fastest, fastest_of
from mst_fx.plan.solve import Host


@dataclasses.dataclass(frozen=True)
class _Seconds:
    made: float

    def seconds(self, device: object) -> float:
        return self.made


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """As :class:`mst_fx.plan.choices.Choice`, in numbers."""

    device_bytes: int
    host_bytes: int
    cost: _Seconds


def _layer(sizes: Sequence[int], seconds: Sequence[float], has_host: bool) -> list[_Choice]:
    pairs = list(zip(sizes, map(_Seconds, seconds), strict=True))
    on_device = [_Choice(size, 0, cost) for size, cost in pairs]
    return on_device + [_Choice(0, size, cost) for size, cost in pairs] * has_host


def _peak(chosen: Sequence[Any], gradient: int) -> int:
    """The forward pass ends with all that is on the device; backward, what two layers have on the host is there too, and gradients
    pile up."""
    here = [sum(c.device_bytes for c in chosen[: i + 1]) for i in range(len(chosen))]
    peaks = [here[-1]]
    for i, choice in enumerate(chosen):
        ahead = chosen[i - 1].host_bytes if i else 0
        peaks.append(here[i] + choice.host_bytes + ahead + gradient * (len(chosen) - i))
    return max(peaks)


_HOST = Host(10_000, 1e9, 1.0)


def _instances(count: int) -> Iterator[tuple[list[list[_Choice]], int]]:
    """Layers of one kind, of which the last sends nothing; and a gradient's bytes."""
    chance = random.Random(0)
    for _ in range(count):
        options = chance.randint(2, 4)
        sizes = sorted(chance.sample(range(5, 60), options))
        seconds = [*sorted((chance.random() for _ in sizes[1:]), reverse=True), 0.0]
        layers = chance.randint(2, 4 if options < 4 else 3)
        choices = [_layer(sizes, seconds, index < layers - 1) for index in range(layers)]
        yield choices, chance.randint(0, 40)


def _seconds(chosen: Sequence[_Choice]) -> float:
    return sum(c.cost.made for c in chosen)


def _search(choices: list[list[_Choice]], gradient: int, budget: int) -> list[_Choice] | None:
    every: Any = choices
    try:
        taken, peak = fastest(every, Room("cpu", budget, 0), _HOST, lambda those: _peak(those, gradient))
    except BudgetError:
        return None
    chosen = [those[index] for those, index in zip(choices, taken, strict=True)]
    assert _peak(chosen, gradient) == peak <= budget
    return chosen


@pytest.mark.slow
def test_plans_are_near_the_best_of_all() -> None:
    best, found, slower = 0.0, 0.0, 0
    for choices, gradient in _instances(10):
        every = [(_peak(those, gradient), _seconds(those)) for those in itertools.product(*choices)]
        least, most = min(every)[0], max(every)[0]
        last = float("inf")
        for budget in range(least, most + 1, max(1, (most - least) // 6)):
            chosen = _search(choices, gradient, budget)
            fitting = [seconds for peak, seconds in every if peak <= int(budget * 0.99)]
            assert chosen is not None and bool(fitting) <= (_seconds(chosen) >= min(fitting, default=0))
            if fitting:
                best, found = best + min(fitting), found + _seconds(chosen)
                slower += _seconds(chosen) > last  # with more memory
                last = _seconds(chosen)
        assert _search(choices, gradient, least - 1) is None
    assert best <= found <= 1.08 * best
    assert slower == 0


def test_late_layers_take_more_than_early_ones() -> None:
    """Where gradients of weights have piled up there is room for the first two layers' least; with the same for all, nobody has more."""
    choices = [_layer([10, 40], [1.0, 0.0], index < 5) for index in range(6)]
    chosen = _search(choices, 20, 157)
    assert chosen is not None
    assert [c.cost.made for c in chosen] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("host", [0, 50, 10_000])
def test_no_more_is_sent_than_there_is(host: int) -> None:
    choices: Any = [_layer([10, 40], [1.0, 0.0], index < 3) for index in range(4)]
    room = Room("cpu", 120, 0)
    taken, _ = fastest(choices, room, Host(host, 1e9, 1.0), lambda those: _peak(those, 10))
    assert sum(those[i].host_bytes for those, i in zip(choices, taken, strict=True)) <= host


def test_groups_are_looked_at_where_they_promise_something() -> None:
    """Alone a layer keeps 10 and makes one second again, or keeps 40; in a group every second one keeps nothing, or 12 for a tenth."""
    alone: Any = [_layer([10, 40], [1.0, 0.0], has_host=False) for _ in range(6)]
    inner: Any = _layer([0, 12], [2.0, 0.1], has_host=False)
    in_groups: Any = [[*inner, *those] if i % 2 else those for i, those in enumerate(alone)]
    ways = [Way(alone), Way(in_groups, beside=5)]
    written: list[int] = []

    def peak(chosen: Sequence[Any]) -> int:
        is_grouped = any(choice in inner for choice in chosen)
        written.append(is_grouped)
        return _peak(chosen, 0) + 5 * is_grouped

    def found(budget: int) -> list[float]:
        written.clear()
        chosen: Any
        chosen, size = fastest_of(ways, Room("cpu", budget, 0), Host(0, 1e9, 1.0), peak)
        assert size <= budget
        return [choice.cost.made for choice in chosen]

    assert found(250) == [0.0] * 6 and not any(written)
    assert found(75) == [1.0, 0.1] * 3  # six alone keep 60, which six seconds make
    assert found(40) == [1.0, 2.0] * 3
    with pytest.raises(BudgetError):
        found(34)
