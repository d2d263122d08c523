"""What looks like attention with a bias, or like a mask, and would have other numbers if it was taken for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import check_parity
from tests.masks import written

OPTIONS: dict[str, Any] = {"inner": "aot_eager", "attention_chunk_rows": 5, "passes": ("attention",)}
BATCH, HEADS, SEQ, WIDTH = (
    4,
    4,
    23,
    32,
)  # as many heads as sequences: one is taken for the other if nobody looks
LOW = torch.finfo(torch.float64).min
_BAR = 1e-11
Form = Callable[["Attention", Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(written.Attention):
    """Attention as ``form`` writes it, of queries, keys and values ``[B, H, S, D]`` and what padding adds, ``[B, 1, 1, S]``."""

    def __init__(self, form: Form) -> None:
        super().__init__(form, HEADS, WIDTH)
        self.table, self.of_keys = (
            nn.Parameter(torch.randn(2 * SEQ + 1, HEADS)),
            nn.Parameter(torch.randn(SEQ)),
        )


def _distance() -> Tensor:
    place = torch.arange(SEQ)
    return place[None, :] - place[:, None]


def _alibi(m: Attention) -> Tensor:
    return m.slopes[:, None, None] * _distance()


def _causal(fill: float) -> Tensor:
    return torch.where(_distance() <= 0, torch.zeros((), dtype=torch.float64), fill)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) / 3.0


def _weigh(scores: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(scores.softmax(-1), v)


def _batch() -> dict[str, Tensor]:
    """Padding on the left of one sequence: its first queries see nothing else."""
    padding = torch.zeros(BATCH, 1, 1, SEQ, dtype=torch.float64)
    padding[1, ..., :9] = LOW
    return {"x": torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64), "padding": padding}


# What is left


def picked_positions(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    place = torch.arange(SEQ)
    backwards = place[torch.arange(SEQ - 1, -1, -1)]
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * (backwards[None] - place[:, None]), v)


def same_for_all(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.slopes[:, None, None].expand(-1, SEQ, SEQ), v)


def number_a_head(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.slopes[:, None, None], v)


def keys_of_sequences(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    of_batch = torch.arange(BATCH)[:, None, None] * m.of_keys
    return _weigh(_scores(q, k) + (of_batch + _causal(-math.inf))[:, None], v)


def keys_of_hidden_sequences(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    of_batch = torch.arange(BATCH)[:, None, None] * m.of_keys
    return _weigh(_scores(q, k) + torch.where(_distance() <= 0, of_batch, -math.inf)[:, None], v)


def table_written_to(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    table = m.table.detach().clone()
    bias = F.embedding(_distance() + SEQ, table)
    table.mul_(2.0)
    return _weigh(_scores(q, k) + bias.permute(2, 0, 1), v)


def boolean_added(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + (_distance() <= 0), v)


def boolean_beside_a_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = _alibi(m) + (_distance() <= 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def boolean_beside_zeros(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.zeros(1, 1, SEQ, SEQ, dtype=torch.float64) + (_distance() <= 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padding_given(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + padding + _causal(LOW), v)


def padding_scaled(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + ((padding == 0).long() - 1) * 1e30 + _causal(LOW), v)


def padding_as_a_logarithm(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + (padding == 0).to(q.dtype).log() + _causal(LOW), v)


def scores_of_one_head(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q[:, :1], k[:, :1]) + _alibi(m), v)


def keys_of_one_head(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k[:, :1]) + _alibi(m), v)


def two_splits(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    flat = [x.reshape(BATCH * HEADS, SEQ, -1) for x in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(BATCH, HEADS, SEQ, SEQ) + _alibi(m)
    scores = scores.view(BATCH * HEADS, SEQ, SEQ).view(2 * BATCH, 2, SEQ, SEQ) + _alibi(m)[:2]
    weights = scores.view(BATCH * HEADS, SEQ, SEQ).softmax(-1)
    return torch.bmm(weights, flat[2]).view(q.shape)


LEFT: list[tuple[Form, str]] = [
    (boolean_beside_zeros, "makes the mask"),
    (scores_of_one_head, "other batches or heads"),
    (keys_of_one_head, "other batches or heads"),
    (two_splits, "no attention known here"),
]
# No formula: it stays, and is read as it is (test_given).
GIVEN: list[tuple[Form, str]] = [
    (picked_positions, "no difference of positions"),
    (same_for_all, "does not depend on distances"),
    (number_a_head, "does not depend on distances"),
    (keys_of_sequences, "not known to depend on distances alone"),
    (keys_of_hidden_sequences, "not known to depend on distances alone"),
    (boolean_added, "is added to scores"),
    (boolean_beside_a_bias, "is added to scores"),
    (padding_given, "a bias may hide keys"),
    (padding_scaled, "a bias may hide keys"),
    (padding_as_a_logarithm, "a bias may hide keys"),
]


# What is rewritten


def whole_slices(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + _alibi(m)[None][:, :, :SEQ, :SEQ], v)


def sequences_as_rows(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    of_batch = torch.arange(BATCH)[:, None, None] * m.slopes.sum() * _distance()
    return _weigh(_scores(q, k) + (of_batch + m.slopes[0] * _distance())[:, None], v)


def padding_beside_infinity(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Fused kernels have other gradients for queries that padding hides all of."""
    return _weigh(_scores(q, k) + _causal(-math.inf) + padding, v)


def positions_far_along(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """The numbers by which they are moved are large, and hide nothing."""
    place = torch.arange(20000, 20000 + SEQ) - 20000
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * place + _causal(LOW), v)


def einsum_of_heads_first(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """The other product is viewed as einsum has it in memory."""
    other = torch.einsum("hbqd,hbkd->bhqk", q.transpose(0, 1), k.transpose(0, 1)).view(-1, SEQ, SEQ)
    return _weigh(_scores(q, k) + _alibi(m), v) + other.sum()


def triangle_of_sequences(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """It is viewed as a triangle in memory, not as one that is repeated."""
    ones = torch.tril(torch.ones(BATCH, 3, SEQ, SEQ, dtype=torch.bool))
    return _weigh(_scores(q, k) + _alibi(m), v) + ones.view(-1, SEQ).sum()


def masks_of_one_head(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    hidden = (_distance() > 0) | (padding[:, 0] < 0)
    scores = torch.bmm(q[:, 0], k[:, 0].transpose(1, 2)).masked_fill(hidden, LOW)
    return torch.bmm(scores.softmax(-1), v[:, 0])[:, None].expand(-1, HEADS, -1, -1)


FIRE: list[tuple[Form, str]] = [
    (table_written_to, "bias"),  # as it was before
    (whole_slices, "bias"),
    (sequences_as_rows, "bias"),
    (padding_beside_infinity, "bias, causal"),
    (positions_far_along, "bias, causal"),
    (einsum_of_heads_first, "bias"),
    (triangle_of_sequences, "bias"),
    (masks_of_one_head, "general: k0 <= q0 and not k1"),
]


@pytest.mark.parametrize(("form", "reason"), LEFT, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_left(form: Form, reason: str) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert not report.rewrites
    assert any(reason in refusal.reason for refusal in report.refusals), [r.reason for r in report.refusals]


@pytest.mark.parametrize(("form", "reason"), GIVEN, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_given(form: Form, reason: str) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert [(r.form, reason in r.why) for r in report.rewrites] == [("given", True)], report.rewrites


@pytest.mark.parametrize(("form", "name"), FIRE, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_rewritten(form: Form, name: str) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert [r.form for r in report.rewrites] == [name]
    assert not report.refusals
