"""Attention: masks are read right, nothing of S² elements is left, and the numbers are eager's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import mst_fx
from mst_fx.graph.subgraphs import subgraphs
from mst_fx.graph.values import tensors_of
from mst_fx.listeners import on_graph
from mst_fx.masks import formula
from mst_fx.masks.formula import And, Compare, Constant, Holds, Mask, Not, Or
from mst_fx.masks.reach import (
    BLIND,
    CAUSAL,
    FULL,
    GENERAL,
    HEADER,
    SPANS,
    WHOLE,
    Reach,
    Vectors,
    allowed,
    reach_of,
)
from mst_fx.ops.attention import attention, mask_reach
from tests.direct import check, rewritten
from tests.helpers import check_parity, compile_mst, report_of, warm_peak
from tests.models import ACCEPTED, ATTENTION_SEQ, OTHERS, attention_batch
from tools.meters.cpu import call_metered, is_available

CHUNK = 8
OPTIONS: dict[str, Any] = {
    "inner": "aot_eager",
    "attention_chunk_rows": CHUNK,
    "chunk_rows": 16,
    "vocab_chunk_rows": 20,
}
ALONE: dict[str, Any] = {
    **OPTIONS,
    "inner": "eager",
    "passes": ("attention",),
}  # where nothing else is the point
_BAR = 3e-6
SEQ = ATTENTION_SEQ

# The algebra


def _vectors(sizes: tuple[int, int, int], seed: int) -> Vectors:
    """Sorted, unsorted and constant key and query vectors, and key padding."""
    batch, queries, keys = sizes
    generator = torch.Generator().manual_seed(seed)

    def random(count: int, size: int, high: int) -> Tensor:
        return torch.randint(0, high, (count, size), generator=generator)

    key = [
        torch.arange(keys)[None],
        random(batch, keys, 5).sort(-1).values,
        random(batch, keys, 5),
        random(batch, keys, 3) > 0,
        torch.arange(keys)[None] < random(batch, 1, keys + 1),
    ]
    query = [
        torch.arange(queries)[None],
        random(batch, queries, 5).sort(-1).values,
        random(batch, queries, 5),
        random(batch, queries, 4) > 0,
    ]
    return Vectors(key, query)


_atom = st.one_of(
    st.builds(
        Compare,
        st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]),
        st.sampled_from(["k0", "k0", "k1", "k2"]),
        st.sampled_from(["q0", "q0", "q1", "q2", ""]),
        st.integers(-9, 9),
    ),
    st.builds(Holds, st.sampled_from(["k3", "k4", "q3"])),
    st.just(Compare("le", "k0", "q0", 0)),
)
_masks = st.one_of(
    _atom,
    st.builds(And, st.tuples(_atom, _atom)),
    st.builds(And, st.tuples(_atom, _atom, _atom)),
    st.builds(Or, st.tuples(_atom, _atom)),
    st.builds(And, st.tuples(_atom, st.builds(Or, st.tuples(_atom, _atom)))),
    _atom.map(formula.negated),
)
_many = settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@_many
@given(
    mask=_masks,
    sizes=st.sampled_from([(1, 24, 24), (2, 21, 21), (2, 8, 24), (1, 5, 17)]),
    seed=st.integers(0, 30),
    is_finite=st.booleans(),
)
def test_reach_holds_all_that_is_allowed(
    mask: Mask, sizes: tuple[int, int, int], seed: int, is_finite: bool
) -> None:
    batch, queries, keys = sizes
    vectors = _vectors(sizes, seed)
    assert formula.parse(formula.text(mask)) == mask
    whole = allowed(mask, vectors, 0, queries, 0, keys, torch.device("cpu")).expand(batch, queries, keys)
    found = reach_of(mask, vectors, queries, keys, CHUNK, is_finite)
    form = int(found.table[0, 0])
    if form == FULL:
        assert whole.all()
    elif form == CAUSAL:
        assert torch.equal(whole, torch.ones_like(whole).tril())
    elif form == SPANS:
        assert torch.equal(whole, _spans_written_out(found, batch, queries))
    for index, (first, last, kind) in enumerate(found.table[HEADER:].tolist()):
        rows = whole[:, index * CHUNK : (index + 1) * CHUNK]
        outside = torch.ones(keys, dtype=torch.bool)
        outside[first:last] = False
        assert not rows[..., outside].any()
        if kind == WHOLE:
            assert rows[..., first:last].all()
        if is_finite and not rows.any(-1).all():
            assert kind == BLIND and (first, last) == (0, keys)


@pytest.mark.parametrize(
    "mask, text",
    [
        (Constant(True), "('constant', True)"),
        (Compare("gt", "k0", "q0", -4), "('compare', 'gt', 'k0', 'q0', -4)"),
        (
            Or((Compare("lt", "k0", "", 7), Holds("k1"))),
            "('or', ('compare', 'lt', 'k0', '', 7), ('true', 'k1'))",
        ),
        (And((Not(Holds("q1")), Holds("k1"))), "('and', ('not', ('true', 'q1')), ('true', 'k1'))"),
    ],
)
def test_text_of_a_formula(mask: Mask, text: str) -> None:
    """What operators carry, and graphs print: a change of it would make all compiled graphs anew."""
    assert formula.text(mask) == text and formula.parse(text) == mask


def _spans_written_out(found: Reach, batch: int, size: int) -> Tensor:
    """The mask ``[B, Q, Q]`` that a kernel for spans runs with the header and the starts."""
    (_, left, right), (spans, longest, even) = found.table[:HEADER].tolist()
    starts = found.starts[: spans + 1].long()
    count = found.starts.numel() - 1
    assert starts[0] == 0 and starts[-1] == count and int(starts.diff().max()) == longest
    if even:
        each = torch.arange(0, size, longest)
        assert torch.equal(starts[:-1], torch.cat([each + first for first in range(0, count, size)]))
    span = torch.searchsorted(starts, torch.arange(count), right=True)
    place = torch.arange(count)
    distance = place[:, None] - place
    seen = span[:, None] == span
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    blocks = [seen[first : first + size, first : first + size] for first in range(0, count, size)]
    assert int(seen.sum()) == sum(int(block.sum()) for block in blocks), "no span crosses a sequence"
    return torch.stack(blocks).expand(batch, size, size)


CAUSAL_MASK = Compare("le", "k0", "q0", 0)


@pytest.mark.parametrize(
    ("part", "left", "right", "longest"),
    [
        (Compare("gt", "k0", "q0", -4), 3, 0, 24),
        (Compare("eq", "k1", "q1", 0), -1, 0, None),
        (And((Compare("eq", "k1", "q1", 0), Compare("gt", "k0", "q0", -3))), 2, 0, None),
    ],
    ids=["window", "documents", "both"],
)
def test_spans_are_seen(part: Mask, left: int, right: int, longest: int | None) -> None:
    vectors = _vectors((2, 24, 24), 0)
    documents = vectors.keys[1]
    vectors = Vectors(vectors.keys, [vectors.queries[0], documents])
    found = reach_of(formula.both([CAUSAL_MASK, part]), vectors, 24, 24, CHUNK, False)
    assert found.table[0].tolist() == [SPANS, left, right]
    if longest is None:
        runs = [row.unique_consecutive(return_counts=True)[1] for row in documents]
        assert found.table[1].tolist() == [sum(map(len, runs)), max(int(r.max()) for r in runs), 0]
    _spans_written_out(found, 2, 24)


def test_documents_of_both_directions_and_even_ones_are_spans() -> None:
    documents = (torch.arange(24) // 8)[None]
    vectors = Vectors([torch.arange(24)[None], documents], [torch.arange(24)[None], documents])
    found = reach_of(Compare("eq", "k1", "q1", 0), vectors, 24, 24, CHUNK, False)
    assert found.table[:HEADER].tolist() == [[SPANS, -1, -1], [3, 8, 1]]
    assert found.starts[:4].tolist() == [0, 8, 16, 24]


def test_padding_and_holes_are_no_spans() -> None:
    size = 24
    for padding in (torch.arange(size) < 20, torch.arange(size) > 3, torch.arange(size) != 9):
        vectors = Vectors([torch.arange(size)[None], padding[None]], [torch.arange(size)[None]])
        mask = And((CAUSAL_MASK, Holds("k1")))
        assert int(reach_of(mask, vectors, size, size, CHUNK, False).table[0, 0]) == GENERAL


def test_plain_forms_are_seen() -> None:
    vectors = _vectors((2, 24, 24), 0)
    causal = Compare("le", "k0", "q0", 0)
    assert int(reach_of(causal, vectors, 24, 24, CHUNK, False).table[0, 0]) == CAUSAL
    assert int(reach_of(formula.TRUE, vectors, 24, 24, CHUNK, False).table[0, 0]) == FULL
    for almost in (1, -1, -24):
        assert int(
            reach_of(dataclasses.replace(causal, offset=almost), vectors, 24, 24, CHUNK, False).table[0, 0]
        ) not in (
            CAUSAL,
            FULL,
        )
    window = reach_of(And((causal, Compare("gt", "k0", "q0", -4))), vectors, 24, 24, CHUNK, False)
    assert window.table[HEADER:, :2].tolist() == [[0, 8], [5, 16], [13, 24]], "only the keys in reach"


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "mask",
    [
        Compare("le", "k0", "q0", 0),
        And((Compare("le", "k0", "q0", 0), Compare("gt", "k0", "q0", -5))),
        And((Compare("le", "k0", "q0", 0), Compare("eq", "k1", "q1", 0))),
        And((Compare("le", "k0", "q0", 0), Holds("k3"))),
        Or((Compare("le", "k0", "q0", 0), Compare("lt", "k0", "", 7))),
        Holds("k4"),
    ],
    ids=["causal", "window", "documents", "padding", "prefix", "right"],
)
def test_op(mask: Mask, groups: int, softcap: float) -> None:
    """Against softmax written out, in float64; queries that see no key give 0."""
    batch, size, width = 2, 21, 6
    vectors = _vectors((batch, size, size), 3)
    query = torch.randn(batch, 4, size, width, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(batch, 4 // groups, size, width, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    reaches = mask_reach(
        list(vectors.keys), list(vectors.queries), [formula.text(mask)], size, size, CHUNK, [False]
    )
    rest: Any = ([], formula.text(mask), 0, CHUNK, 0.3, softcap, 0.0, None, None)
    out, _ = attention(query, key, value, list(vectors.keys), list(vectors.queries), *reaches, *rest)

    visible = allowed(mask, vectors, 0, size, 0, size, torch.device("cpu")).expand(batch, -1, -1)[:, None]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    truth = weights @ value.repeat_interleave(groups, 1)
    assert torch.allclose(out, truth, atol=1e-12)
    tangent = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, (query, key, value), tangent),
        torch.autograd.grad(truth, (query, key, value), tangent),
        strict=True,
    ):
        assert torch.allclose(found, wanted, atol=1e-12)


# Masks written by hand


class Attention(nn.Module):
    """``x + attention(x)`` with a mask made of positions."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.mask, self.dropout = mask, dropout
        self.qkv, self.out = nn.Linear(16, 48).double(), nn.Linear(16, 16).double()

    def forward(self, x: Tensor) -> Tensor:
        batch, size, _ = x.shape
        query, key, value = self.qkv(x).view(batch, size, 3, 4, 4).permute(2, 0, 3, 1, 4)
        place = torch.arange(size)
        mask = self.mask(place[None, :], place[:, None])[None, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=self.dropout)
        return x + self.out(out.transpose(1, 2).reshape(batch, size, 16))


WRITTEN = {
    "causal": (lambda k, q: k <= q, "causal"),
    "causal_mirrored": (lambda k, q: q >= k, "causal"),
    "causal_by_difference": (lambda k, q: q - k >= 0, "causal"),
    "not_later": (lambda k, q: ~(k > q), "causal"),
    "almost_causal": (lambda k, q: k < q + 2, "general: k0 < q0 +2"),
    "strictly_before": (lambda k, q: k < q, "general: k0 < q0"),
    "window": (lambda k, q: (k <= q) & (q - k < 5), "window 5"),
    "window_by_where": (lambda k, q: torch.logical_and(k <= q, k > q - 5), "window 5"),
    "both_sides": (lambda k, q: (k - q).abs() <= 3, "general: k0 <= q0 +3 and k0 >= q0 -3"),
    "prefix": (lambda k, q: (k <= q) | (k < 9), "general: k0 <= q0 or k1"),
    "documents": (lambda k, q: (k <= q) & (k // 7 == q // 7), "documents"),
    "all": (lambda k, q: (k >= 0) | (q < 0), "full"),
    "or from zeros": (
        lambda k, q: q.new_zeros((), dtype=torch.bool) | (k <= q) | (k < 9),
        "general: k0 <= q0 or k1",
    ),
    "and from ones": (lambda k, q: k.new_ones((), dtype=torch.bool) & (k <= q), "causal"),
    "or from a tensor": (lambda k, q: torch.tensor(False) | (k <= q), "causal"),
    "or from full": (lambda k, q: torch.logical_or(k <= q, torch.full((), False)), "causal"),
    "or with whole zeros": (lambda k, q: (k <= q) | torch.zeros(SEQ, SEQ, dtype=torch.bool), "causal"),
    "or with no keys": (lambda k, q: torch.zeros_like(k, dtype=torch.bool) | (k <= q), "causal"),
    "and not false": (lambda k, q: ~q.new_full((1, 1), False, dtype=torch.bool) & (k <= q) & True, "causal"),
    "image blocks": (
        lambda k, q: q.new_zeros((), dtype=torch.bool) | (k <= q) | ((k // 5 == q // 5) & (q > 9)),
        "general: k0 <= q0 or (k1 == q1 and q2)",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("batch", [1, 3])
def test_written_masks(name: str, batch: int) -> None:
    mask, form = WRITTEN[name]
    x = torch.randn(batch, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(Attention(mask), (x,), options=OPTIONS)
    (found,) = (r for r in report.rewrites if r.kind == "attention")
    assert found.form == form


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda k, q: ((k <= q) & (k > 3)).tril(), "tril"),
        (lambda k, q: (k * q) % 3 == 0, "remainder|mod"),
        (lambda k, q: (k <= q).cumsum(-1) > 2, "cumsum|gt"),
        (lambda k, q: torch.rand(SEQ, SEQ) > 0.5, "rand|gt"),
        (lambda k, q: (k <= q).roll(1, -1), "roll"),
        (lambda k, q: (k <= q).transpose(0, 1), "transpose"),
        (lambda k, q: (k <= q) & torch.zeros((), dtype=torch.bool), "nothing"),
    ],
)
def test_masks_that_are_not_understood_are_refused(
    mask: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    x = torch.randn(1, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = report_of(Attention(mask), OPTIONS, x)
    assert not report.rewrites
    (refused,) = (r for r in report.refusals if r.kind == "attention")
    assert any(part in refused.reason for part in reason.split("|")), refused.reason


class WrittenOut(nn.Module):
    """Attention of matmuls and softmax, over all tokens or those up to each."""

    def __init__(self, softcap: float = 0.0, causal: bool = True, keep_weights: bool = False) -> None:
        super().__init__()
        self.softcap, self.causal, self.keep_weights = softcap, causal, keep_weights
        self.qkv = nn.Linear(16, 48).double()

    def forward(self, x: Tensor) -> Any:
        batch, size, _ = x.shape
        query, key, value = self.qkv(x).view(batch, size, 3, 4, 4).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(query, key.transpose(-1, -2)) / 2.0
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.causal:
            place = torch.arange(size)
            scores = scores + torch.where(place[None, :] <= place[:, None], 0.0, float("-inf"))
        weights = scores.softmax(dim=-1)
        out = x + torch.matmul(weights, value).transpose(1, 2).reshape(batch, size, 16)
        return (out, weights) if self.keep_weights else out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_attention_written_out(softcap: float, causal: bool) -> None:
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(WrittenOut(softcap, causal), (x,), options=OPTIONS)
    (found,) = (r for r in report.rewrites if r.kind == "attention")
    assert found.form == ("causal" if causal else "full")
    assert found.gradient == ("recompute" if softcap else "native")


def test_a_view_of_the_output_still_works() -> None:
    """The output written out is contiguous, and a view of it must stay one."""

    class Viewed(WrittenOut):
        def forward(self, x: Tensor) -> Any:
            query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(2, 3)).softmax(-1)
            return (weights @ value).view(x.shape[0], -1)

    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    assert _forms(check(Viewed(), (x,), options=OPTIONS)) == ["full"]


@pytest.mark.parametrize("how", ["alpha", "in place"])
def test_attention_written_out_otherwise(how: str) -> None:
    class Other(WrittenOut):
        def forward(self, x: Tensor) -> Any:
            query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            scores = query @ (key.clone().transpose_(2, 3) if how == "in place" else key.transpose(2, 3))
            if how == "in place":
                return scores.softmax(-1) @ value
            place = torch.arange(x.shape[1])
            mask = torch.where(place[None, :] <= place[:, None], 0.0, float("-inf"))
            return torch.add(mask, scores, alpha=3).softmax(-1) @ value

    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(Other(), (x,), options=OPTIONS)
    assert bool(report.rewrites) == (how == "in place") != bool(report.refusals)


def test_weights_that_somebody_reads_are_refused() -> None:
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(WrittenOut(keep_weights=True), (x,), options=OPTIONS)
    assert not report.rewrites
    assert "softmax" in report.refusals[0].reason


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_autocast(mask: str) -> None:
    """Under autocast the fused call casts its operands: the output is bfloat16, as in eager."""
    model = Attention(WRITTEN[mask][0]).float()
    x = torch.randn(2, SEQ, 16)

    def run(fn: Callable[..., Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(x)

    truth, found = run(model), run(compile_mst(model, OPTIONS))
    assert len(_forms(report_of(model, OPTIONS, x))) == 1
    assert found.dtype == truth.dtype
    assert float((found - truth).norm() / truth.norm()) < 4e-3


def test_dropout_is_refused() -> None:
    x = torch.randn(1, SEQ, 16, dtype=torch.float64)
    report = report_of(Attention(lambda k, q: k <= q, dropout=0.1), OPTIONS, x)
    assert not report.rewrites and "at random" in report.refusals[0].reason


class Added(nn.Module):
    """Attention with a mask ``[B, ..]`` of what is added to the scores, of some keys' places and a mark a token."""

    def __init__(self, mask: Callable[..., Tensor], fused: bool = True) -> None:
        super().__init__()
        self.mask, self.fused, self.qkv = mask, fused, nn.Linear(16, 48).double()

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        mask = self.mask(place[None, :], place[:, None], marks)
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return (torch.matmul(query, key.transpose(2, 3)) + self.zeros() + mask).softmax(-1) @ value

    def zeros(self) -> Tensor:
        return torch.zeros(1, 4, SEQ, SEQ, dtype=torch.float64)


def _minus(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, float("-inf")).double()


ADDED = {
    "zeros": (lambda k, q, marks: torch.zeros(1, 4, SEQ, SEQ, dtype=torch.float64), "full"),
    "new zeros": (lambda k, q, marks: k.new_zeros(1, 4, SEQ, SEQ, dtype=torch.float64), "full"),
    "zeros and a mask": (
        lambda k, q, marks: torch.zeros(1, 4, SEQ, SEQ, dtype=torch.float64) + _minus(k <= q),
        "causal",
    ),
    "a mask and full": (
        lambda k, q, marks: _minus(k <= q)[None, None] + torch.full((1, 4, SEQ, SEQ), 0.0).double(),
        "causal",
    ),
    "zeros where": (
        lambda k, q, marks: torch.where(k <= q, torch.zeros(1, 4, SEQ, SEQ, dtype=torch.float64), -1e30),
        "causal",
    ),
    "batch first": (
        lambda k, q, marks: ((k <= q) & (marks[:, None, :] == marks[:, :, None]))[:, None],
        "documents",
    ),
    "batch first, added": (
        lambda k, q, marks: _minus((k <= q) & (marks[:, None, :] == marks[:, :, None])).unsqueeze(1),
        "documents",
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_masks(name: str) -> None:
    """Zeros are no mask; a mask ``[B, Q, K]`` that is given heads later does not differ between heads."""
    mask, form = ADDED[name]
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    marks = torch.stack([torch.arange(SEQ) // 7, torch.arange(SEQ) // 9])
    for fused in (True, False) if "batch" not in name else (True,):
        report = check(Added(mask, fused), (x, marks), options=OPTIONS)
        assert _forms(report) == [form], report.refusals


def _written(k: Tensor, q: Tensor, marks: Tensor) -> Tensor:
    mask = _minus(k <= q)
    mask[:, :2] = 0.0
    return mask


@pytest.mark.parametrize(
    ("mask", "reason", "cause"),
    [
        (
            lambda k, q, marks: torch.zeros(1, 4, SEQ, SEQ).double().index_fill_(3, k[0, :3], -9.0),
            "index",
            "mask",
        ),
        (lambda k, q, marks: _minus(k <= q).index_fill_(0, k[0, :3], -9.0), "index|in place", "mask"),
        (lambda k, q, marks: (k * q) * 0.5 * torch.ones((), dtype=torch.float64), "mul", "mask"),
        (lambda k, q, marks: marks[:4, :, None] == marks[:4, None, :], "between heads", "mask"),
        (lambda k, q, marks: _minus(marks.expand(SEQ, SEQ) > k), "an input of this graph", "mask-input"),
        (lambda k, q, marks: (k <= q) & (marks > 0), "an input of this graph", "mask-input"),
        (lambda k, q, marks: (1.0 - marks.double()) * -1e9, "an input of this graph", "mask-input"),
        (_written, "makes the mask", "mask"),  # as a new value
    ],
)
def test_reasons_are_true(mask: Callable[..., Tensor], reason: str, cause: str) -> None:
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    marks = torch.arange(SEQ * SEQ).view(SEQ, SEQ) % 5
    report = check(Added(mask), (x, marks), options=OPTIONS)
    assert not report.rewrites
    refused = next(r for r in report.refusals if r.kind == "attention")
    assert any(part in refused.reason for part in reason.split("|")) and refused.cause == cause, refused


def test_attention_of_three_dimensions_that_is_not_known_is_refused_and_logits_are_none() -> None:
    """``[B·heads, S, S]``, as in xglm; a softmax over a vocabulary is no attention."""

    class Three(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.way, self.qkv, self.head = way, nn.Linear(16, 48).double(), nn.Linear(16, SEQ).double()

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).flatten(1, 2)
            if self.way == "logits":
                return self.head(x).softmax(-1)
            if self.way == "matrix":
                return (x.tanh() @ self.head.weight.t()).softmax(-1)
            if self.way == "baddbmm":
                scores = torch.baddbmm(x.new_zeros(1, 1, 1), query, key.transpose(1, 2))
            elif self.way == "einsum":
                scores = torch.einsum("bqd,bkd->bqk", query, key)
            else:
                scores = torch.bmm(query, key.transpose(1, 2)).view(2, 4, SEQ, SEQ) / 2.0
                scores = scores.clamp(max=9.0).view(8, SEQ, SEQ)
            return torch.bmm(F.softmax(scores, -1), value)

    x = torch.randn(2, SEQ, 16, dtype=torch.float64)
    for way, expected in {"bmm": 1, "baddbmm": 0, "einsum": 1, "logits": 0, "matrix": 0}.items():
        refused = [r for r in report_of(Three(way), OPTIONS, x).refusals if r.kind == "attention"]
        assert [str(r.cause.value) for r in refused] == ["scores"] * expected, way


def test_masks_written_in_place_are_refused() -> None:
    def mask(k: Tensor, q: Tensor) -> Tensor:
        found = k <= q
        found[:, 3] = True
        return found

    x = torch.randn(1, SEQ, 16, dtype=torch.float64, requires_grad=True)
    assert not check(Attention(mask), (x,), options=OPTIONS).rewrites


def _shifted_through_a_view(k: Tensor, q: Tensor) -> Tensor:
    place = torch.arange(SEQ)
    place.view(-1).sub_(9)
    return (k <= q) | (place[None, :] * 1 < 0)


@pytest.mark.parametrize(
    "mask",
    [
        lambda k, q: torch.sub(k, q, alpha=2) <= 0,
        lambda k, q: (k - q).bool() < 1,
        lambda k, q: (q - k).to(torch.uint8) < 5,
        _shifted_through_a_view,
    ],
)
def test_numbers_that_are_others_are_not_read(mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Differences with a factor or after a cast that changes them, and constants that are written to through a view."""
    x = torch.randn(1, SEQ, 16, dtype=torch.float64, requires_grad=True)
    check(Attention(mask), (x,), options=OPTIONS)


def test_a_scale_that_rounds_is_none() -> None:
    class Rounded(WrittenOut):
        def forward(self, x: Tensor) -> Any:
            query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            scores = torch.div(query @ key.transpose(2, 3), 0.5, rounding_mode="floor")
            return scores.softmax(-1) @ value

    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    assert not check(Rounded(), (x,), options=OPTIONS).rewrites


def test_short_sequences_are_left_alone() -> None:
    x = torch.randn(1, CHUNK, 16, dtype=torch.float64)
    report = report_of(Attention(lambda k, q: k <= q), OPTIONS, x)
    assert not report.rewrites and not report.refusals


# Hugging Face models


def _model(name: str, checkpoint: bool, eager: bool, layers: int = 1) -> nn.Module:
    entry = {**ACCEPTED, **OTHERS}[name]
    count = next(key for key in ("n_layer", "num_layers", "num_hidden_layers") if key in entry.overrides)
    model = entry.build(**{count: layers})
    model.config.use_cache = False  # type: ignore[union-attr]
    if eager:
        model.set_attn_implementation("eager")  # type: ignore[operator]
    if checkpoint:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def _forms(report: mst_fx.Report) -> list[str]:
    return [rewrite.form for rewrite in report.rewrites if rewrite.kind == "attention"]


CASES = [  # one layer, or two, as there are forms
    ("llama", 1, "", "", ["causal"]),
    ("llama", 3, "ones", "", ["causal + padding"]),
    ("llama", 3, "left", "checkpoint", ["causal + padding"] * 2),
    ("llama", 1, "holes", "", ["causal + padding"]),
    ("llama", 3, "packed", "checkpoint", ["documents"]),
    ("llama", 3, "", "eager", ["causal"]),
    ("mistral", 3, "right", "dynamic", ["padding + window 16"]),
    ("gemma2", 3, "", "", None),
    ("gemma3", 1, "packed", "checkpoint", None),
    ("gpt2", 3, "right", "", ["causal + padding"]),
    ("gpt_neox", 1, "", "dynamic", ["documents"]),  # that it is one is seen when it runs
    ("phi3", 3, "left", "", ["causal + padding"]),
    ("bert", 3, "right", "", ["padding"]),
    ("bert", 1, "holes", "checkpoint", ["padding"]),
    ("falcon", 3, "", "", ["causal"]),
    ("opt", 3, "left", "", ["causal + padding"]),
]


@pytest.mark.parametrize(("name", "batch", "variant", "how", "forms"), CASES)
def test_hugging_face(name: str, batch: int, variant: str, how: str, forms: list[str] | None) -> None:
    layers = 2 if forms is None else len(forms)
    model = _model(name, how == "checkpoint", how == "eager", layers)
    inputs = attention_batch(name, batch, variant)
    more: dict[str, Any] = {"dynamic": True} if how == "dynamic" else {}
    # One of two dynamic ones goes without AOTAutograd, which takes longest of all where sizes are symbols.
    is_traced = how == "checkpoint" or (name, how) == ("gpt_neox", "dynamic")
    traced = {**ALONE, "inner": "aot_eager"} if is_traced else ALONE
    options = OPTIONS if (name, how) == ("llama", "checkpoint") else traced  # there, with all other passes
    squares: list[tuple[list[str], list[str]]] = []

    def look(captured: fx.GraphModule, new: fx.GraphModule, report: mst_fx.Report) -> None:
        if how != "dynamic":
            squares.append((list(_square(captured)), list(_square(new))))

    with on_graph.listening(look):
        report = check_parity(model, inputs, _BAR, _BAR, options, **more)
    found = _forms(report)
    assert not any(after for _, after in squares), squares
    if name == "opt" and report.graphs > 1:  # it draws numbers for a layerdrop of 0
        assert transformers.__version__ < "5.20", "newer versions of the library do not"
    else:
        assert len(found) == layers and (forms is None or found == forms), found


@pytest.mark.slow
def test_inductor() -> None:
    """Of the layer attention alone: each norm, and the MLP, would be some more kernels to compile."""
    model: Any = _model("mistral", True, False).float()
    (layer,) = model.model.layers
    layer.mlp = layer.input_layernorm = layer.post_attention_layernorm = model.model.norm = nn.Identity()
    inputs = attention_batch("mistral", 3, "left", torch.float32)
    report = check_parity(model, inputs, 1e-5, 1e-5, {**ALONE, "inner": "inductor"})
    assert _forms(report) == ["padding + window 16"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_fully_masked_rows_of_eager_attention(name: str) -> None:
    """Left padding: such queries see all keys alike in eager attention, and fused kernels get that wrong."""
    layers = 2 if name == "gemma2" else 1  # of two kinds
    model = _model(name, False, True, layers).float()
    inputs = attention_batch(name, 3, "left", torch.float32)
    assert len(_forms(check_parity(model, inputs, 1e-6, 1e-5, ALONE))) == layers


def test_models_that_are_refused() -> None:
    model, inputs = _model("llama", False, False), attention_batch("llama", 1, "square")
    report = check_parity(model, inputs, _BAR, _BAR, ALONE)
    assert not _forms(report)
    reasons = {r.reason for r in report.refusals if r.kind == "attention"}
    assert reasons and all("mask" in reason for reason in reasons), reasons


def _graphs(gm: fx.GraphModule) -> Iterator[fx.Graph]:
    yield gm.graph
    for _, child in subgraphs(gm):
        yield from _graphs(child)


@pytest.mark.parametrize(
    ("name", "variant", "how"),
    [
        ("llama", "", "checkpoint"),
        ("llama", "left", "eager"),
        ("mistral", "packed", "checkpoint"),
        ("gemma2", "right", ""),
        ("gemma3", "", ""),
        ("bert", "holes", ""),
    ],
)
def test_nothing_of_square_size_is_left(name: str, variant: str, how: str) -> None:
    layers = 2 if name.startswith("gemma") else 1  # of two kinds
    model = _model(name, how == "checkpoint", how == "eager", layers)
    inputs = attention_batch(name, 1, variant)
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        before = list(_square(gm))
        new, _ = mst_fx.rewrite(gm, example_inputs, ALONE)
        assert before and not list(_square(new)), list(_square(new))
        graphs.append(new.graph)
        return gm.forward  # type: ignore[no-any-return]

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**{k: v for k, v in inputs.items() if k != "labels"})
    assert graphs


def _square(gm: fx.GraphModule) -> Iterator[str]:
    for graph in _graphs(gm):
        for node in graph.nodes:
            if any(list(fake.shape).count(SEQ) > 1 for fake in tensors_of(node)):
                yield node.name


def test_logits_stay_the_same_without_gradients() -> None:
    model = _model("mistral", False, False).eval()
    inputs = attention_batch("mistral", 2, "left")
    with torch.no_grad():
        truth = model(**inputs).logits
        found = compile_mst(model, OPTIONS)(**inputs).logits
    assert torch.allclose(found, truth, atol=1e-6)


def test_strict_raises_the_reason() -> None:
    x = torch.randn(1, SEQ, 16, dtype=torch.float64)
    run, _ = rewritten(Attention(lambda k, q: (k <= q).roll(1, -1)), {**OPTIONS, "strict": True})
    with pytest.raises(Exception, match="roll"):
        run(x)


# Memory


def _measure() -> list[int]:
    """Bytes that a step of one layer at S = 6,144 takes at its peak above what was there before: whole, and padded."""
    from tools.bench.models import Shape, make_llama

    seq = 6144
    shape = Shape(hidden=16, intermediate=16, heads=1, kv_heads=1, vocabulary=16, layers=1)
    model = make_llama(shape, seq, "cpu", torch.float32, checkpoint=True, mask=True)
    inputs: dict[str, Any] = {"input_ids": torch.randint(16, (1, seq))}
    inputs["labels"] = inputs["input_ids"]
    padding = {"attention_mask": (torch.arange(seq) < seq - 100)[None].long()}
    options: Any = {"inner": "aot_eager", "passes": ("attention",)}
    run = torch.compile(model, backend="mst", options=options)
    return [warm_peak(lambda: run(**inputs, **more).loss.backward()) for more in ({}, padding)]  # noqa: B023


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")
def test_no_mask_in_memory() -> None:
    square = 6144**2
    found = call_metered(_measure, timeout=600)
    assert len(found) == 2 and max(found) < square // 2  # a Boolean mask is S² bytes
