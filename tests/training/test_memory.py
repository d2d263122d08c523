"""Memory, by the exact malloc meter, with real Inductor in float32, in processes of their own.

Blocks have the chunks of ``"auto"``: an MLP's is as wide as those of ``tools.bench.memory``, so that it gets other chunks backward.
For whole steps the sizes are an eighth in every dimension, chunks included: all bytes are a 64th.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tools.bench.memory import BlockPeaks, StepPeak, block_peaks, step_peak, step_peaks
from tools.bench.models import Shape
from tools.bench.tables import MIB
from tools.meters.cpu import is_available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler"),
]

SEQ = 2048
SHAPE = Shape(hidden=64, intermediate=512, heads=4, kv_heads=4, vocabulary=4000, layers=1)
CHUNKS: dict[str, Any] = {"chunk_rows": 64, "vocab_chunk_rows": 33}
SLACK = MIB // 16  # blocks count with their usable size, and small ones are many here


def _bar(peaks: BlockPeaks) -> float:
    return peaks.left_bytes + 1.3 * peaks.chunk_bytes + SLACK


@pytest.fixture(scope="module")
def mlp() -> BlockPeaks:
    return block_peaks("mlp", "mst", 2048, 512, 1024)


@pytest.fixture(scope="module")
def head() -> BlockPeaks:
    return block_peaks("head", "mst", 2048, 64, 16000)


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


@pytest.fixture(scope="module")
def steps() -> dict[str, StepPeak]:
    """Without a mask; by what is returned."""
    names = ("model", "held", "loss")
    return dict(zip(names, step_peaks("mst", names, SHAPE, SEQ, mask=False, **CHUNKS), strict=True))


def test_a_checkpointed_step_takes_a_tenth_of_inductors_memory(steps: dict[str, StepPeak]) -> None:
    mst, plain = steps["model"], step_peak("inductor", "model", SHAPE, SEQ, mask=False)
    assert mst.loss == pytest.approx(plain.loss, rel=1e-5)
    assert mst.above <= 0.10 * plain.above, f"{mst.above / plain.above:.3f}; alive: {mst.alive}"


def test_layers_that_are_compiled_once_take_no_more() -> None:
    """Their backward pass writes over what arrives there, as that of layers that are compiled one by one does."""
    shape = dataclasses.replace(SHAPE, layers=3)
    once, each = (
        step_peak("mst", "model", shape, SEQ, mask=False, layers=layers, **CHUNKS)
        for layers in ("once", "each")
    )
    assert once.loss == each.loss
    assert once.above <= each.above + SLACK, f"{once.alive}; {each.alive}"


def test_logits_among_the_outputs_cost_nothing(steps: dict[str, StepPeak]) -> None:
    whole, loss_only = steps["model"], steps["loss"]
    assert whole.loss == pytest.approx(loss_only.loss, rel=1e-6)
    assert whole.above <= 1.05 * loss_only.above, f"{whole.alive}; {loss_only.alive}"


def test_logits_that_are_held_cost_their_hidden_rows(steps: dict[str, StepPeak]) -> None:
    """And no gradient of these rows."""
    held, loss_only = steps["held"], steps["loss"]
    hidden = SEQ * SHAPE.hidden * 4
    assert held.above - loss_only.above <= hidden + SLACK, f"{held.alive}; {loss_only.alive}"
