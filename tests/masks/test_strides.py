"""Queries, keys, values and tangents in any order in memory: SqueezeBERT's convolutions give ``[B, H, D, S]``, and kernels read rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import check_parity

SEQ, HEADS, WIDTH = 37, 4, 32
_OPTIONS: dict[str, Any] = {"inner": "aot_eager", "attention_chunk_rows": 8, "passes": ("attention",)}


class _Attention(nn.Module):
    """Attention of which some of ``q``, ``k``, ``v`` and the tangent ``t`` have the elements of a row apart; ``window``: no kernel takes it."""

    def __init__(self, apart: str, window: bool, is_fused: bool) -> None:
        super().__init__()
        self.apart, self.window, self.is_fused = apart, window, is_fused
        self.qkv, self.of_rows = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(SEQ, SEQ)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).transpose(1, 2).contiguous().view(len(x), 3, HEADS, -1, SEQ).transpose(3, 4)
        q, k, v = (
            parts[:, i] if name in self.apart else parts[:, i].contiguous() for i, name in enumerate("qkv")
        )
        place = torch.arange(SEQ)
        mask = place <= place[:, None]
        mask = mask & (place > place[:, None] - 9) if self.window else mask
        if self.is_fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
            sinks = self.sinks.view(1, -1, 1, 1).expand(len(x), -1, SEQ, 1)
            out = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v
        out = self.of_rows(out.transpose(2, 3)) if "t" in self.apart else out.sin()
        return (out * out.detach().roll(1, 2)).sum()


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("apart", ["", "q", "k", "v", "t", "qkvt"])
def test_numbers(apart: str, window: bool, is_fused: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, SEQ, WIDTH, dtype=torch.float64)
    report = check_parity(_Attention(apart, window, is_fused).double(), {"x": x}, 1e-12, 1e-12, _OPTIONS)
    assert [r.form for r in report.rewrites] == ["window 9" if window else "causal"]
