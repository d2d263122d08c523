"""Hugging Face models: one ``mlp`` rewrite a layer, a ``vocab`` rewrite, eager's loss and gradients.

Weights are float64; HF's norms and losses go through float32, so the bar is 3e-6 for both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mst_fx import Report
from tests.helpers import SMALL_CHUNKS, check_parity, kinds, report_of
from tests.models import ACCEPTED, OTHERS, Entry, inputs_of

_BAR = 3e-6


def _check_report(entry: Entry, report: Report) -> None:
    expected = {kind: n for kind, n in (("mlp", entry.mlps), ("vocab", entry.vocab)) if n}
    assert kinds(report) == expected, str(report)
    experts = [r for r in report.refusals if "experts" in r.reason]
    assert len(experts) == entry.experts, str(report)
    assert len(report.refusals) == entry.experts, str(report)


# Rows that chunks divide, that they do not, and fewer than a chunk: what becomes of them is no model's matter.
_SHAPES = [
    *((name, 3, 35) for name in ACCEPTED),
    ("llama", 1, 32),
    ("t5", 1, 32),
    ("llama", 3, 5),
    ("gpt2", 3, 5),
]


@pytest.mark.parametrize(("name", "batch", "length"), _SHAPES)
def test_accepted(name: str, batch: int, length: int) -> None:
    entry = ACCEPTED[name]
    model = entry.build().double()
    if entry.experts:
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # grouped_mm has no float64
    report = check_parity(model, inputs_of(entry, batch, length), _BAR, _BAR)
    if batch * length > 20:
        _check_report(entry, report)


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    entry = OTHERS[name]
    model = entry.build().double()
    if entry.experts:
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    _check_report(entry, check_parity(model, inputs_of(entry, 3, 35), _BAR, _BAR))


def test_grouped_experts() -> None:
    entry = ACCEPTED["mixtral"]
    model = entry.build()
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    report = check_parity(model, inputs_of(entry, 3, 35), 1e-5, 1e-5)
    if report.graphs == 1:
        _check_report(entry, report)
    else:
        # AOTAutograd cannot trace the experts' backward pass of transformers 5.17, whatever the backend.
        backward = getattr(torch.ops.transformers, "grouped_mm_fallback_backward", None)
        assert backward is None, "models are captured whole"


@pytest.mark.parametrize("count", [torch.tensor(77), 77, torch.tensor(77.0)])
def test_num_items_in_batch(count: Any) -> None:
    entry = ACCEPTED["llama"]
    inputs = {**inputs_of(entry, 3, 35), "num_items_in_batch": count}
    check_parity(entry.build(num_hidden_layers=1), inputs, 1e-5, 1e-5)


def test_tied_embeddings() -> None:
    entry = ACCEPTED["llama"]
    check_parity(entry.build(tie_word_embeddings=True).double(), inputs_of(entry, 3, 35), _BAR, _BAR)


def test_names_are_module_paths() -> None:
    entry = ACCEPTED["llama"]
    report = report_of(entry.build(), SMALL_CHUNKS, **inputs_of(entry, 3, 35))
    assert [r.name for r in report.rewrites] == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]
