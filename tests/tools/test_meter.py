"""The memory meters agree with each other and with known allocations."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.meters.apart import ROOT, Worker, call_apart
from tools.meters.cpu import call_metered, describe_blocks, is_available, malloc_meter, measure_cpu

MIB = 2**20

needs_malloc_meter = pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")


def _pattern() -> None:
    """Peaks at 48 MiB: 32 and 16 at once, then 16 and 8."""
    first = torch.empty(32 * MIB, dtype=torch.uint8)
    second = torch.empty(16 * MIB, dtype=torch.uint8)
    del first
    third = torch.empty(8 * MIB, dtype=torch.uint8)
    del second, third


def test_measure_cpu_knows_a_pattern() -> None:
    with measure_cpu() as found:
        _pattern()
    assert found.peak_bytes == 48 * MIB
    assert [level // MIB for _, level in found.timeline] == [32, 48, 16, 24, 8, 0]
    seconds = [second for second, _ in found.timeline]
    assert seconds == sorted(seconds) and seconds[0] >= 0


def test_measure_cpu_leaves_out_what_was_there_before() -> None:
    """Even at an address where the profiler, which keeps what it saw, knows a block of an earlier measurement."""
    with measure_cpu():
        blocks = [torch.empty(32 * MIB, dtype=torch.uint8) for _ in range(8)]
    addresses = {block.data_ptr() for block in blocks}
    del blocks
    there = [torch.empty(32 * MIB, dtype=torch.uint8) for _ in range(8)]
    assert addresses & {block.data_ptr() for block in there}, "the case that is tested"
    with measure_cpu() as found:
        del there
        _pattern()
    assert found.peak_bytes == 48 * MIB
    assert [level // MIB for _, level in found.timeline] == [32, 48, 16, 24, 8, 0]


def _malloc_pattern() -> dict[str, Any]:
    meter = malloc_meter()
    meter.reset()
    start = meter.current()
    _pattern()
    grown = bytearray(MIB)
    grown.extend(bytes(4 * MIB))  # through realloc
    del grown
    return {
        "peak": meter.peak() - start,
        "left": meter.current() - start,
        "alive": meter.alive_at_peak(),
        "levels": [level for _, level in meter.timeline()],
    }


@pytest.mark.slow
@needs_malloc_meter
def test_malloc_meter_knows_a_pattern() -> None:
    found = call_metered(_malloc_pattern, timeout=120)
    slack = 16 << 10  # a block counts with its usable size
    assert 48 * MIB <= found["peak"] <= 48 * MIB + slack
    assert found["left"] == 0
    assert [round(size / MIB) for size in found["alive"]] == [32, 16]
    assert max(found["levels"]) == found["peak"] and found["levels"][-1] == 0


def _compiled_both() -> dict[str, Any]:
    def chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x @ w).sin() @ w).cumsum(0).cos()

    x, w = torch.randn(4096, 512), torch.randn(512, 512)
    compiled = torch.compile(chain)
    meter = malloc_meter()
    compiled(x, w)
    compiled(x, w)
    meter.reset()
    start = meter.current()
    compiled(x, w)
    exact = meter.peak() - start
    with measure_cpu() as found:
        compiled(x, w)
    return {"exact": exact, "profiler": found.peak_bytes, "buffer": x.nbytes}


@needs_malloc_meter
@pytest.mark.slow
def test_meters_agree_on_inductor_buffers() -> None:
    found = call_metered(_compiled_both, timeout=300)
    assert found["profiler"] >= 2 * found["buffer"]  # Inductor's own buffers, not only the result
    assert found["profiler"] <= found["exact"] <= found["profiler"] + MIB


def _fail() -> None:
    raise ValueError("no such luck")


def _preload() -> str | None:
    return os.environ.get("LD_PRELOAD")


@pytest.mark.slow
def test_call_apart_reports_a_failure() -> None:
    with pytest.raises(RuntimeError, match="no such luck") as raised:
        call_apart(_fail, timeout=120)
    assert str(raised.value).splitlines()[-1].startswith("ValueError"), "the cause comes last"


class Counter:
    """What a worker makes once."""

    def __init__(self, start: int, *, way: str) -> None:
        self.value = start
        print(f"counts {way}", flush=True)

    def add(self, number: int) -> tuple[int, int]:
        self.value += number
        return self.value, os.getpid()

    def die(self) -> None:
        print("so long", flush=True)
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(60)


@pytest.mark.slow
def test_a_worker_keeps_what_it_made(tmp_path: Path) -> None:
    """And its log; both requests may be asked before the first answer is read."""
    with Worker(Counter, 5, way="up", log=tmp_path / "log.txt") as worker:
        worker.ask("add", 2)
        worker.ask("add", 3)
        (first, process), (second, same) = worker.answer(120), worker.answer(120)
        assert (first, second) == (7, 10) and process == same != os.getpid()
        worker.ask("die")
        with pytest.raises(RuntimeError, match="so long\nCounter ended with status 3"):
            worker.answer(120)
    assert (tmp_path / "log.txt").read_text() == "counts up\nso long\n"


@pytest.mark.slow
def test_a_worker_that_is_late_is_stopped() -> None:
    worker = Worker(Counter, 0, way="down")
    worker.ask("add", 1)
    _, process = worker.answer(120)
    worker.ask("sleep")
    with pytest.raises(RuntimeError, match="Counter took more than 0 s"):
        worker.answer(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    worker.stop()


PROGRAM = """
from tools.meters.apart import ROOT, Worker, call_apart

def double(x):
    return 2 * x

if __name__ == "__main__":
    print(call_apart(double, 21, timeout=120))
"""


@pytest.mark.parametrize("how", ["file", "module"])
def test_a_function_of_the_program_that_runs(how: str, tmp_path: Path) -> None:
    path = tmp_path / "own_program.py"
    path.write_text(PROGRAM)
    command = [sys.executable, *([str(path)] if how == "file" else ["-m", "own_program"])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "42\n"


@needs_malloc_meter
@pytest.mark.slow
def test_the_meter_is_not_handed_on() -> None:
    assert call_metered(_preload, timeout=120) is None


def test_a_process_without_the_meter_says_so() -> None:
    with pytest.raises(RuntimeError, match="not loaded"):
        malloc_meter()


def test_describe_blocks() -> None:
    assert describe_blocks([4 * MIB, 4 * MIB, MIB, MIB // 2]) == (
        "2 x 4.0 MiB + 1.0 MiB + 0.5 MiB in smaller ones"
    )
