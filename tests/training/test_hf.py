"""Hugging Face models: one ``mlp`` rewrite a layer, a ``vocab`` rewrite, eager's loss and gradients.

Weights are float64; HF's norms and losses go through float32, so the bar is 3e-6 for both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mst_fx import Report
from tests.helpers import SMALL_CHUNKS, check_parity, kinds
from tests.models import ACCEPTED, OTHERS, Entry, inputs_of

pytestmark = pytest.mark.shares_compiled

_BAR = 3e-6
_EAGER = {**SMALL_CHUNKS, "inner": "eager"}
# What the name of a config for the number of layers is, where it is another.
_LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "mpt": "n_layers", "t5": "num_layers"}
# Two kinds of layers. Of the others one layer is as good as two.
_OF_TWO_LAYERS = {"gemma2", "deepseek_v3"}


def _of_one_layer(name: str, entry: Entry) -> Entry:
    overrides = {**entry.overrides, _LAYERS.get(name, "num_hidden_layers"): 1}
    return dataclasses.replace(entry, overrides=overrides, mlps=entry.mlps // 2)


def _check_report(entry: Entry, report: Report) -> None:
    expected = {kind: n for kind, n in (("mlp", entry.mlps), ("vocab", entry.vocab)) if n}
    assert kinds(report) == expected, str(report)
    assert not report.refusals, str(report)


def _check(entry: Entry, batch: int, length: int, options: dict[str, Any] | None = None) -> Report:
    model = entry.build().double()
    if "num_experts_per_tok" in entry.overrides:
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # grouped_mm has no float64
    report = check_parity(model, inputs_of(entry, batch, length), _BAR, _BAR, options or _EAGER)
    if batch * length > 20:
        _check_report(entry, report)
    return report


@pytest.mark.parametrize("name", [name for name in (*ACCEPTED, *OTHERS) if name != "llama"])
def test_models(name: str) -> None:
    entry = {**ACCEPTED, **OTHERS}[name]
    if name == "t5":  # its encoder's second layer uses what the first made
        entry = dataclasses.replace(entry, overrides={**entry.overrides, "num_decoder_layers": 1}, mlps=3)
    elif name not in _OF_TWO_LAYERS:
        entry = _of_one_layer(name, entry)
    _check(entry, 3, 35)


def test_llama() -> None:
    """Under AOTAutograd, too; names are module paths."""
    report = _check(ACCEPTED["llama"], 3, 35, SMALL_CHUNKS)
    assert [r.name for r in report.rewrites] == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]


@pytest.mark.parametrize(("name", "batch", "length"), [("llama", 1, 32), ("gpt2", 3, 5)])
def test_lengths(name: str, batch: int, length: int) -> None:
    """Rows that chunks divide, and fewer than a chunk: what becomes of them is no model's matter (``test_toys``)."""
    _check(_of_one_layer(name, ACCEPTED[name]), batch, length)


def test_grouped_experts() -> None:
    entry = _of_one_layer("mixtral", ACCEPTED["mixtral"])
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
    report = check_parity(entry.build(num_hidden_layers=0), inputs, 1e-5, 1e-5)
    assert kinds(report) == {"vocab": 1}


def test_tied_embeddings() -> None:
    """The weight's gradient is a sum of the head's and the embedding's."""
    model = ACCEPTED["llama"].build(num_hidden_layers=0, tie_word_embeddings=True).double()
    assert kinds(check_parity(model, inputs_of(ACCEPTED["llama"], 3, 35), _BAR, _BAR)) == {"vocab": 1}
