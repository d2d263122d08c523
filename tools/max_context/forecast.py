"""How bytes grow with the length, and which length is the longest that fits: arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes at a length: ``fixed + slope * tokens``."""

    fixed: float
    slope: float

    def at(self, seq: float) -> float:
        return self.fixed + self.slope * seq

    def length(self, usable: float) -> float:
        """Tokens that fit into ``usable`` bytes."""
        if self.slope > 0:
            return (usable - self.fixed) / self.slope
        return math.inf if self.fixed <= usable else 0.0


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Through the two points of largest x; (x, y)."""
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    slope = (y1 - y0) / (x1 - x0)
    return Line(y1 - slope * x1, slope)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What short runs say of long ones. All numbers but ``warnings`` are for one number of layers.

    Attributes:
        phase: the one that reaches the usable bytes first: "forward", "backward" or "optimizer".
        line: its peak.
        saved: what is alive between forward and backward.
        length: tokens, not rounded.
        gradient_bytes: of all parameters.
        largest_gradient_bytes: of one parameter.
    """

    phase: str
    line: Line
    saved: Line
    length: float
    parameter_bytes: float
    gradient_bytes: float
    largest_gradient_bytes: float
    state_bytes: float
    warnings: tuple[str, ...] = ()


def predict(points: Sequence[Result], layers: int, usable: float) -> Forecast:
    """The forecast for a model of ``layers`` layers.

    Args:
        points: results of :func:`measure`, at least two lengths; of this number of layers, or of two other
            numbers, from which all bytes are extrapolated linearly.
        usable: bytes.
    """
    groups: dict[int, list[Result]] = {}
    for point in points:
        groups.setdefault(point["layers"], []).append(point)
    if layers in groups:
        groups = {layers: groups[layers]}

    def scale(of: Callable[[Sequence[Result]], float]) -> float:
        values = [(float(n), of(group)) for n, group in groups.items()]
        return values[0][1] if len(values) == 1 else fit(values).at(layers)

    def line(phase: str, name: str) -> Line:
        def of(group: Sequence[Result]) -> Line:
            return fit([(point["seq"], point["phases"][phase][name]) for point in group])

        return Line(scale(lambda group: of(group).fixed), scale(lambda group: of(group).slope))

    lines = {phase: line(phase, "peak_bytes") for phase in points[0]["phases"]}
    saved = line("backward", "before_bytes")
    phase = min(lines, key=lambda name: lines[name].length(usable))
    warnings = []
    if lines["backward"].slope < saved.slope:
        warnings.append("backward peaked at its end, where gradients are: longer --seq are needed")

    def size(name: str) -> float:
        return scale(lambda group: float(group[-1][name]))

    return Forecast(
        phase=phase,
        line=lines[phase],
        saved=saved,
        length=lines[phase].length(usable),
        parameter_bytes=size("parameter_bytes"),
        gradient_bytes=size("gradient_bytes"),
        largest_gradient_bytes=max(point["largest_gradient_bytes"] for point in points),
        state_bytes=size("state_bytes"),
        warnings=tuple(warnings),
    )


def usable_bytes(point: Result, cap: float | None) -> float:
    """What torch's allocator may take: the cap, or what it was given, less what the driver took of it."""
    free: float = point["total_bytes"] - point["outside_bytes"]
    return min(free, point["limit_bytes"] if cap is None else cap)


def bound(forecast: Forecast, usable: float, layers: int, hidden: int, optimizer: str) -> float:
    """Tokens of one bfloat16 hidden row a layer that fit beside parameters, gradients and states."""
    one_by_one = optimizer == "in-backward"
    gradients = forecast.largest_gradient_bytes if one_by_one else forecast.gradient_bytes
    free = usable - forecast.parameter_bytes - forecast.state_bytes - gradients
    return free / (layers * hidden * 2)


def round_down(tokens: float, multiple: int) -> int:
    return int(tokens // multiple) * multiple
