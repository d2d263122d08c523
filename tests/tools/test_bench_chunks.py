"""The sweep over chunk sizes measures each size, and the one of ``"auto"``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tools.bench.chunks import Point, auto_rows, draw, read, sweep, table
from tools.bench.runner import Case


@pytest.mark.slow
@pytest.mark.parametrize("level", ["mlp", "head"])
def test_sweep(level: str, tmp_path: Path) -> None:
    case = Case(level=level, model="tiny", layers=1, seq=600, device="cpu")
    points = sweep(case, [50, 300, 601], rounds=2, steps=1, inner="aot_eager")
    assert [point.chunk_rows for point in points] == [50, auto_rows(case), 300]
    assert [point.is_auto for point in points] == [False, True, False]
    assert all(len(point.seconds) == 2 and min(point.seconds) > 0 for point in points)
    draw([(case, points)], tmp_path / "chunks.png", "")
    assert (tmp_path / "chunks.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_read_is_marked_as_today(tmp_path: Path) -> None:
    case = Case(level="mlp", model="llama3-8b", layers=1, seq=65536)
    points = [Point(1024, True, (0.2, 0.1), 7), Point(4096, False, (0.1, 0.1), 9)]
    results = [{**dataclasses.asdict(case), "points": list(map(dataclasses.asdict, points))}]
    (tmp_path / "chunks.json").write_text(json.dumps({"results": results}))
    ((found, curve),) = read(tmp_path / "chunks.json")
    assert found == case
    assert [(p.chunk_rows, p.is_auto, p.median, p.above) for p in curve] == [
        (1024, False, pytest.approx(0.15), 7),
        (4096, True, 0.1, 9),
    ]


def test_automatic_sizes_are_those_of_a_gpu() -> None:
    case = Case(level="mlp", model="llama3-8b", layers=1, seq=65536)
    assert auto_rows(case) == 4096
    assert auto_rows(dataclasses.replace(case, model="llama3-70b")) == 8192
    assert auto_rows(dataclasses.replace(case, model="qwen2.5-0.5b")) == 4096
    head = dataclasses.replace(case, level="head")
    assert auto_rows(head) == 4096
    assert auto_rows(dataclasses.replace(head, seq=262144)) == 4096  # 32 chunks would have 8,192
    assert auto_rows(dataclasses.replace(head, model="qwen2-7b")) == 3584
    assert auto_rows(dataclasses.replace(head, model="qwen2.5-0.5b")) == 2048


def test_table() -> None:
    case = Case(level="mlp", model="tiny", layers=1, seq=64)
    points = [Point(16, False, (0.2, 0.1, 0.4), 2**30), Point(32, True, (0.1, 0.1), 2**31)]
    lines = table(case, points).splitlines()
    assert lines[-2] == "| 16 | 200.0 (100.0 – 400.0) | 2.00 | 1.00 |"
    assert lines[-1] == "| 32 (auto) | 100.0 (100.0 – 100.0) | 1.00 | 2.00 |"
