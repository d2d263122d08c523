"""How far ways of training are from eager, held against what a seed changes: numbers, a table, a picture."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.tables import GIB, markdown_table
from tools.convergence.runs import Result

WINDOW = 20  # steps whose mean loss is a point of a curve
_COLORS = {"eager": "tab:gray", "nudged": "black", "mst": "tab:red", "plan": "tab:blue", "ranks": "tab:green"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A way beside eager.

    Attributes:
        held_out: loss, the mean over the seeds.
        held_out_gap: of these losses, from the same weights; the largest over the seeds.
        curve_gap: of two points of the curves, from the same weights; the largest over seeds and points.
        norm_gap: of the norms of the first step's gradients, relative; the largest over the seeds.
    """

    way: str
    held_out: float
    held_out_gap: float
    curve_gap: float
    norm_gap: float


@dataclasses.dataclass(frozen=True)
class Noise:
    """What a seed changes: how far eager's runs are from each other.

    Attributes:
        held_out: the largest less the least loss.
        curve: the same for each point of the curves.
    """

    held_out: float
    curve: list[float]

    def has(self, found: Comparison) -> bool:
        """Whether a way's gaps lie within it: at the end, and along the curves, whose points' median counts."""
        return found.held_out_gap <= self.held_out and found.curve_gap <= statistics.median(self.curve)


def curve(result: Result) -> list[float]:
    """Means of the losses of :data:`WINDOW` steps each; the last one may have fewer."""
    losses = result["losses"]
    return [statistics.mean(losses[at : at + WINDOW]) for at in range(0, len(losses), WINDOW)]


def noise(results: Sequence[Result]) -> Noise:
    """Of eager's seeds.

    Raises:
        ValueError: if there are fewer than two.
    """
    eager = [r for r in results if r["way"] == "eager"]
    if len({r["seed"] for r in eager}) < 2:
        raise ValueError("two seeds of eager at least: one says nothing of what a seed changes")
    points = [_spread(at) for at in zip(*map(curve, eager), strict=True)]
    return Noise(_spread([r["held_out"] for r in eager]), points)


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def curve_gaps(results: Sequence[Result], way: str) -> list[float]:
    """At each point of the curves the largest over the seeds."""
    eager = {r["seed"]: curve(r) for r in results if r["way"] == "eager"}
    mine = [(curve(r), eager[r["seed"]]) for r in results if r["way"] == way]
    of_seeds = [[abs(a - b) for a, b in zip(*pair, strict=True)] for pair in mine]
    return [max(at) for at in zip(*of_seeds, strict=True)]


def compare(results: Sequence[Result], way: str) -> Comparison:
    eager = {r["seed"]: r for r in results if r["way"] == "eager"}
    pairs = [(r, eager[r["seed"]]) for r in results if r["way"] == way]
    return Comparison(
        way,
        held_out=statistics.mean(r["held_out"] for r, _ in pairs),
        held_out_gap=max(abs(r["held_out"] - truth["held_out"]) for r, truth in pairs),
        curve_gap=max(curve_gaps(results, way)),
        norm_gap=max(abs(r["norm"] / truth["norm"] - 1) for r, truth in pairs),
    )


def ways_of(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r["way"] for r in results))


_HEAD = (
    "way",
    "held-out loss",
    "gap to eager",
    "of the seeds' spread",
    "gap of the curves",
    "of the spread",
    "within",
    "gap of the first gradient's norm",
    "first step, s",
    "s a step",
    "peak GiB",
    "rewritten",
)


def table(results: Sequence[Result]) -> str:
    """What seeds change, a line a way, and the plans."""
    seeds, ways = noise(results), ways_of(results)
    count = len({r["seed"] for r in results if r["way"] == "eager"})
    text = (
        f"{count} seeds of eager: their held-out losses lie {seeds.held_out:.4f} apart, the points of their curves "
        f"(means of {WINDOW} steps) {statistics.median(seeds.curve):.4f} in the median. Gaps are to eager from the same "
        "weights, the largest over seeds and points; within: neither is larger than these. The gap of norms is relative: "
        "AdamW hides a gradient that is too large by a factor."
    )
    of_way = {way: [r for r in results if r["way"] == way] for way in ways}
    lines = [_HEAD, *(_line(of_way[way], compare(results, way), seeds) for way in ways)]
    plans = [plan for r in results for plan in r["plans"]]
    return "\n\n".join([text, markdown_table(lines), *(f"```\n{plan}\n```" for plan in plans)])


def _line(mine: Sequence[Result], found: Comparison, seeds: Noise) -> tuple[Any, ...]:
    """Of a way."""
    shares = found.held_out_gap / seeds.held_out, found.curve_gap / statistics.median(seeds.curve)
    gaps = (
        *(f"{found.held_out_gap:.1e}", f"{shares[0]:.2g}", f"{found.curve_gap:.1e}", f"{shares[1]:.2g}"),
        *("yes" if seeds.has(found) else "NO", f"{found.norm_gap:.1e}"),
    )
    peaks = [r["peak_bytes"] / GIB for r in mine if r["peak_bytes"]]
    rewritten = ", ".join(f"{count} {kind}" for kind, count in mine[0]["rewritten"].items())
    return (
        *(found.way, f"{found.held_out:.4f}", *(["–"] * len(gaps) if found.way == "eager" else gaps)),
        *(f"{mine[0]['first_seconds']:.1f}", f"{statistics.median(r['step_seconds'] for r in mine):.4f}"),
        *(f"{max(peaks):.2f}" if peaks else "–", rewritten or "–"),
    )


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """The curves; and the gaps to eager, with the spread of eager's seeds, on a logarithmic scale.

    Args:
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = [WINDOW * (at + 1) for at in range(len(curve(results[0])))]
    for result in results:
        way, is_first = result["way"], result["seed"] == results[0]["seed"]
        style = {"lw": 3.0, "alpha": 0.5} if way == "eager" else {"lw": 1.0, "ls": "--"}
        left.plot(steps, curve(result), color=_COLORS[way], label=way if is_first else None, **style)
    right.fill_between(
        steps, noise(results).curve, color="tab:gray", alpha=0.3, label="eager's seeds among themselves"
    )
    for way in ways_of(results):
        if way != "eager":
            right.plot(
                steps, curve_gaps(results, way), color=_COLORS[way], label=f"{way} to eager, same weights"
            )
    right.set_yscale("log")
    left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
    right.set(xlabel="step", ylabel="difference of these losses")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
