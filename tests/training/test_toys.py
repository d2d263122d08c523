"""Toy transformers, float64 throughout: loss within 1e-10, every gradient within 1e-9 of eager's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import SMALL_CHUNKS, GatedMLP, PlainMLP, ToyLM, check_parity, kinds, report_of, token_batch


@pytest.mark.parametrize("order", ["pre", "post", "parallel"])
@pytest.mark.parametrize("mlp", [PlainMLP, GatedMLP])
@pytest.mark.parametrize(("batch", "length", "inner"), [(1, 64, "eager"), (3, 37, "aot_eager")])
def test_parity(order: str, mlp: type[nn.Module], batch: int, length: int, inner: str) -> None:
    """One layer of each kind, with and without AOTAutograd; several, whose bodies are one, of the first."""
    layers = 2 if (order, mlp) == ("pre", GatedMLP) else 1
    model, inputs = ToyLM(order, mlp, layers), token_batch(batch, length)
    report = check_parity(model, inputs, 1e-10, 1e-9, {**SMALL_CHUNKS, "inner": inner})
    assert kinds(report) == {"mlp": layers, "vocab": 1}


@pytest.mark.parametrize("length", [1, 7, 16, 17])
def test_short_sequences(length: int) -> None:
    """Smaller than a chunk, exactly one, one row more, one row."""
    inputs = token_batch(1, length)
    inputs["labels"][:] = inputs["ids"]
    check_parity(ToyLM(layers=1), inputs, 1e-10, 1e-9, {**SMALL_CHUNKS, "inner": "eager"})


@pytest.mark.slow
@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 63, 64])
def test_any_chunk_size(chunk_rows: int) -> None:
    options = {"inner": "eager", "chunk_rows": chunk_rows, "vocab_chunk_rows": chunk_rows}
    check_parity(ToyLM(layers=1), token_batch(1, 65), 1e-10, 1e-9, options)


def test_regions_absorb_the_norm_before_and_the_add_after() -> None:
    report = report_of(ToyLM(layers=1), None, **token_batch(1, 64))
    first = report.rewrites[0]
    assert first.name == "blocks.0.mlp"
    text = "\n".join(first.before)
    assert "rms_norm" in text and "add" in text


@pytest.mark.slow
def test_frozen_weights_get_no_gradient() -> None:
    model = ToyLM()
    model.head.weight.requires_grad_(False)
    model.blocks[0].mlp.up.weight.requires_grad_(False)  # type: ignore[union-attr]
    check_parity(model, token_batch(1, 64), 1e-10, 1e-9)
    assert model.head.weight.grad is None


@pytest.mark.slow
def test_only_the_inputs_need_a_gradient() -> None:
    """All weights frozen: no weight gradient is computed, and rows still get theirs."""
    model = ToyLM(layers=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.embed.weight.requires_grad_(True)
    check_parity(model, token_batch(1, 64), 1e-10, 1e-9)


def test_tied_head() -> None:
    model = ToyLM(layers=1)
    model.head.weight = model.embed.weight
    check_parity(model, token_batch(2, 33), 1e-10, 1e-9)


def test_zero_size_batch() -> None:
    model = ToyLM(layers=1)
    ids = torch.zeros(0, 8, dtype=torch.long)
    check_parity(model, {"ids": ids, "labels": ids}, 1e-10, 1e-9)
