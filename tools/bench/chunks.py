"""How fast blocks are by the rows of their chunks, and what they take: the curves that ``"auto"`` follows.

    python -m tools.bench.chunks --model llama3-8b qwen2-7b --seq 16384,65536  # one MLP, one head with its loss
    python -m tools.bench.chunks --level mlp --chunks 1024,2048,4096,8192,16384
    python -m tools.bench.chunks --cpu                                         # a small size that runs anywhere
    python -m tools.bench.chunks --draw benchmarks/chunks-h200.json --level mlp --seq 65536 --out docs --name chunks-mlp

A block's variants are compiled in one process and then take turns, forward and backward. Chunks have the
same size in both passes; with ``"auto"`` those of the backward pass may be half as large.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mst_fx.chunk_rows import mlp_chunk_size, vocab_chunk_size
from tools.bench.contenders import Contender
from tools.bench.models import MODELS, config_of
from tools.bench.runner import Case, Runner
from tools.bench.tables import GIB, markdown_table, numbers, write_results
from tools.draw import panels

OPTIONS = {"mlp": "chunk_rows", "head": "vocab_chunk_rows"}
_SLOWEST = 1.6  # that the picture shows


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of chunks.

    Attributes:
        is_auto: it is the size that ``"auto"`` takes.
        seconds: of each step that counts.
        above: bytes at the peak above parameters and inputs; 0 on a CPU.
    """

    chunk_rows: int
    is_auto: bool
    seconds: tuple[float, ...]
    above: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def auto_rows(case: Case) -> int:
    """The rows of a chunk under ``chunk_rows="auto"``."""
    config = config_of(case.model, case.seq)
    if case.level == "mlp":
        return mlp_chunk_size(case.seq, config.hidden_size, case.device).chunk_rows
    return vocab_chunk_size(case.seq, config.hidden_size, config.vocab_size, case.device).chunk_rows


def sweep(
    case: Case, chunk_rows: Sequence[int], rounds: int, steps: int, inner: str = "inductor"
) -> list[Point]:
    """Measures a block with chunks of several sizes, and of the one that ``"auto"`` takes.

    Args:
        chunk_rows: those above the case's rows are left out.
    """
    automatic = auto_rows(case)
    sizes = sorted({automatic, *(rows for rows in chunk_rows if rows <= case.seq)})
    runners = {
        rows: Runner(Contender("mst", options={OPTIONS[case.level]: rows, "inner": inner}), case)
        for rows in sizes
    }
    found: dict[int, list[dict[str, float]]] = {rows: [] for rows in sizes}
    # All variants run the same code, and Dynamo would give up after 8 of them.
    with torch._dynamo.config.patch(recompile_limit=2 * len(sizes) + 8, fail_on_recompile_limit_hit=True):
        for runner in runners.values():
            runner.warm_up()
        for _ in range(rounds):
            for rows, runner in runners.items():
                found[rows] += runner.turn(steps)
    torch._dynamo.reset()
    return [
        Point(
            rows,
            rows == automatic,
            tuple(turn["seconds"] for turn in turns),
            int(max(turn["peak_bytes"] - turn["before_bytes"] for turn in turns)),
        )
        for rows, turns in found.items()
    ]


def table(case: Case, points: Sequence[Point]) -> str:
    """Markdown of one block."""
    fastest = min(point.median for point in points)
    lines: list[Sequence[Any]] = [
        ("rows a chunk", "ms (fastest – slowest)", "of the fastest", "peak GiB above")
    ]
    for point in points:
        low, high = min(point.seconds) * 1e3, max(point.seconds) * 1e3
        name = f"{point.chunk_rows:,}" + (" (auto)" if point.is_auto else "")
        lines.append(
            (
                name,
                f"{point.median * 1e3:.1f} ({low:.1f} – {high:.1f})",
                point.median / fastest,
                point.above / GIB,
            )
        )
    return f"### {case.model}, {case.level}, {case.seq:,} rows\n\n{markdown_table(lines)}"


def draw(curves: Sequence[tuple[Case, Sequence[Point]]], path: Path, title: str) -> None:
    """Time relative to the fastest, and the peak, against the rows of a chunk; that of ``"auto"`` is filled."""
    labels = (f"time, of the fastest (up to {_SLOWEST})", "peak GiB above parameters and inputs")
    with panels(path, title, "rows a chunk", labels) as axes:
        axes[0].set_ylim(0.97, _SLOWEST)
        for case, points in curves:
            fastest = min(point.median for point in points)
            name = f"{case.model} {case.level}, {case.seq:,} rows"
            automatic = [index for index, point in enumerate(points) if point.is_auto]
            sizes = [point.chunk_rows for point in points]
            times, peaks = [p.median / fastest for p in points], [p.above / GIB for p in points]
            for panel, values in zip(axes, (times, peaks), strict=True):
                (line,) = panel.plot(sizes, values, marker="o", fillstyle="none", label=name)
                filled = {"color": line.get_color(), "markevery": automatic, "linestyle": "", "marker": "o"}
                panel.plot(sizes, values, **filled)


def read(path: Path) -> list[tuple[Case, list[Point]]]:
    """The curves of a JSON file of this script, with the sizes marked that ``"auto"`` takes today."""
    curves = []
    for found in json.loads(path.read_text())["results"]:
        points = found.pop("points")
        case = Case(**found)
        automatic = auto_rows(case)
        curves.append((case, [Point(**{**p, "is_auto": p["chunk_rows"] == automatic}) for p in points]))
    return curves


def main() -> None:
    arguments = _arguments()
    if arguments.draw:
        curves = [
            (case, points)
            for case, points in read(arguments.draw)
            if case.level in arguments.level and case.seq in arguments.seq
        ]
        draw(curves, arguments.out / f"{arguments.name}.png", arguments.title)
        return
    device = "cpu" if arguments.cpu else "cuda"
    if arguments.cpu:
        arguments.model, arguments.seq, arguments.chunks = ["tiny"], [2048], [128, 512, 2048]
    curves = []
    for model, level, seq in itertools.product(arguments.model, arguments.level, arguments.seq):
        case = Case(level=level, model=model, layers=1, seq=seq, device=device)
        points = sweep(case, arguments.chunks, arguments.rounds, arguments.steps)
        curves.append((case, points))
        print(table(case, points), flush=True)
        results = [
            {**dataclasses.asdict(case), "points": list(map(dataclasses.asdict, points))}
            for case, points in curves
        ]
        tables = "\n\n".join(table(*curve) for curve in curves)
        write_results(arguments.out, arguments.name, results, tables)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    draw(curves, arguments.out / f"{arguments.name}.png", f"{arguments.title}, {gpu}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=sorted(MODELS), default=["llama3-8b"], help="whose shapes")
    add("--level", nargs="+", choices=sorted(OPTIONS), default=["mlp", "head"])
    add("--seq", type=numbers, default=[16384, 65536], help="rows, separated by commas")
    add("--chunks", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384], help="rows a chunk")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=3, help="steps of a turn that count")
    add("--out", type=Path, default=Path("bench-out"))
    add("--name", default="chunks", help="of the files with the results")
    add("--title", default="Chunks of one block, forward and backward", help="of the picture")
    add("--draw", type=Path, help="a JSON file of before, to draw the levels and lengths of, all models")
    add("--cpu", action="store_true", help="a small size on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
