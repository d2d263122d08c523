"""``mst-fx diff --html``: one self-contained page about a report.

The graphs before and after side by side, aligned by the names of their nodes, regions and what did not change
folded; the estimate of the memory of a step as a chart; refusals and findings. What is shown is chosen here, how
is in ``page.html``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources

from jinja2 import Environment, StrictUndefined

from mst_fx.diagnose.findings import Diagnosis, Line, Memory
from mst_fx.report import COLUMNS, Alive, Rewrite, human_bytes

_SHOWN = 4  # unchanged nodes in a row that are not worth folding
_MOMENTS = 400  # of a pass, that are drawn
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 880, 300, 78, 26, 34  # of the chart, and its margins


def make_page(title: str, report: Diagnosis) -> str:
    """A page of HTML that needs nothing else: no network, light and dark.

    Args:
        report: of :func:`~mst_fx.explain` or :func:`~mst_fx.watch`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": human_bytes, "count": "{:,}".format}
    environment.globals |= {"nodes": _nodes, "loop_of": _loop_of}
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    return template.render(
        title=title,
        report=report,
        columns=COLUMNS,
        tiles=list(_tiles(report)),
        chart=_chart(_curves(report)),
        alive=_alive(report),
        graphs=list(_graphs(report)),
    )


def _curves(report: Diagnosis) -> dict[str, Memory]:
    """The curves of the chart: by the walk over the graph of both passes where a memory plan has made one."""
    if not any(plan.after for plan in report.plans):
        before, after = report.memory_before, report.memory_after
        return {"before": before, "after": after} if max(before.peak, after.peak) else {}
    found = {"before": report.captured} if len(report.captured) >= len(report.plans) else {}
    found["after"] = [plan.before for plan in report.plans if plan.before is not None]
    found["planned"] = [plan.after for plan in report.plans if plan.after is not None]
    return {
        name: functools.reduce(
            Memory.then, (Memory(_thinned(x.forward), _thinned(x.backward), x.kept) for x in lines)
        )
        for name, lines in found.items()
    }


def _thinned(curve: Sequence[int]) -> tuple[int, ...]:
    """A curve of a few hundred moments at most, each the highest of several."""
    width = -(-len(curve) // _MOMENTS) or 1
    return tuple(max(curve[start : start + width]) for start in range(0, len(curve), width))


def _alive(report: Diagnosis) -> list[tuple[str, tuple[Alive, ...]]]:
    """What is alive at the peak, of each curve that knows it: of the graph that takes most, beside each other."""
    by_peak = functools.partial(max, key=lambda line: max((*line.forward, *line.backward), default=0))
    known = {
        "before": report.captured,
        "after": [plan.before for plan in report.plans if plan.before is not None],
        "planned": [plan.after for plan in report.plans if plan.after is not None],
    }
    return [(name, by_peak(lines).largest) for name, lines in known.items() if lines]


def _nodes(lines: Sequence[object]) -> str:
    return f"{len(lines)} node{'s' if len(lines) > 1 else ''}"


def _loop_of(rewrite: Rewrite) -> str:
    """What came: a loop, or what takes attention's place."""
    if rewrite.chunks == 1:
        return rewrite.form or rewrite.why
    chunk = human_bytes(rewrite.chunk_bytes)
    return f"loop of {rewrite.chunks:,} × {rewrite.chunk_rows:,} rows, a chunk {chunk}"


def _tiles(report: Diagnosis) -> Iterator[tuple[str, str]]:
    """Numbers, each with a note."""
    before, after = report.memory_before.peak, report.memory_after.peak
    if before:
        note = "estimated peak of a step above parameters and their gradients"
        yield f"{human_bytes(before)} → {human_bytes(after)}", note
    kinds = sorted({rewrite.kind for rewrite in report.rewrites})
    counts = [f"{sum(r.kind == kind for r in report.rewrites)} {kind}" for kind in kinds]
    yield str(len(report.rewrites)), f"rewritten: {', '.join(counts) or 'nothing'}"
    yield str(len(report.refusals)), "refused"
    yield str(report.graphs), "graphs captured"


# The chart


@dataclasses.dataclass(frozen=True)
class _Curve:
    """One memory over a step; ``x`` and ``y`` are where its peak is, in pixels.

    Attributes:
        is_right: the peak lies so far to the right that its label goes to the left of it.
    """

    name: str
    path: str
    x: float
    y: float
    is_right: bool
    peak: int


@dataclasses.dataclass(frozen=True)
class _Chart:
    """Positions in pixels.

    Attributes:
        floor: where 0 bytes are.
        ticks: (y, bytes).
        phases: (x of the middle, name).
        data: what the script needs to read values off: JSON of [fraction of the step, bytes] by curve.
    """

    floor: float
    middle: float
    ticks: list[tuple[float, int]]
    phases: list[tuple[float, str]]
    curves: list[_Curve]
    data: str
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    top: int = _TOP


def _chart(memories: Mapping[str, Memory]) -> _Chart | None:
    if not memories:
        return None
    ticks = _ticks(max(memory.peak for memory in memories.values()))
    full = ticks[-1]
    has_backward = any(memory.backward for memory in memories.values())
    points = {name: _points(memory, has_backward) for name, memory in memories.items()}
    curves = []
    for name, memory in memories.items():
        x, y = max(points[name], key=lambda point: point[1])
        curves.append(_Curve(name, _path(points[name], full), _x(x), _y(y, full), x > 0.7, memory.peak))
    return _Chart(
        floor=_y(0, full),
        middle=_x(0.5),
        ticks=[(_y(tick, full), tick) for tick in ticks],
        phases=[(_x((start + end) / 2), name) for name, start, end in _phases(has_backward)],
        curves=curves,
        data=json.dumps({name: [[round(x, 4), y] for x, y in curve] for name, curve in points.items()}),
    )


def _ticks(top: int) -> list[int]:
    """From 0 to a round number above ``top``: 1, 2 or 5 times a power of two of bytes, in about four steps."""
    step = next(
        int(factor * 2.0**power)
        for power in itertools.count(0, 10)
        for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500)
        if factor * 2.0**power * 5 >= top
    )
    return list(range(0, top + step, step))


def _phases(has_backward: bool) -> list[tuple[str, float, float]]:
    return [("forward", 0, 0.5), ("backward", 0.5, 1)] if has_backward else [("forward", 0, 1)]


def _points(memory: Memory, has_backward: bool) -> list[tuple[float, int]]:
    """(fraction of the step, bytes): forward is the first half, backward the second."""
    points = [(0.0, 0)]
    values = (memory.forward, memory.backward)
    for (_, start, end), half in zip(_phases(has_backward), values, strict=False):
        width = end - start
        points += [(start + width * (i + 1) / len(half), value) for i, value in enumerate(half)]
    return [*points, (1.0, 0)]


def _path(curve: Sequence[tuple[float, int]], full: int) -> str:
    corners = [f"{_x(x):.1f},{_y(value, full):.1f}" for x, value in curve]
    return f"M{' L'.join(corners)} Z"


def _x(fraction: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 8) * fraction


def _y(value: float, full: int) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / full


# The graphs side by side


@dataclasses.dataclass(frozen=True)
class _Block:
    """Nodes of one side that are shown together.

    Attributes:
        kind: "plain"; "same": folded, they did not change; "unread": folded, nobody reads them any more; "went" and
            "came": of a rewrite.
        lines: each with "went", "came" or "".
        run: the same for both sides of what did not change.
    """

    kind: str
    lines: list[tuple[Line, str]]
    rewrite: Rewrite | None = None
    run: int = 0


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A graph before and after.

    Attributes:
        before, after: how many nodes.
        pairs: what stands beside each other: blocks of the left side, and of the right.
    """

    before: int
    after: int
    pairs: list[tuple[list[_Block], list[_Block]]]


def _graphs(report: Diagnosis) -> Iterator[_Graph]:
    for before, after in zip(report.lines_before, report.lines_after, strict=True):
        yield _Graph(len(before), len(after), list(_aligned(before, after, report.rewrites)))


def _aligned(
    before: Sequence[Line], after: Sequence[Line], rewrites: Sequence[Rewrite]
) -> Iterator[tuple[list[_Block], list[_Block]]]:
    matcher = difflib.SequenceMatcher(
        a=[(x.key, x.text) for x in before], b=[(x.key, x.text) for x in after], autojunk=False
    )
    for tag, start, end, new_start, new_end in matcher.get_opcodes():
        old, new = before[start:end], after[new_start:new_end]
        if tag == "equal":
            yield [_unchanged(old, start)], [_unchanged(new, start)]
        else:
            yield list(_went(old, new, rewrites)), list(_came(new, old, rewrites))


def _unchanged(lines: Sequence[Line], run: int) -> _Block:
    return _Block("plain" if len(lines) <= _SHOWN else "same", [(line, "") for line in lines], run=run)


def _went(old: Sequence[Line], new: Sequence[Line], rewrites: Sequence[Rewrite]) -> Iterator[_Block]:
    stay = {line.key for line in new}
    for rewrite, group in itertools.groupby(old, lambda line: _rewrite_of(line, old, rewrites, "before")):
        lines = [(line, "" if line.key in stay else "went") for line in group]
        kind = "went" if rewrite is not None else "unread" if len(lines) > _SHOWN else "plain"
        yield _Block(kind, lines, rewrite)


def _came(new: Sequence[Line], old: Sequence[Line], rewrites: Sequence[Rewrite]) -> Iterator[_Block]:
    known = {line.key for line in old}
    owners = [_rewrite_of(line, [*old, *new], rewrites, "after") for line in new]
    for i in reversed(range(len(new) - 1)):
        if owners[i] is None and new[i].key not in known:
            owners[i] = owners[i + 1]  # an op of several results, before the result that took a node's place
    for rewrite, group in itertools.groupby(zip(owners, new, strict=True), lambda pair: pair[0]):
        lines = [(line, "" if line.key in known else "came") for _, line in group]
        yield _Block("plain" if rewrite is None else "came", lines, rewrite)


def _rewrite_of(line: Line, around: Sequence[Line], rewrites: Sequence[Rewrite], side: str) -> Rewrite | None:
    """The rewrite a node belongs to: by its name and operands, and by the layer where layers look alike."""
    named = [r for r in rewrites if _is_among(line, r.before if side == "before" else r.after)]
    modules = [x.module for x in around if x.key.rpartition(".")[0] == line.key.rpartition(".")[0]]
    near = [r for r in named if any(m.startswith(r.name) for m in modules)]
    return next(iter(near or named), None)


def _is_among(line: Line, nodes: Sequence[str]) -> bool:
    """Whether a node is one of ``%linear : [num_users=1] = …(args = (%x, %weight))``, by name and an operand."""
    for text in nodes:
        name, *operands = re.findall(r"%(\w+)", text)
        if name == line.name and (not operands or set(operands) & set(line.operands)):
            return True
    return False
