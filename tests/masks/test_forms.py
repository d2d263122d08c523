"""The many spellings of one attention are recognised and have eager's numbers; what only looks like one of them is left, with its reason."""

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

OPTIONS: dict[str, Any] = {
    "inner": "aot_eager",
    "attention_chunk_rows": 16,
    "passes": ("attention",),
}
SEQ, HEADS, WIDTH = 67, 4, 32
LOW = torch.finfo(torch.float64).min
_BAR = 1e-12
Form = Callable[["Attention", Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(written.Attention):
    """Attention as ``form`` writes it, of queries, keys and values ``[B, H, S, D]`` and padding ``[B, S]``."""

    def __init__(self, form: Form) -> None:
        super().__init__(lambda m, q, *more: form(m, q, *more).to(q.dtype), HEADS, WIDTH)
        self.table = nn.Parameter(torch.randn(2 * SEQ + 1, HEADS))
        self.net = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, HEADS, bias=False))


def _places(q: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(q.shape[2])
    return place[:, None], place[None, :]


def _distance(q: Tensor) -> Tensor:
    query, key = _places(q)
    return key - query


def _alibi(m: Attention, q: Tensor) -> Tensor:
    return m.slopes[:, None, None] * _distance(q)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) / 3.0


def _weigh(scores: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(scores.softmax(-1), v)


# What is recognised


def filled_with_a_billion(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh((_scores(q, k) + _alibi(m, q)).masked_fill(_distance(q) > 0, -1e9), v)


def triangle_of_infinity(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.triu(torch.full((SEQ, SEQ), -math.inf, dtype=q.dtype), diagonal=1)
    return _weigh(_scores(q, k) + _alibi(m, q) + mask, v)


def triangle_of_ones(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(SEQ, SEQ)).view(1, 1, SEQ, SEQ)
    return _weigh(_scores(q, k).masked_fill(mask == 0, -math.inf), v)


def band(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    ones = torch.ones(SEQ, SEQ, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ones.tril() & ones.triu(-9))


def triangle_as_boolean(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~torch.ones(SEQ, SEQ).triu(1).bool())


def where_as_a_method(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.zeros((), dtype=q.dtype).where((_distance(q) <= 0) & padding[:, None, None], LOW)
    return _weigh(_scores(q, k) + _alibi(m, q) + mask, v)


def einsum(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) + _alibi(m, q)
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(_distance(q) > 0, LOW).softmax(-1), v)


def einsum_of_tokens_first(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def table_transposed(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.table.T[:, _distance(q).T + SEQ], v)


def table_viewed(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.table[_distance(q) + SEQ].permute(2, 0, 1).reshape(1, HEADS, SEQ, SEQ), v)


def network_of_distances(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.net(_distance(q).to(q.dtype)[..., None] / 8).permute(2, 0, 1), v)


def scaled_with_its_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.zeros((), dtype=q.dtype).where((_distance(q) <= 0) & padding[:, None, None], LOW)
    return _weigh((torch.matmul(q, k.transpose(-1, -2)) + mask) / 3.0, v)


def cast_back_as_scores_are(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """T5's, that of its first years."""
    scores = _scores(q, k)
    scores += m.table[_distance(q) + SEQ].permute(2, 0, 1)[None]
    return torch.matmul(scores.double().softmax(-1).type_as(scores), v)


def of_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Its query is what another attention gave."""
    hidden = _distance(q) > 0
    first = _weigh((_scores(q, k) + _alibi(m, q)).masked_fill(hidden, -math.inf), v)
    return _weigh((_scores(first, k) + _alibi(m, q)).masked_fill(hidden, -math.inf), v)


def _causal(scores: Tensor, v: Tensor) -> Tensor:
    return _weigh(scores.masked_fill(_distance(scores) > 0, -math.inf), v)


def key_by_its_attribute(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _causal(q @ k.mT / 3.0, v)


def key_permuted(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _causal(q @ k.permute(0, 1, 3, 2) / 3.0, v)


def key_by_keywords(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _causal(q @ torch.transpose(k, dim0=-1, dim1=2) / 3.0, v)


FIRE: list[tuple[Form, list[str]]] = [
    (key_by_its_attribute, ["causal"]),
    (key_permuted, ["causal"]),
    (key_by_keywords, ["causal"]),
    (filled_with_a_billion, ["bias, causal"]),
    (triangle_of_infinity, ["bias, causal"]),
    (triangle_of_ones, ["causal"]),
    (band, ["window 10"]),
    (triangle_as_boolean, ["causal"]),
    (where_as_a_method, ["bias, causal + padding"]),
    (einsum, ["bias, causal"]),
    (einsum_of_tokens_first, ["full"]),
    (table_transposed, ["bias"]),
    (table_viewed, ["bias"]),
    (network_of_distances, ["bias"]),
    (scaled_with_its_mask, ["causal + padding"]),
    (cast_back_as_scores_are, ["bias"]),
    (of_attention, ["bias, causal", "bias, causal"]),
]


# What is left


def table_without_gradient(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    with torch.no_grad():
        bias = m.table[_distance(q) + SEQ]
    return _weigh(_scores(q, k) + bias.permute(2, 0, 1), v)


def padding_as_a_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Queries of padding see what the mask hides."""
    bias = _alibi(m, q) + (1.0 - padding[:, None, None].to(q.dtype)) * LOW
    return _weigh(_scores(q, k) + bias + torch.zeros((), dtype=q.dtype).where(_distance(q) <= 0, LOW), v)


def scaled_with_its_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh((torch.matmul(q, k.transpose(-1, -2)) + _alibi(m, q)) / 3.0, v)


def triangle_of_others(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + torch.tril(_alibi(m, q)), v)


def triangle_compared_otherwise(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(SEQ, SEQ)) * torch.arange(SEQ)
    return _weigh(_scores(q, k).masked_fill(mask == 0, -1e30), v)


def counted_by_twos(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    place = torch.arange(0, 2 * SEQ, 2)
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * (place[None] - place[:, None]), v)


def gradient_by_frequency(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    bias = F.embedding(_distance(q).clamp(-9, 9) + SEQ, m.table, scale_grad_by_freq=True)
    return _weigh(_scores(q, k) + bias.permute(2, 0, 1), v)


def picked_keys(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = _scores(q, k)
    best = scores.detach().mean(1).topk(9, -1).indices
    hidden = torch.ones(*best.shape[:2], SEQ, dtype=torch.bool).scatter(-1, best, False)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden[:, None])


def weights_without_gradient(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = _scores(q, k).masked_fill(_distance(q) > 0, -math.inf)
    with torch.no_grad():
        weights = scores.softmax(-1)
    return torch.matmul(weights, v)


LEFT: list[tuple[Form, str]] = [
    (weights_without_gradient, "no attention known here"),
    (table_without_gradient, "under no_grad"),
    (picked_keys, "top-k"),
]
# No formula: it stays, and is read as it is (test_given).
GIVEN: list[tuple[Form, str]] = [
    (padding_as_a_bias, "a bias may hide keys by a number, and a mask does"),
    (scaled_with_its_bias, "scaled with a bias in them"),
    (triangle_of_others, "not known to depend on distances alone"),
    (triangle_compared_otherwise, "no formula"),
    (counted_by_twos, "no difference of positions"),
    (gradient_by_frequency, "not known to depend on distances alone"),
]


def _batch() -> dict[str, Tensor]:
    padding = torch.ones(2, SEQ, dtype=torch.bool)
    padding[1, :21] = False
    return {"x": torch.randn(2, SEQ, WIDTH, dtype=torch.float64), "padding": padding}


@pytest.mark.parametrize(("form", "names"), FIRE, ids=lambda x: getattr(x, "__name__", ""))
def test_numbers(form: Form, names: list[str]) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert [r.form for r in report.rewrites if r.kind == "attention"] == names
    assert not report.refusals


@pytest.mark.parametrize(("form", "reason"), LEFT, ids=lambda x: getattr(x, "__name__", ""))
def test_what_only_looks_like_it(form: Form, reason: str) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert not report.rewrites
    assert any(reason in refusal.reason for refusal in report.refusals), [r.reason for r in report.refusals]


@pytest.mark.parametrize(("form", "reason"), GIVEN, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_given(form: Form, reason: str) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert [(r.form, reason in r.why) for r in report.rewrites] == [("given", True)], report.rewrites


def cast_for_scores(m: Attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """GPT-J: scores in float32, whatever the model's type."""
    scores = _scores(q.float(), k.float()).masked_fill(_distance(q) > 0, torch.finfo(torch.float32).min)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_queries_and_keys_that_are_cast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bar = 2e-2 if dtype == torch.bfloat16 else 1e-6
    batch = _batch() | {"x": torch.randn(2, SEQ, WIDTH, dtype=dtype)}
    report = check_parity(Attention(cast_for_scores).to(dtype), batch, bar, bar, OPTIONS)
    assert [r.form for r in report.rewrites] == ["causal"] and not report.refusals


def test_scores_of_blocks_are_no_refusal() -> None:
    """Of a mixer that goes over a sequence in blocks."""

    class Blocks(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.qkv, self.head = size, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y[:, None] for y in self.qkv(x).chunk(3, -1))
            if self.size >= x.shape[1]:
                out = torch.matmul(torch.matmul(q, k.transpose(2, 3)).tril(), v)
                return (self.head(out) * x.detach()[:, None]).sum()
            blocks = [slice(i, min(i + self.size, SEQ)) for i in range(0, SEQ, self.size)]
            parts = [
                torch.matmul(torch.matmul(q[:, :, at], k[:, :, at].transpose(2, 3)).tril(), v[:, :, at])
                for at in blocks
            ]
            return (self.head(torch.cat(parts, 2)) * x.detach()[:, None]).sum()

    batch = {"x": torch.randn(2, SEQ, WIDTH, dtype=torch.float64)}
    assert not check_parity(Blocks(32).double(), batch, _BAR, _BAR, OPTIONS).refusals
    (refused,) = check_parity(Blocks(SEQ).double(), batch, _BAR, _BAR, OPTIONS).refusals
    assert "without a softmax" in refused.reason


@pytest.mark.slow
def test_a_projection_into_blocks_is_no_head() -> None:
    """As of MiniMax: queries, keys and values of one product, behind a function."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            parts = F.silu(self.qkv(x)).view(*x.shape[:2], HEADS, -1)
            q, k, v = (y.transpose(1, 2) for y in parts.split(WIDTH // HEADS, 3))
            state, outs = torch.zeros(WIDTH // HEADS, WIDTH // HEADS, dtype=x.dtype), []
            for i in range(0, SEQ, 16):
                queries, keys, values = (y[:, :, i : min(i + 16, SEQ)] for y in (q, k, v))
                inside = (queries @ keys.transpose(2, 3)).tril() @ values
                outs.append(inside + (queries * 0.5) @ state)
                state = state + (keys * 0.5).transpose(2, 3) @ values
            rows = F.rms_norm(torch.cat(outs, 2).transpose(1, 2).flatten(2), (WIDTH,))
            return (self.out(rows) * x.detach()).sum()

    batch = {"x": torch.randn(2, SEQ, WIDTH, dtype=torch.float64)}
    options = OPTIONS | {"passes": ("mlp", "vocab"), "chunk_rows": 16, "vocab_chunk_rows": 16}
    assert not check_parity(Mixer().double(), batch, _BAR, _BAR, options).refusals
