"""Attention sinks: recognised however they are written, without an S×S value, and the numbers are eager's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from transformers.models.gpt_oss import modeling_gpt_oss

import mst_fx
from mst_fx.graph.subgraphs import subgraphs
from mst_fx.graph.values import tensors_of
from mst_fx.masks import formula
from mst_fx.masks.formula import And, Compare, Holds, Mask
from mst_fx.masks.reach import CAUSAL, HEADER, Vectors, allowed
from mst_fx.ops import attention as ops
from mst_fx.torch_api import attention as kernels
from tests.direct import check
from tests.helpers import compile_mst, relative_error, warm_peak, worst_error
from tools.meters.cpu import call_metered, is_available, measure_cpu

CHUNK = 8
SEQ = 35
OPTIONS: dict[str, Any] = {"inner": "aot_eager", "attention_chunk_rows": CHUNK, "passes": ("attention",)}

# The operator


def _vectors(batch: int, size: int) -> Vectors:
    place = torch.arange(size)[None]
    documents = (place // 9).expand(batch, -1).contiguous()
    seen = torch.ones(batch, size, dtype=torch.bool)
    seen[:, :9] = False  # a whole chunk of queries sees nothing, and some more of one sequence
    seen[0, :13] = False
    return Vectors([place, documents, seen], [place, documents])


_CAUSAL = Compare("le", "k0", "q0", 0)
_MASKS: dict[str, Mask] = {
    "causal": _CAUSAL,
    "full": Compare("ge", "k0", "", 0),
    "window": And((_CAUSAL, Compare("gt", "k0", "q0", -5))),
    "documents": And((_CAUSAL, Compare("eq", "k1", "q1", 0))),
    "padding": And((_CAUSAL, Holds("k2"))),
}


def _operands(groups: int, size: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query ``[2, 4, size, 6]``, keys, values of ``width``, and sinks, of which two take all and nothing."""
    torch.manual_seed(size)
    made = [torch.randn(2, heads, size, 6, dtype=dtype) for heads in (4, 4 // groups)]
    made += [
        torch.randn(2, 4 // groups, size, width, dtype=dtype),
        torch.tensor([0.5, -2.0, 40.0, -40.0], dtype=dtype),
    ]
    return [x.requires_grad_() for x in made]


def _truth(operands: list[Tensor], visible: Tensor, softcap: float = 0.0, fill: float = -math.inf) -> Tensor:
    query, key, value, sinks = operands
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * 0.3
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + torch.zeros((), dtype=query.dtype).where(visible, fill)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value.repeat_interleave(groups, 1)


def _run(
    operands: list[Tensor], mask: Mask, vectors: Vectors, softcap: float = 0.0, fill: float = 0.0
) -> Tensor:
    query, key, value, sinks = operands
    size, parts = query.shape[2], (list(vectors.keys), list(vectors.queries))
    reaches = ops.mask_reach(*parts, [formula.text(mask)], size, size, CHUNK, [fill != 0.0])
    rest = (formula.text(mask), 0, CHUNK, 0.3, softcap, fill, None, sinks)
    out: Tensor = ops.attention(query, key, value, *parts, *reaches, [], *rest)[0]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("how", ["", "softcap", "uneven widths", "a few heads at a time"])
@pytest.mark.parametrize("name", _MASKS)
def test_op(name: str, how: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the softmax of scores and sinks written out, in float64; kernels where the mask is causal or full, otherwise chunks."""
    size, softcap = 29, 4.0 if how == "softcap" else 0.0
    if how == "a few heads at a time":
        monkeypatch.setattr(ops, "_MOST_SCORES", 2 * 2 * CHUNK * size)
    operands = _operands(groups, size, 5 if how == "uneven widths" else 6)
    vectors, mask = _vectors(2, size), _MASKS[name]
    visible = allowed(mask, vectors, 0, size, 0, size, torch.device("cpu"))[:, None]
    out, truth = _run(operands, mask, vectors, softcap), _truth(operands, visible, softcap)
    tangent = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, operands, tangent) for x in (out, truth))
    assert torch.allclose(out, truth, rtol=1e-10, atol=1e-13)
    for mine, true in zip(found, wanted, strict=True):
        assert relative_error(mine, true) <= 1e-10
        assert torch.allclose(mine, true, rtol=1e-10, atol=1e-12)


def test_a_query_that_sees_no_key_gives_the_sink_everything() -> None:
    """A finite number is added to masked scores, as eager attention does: the sink is larger, unless it is that small itself."""
    size, fill = 29, torch.finfo(torch.float64).min
    operands, vectors, mask = _operands(2, size, 6), _vectors(2, size), _MASKS["padding"]
    visible = allowed(mask, vectors, 0, size, 0, size, torch.device("cpu"))[:, None]
    out, truth = _run(operands, mask, vectors, fill=fill), _truth(operands, visible, fill=fill)
    assert torch.equal(out[0, :, :13], torch.zeros_like(out[0, :, :13]))
    tangent = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, operands, tangent) for x in (out, truth))
    for mine, true in zip((out, *found), (truth, *wanted), strict=True):
        assert torch.allclose(mine, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_the_op(dtype: torch.dtype, name: str) -> None:
    """No more is lost than where all is written out in that type: in the mean of several tries, for of four sinks' gradients
    chance says in one try which error is the larger one."""
    size, mask = 200, _MASKS[name]
    vectors = _vectors(2, size)
    visible = allowed(mask, vectors, 0, size, 0, size, torch.device("cpu"))[:, None]
    ratios: list[list[float]] = []
    for seed in range(10):
        torch.manual_seed(seed)
        made = [torch.randn(2, heads, size, 6).to(dtype) for heads in (4, 2, 2)] + [torch.randn(4).to(dtype)]
        tangent = torch.randn(2, 4, size, 6).to(dtype)
        mine = _results(lambda leaves: _run(leaves, mask, vectors), made, tangent)
        plain = _results(lambda leaves: _truth(leaves, visible), made, tangent)
        truth = _results(lambda leaves: _truth(leaves, visible), [x.double() for x in made], tangent.double())
        assert all(found.dtype == dtype for found in mine)
        errors = [
            [relative_error(x, true) for x, true in zip(found, truth, strict=True)] for found in (mine, plain)
        ]
        ratios.append([math.log(found / eager) for found, eager in zip(*errors, strict=True)])
        assert dtype == torch.bfloat16 or max(errors[0]) <= 1e-6
    assert dtype == torch.float32 or (torch.tensor(ratios).mean(0).exp() <= 1.1).all(), ratios


def _results(run: Callable[[list[Tensor]], Tensor], made: list[Tensor], tangent: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in made]
    out = run(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tangent)]


def test_a_kernel_makes_nothing_as_large_as_the_output_besides() -> None:
    """Forward, sinks cost the kernel a few vectors: its output is scaled where it is."""
    size, width = 4096, 64
    query, key, value = (torch.randn(1, 2, size, width) for _ in range(3))
    sinks = torch.randn(2)
    known = [CAUSAL, 0, 0, *[0] * 3 * (HEADER - 1)]

    def peak(sinks: Tensor | None) -> int:
        with measure_cpu() as found:
            ops.attention(
                query, key, value, [], [], None, None, known, "true", 0, 64, 0.125, 0.0, 0.0, None, sinks
            )
        return found.peak_bytes

    peak(sinks)  # what is made once
    without = peak(None)
    assert peak(sinks) <= without + 6 * 2 * size * 4
    assert 2 * size * width * 4 > 10 * 6 * size  # an output more would be seen


@pytest.mark.slow
def test_a_compiler_fuses_the_gradient_of_sinks() -> None:
    """Backward, sinks cost one kernel more, which reads tangent and output and makes a vector a head."""
    query = torch.randn(1, 64, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)

    def run(query: Tensor, sinks: Tensor) -> Tensor:
        q = query.transpose(1, 2)
        rest = ([CAUSAL, 0, 0, 0, 0, 0], "true", 0, 64, 0.125, 0.0, 0.0, None, sinks)
        out: Tensor = torch.ops.mst_fx.attention(q, q, q, [], [], None, None, *rest)[0]
        return out.transpose(1, 2).tanh().sum()

    torch._dynamo.reset()
    _, codes = run_and_get_code(lambda: torch.compile(run)(query, sinks).backward())
    (code,) = (code for code in codes if "attention_backward" in code)
    made = code[code.index("def call") :].splitlines()
    wide = [line for line in made if "empty_strided" in line and "float32" in line]
    assert len(wide) == 2 and "(1, 4, 64)" in wide[0] and "(4, )" in wide[1], wide


@pytest.mark.slow
@pytest.mark.parametrize("window", [False, True])
def test_sinks_read_the_tangent_before_it_is_written_over(
    window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kernels, "_BUSY", 1
    )  # heads one at a time, whose gradients go where tangent, keys and values were
    model = Written("gpt-oss", window)
    after = nn.Linear(16, 16).double()  # whose gradient is the tangent, a new tensor
    x, wanted = (
        torch.randn(2, SEQ, 16, dtype=torch.float64),
        [*model.query.parameters(), *model.pair.parameters()],
    )
    wanted.append(model.sinks)

    def loss(x: Tensor) -> Tensor:
        return after(model(x)).pow(2).sum()  # type: ignore[no-any-return]

    truth = torch.autograd.grad(loss(x), wanted)
    run = compile_mst(loss, {**OPTIONS, "inner": "inductor"})
    found, codes = run_and_get_code(lambda: torch.autograd.grad(run(x), wanted))
    assert any("attention_backward_over" in code for code in codes)
    for mine, true in zip(found, truth, strict=True):
        assert relative_error(mine, true) <= 1e-10


# How it is written


class Written(nn.Module):
    """Attention with sinks: 4 heads, 2 of keys and values, a window of 9 or none."""

    def __init__(self, how: str = "gpt-oss", window: bool = False, fill: float | None = None) -> None:
        super().__init__()
        self.how, self.window, self.fill = how, window, fill
        self.query, self.pair = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()
        self.sinks = nn.Parameter(torch.tensor([0.3, -1.0, 2.0, 5.0], dtype=torch.float64))
        self.of_query = nn.Linear(16, 4).double()

    def forward(self, x: Tensor) -> Any:
        batch, size, _ = x.shape
        query = self.query(x).view(batch, size, 4, 4).transpose(1, 2)
        key, value = self.pair(x).view(batch, size, 2, 2, 4).permute(2, 0, 3, 1, 4)
        key, value = (
            each[:, :, None].expand(batch, 2, 2, size, 4).reshape(batch, 4, size, 4) for each in (key, value)
        )
        place = torch.arange(size)
        seen = place[None, :] <= place[:, None]
        if self.window:
            seen = seen & (place[None, :] > place[:, None] - 9)
        mask = torch.where(seen, 0.0, -1e30).double()[None, None]
        scores = torch.matmul(query, key.transpose(2, 3)) * 0.5
        scores = scores + mask if self.fill is None else scores.masked_fill(~seen, self.fill)
        out = WAYS[self.how](self, scores, value, x)
        if isinstance(out, tuple):
            return out[0].transpose(1, 2).reshape(batch, size, 16), out[1]
        return out.transpose(1, 2).reshape(batch, size, 16)

    def column(self, scores: Tensor) -> Tensor:
        return self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)


def _less_maximum(both: Tensor) -> Tensor:
    return both - both.max(dim=-1, keepdim=True).values


def _gpt_oss(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    both = _less_maximum(torch.cat([scores, self.column(scores)], dim=-1))
    weights = torch.softmax(both, -1, dtype=both.dtype)[..., :-1]
    return torch.matmul(nn.functional.dropout(weights, 0.0, self.training).to(value.dtype), value)


def _short(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    column = self.sinks.view(1, 4, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[:, :, :, :-1].to(value.dtype) @ value


def _first(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    both = torch.cat(
        (self.sinks[None, :, None, None].repeat(scores.shape[0], 1, scores.shape[2], 1), scores), 3
    )
    return (both - both.amax(-1, keepdim=True).detach()).softmax(3)[..., 1:] @ value


def _narrow(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    column = (2 * self.sinks).tanh()[:, None, None].expand(scores.shape[0], 4, scores.shape[2], 1)
    return torch.cat([scores, column], -1).softmax(-1).narrow(-1, 0, scores.shape[3]) @ value


def _to_size(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    return (
        torch.cat([scores, self.column(scores).double()], -1).double().softmax(-1)[..., : scores.shape[3]]
        @ value
    )


def _granite(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    scale = (torch.logsumexp(scores, dim=-1) - self.sinks.view(1, -1, 1)).to(torch.float64).sigmoid()
    out = torch.matmul(nn.functional.softmax(scores, dim=-1).to(value.dtype), value)
    return out * scale.unsqueeze(-1).to(out.dtype)


def _granite_keepdim(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    scale = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - self.sinks.view(1, 4, 1, 1))
    return scale * (scores.softmax(-1) @ value)


def _no_sinks(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    return _less_maximum(scores).softmax(-1) @ value


def _of_query(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    column = self.of_query(x).transpose(1, 2)[..., None]
    return _less_maximum(torch.cat([scores, column], -1)).softmax(-1)[..., :-1] @ value


def _of_sequence(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    column = self.of_query(x).mean(1)[:, :, None, None].expand(-1, -1, scores.shape[2], -1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


def _one_for_all(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    column = self.sinks.sum().view(1, 1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


def _kept(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    weights = torch.cat([scores, self.column(scores)], -1).softmax(-1)
    return weights @ nn.functional.pad(value, (0, 0, 0, 1), value=1.0)


def _other_slice(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    return torch.cat([scores, self.column(scores)], -1).softmax(-1)[..., 1:] @ value


def _every_second(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    return torch.cat([scores, self.column(scores)], -1).softmax(-1)[..., :-1:2] @ value[:, :, ::2]


def _sliced_queries(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    both = torch.cat([scores, self.column(scores)], -1).softmax(-1)
    return (both[..., 1:, :-1] @ value).repeat_interleave(2, 2)[:, :, : scores.shape[2]]


def _two_columns(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    column = self.column(scores)
    return torch.cat([scores, column, column], -1).softmax(-1)[..., :-2] @ value


def _weights_read(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Any:
    weights = torch.cat([scores, self.column(scores)], -1).softmax(-1)
    return weights[..., :-1] @ value, weights


def _both_read(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Any:
    both = torch.cat([scores, self.column(scores)], -1)
    return _less_maximum(both).softmax(-1)[..., :-1] @ value, both


def _maximum_read(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Any:
    both = torch.cat([scores, self.column(scores)], -1)
    most = both.max(-1, keepdim=True).values
    return (both - most).softmax(-1)[..., :-1] @ value, most


def _other_maximum(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    """Of each key: a softmax sees that."""
    both = torch.cat([scores, self.column(scores)], -1)
    return (both - both.max(2, keepdim=True).values).softmax(-1)[..., :-1] @ value


def _of_another(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    both = torch.cat([scores, self.column(scores)], -1)
    return (both - (2 * both).max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ value


def _fewer(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    return torch.cat([scores, self.column(scores)], -1).softmax(-1)[..., :-3] @ value[:, :, :-2]


def _other_scores(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    scale = (torch.logsumexp(2 * scores, dim=-1) - self.sinks.view(1, -1, 1)).sigmoid()
    return (scores.softmax(-1) @ value) * scale.unsqueeze(-1)


def _sums_read(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Any:
    sums = torch.logsumexp(scores, dim=-1)
    return (scores.softmax(-1) @ value) * (sums - self.sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1), sums


def _other_way(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    scale = (self.sinks.view(1, -1, 1) - torch.logsumexp(scores, dim=-1)).sigmoid()
    return (scores.softmax(-1) @ value) * scale.unsqueeze(-1)


def _granite_of_query(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    scale = (torch.logsumexp(scores, dim=-1) - self.of_query(x).transpose(1, 2)).sigmoid()
    return (scores.softmax(-1) @ value) * scale.unsqueeze(-1)


def _dropped(self: Written, scores: Tensor, value: Tensor, x: Tensor) -> Tensor:
    weights = torch.cat([scores, self.column(scores)], -1).softmax(-1)[..., :-1]
    return nn.functional.dropout(weights, 1.0, True) @ value


WAYS: dict[str, Callable[[Written, Tensor, Tensor, Tensor], Any]] = {
    "gpt-oss": _gpt_oss, "short": _short, "first": _first, "narrow": _narrow, "to size": _to_size, "granite": _granite,
    "granite, keepdim": _granite_keepdim, "no sinks": _no_sinks,
    "of the query": _of_query, "of the sequence": _of_sequence, "one for all": _one_for_all, "kept": _kept,
    "other slice": _other_slice, "every second": _every_second, "sliced queries": _sliced_queries, "two columns": _two_columns,
    "weights read": _weights_read, "both read": _both_read, "maximum read": _maximum_read, "other maximum": _other_maximum,
    "of another": _of_another, "fewer": _fewer, "other scores": _other_scores, "sums read": _sums_read, "other way": _other_way,
    "granite, of the query": _granite_of_query, "dropped": _dropped,
}  # fmt: skip
_KNOWN = ("gpt-oss", "short", "first", "narrow", "to size", "granite", "granite, keepdim", "no sinks")
_GIVEN = ("of the query", "of the sequence", "one for all")


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("how", _KNOWN)
def test_spellings(how: str, window: bool) -> None:
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    model = Written(how, window)
    report = check(model, (x,), 1e-10, OPTIONS)
    (found,) = report.rewrites
    assert found.form == ("window 9" if window else "causal") and not report.refusals


@pytest.mark.parametrize(
    ("window", "fill", "form"),
    [
        (False, -math.inf, "causal"),
        (False, -1e30, "causal"),
        (True, -math.inf, "window 9"),
        (True, -1e30, "given"),
    ],
)
def test_scores_that_are_filled(window: bool, fill: float, form: str) -> None:
    """Attention that has no sinks is no stand-in for it."""
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(Written("gpt-oss", window, fill), (x,), 1e-10, OPTIONS)
    assert [r.form for r in report.rewrites] == [form] and not report.refusals


@pytest.mark.parametrize("how", _GIVEN)
def test_sinks_that_are_no_number_a_head(how: str) -> None:
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(Written(how), (x,), 1e-10, OPTIONS)
    (found,) = report.rewrites
    assert found.form == "given" and "may differ between queries" in found.why and not report.refusals


@pytest.mark.parametrize("how", [name for name in WAYS if name not in (*_KNOWN, *_GIVEN)])
def test_what_is_no_sink_is_left_alone(how: str) -> None:
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    report = check(Written(how), (x,), 1e-10, OPTIONS)
    assert not report.rewrites and len(report.refusals) == 1
    assert ("may differ between queries" in report.refusals[0].reason) == (how == "granite, of the query")


def test_frozen_sinks() -> None:
    model = Written()
    model.sinks.requires_grad_(False)
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    assert len(check(model, (x,), 1e-10, OPTIONS).rewrites) == 1


def test_sinks_alone_are_trained() -> None:
    model = Written("gpt-oss", window=True).requires_grad_(False)
    model.sinks.requires_grad_()
    x = torch.randn(2, SEQ, 16, dtype=torch.float64)
    assert len(check(model, (x,), 1e-10, OPTIONS).rewrites) == 1


# GPT-OSS


class _Norm(nn.Module):
    """The library's, which casts to float32, in the type of its rows."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _gpt_oss_model(how: str = "", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, num_local_experts=2, num_experts_per_tok=1, sliding_window=9,
        max_position_embeddings=128, use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model: Any = transformers.GptOssForCausalLM(config)
    model.to(dtype)
    model.set_experts_implementation("batched_mm")  # the others take no float64
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(std=2.0)
        layer.input_layernorm, layer.post_attention_layernorm = map(
            _Norm, (layer.input_layernorm, layer.post_attention_layernorm)
        )
    model.model.norm = _Norm(model.model.norm)
    if "no experts" in how:
        for layer in model.model.layers:
            layer.mlp = nn.Identity()
            layer.forward = _without_router.__get__(layer)
    if "checkpoint" in how:
        model.gradient_checkpointing_enable()
    return model


def _without_router(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    return hidden_states + attended  # type: ignore[no-any-return]


def _inputs(batch: int, how: str) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.randint(64, (batch, SEQ), generator=torch.Generator().manual_seed(1))}
    mask = torch.ones(batch, SEQ, dtype=torch.long)
    if "left" in how:
        mask[0, :9] = 0
    if "right" in how:
        mask[0, -9:] = 0
    return {**inputs, "attention_mask": mask} if "left" in how or "right" in how else inputs


def _step(run: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    logits = run(**inputs).logits  # the library's loss is in float32
    logits.double().pow(2).mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize(
    ("batch", "how"),
    [
        (1, ""),
        (3, "checkpoint"),
        (3, "no experts, left checkpoint"),
        (2, "no experts, right"),
        (2, "no experts, dynamic"),
        pytest.param(2, "no experts, inductor checkpoint", marks=pytest.mark.slow),
    ],
)
def test_gpt_oss(batch: int, how: str) -> None:
    """Every gradient is eager's; the layers have a window of 9, and none."""
    model, inputs = _gpt_oss_model(how), _inputs(batch, how)
    truth = _step(model, model, inputs)
    options = {**OPTIONS, "inner": "inductor"} if "inductor" in how else OPTIONS
    more: dict[str, Any] = {"dynamic": True} if "dynamic" in how else {}
    with mst_fx.watch() as report:
        found = _step(compile_mst(model, options, **more), model, inputs)
    assert sum("sinks" in name for name in truth) == 2
    # Inductor's rotary embedding is in float32, as the library's is, and rounds otherwise.
    assert worst_error(found, truth) <= (3e-7 if "inductor" in how else 1e-10)
    forms = [rewrite.form for rewrite in report.rewrites]
    if not how or (how.endswith("checkpoint") and "left" not in how):
        assert forms == ["window 9", "causal"]
    assert len(forms) == 2 and not [r for r in report.refusals if r.kind == "attention"]


def test_gpt_oss_in_16_bits() -> None:
    """The worst gradient of several models. (Those of the sinks: of the operator, above.)"""
    ratios: list[float] = []
    compiled = compile_mst(model := _gpt_oss_model("no experts", torch.bfloat16), OPTIONS)
    exact = _gpt_oss_model("no experts")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator).bfloat16())
        exact.load_state_dict(model.state_dict())
        inputs = {"input_ids": torch.randint(64, (2, SEQ), generator=generator)}
        truth = _step(exact, exact, inputs)
        found, eager = (worst_error(_step(run, model, inputs), truth) for run in (compiled, model))
        ratios.append(math.log(found / eager))
    assert math.exp(sum(ratios) / len(ratios)) <= 1.1, ratios


def test_prompt_and_what_follows() -> None:
    """Without gradients, with a cache: all queries, and then some that have keys before them."""
    model = _gpt_oss_model("no experts").eval()
    model.config.use_cache = True
    inputs = _inputs(2, "")["input_ids"]

    def run(call: Callable[..., Any]) -> list[Tensor]:
        with torch.no_grad():
            first = call(input_ids=inputs[:, :14])
            second = call(input_ids=inputs[:, 14:], past_key_values=first.past_key_values)
        return [first.logits, second.logits]

    truth = run(model)
    with mst_fx.watch() as report:
        found = run(compile_mst(model, OPTIONS))
    assert len([r for r in report.rewrites if r.kind == "attention"]) >= 2
    for mine, true in zip(found, truth, strict=True):
        assert relative_error(mine, true) <= 1e-10


def test_nothing_of_square_size_is_left_in_the_graph() -> None:
    model = _gpt_oss_model("checkpoint")
    seen: list[list[str]] = []

    def squares(gm: fx.GraphModule) -> list[str]:
        nodes = [
            node for graph in [gm.graph, *(child.graph for _, child in subgraphs(gm))] for node in graph.nodes
        ]
        return [
            n.name for n in nodes if any(sum(x in (SEQ, SEQ + 1) for x in t.shape) > 1 for t in tensors_of(n))
        ]

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        new, _ = mst_fx.rewrite(gm, example_inputs, OPTIONS)
        seen.append(squares(gm))
        assert not squares(new)
        return gm.forward  # type: ignore[no-any-return]

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**_inputs(1, ""))
    assert len(seen) == 1 and len(seen[0]) > 8


def test_library_still_writes_it_so() -> None:
    """What these tests take for gpt-oss is what the library has."""
    assert "combined_logits" in modeling_gpt_oss.eager_attention_forward.__code__.co_varnames


# Memory


def _measure() -> list[int]:
    """Bytes that a checkpointed step of two layers at S = 6,144 takes at its peak above what was there before."""

    seq = 6144
    model = _gpt_oss_model("no experts, checkpoint", torch.float32).model
    model.config.max_position_embeddings = seq
    ids = torch.randint(64, (1, seq))
    options: Any = {"inner": "aot_eager", "passes": ("attention",)}
    run = torch.compile(model, backend="mst", options=options)
    return [warm_peak(lambda: run(input_ids=ids).last_hidden_state.sum().backward())]


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")
def test_no_scores_in_memory() -> None:
    """A Boolean mask would take S² bytes, the scores of four heads 16 times that."""
    (found,) = call_metered(_measure, timeout=600)
    assert found < 6144**2


# Flint: scores are kept in float32


def _flint_model(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.FlintConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, use_cache=False,
    )  # fmt: skip
    model: Any = transformers.FlintForCausalLM(config)
    for layer in model.model.layers:  # so that scores reach tens
        layer.self_attn.q_norm.weight.data.mul_(2.5)
        layer.self_attn.k_norm.weight.data.mul_(2.5)
    return model.to(dtype)


@pytest.mark.parametrize("how", ["", "left"])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_in_float32_are_not_rounded(autocast: bool, how: str) -> None:
    model = _flint_model(torch.float32 if autocast else torch.bfloat16)
    exact = _flint_model()
    exact.load_state_dict(model.state_dict())
    inputs = _inputs(2, how)

    def step(run: Callable[..., Any], of: nn.Module, is_cast: bool = autocast) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            return _step(run, of, inputs)

    truth, eager = step(exact, exact, is_cast=False), step(model, model)
    with mst_fx.watch() as report:
        found = step(compile_mst(model, OPTIONS), model)
    assert len(report.rewrites) == 2
    for part in ("q_proj", "k_proj"):
        names = [name for name in truth if part in name]
        mine, plain = (
            [relative_error(grads[name], truth[name]) for name in names] for grads in (found, eager)
        )
        assert len(names) == 2 and sum(mine) <= 1.1 * sum(plain)
