"""The report as people read it: equal layers in one line, masks charged to all who share them, the loss outside counted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx.alike import together
from mst_fx.report import COLUMNS, Refused, Report, Rewrite, human_bytes
from tests.helpers import Attention, ToyLM, report_of, token_batch

SIZE = 41


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["lm_head"], "lm_head"),
        (["mlp", "mlp", "mlp"], "mlp ×3"),
        (["layers.0.mlp", "layers.1.mlp"], "layers.0–1.mlp ×2"),
        (["layers.0.mlp", "layers.1.mlp", "layers.3.mlp", "layers.7.mlp"], "layers.0–1,3,7.mlp ×4"),
        (["layers.10.mlp", "layers.9.mlp"], "layers.9–10.mlp ×2"),
        (["a.0.b.3.mlp", "a.0.b.4.mlp"], "a.0.b.3–4.mlp ×2"),
        (["a.0.b.3.mlp", "a.1.b.4.mlp"], "a.0.b.3.mlp … a.1.b.4.mlp ×2"),
    ],
)
def test_names_in_one(names: list[str], text: str) -> None:
    assert together(names) == text


def _rewrite(name: str, **more: Any) -> Rewrite:
    sizes = {"rows": 100, "chunk_rows": 10, "chunks": 10, "intermediate_bytes": 1000, "chunk_bytes": 100}
    rest: dict[str, Any] = {"gradient": "recompute", "deferred": False, "body": "", "why": ""}
    return Rewrite("mlp", name, **{**sizes, **rest, **more})


def test_equal_layers_are_one_row() -> None:
    report = Report(
        [
            _rewrite("layers.0.mlp"),
            _rewrite("layers.1.mlp"),
            _rewrite("layers.2.mlp", intermediate_bytes=2000),
        ],
        [Refused("mlp", f"layers.{i}.up", f"linear_{i}: no rule") for i in range(3)],
        graphs=1,
    )
    assert [row[1] for row in report.rows()] == ["layers.0–1.mlp ×2", "layers.2.mlp"]
    assert report.refused() == [("mlp", "layers.0–2.up ×3", "linear_0: no rule")]
    assert str(report).splitlines()[-1].startswith("1 graph(s): rewrote 3 mlp; refused 3")
    assert len(report.parts()["rewrites"]) == 3, "for programs each by itself"


def test_what_is_empty_has_no_table() -> None:
    assert str(Report(graphs=1)) == "1 graph(s): rewrote nothing; refused 0"
    assert "<table>" not in Report(graphs=1)._repr_html_()


class _TwoAttentions(nn.Module):
    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(16, 2) for _ in range(2))
        self.is_shared = is_shared

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        masks = [(positions[None] <= positions[:, None] + i)[None, None] for i in range(2)]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Attention)
            q, k, v = layer.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            mask = masks[0 if self.is_shared else i]
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x


def test_a_mask_is_charged_to_all_who_share_it() -> None:
    options = {"inner": "aot_eager", "attention_chunk_rows": 16}
    report = report_of(_TwoAttentions(True), options, torch.randn(1, SIZE, 16))
    assert [r.intermediate_bytes for r in report.rewrites] == [SIZE**2, 0], "counted once"
    assert [r.shared_bytes for r in report.rewrites] == [SIZE**2] * 2
    ((_, name, _, _, inside, *_),) = report.rows()
    assert name.startswith("layers.0") or "×2" in name
    assert inside == f"{human_bytes(SIZE**2)}, shared"
    apart = report_of(_TwoAttentions(False), options, torch.randn(1, SIZE, 16))
    assert [r.shared_bytes for r in apart.rewrites] == [0, 0] and "shared" not in str(apart)


class _Logits(ToyLM):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x: Tensor = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def test_a_loss_outside_is_counted() -> None:
    batch = token_batch(2, SIZE)
    report = report_of(_Logits(layers=1), None, batch["ids"])
    logits = 2 * SIZE * 96 * 8
    kept = report.memory_after.kept
    assert kept >= logits and report.memory_after.peak >= kept + 2 * logits
    assert report.memory_before.peak - report.memory_after.peak < report.memory_before.peak
    assert f"at least 2 x {human_bytes(logits)} of either for a loss of the logits" in str(report)
    inside = report_of(ToyLM(layers=1), None, batch["ids"], batch["labels"])
    assert "of either" not in str(inside)


def test_in_a_notebook_and_at_the_prompt() -> None:
    batch = token_batch(2, SIZE)
    report = report_of(ToyLM(layers=3), None, batch["ids"], batch["labels"])
    assert repr(report).startswith("<Diagnosis of 1 graph(s): rewrote 3 mlp, 1 vocab; refused 0")
    assert "\n" not in repr(report) and len(repr(report)) < 150
    page = report._repr_html_()
    assert re.findall("<th>(.*?)</th>", page) == list(COLUMNS)
    assert page.count("<tr>") == 1 + len(report.rows()) and "×2" in page
    assert "estimate for a step" in page and "before <span" in page
    report.refusals.append(Refused("mlp", "<b>", "a < b"))
    report.findings.append(mst_fx.Finding("short", "x < y", "<none>"))
    page = report._repr_html_()
    assert "&lt;b&gt;" in page and "a &lt; b" in page and "fix: &lt;none&gt;" in page and "<none>" not in page


def test_explain_says_how_to_call_it() -> None:
    made = mst_fx.explain(nn.Linear(2, 2))
    assert repr(made) == "<mst_fx.explain of Linear: call it with the arguments of Linear>"
    with pytest.raises(mst_fx.OptionError):
        mst_fx.explain(nn.Linear(2, 2), {"chunk_row": 3})
