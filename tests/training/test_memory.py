"""Memory, by the exact malloc meter, with real Inductor in float32, in processes of their own.

Blocks have the widths of ``tools.bench.memory`` and a quarter of its rows, with the chunks of ``"auto"``. For
whole steps the sizes are an eighth in every dimension, chunks included: all bytes are a 64th.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tools.bench.memory import BlockPeaks, StepPeak, block_peaks, step_peak
from tools.bench.models import Shape
from tools.bench.tables import MIB
from tools.meters.cpu import is_available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler"),
]

SEQ = 2048
SHAPE = Shape(hidden=64, intermediate=512, heads=4, kv_heads=4, vocabulary=4000, layers=4)
CHUNKS: dict[str, Any] = {"chunk_rows": 64, "vocab_chunk_rows": 33}
SLACK = MIB // 16  # blocks count with their usable size, and small ones are many here


def _bar(peaks: BlockPeaks) -> float:
    return peaks.left_bytes + 1.3 * peaks.chunk_bytes + SLACK


@pytest.fixture(scope="module")
def mlp() -> BlockPeaks:
    return block_peaks("mlp", "mst", 4096, 512, 4096)


@pytest.fixture(scope="module")
def head() -> BlockPeaks:
    return block_peaks("head", "mst", 4096, 512, 32000)


def test_forward_of_an_mlp(mlp: BlockPeaks) -> None:
    assert mlp.forward_peak <= _bar(mlp), mlp.forward_alive


def test_backward_of_an_mlp(mlp: BlockPeaks) -> None:
    assert mlp.backward_peak <= _bar(mlp), mlp.backward_alive


def test_forward_of_a_head(head: BlockPeaks) -> None:
    assert head.forward_peak <= _bar(head), head.forward_alive


def test_backward_of_a_head(head: BlockPeaks) -> None:
    assert head.backward_peak <= _bar(head), head.backward_alive


def test_forward_of_an_mlp_keeps_no_more_than_its_live_set(mlp: BlockPeaks) -> None:
    assert mlp.forward_peak <= mlp.output_bytes + 1.3 * mlp.live_bytes + SLACK, mlp.forward_alive


@functools.cache
def _step(way: str, returns: str, mask: bool) -> StepPeak:
    return step_peak(way, returns, SHAPE, SEQ, mask=mask, **(CHUNKS if way == "mst" else {}))


def test_a_checkpointed_step_takes_a_tenth_of_inductors_memory() -> None:
    mst, plain = _step("mst", "model", False), _step("inductor", "model", False)
    assert mst.loss == pytest.approx(plain.loss, rel=1e-5)
    assert mst.above <= 0.10 * plain.above, f"{mst.above / plain.above:.3f}; alive: {mst.alive}"


def test_logits_among_the_outputs_cost_nothing() -> None:
    whole, loss_only = _step("mst", "model", False), _step("mst", "loss", False)
    assert whole.loss == pytest.approx(loss_only.loss, rel=1e-6)
    assert whole.above <= 1.05 * loss_only.above, f"{whole.alive}; {loss_only.alive}"


def test_logits_that_are_held_cost_their_hidden_rows() -> None:
    """And no gradient of these rows."""
    held, loss_only = _step("mst", "held", False), _step("mst", "loss", False)
    hidden = SEQ * SHAPE.hidden * 4
    assert held.above - loss_only.above <= hidden + SLACK, f"{held.alive}; {loss_only.alive}"
