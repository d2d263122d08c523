"""The solver against all plans that there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from mst_fx.plan import solve as solver
from mst_fx.plan.solve import Host, Kind, Option, TooLittle, solve


def _instances(count: int) -> Iterator[tuple[list[Kind], int]]:
    """Kinds as layers make them: each option keeps more and costs less than the one before; and a budget."""
    chance = random.Random(0)
    for _ in range(count):
        kinds = []
        for _ in range(chance.randint(1, 3)):
            options = chance.randint(1, 4)
            sizes = sorted(chance.sample(range(1, 60), options))
            seconds = sorted((chance.choice((0.0, 1.0, chance.random())) for _ in sizes), reverse=True)
            kinds.append(Kind(chance.randint(1, 4), tuple(map(Option, sizes, seconds))))
        yield kinds, chance.randint(0, 250)


def _spread(count: int, over: int) -> Iterator[list[int]]:
    for cut in itertools.combinations(range(count + over - 1), over - 1):
        ends = (-1, *cut, count + over - 1)
        yield [b - a - 1 for a, b in itertools.pairwise(ends)]


def _of(kinds: list[Kind], counts: list[list[int]]) -> tuple[int, float]:
    pairs = [
        (n, o)
        for kind, found in zip(kinds, counts, strict=True)
        for n, o in zip(found, kind.options, strict=True)
    ]
    return sum(n * o.bytes for n, o in pairs), math.fsum(n * o.seconds for n, o in pairs)


def _best(kinds: list[Kind], room: int) -> float | None:
    every = itertools.product(*(_spread(kind.count, len(kind.options)) for kind in kinds))
    fitting = [seconds for size, seconds in (_of(kinds, list(counts)) for counts in every) if size <= room]
    return min(fitting, default=None)


@pytest.mark.parametrize("has_scipy", [True, False])
def test_the_solver_against_all_plans(has_scipy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact with scipy; without it feasible, and as good as can be where steps are small."""
    assert getattr(solver, "milp", None) is not None
    if not has_scipy:
        monkeypatch.setattr(solver, "milp", None)
    worse = solved = 0
    for kinds, room in _instances(200):
        best = _best(kinds, room)
        if best is None:
            with pytest.raises(TooLittle) as error:
                solve(kinds, room)
            assert error.value.missing == sum(k.count * k.options[0].bytes for k in kinds) - room > 0
            continue
        found = solve(kinds, room)
        size, seconds = _of(kinds, found)
        assert [sum(counts) for counts in found] == [kind.count for kind in kinds] and size <= room
        solved += 1
        if has_scipy:
            assert seconds == pytest.approx(best, rel=1e-6, abs=1e-9)
        worse += seconds > best * (1 + 1e-6) + 1e-9
    assert solved > 100
    assert has_scipy == (worse == 0), "the ladder is not exact, or this test cannot tell"


@pytest.mark.parametrize("has_scipy", [True, False])
def test_more_memory_is_never_slower(has_scipy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_scipy:
        monkeypatch.setattr(solver, "milp", None)
    for kinds, _ in _instances(25):
        least = sum(kind.count * kind.options[0].bytes for kind in kinds)
        seconds = [_of(kinds, solve(kinds, room))[1] for room in range(least, least + 120, 11)]
        assert seconds == sorted(seconds, reverse=True) or not has_scipy
        assert seconds[-1] <= seconds[0]


def test_of_equal_plans_the_one_of_fewest_bytes() -> None:
    kind = Kind(4, (Option(1, 2.0), Option(5, 1.0), Option(9, 1.0)))
    assert solve([kind], 10**6) == [[0, 4, 0]]


@pytest.mark.parametrize("has_scipy", [True, False])
def test_the_host_against_all_plans(has_scipy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option on the device or on the host, whose bytes and bandwidth are limited too."""
    if not has_scipy:
        monkeypatch.setattr(solver, "milp", None)
    chance = random.Random(1)
    solved = sent = worse = 0
    for kinds, room in _instances(60):
        host = Host(chance.randint(0, 120), bandwidth=20.0, hides=chance.choice((0.0, 2.0, 10.0)))
        both = [
            Kind(kind.count, (*kind.options, *(Option(0, o.seconds, o.bytes) for o in kind.options)))
            for kind in (Kind(min(k.count, 3), k.options[:2]) for k in kinds[:2])
        ]
        every = itertools.product(*(list(_spread(kind.count, len(kind.options))) for kind in both))
        plans = [list(counts) for counts in every]
        fitting = [
            _cost(both, p, host) for p in plans if _of(both, p)[0] <= room and _sent(both, p) <= host.bytes
        ]
        if not fitting:
            with pytest.raises(TooLittle):
                solve(both, room, host)
            continue
        try:
            found = solve(both, room, host)
        except TooLittle:
            assert not has_scipy
            continue
        assert _of(both, found)[0] <= room and _sent(both, found) <= host.bytes
        solved += 1
        sent += bool(_sent(both, found))
        if has_scipy:
            assert _cost(both, found, host) == pytest.approx(min(fitting), rel=1e-6, abs=1e-9)
        worse += _cost(both, found, host) > min(fitting) * (1 + 1e-6) + 1e-9
    assert solved > 30 and sent > 10
    assert has_scipy == (worse == 0)


def _sent(kinds: list[Kind], counts: list[list[int]]) -> int:
    return sum(
        n * o.host
        for kind, found in zip(kinds, counts, strict=True)
        for n, o in zip(found, kind.options, strict=True)
    )


def _cost(kinds: list[Kind], counts: list[list[int]], host: Host) -> float:
    return _of(kinds, counts)[1] + host.seconds(_sent(kinds, counts))


def test_very_many_options_to_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the step: what is made again, and what copies hide behind."""
    chance = random.Random(1)
    host = Host(10**9, 1e6, 3.0)
    for _ in range(3):
        sizes = sorted(chance.sample(range(10**6), solver._FEW // 2 + 1))
        seconds = sorted((chance.random() for _ in sizes), reverse=True)
        kept = list(map(Option, sizes, seconds))
        kinds = [Kind(20, (*kept, *(Option(0, o.seconds, o.bytes) for o in kept))), Kind(2, tuple(kept))]
        room = 11 * sizes[-1]
        found = solver._seconds(kinds, solve(kinds, room, host), host)
        with monkeypatch.context() as patch:
            patch.setattr(solver, "_FEW", 10**6)
            best = solver._seconds(kinds, solve(kinds, room, host), host)
        assert best <= found <= best + solver._GAP * (best + host.hides)
