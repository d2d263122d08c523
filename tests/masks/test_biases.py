"""Attention with a bias: it is recognised, nothing of S² elements is left, and its gradients are eager's; what is no formula is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mst_fx
from tests.helpers import check_parity, compile_mst
from tests.masks import written

OPTIONS: dict[str, Any] = {
    "inner": "aot_eager",
    "attention_chunk_rows": 16,
    "chunk_rows": 16,
    "vocab_chunk_rows": 16,
    "passes": ("attention",),
}
SEQ, HEADS = 67, 4
LOW = torch.finfo(torch.float64).min
_BAR = 1e-12


class Attention(written.Attention):
    """Attention written out, or fused, whose scores get what ``bias`` makes."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = HEADS, width: int = 32) -> None:
        super().__init__(attend, heads, width)
        self.table = nn.Embedding(32, heads)


def _distance(size: int) -> Tensor:
    return torch.arange(size)[None, :] - torch.arange(size)[:, None]


def _bucket(distance: Tensor) -> Tensor:
    """T5's, with its write in place."""
    buckets: Any = 0
    buckets += (distance > 0).to(torch.long) * 16
    distance = torch.abs(distance)
    large = 8 + (torch.log(distance.float() / 8) / math.log(128 / 8) * 8).to(torch.long)
    large = torch.min(large, torch.full_like(large, 15))
    buckets += torch.where(distance < 8, distance, large)
    return buckets  # type: ignore[no-any-return]


def _weigh(scores: Tensor, value: Tensor) -> Tensor:
    return torch.matmul(F.softmax(scores, -1), value)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3)) * 0.4


def _hidden(size: int, padding: Tensor | None) -> Tensor:
    hidden = _distance(size)[None, None] > 0
    return hidden if padding is None else hidden | ~padding[:, None, None, :]


def _added(size: int, padding: Tensor | None, fill: float = LOW) -> Tensor:
    return torch.where(~_hidden(size, padding), torch.zeros((), dtype=torch.float64), fill)


def t5(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.table(_bucket(_distance(q.shape[2]))).permute([2, 0, 1]).unsqueeze(0)
    return _weigh(_scores(q, k) + bias + _added(q.shape[2], padding), v)


def t5_fused(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.table(_bucket(_distance(q.shape[2]))).permute([2, 0, 1]).unsqueeze(0)
    mask = torch.where(~_hidden(q.shape[2], padding), bias, LOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.contiguous(), scale=0.4)


def table_of_heads(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.table.weight.t()[:, (_distance(q.shape[2]) + 5).clamp(0, 31)]
    return _weigh(_scores(q, k) + bias, v)


def alibi_by_distance(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = -m.slopes.view(1, -1, 1, 1) * (-_distance(q.shape[2])).abs()
    return _weigh((bias + _scores(q, k)).masked_fill(_hidden(q.shape[2], padding), LOW), v)


def alibi_fused(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None, :]
    bias = (-m.slopes[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.4)


def alibi_of_keys(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.slopes[:, None, None] * torch.arange(1 - q.shape[2], 1).view(1, 1, -1)
    hidden = torch.where(_hidden(q.shape[2], padding), LOW, torch.zeros((), dtype=torch.float64)).to(
        torch.bool
    )
    return _weigh((_scores(q, k) + bias).masked_fill(hidden, LOW), v)


def added_the_other_way(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.slopes[:, None, None] * _distance(q.shape[2])
    added = torch.where(_hidden(q.shape[2], padding), LOW, torch.zeros((), dtype=torch.float64))
    return _weigh(_scores(q, k) + (bias + added), v)


def bloom(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    batch, heads, size, _ = q.shape
    count = torch.arange(size).expand(batch, -1) if padding is None else padding.long().cumsum(-1) - 1
    bias = (m.slopes[:, None] * count[:, None, :]).reshape(batch * heads, 1, size)
    flat = [x.reshape(batch * heads, size, -1) for x in (q, k, v)]
    scores = bias.baddbmm(batch1=flat[0], batch2=flat[1].transpose(-1, -2), beta=0.5, alpha=0.4)
    scores = scores.view(batch, heads, size, size) + _added(size, padding)
    weights = F.softmax(scores, -1).view(batch * heads, size, size)
    return torch.bmm(weights, flat[2]).view(batch, heads, size, -1)


def xglm(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    batch, heads, size, _ = q.shape
    flat = [x.reshape(batch * heads, size, -1) for x in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(batch, heads, size, size) + _added(
        size, padding
    )
    scores = torch.max(scores, torch.full((), LOW, dtype=torch.float64)).view(batch * heads, size, size)
    return torch.bmm(F.softmax(scores, -1), flat[2]).view(batch, heads, size, -1)


def without_heads(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    weights = F.softmax(torch.bmm(flat[0], flat[1].transpose(1, 2)), dim=2)
    return torch.bmm(weights, flat[2]).view(q.shape)


FORMS = [
    (t5, "bias, causal", "bias, general: k0 <= q0 and not k1"),
    (t5_fused, "bias, causal", "bias, general: k0 <= q0 and not k1"),
    (table_of_heads, "bias", None),
    (alibi_by_distance, "bias, causal", "bias, general: k0 <= q0 and not k1"),
    (alibi_fused, "bias, causal", None),
    (alibi_of_keys, "bias, causal", "bias, general: k0 <= q0 and not k1"),
    (added_the_other_way, "bias, causal", "bias, general: k0 <= q0 and not k1"),
    (bloom, "bias, causal", "bias, general: k0 <= q0 and not k1"),
    (xglm, "causal", "general: k0 <= q0 and not k1"),
    (without_heads, "full", None),
]
CASES = [
    (form, padded, name) for form, *names in FORMS for padded, name in enumerate(names) if name is not None
]


@pytest.mark.parametrize(("form", "padded", "name"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_numbers(form: Callable[..., Tensor], padded: int, name: str) -> None:
    """Also of queries that see no key but by a finite number: those of padding on the left."""
    torch.manual_seed(0)
    model = Attention(form).double()
    batch: dict[str, Any] = {"x": torch.randn(2, SEQ, 32, dtype=torch.float64)}
    if padded:
        batch["padding"] = torch.ones(2, SEQ, dtype=torch.bool)
        batch["padding"][1, :21] = False
    report = check_parity(model, batch, _BAR, _BAR, OPTIONS)
    assert [(r.kind, r.form) for r in report.rewrites] == [("attention", name)]
    assert not report.refusals


@pytest.mark.slow
@pytest.mark.parametrize("form", [t5, alibi_by_distance, bloom], ids=lambda x: x.__name__)
def test_sequences_of_changing_length(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Attention(form).double()
    compiled = compile_mst(model, OPTIONS)
    for size in (SEQ, 83, 99):
        x = torch.randn(2, size, 32, dtype=torch.float64)
        grads = []
        with mst_fx.watch() as report:
            for run in (model, compiled):
                model.zero_grad()
                run(x).backward()
                grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*grads, strict=True))
        assert not report.refusals


def by_products(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    place = torch.arange(q.shape[2])
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * (place[None, :] * place[:, None]), v)


def by_query_too(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    place = torch.arange(q.shape[2])
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * (_distance(q.shape[2]) / (place[:, None] + 1)), v)


def by_other_positions(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    place = torch.arange(q.shape[2]) * 2 % 7
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * (place[None, :] - place[:, None]), v)


def made_cumulative(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    return _weigh(_scores(q, k) + m.slopes[:, None, None] * _distance(q.shape[2]).cumsum(-1), v)


def written_to(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.slopes[:, None, None] * _distance(q.shape[2])
    bias[:, 3, 5] = 7.0
    return _weigh(_scores(q, k) + bias, v)


def transposed(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    distance = _distance(q.shape[2])
    return _weigh(
        _scores(q, k) + m.slopes[:, None, None] * (distance.clamp(max=3) + distance.transpose(0, 1)), v
    )


def of_small_fill(m: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    bias = m.slopes[:, None, None] * torch.arange(q.shape[2])
    return _weigh(_scores(q, k) + bias + _added(q.shape[2], padding, -2e4), v)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (by_products, "not known to depend on distances alone"),
        (by_query_too, "not known to depend on distances alone"),
        (by_other_positions, "no difference of positions that count tokens"),
        (made_cumulative, "not known to depend on distances alone"),
        (written_to, "not known to depend on distances alone"),
        (transposed, "read as it is and transposed"),
        (of_small_fill, "may outweigh"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_no_formula_of_distances(form: Callable[..., Tensor], reason: str) -> None:
    """It stays, and is read as it is (test_given)."""
    torch.manual_seed(0)
    model = Attention(form).double()
    report = check_parity(model, {"x": torch.randn(2, SEQ, 32, dtype=torch.float64)}, _BAR, _BAR, OPTIONS)
    assert [(r.form, reason in r.why) for r in report.rewrites] == [("given", True)], report.rewrites


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_t5(implementation: str) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "attn_implementation": implementation,
    }
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields)).double()
    ids = torch.randint(1, 64, (2, SEQ))
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    report = check_parity(model, batch, _BAR, 1e-10, OPTIONS)
    forms = sorted(r.form for r in report.rewrites)
    assert forms == ["bias, causal"] * 2 + ["bias, padding"] * 2 + ["padding"] * 2
    assert not report.refusals


@pytest.mark.slow
@pytest.mark.parametrize("form", [t5_fused, alibi_of_keys], ids=lambda x: x.__name__)
def test_no_square_in_memory(form: Callable[..., Tensor]) -> None:
    """No block of S² elements, not even of one byte each."""
    size = 8192
    model = Attention(form, heads=2, width=16).double()
    compiled = compile_mst(model, {**OPTIONS, "attention_chunk_rows": 256})
    x = torch.randn(1, size, 16, dtype=torch.float64)
    with mst_fx.watch() as report:
        compiled(x[:, :1024]).backward()
        torch._dynamo.reset()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            compiled(x).backward()
    assert {r.kind for r in report.rewrites} == {"attention"}
    blocks = [e.self_cpu_memory_usage for e in found.events()]
    assert model.qkv.weight.grad is not None
    assert 0 < max(blocks) < size**2
