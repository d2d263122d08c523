"""Arithmetic of the longest-sequence search, and its step on a CPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tools.bench.contenders import CONTENDERS
from tools.max_context import train
from tools.max_context.forecast import Line, bound, fit, predict, usable_bytes
from tools.max_context.search import Found, default_lengths, search, short_runs, trained
from tools.max_context.tables import tables

GIB = 2**30


def _point(seq: int, layers: int = 4, **peaks: float) -> dict[str, Any]:
    """A run whose forward, backward and optimizer peaks are given in bytes."""
    phases = {name: {"peak_bytes": peak, "before_bytes": 0, "seconds": 1.0} for name, peak in peaks.items()}
    phases.setdefault("backward", {"peak_bytes": 0.0, "before_bytes": 0, "seconds": 1.0})
    return {
        "seq": seq,
        "layers": layers,
        "phases": phases,
        "parameter_bytes": 100 * layers,
        "gradient_bytes": 100 * layers,
        "largest_gradient_bytes": 20,
        "state_bytes": 200 * layers,
        "total_bytes": 20_000,
        "outside_bytes": 1_000,
        "limit_bytes": 19_500,
        "at_first_gradient_bytes": None,
        "reserved_bytes": 0,
        "retries": 0,
        "step_seconds": 2.0,
        "compile_seconds": 0.0,
        "loss": 1.0,
        "gradient_norm": 1.0,
    }


def test_fit_goes_through_the_two_longest() -> None:
    line = fit([(30, 700), (10, 999), (20, 500)])
    assert line == Line(100, 20)
    assert line.length(1100) == 50
    assert Line(5, 0).length(6) == math.inf and Line(5, -1).length(4) == 0


def test_the_phase_that_is_full_first_limits() -> None:
    points = [_point(seq, forward=900 + 8 * seq, backward=1500 + 5 * seq) for seq in (100, 200)]
    low, high = (predict(points, 4, usable) for usable in (2000, 9000))
    assert (low.phase, low.length) == ("backward", 100)
    assert high.phase == "forward" and high.length == pytest.approx((9000 - 900) / 8)
    assert not high.warnings
    usable = usable_bytes(points[0], None)
    assert usable == 19_000 and usable_bytes(points[0], 9000) == 9000


def test_layers_are_extrapolated() -> None:
    def run(seq: int, layers: int) -> dict[str, Any]:
        return _point(seq, layers, forward=50 + 400 * layers + (3 + 2 * layers) * seq)

    points = [run(seq, layers) for layers in (2, 4) for seq in (100, 200)]
    forecast = predict(points, 32, 1e6)
    assert forecast.line.fixed == pytest.approx(50 + 400 * 32)
    assert forecast.line.slope == pytest.approx(3 + 2 * 32)
    assert forecast.parameter_bytes == pytest.approx(3200) and forecast.state_bytes == pytest.approx(6400)
    assert forecast.largest_gradient_bytes == 20
    # A number of layers that was run is not extrapolated.
    assert predict([*points, run(100, 32), run(201, 32)], 32, 1e6).line.slope == pytest.approx(67)


def test_a_backward_pass_that_peaks_at_its_end_is_told() -> None:
    points = [_point(seq, forward=8.0 * seq, backward=5000.0 + seq) for seq in (100, 200)]
    for point in points:
        point["phases"]["backward"]["before_bytes"] = 7 * point["seq"]
    assert "longer --seq" in predict(points, 4, 9000).warnings[0]


def test_bound_counts_gradients_as_they_live() -> None:
    points = [_point(seq, forward=900 + 8 * seq) for seq in (100, 200)]
    forecast = predict(points, 4, 9000)
    assert bound(forecast, 9000, 4, 5, "adamw") == (9000 - 400 - 800 - 400) / (4 * 5 * 2)
    assert bound(forecast, 9000, 4, 5, "in-backward") == (9000 - 400 - 800 - 20) / (4 * 5 * 2)


class _Gpu:
    """Trains up to a length."""

    def __init__(self, most: int, error_at: int | None = None) -> None:
        self.most, self.error_at, self.asked = most, error_at, list[int]()

    def __call__(self, seq: int) -> dict[str, Any]:
        self.asked.append(seq)
        if seq == self.error_at:
            return {"seq": seq, "layers": 4, "error": "Traceback\ntook more than 9 s"}
        return (
            _point(seq, forward=1)
            if seq <= self.most
            else {"seq": seq, "layers": 4, "oom": "forward", "message": ""}
        )


@pytest.mark.parametrize(
    ("most", "above", "found", "asked"),
    [
        (1000, True, Found(1000, 1050), [1000, 1050]),
        (1000, False, Found(1000), [1000]),
        # An OOM at less than 1.05 times the length says it all.
        (970, True, Found(960, 980), [1000, 980, 960]),
        # The prediction was too low: climb.
        (1060, True, Found(1050, 1110), [1000, 1050, 1110]),
        (10, True, Found(None, 920, "5 lengths ran out of memory"), [1000, 980, 960, 940, 920]),
    ],
)
def test_search(most: int, above: bool, found: Found, asked: list[int]) -> None:
    gpu = _Gpu(most)
    assert search(1000, gpu, above=above, multiple=10) == found
    assert gpu.asked == asked


def test_search_says_what_was_not_tried() -> None:
    assert search(1000, _Gpu(1000, 1050), above=True, multiple=10) == Found(
        1000, None, "at 1,050: took more than 9 s"
    )
    assert search(1000, _Gpu(2000, 1000), above=True, multiple=10).length is None


def test_short_runs_shrink_until_two_train() -> None:
    def lengths(most: int, error_at: int | None = None) -> tuple[list[int], list[int]]:
        gpu = _Gpu(most, error_at)
        found = short_runs((64, 96), gpu, 2)
        return gpu.asked, [run["seq"] for run in found if trained(run)]

    assert lengths(100) == ([64, 96], [64, 96])
    assert lengths(85) == ([64, 96, 80], [64, 80])
    assert lengths(40) == ([64, 32, 48, 40], [32, 40])
    assert lengths(64) == ([64, 96, 80, 72, 32], [64, 32])
    assert lengths(100, 64) == ([64], [])
    assert lengths(0)[1] == []


def test_default_lengths_follow_what_is_kept() -> None:
    lengths = {name: default_lengths(contender)[1] for name, contender in CONTENDERS.items()}
    assert lengths["mst+ckpt"] == lengths["liger-tiled+ckpt"] == 98304
    assert lengths["eager+ckpt"] == lengths["attention+ckpt"] == lengths["mst"] == 24576
    assert lengths["eager"] == lengths["attention"] == lengths["liger"] == 6144


def test_tables() -> None:
    gpu = _Gpu(1000)

    def entry(name: str, found: Found | None, **more: Any) -> dict[str, Any]:
        points = [_point(seq, forward=900 + 8 * seq) for seq in (100, 200)]
        forecast = dataclasses.asdict(predict(points, 4, 9000))
        return {
            "contender": name,
            "model": "tiny",
            "layers": 4,
            "optimizer": "adamw, fused",
            "cap": GIB,
            "verify": "both",
            "tried": points,
            "points": points,
            "attempts": [gpu(1000), gpu(1050)],
            "note": "",
            "usable": 9000,
            "forecast": forecast,
            "bound": 2000.0,
            "predicted": 1010,
            "found": found and dataclasses.asdict(found),
        } | more

    slow = entry("eager", None, predicted=250)
    fast = entry("mst", Found(1000, 1050))
    none = {"contender": "liger", "model": "tiny", "optimizer": "adamw, fused", "cap": None, "note": "no"}
    text = tables([slow, fast, {**none, "tried": [], "attempts": [], "layers": 4}], "eager")
    head, _, first, second, third = text.split("\n\n")[1].splitlines()
    assert {line.count(" | ") for line in (head, first, second, third)} == {13}
    cells = "adamw, fused | 1.00 | 4 | 8 | 2 | 2,000"
    assert second == (
        f"| mst | {cells} | 1,010 | 1,000 | 2.00 | yes, at 1,050 (1.050 x) | – | 0.500 | 4.00 x (predicted) |"
    )
    assert (
        first == f"| eager | {cells} | 250 | – | – | not tried | – | 0.125 (predicted) | 1.00 x (predicted) |"
    )
    parts = text.split("\n\n")[3].splitlines()
    assert {line.count(" | ") for line in parts if "---" not in line} == {11}
    runs = text.split("\n\n")[5].splitlines()
    assert {line.count(" | ") for line in runs if "---" not in line} == {15} and len(runs) == 10


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "in-backward"])
def test_a_step_trains_and_runs_out_of_memory(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_collect_log", list)  # its handler would stay

    def run(contender: str, kernel: str = "fused", cap: float | None = None) -> dict[str, Any]:
        return train.measure(
            model="tiny",
            contender=contender,
            layers=1,
            seq=128,
            optimizer=optimizer,
            kernel=kernel,
            lora=0,
            options={"inner": "aot_eager", "chunk_rows": 32, "strict": True},
            cap=cap,
            device="cpu",
            steps=2,
        )

    eager, mst = run("eager", kernel="loop"), run("mst+ckpt")
    assert eager["state_bytes"] == pytest.approx(2 * eager["parameter_bytes"], rel=1e-3)
    assert eager["most_steps_of_a_parameter"] == mst["most_steps_of_a_parameter"] == 1
    assert eager["gradient_bytes"] == mst["gradient_bytes"] == eager["parameter_bytes"]
    # Of the second step: the first one's update is in it.
    assert mst["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    assert mst["gradient_norm"] == pytest.approx(eager["gradient_norm"], rel=1e-4)
    assert ("optimizer" in mst["phases"]) == (optimizer == "adamw")
    full = run("eager", cap=eager["parameter_bytes"] * 3)
    assert full["oom"] in ("forward", "backward") and "phases" not in full
