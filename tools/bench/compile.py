"""Compile time of a deep toy Llama on a CPU: mst beside Inductor, cold caches and warm.

    python -m tools.bench.compile                       # 32 layers; about ten minutes on 2 cores
    python -m tools.bench.compile --layers 8 --repeat 3

Each run is a process of its own with its own cache folder. Compile time is that of the first training
step less that of a warm one, in wall seconds and in CPU seconds (compilers that were started included):
the second says more on a machine that is busy with other things.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import mst_fx
from mst_fx.torch_api.inductor import cache_counters
from tools.bench.models import Shape, make_llama, text_tokens
from tools.bench.tables import markdown_table, numbers, write_results
from tools.meters.apart import call_apart

SEQ = 512


@dataclasses.dataclass(frozen=True)
class CompileRun:
    """One process.

    Attributes:
        wall, cpu: seconds of the first step less those of a warm one.
        step: wall seconds of a warm step.
        counters: Inductor's and AOTAutograd's cache counters.
        loss, gradient_norm: of the first step.
    """

    wall: float
    cpu: float
    step: float
    counters: dict[str, int]
    loss: float
    gradient_norm: float

    def compiled_anew(self) -> dict[str, int]:
        """The counters that say that something was not found in a cache, where not 0."""
        return {
            name: count
            for name, count in self.counters.items()
            if count and ("miss" in name or "bypass" in name)
        }


def compile_run(
    way: str, layers: int, chunks: int, cache: str | Path, *, checkpoint: bool = False, timeout: float = 1200
) -> CompileRun:
    """Trains a toy Llama (hidden 64) for two steps in a process of its own.

    Args:
        way: "mst", "inductor", or "enabled": the latter inside of ``mst_fx.enable``.
        chunks: of every loop.
        cache: folder of Inductor's caches.

    Raises:
        RuntimeError: if the process fails or takes more than ``timeout`` seconds.
    """
    # One thread: compilers then run as children that are waited for, and their CPU time is seen.
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return CompileRun(**call_apart(_measure, way, layers, chunks, checkpoint, timeout=timeout, env=env))


def _measure(way: str, layers: int, chunks: int, checkpoint: bool) -> dict[str, Any]:
    shape = Shape(hidden=64, intermediate=256, heads=4, kv_heads=2, vocabulary=1000, layers=layers)
    model = make_llama(shape, SEQ, "cpu", torch.float32, checkpoint=checkpoint)
    ids = text_tokens(SEQ, shape.vocabulary)[None]
    rows = SEQ // chunks
    options: dict[str, Any] = {"chunk_rows": rows, "vocab_chunk_rows": rows, "strict": True}
    if way == "enabled":
        mst_fx.enable(options)
    run: Any = torch.compile(model, backend="mst", options=options) if way == "mst" else torch.compile(model)

    def step() -> tuple[float, float, float]:
        model.zero_grad(set_to_none=True)
        wall, cpu = time.perf_counter(), _cpu_seconds()
        loss = run(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        return time.perf_counter() - wall, _cpu_seconds() - cpu, loss.item()

    first_wall, first_cpu, loss = step()
    norms = [torch.linalg.vector_norm(p.grad) for p in model.parameters() if p.grad is not None]
    warm_wall, warm_cpu, _ = step()
    return {
        "wall": first_wall - warm_wall,
        "cpu": first_cpu - warm_cpu,
        "step": warm_wall,
        "counters": cache_counters(),
        "loss": loss,
        "gradient_norm": torch.linalg.vector_norm(torch.stack(norms)).item(),
    }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=1, help="cold runs of each; medians count")
    parser.add_argument("--chunks", type=numbers, default=[2, 16])
    parser.add_argument("--checkpoint", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    arguments = parser.parse_args()
    contenders = [("inductor", "inductor", 1), *((f"mst, {n} chunks", "mst", n) for n in arguments.chunks)]
    lines: list[Any] = [
        ("way", "cold, wall s", "cold, CPU s", "of Inductor's (CPU)", "warm, wall s", "compiled anew")
    ]
    results: dict[str, Any] = {}
    plain = 0.0
    for name, way, chunks in contenders:
        cold = []
        for _ in range(arguments.repeat):
            with tempfile.TemporaryDirectory() as cache:
                settings = (way, arguments.layers, chunks, cache)
                cold.append(compile_run(*settings, checkpoint=arguments.checkpoint))
                warm = compile_run(*settings, checkpoint=arguments.checkpoint)
        wall, cpu = statistics.median(run.wall for run in cold), statistics.median(run.cpu for run in cold)
        plain = plain or cpu
        anew = ", ".join(f"{key} {count}" for key, count in warm.compiled_anew().items()) or "nothing"
        lines.append((name, wall, cpu, cpu / plain, warm.wall, anew))
        results[name] = {"cold": [dataclasses.asdict(run) for run in cold], "warm": dataclasses.asdict(warm)}
        print(*lines[-1], sep="  ", flush=True)
        write_results(arguments.out, "compile", results, markdown_table(lines))
    print(f"\n{markdown_table(lines)}")


if __name__ == "__main__":
    main()
