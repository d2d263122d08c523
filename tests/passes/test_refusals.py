"""What looks like a bulge and is left alone has a refusal with its reason; what can be none is not listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx.errors import Cause
from mst_fx.report import Report
from tests.direct import rewritten
from tests.helpers import SMALL_CHUNKS, check_parity, compile_mst, kinds, report_of

H, V, B, S = 16, 96, 2, 40


class Parts(nn.Module):
    """Layers for ``function`` to use, which gets the module, hidden rows and labels."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.head, self.code = nn.Linear(H, V, bias=False), nn.Parameter(torch.randn(V, H))
        self.up, self.down, self.score = nn.Linear(H, 64), nn.Linear(64, H), nn.Linear(H, 1)
        self.conv_up, self.conv_down = nn.Conv1d(H, 64, 1), nn.Conv1d(64, H, 1)
        self.one, self.other = nn.Linear(H, H), nn.Linear(H, H)
        self.q, self.k, self.v, self.o = (nn.Linear(*sizes) for sizes in ((H, 64), (H, 64), (H, 64), (64, H)))
        self.mixed, self.conv = nn.Linear(H, 3 * H), nn.Conv1d(H, H, 3, padding=1, groups=H)
        self.blocks, self.wide_blocks = (
            nn.Parameter(torch.randn(4, 4, 4)),
            nn.Parameter(torch.randn(4, 12, 4)),
        )
        self.ups, self.downs = nn.Parameter(torch.randn(4, H, 64)), nn.Parameter(torch.randn(4, 64, H))
        self.rank_in, self.rank_out = nn.Linear(H, 4), nn.Linear(4, H)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.function(self, x, labels)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _report(function: Callable[[Any, Tensor, Tensor], Any], **options: Any) -> Report:
    """What is done to a function; its numbers are eager's in any case."""
    model, x = Parts(function), torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    run, report = rewritten(model, options)
    labels = torch.randint(0, V, (B, S))
    found, truth = run(x, labels), model(x, labels)
    pairs = zip(found, truth, strict=True) if isinstance(truth, tuple) else [(found, truth)]
    for one, other in pairs:
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=1e-9, atol=1e-9)
    return report


# Heads


def _minimum(m: Any, x: Tensor, y: Tensor) -> Any:
    """Chameleon's: no image tokens."""
    logits = m.head(x)
    logits[:, :, torch.arange(5)] = torch.finfo(logits.dtype).min
    return _loss(logits, y.clamp(min=5)), logits


def _rows_set(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    logits[y == 3] = 0.0
    return _loss(logits, y)


def _scattered(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    logits.scatter_add_(-1, y[..., None], torch.ones(B, S, 1, dtype=logits.dtype))
    return _loss(logits, y)


def _two_halves(m: Any, x: Tensor, y: Tensor) -> Tensor:
    first, second = m.head(x).log_softmax(-1)
    return F.kl_div(first, second, log_target=True, reduction="batchmean") + first.mean()


def _other_order(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    swapped = torch.cat([logits[1:], logits[:1]])
    return _loss(logits, y) + (logits.softmax(-1) - swapped.softmax(-1)).square().sum()


def _contrastive(m: Any, x: Tensor, y: Tensor) -> Tensor:
    one, other = (F.normalize(f(x).flatten(0, 1), dim=-1) for f in (m.one, m.other))
    logits, same = one @ other.t(), torch.arange(B * S)
    return F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)


def _largest_of_sequence(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.log1p(F.relu(m.head(x))).amax(1).sum(-1).mean()  # SPLADE


def _flat_margin(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x).view(-1, V)
    logits.view(-1)[torch.arange(B * S) * V + y.flatten()] -= 0.35
    return _loss(logits, y)


def _by_sequence(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    for index in range(B):
        logits[index, torch.arange(S), y[index]] -= 0.35
    return _loss(logits, y)


def _rows_in_a_buffer(m: Any, x: Tensor, y: Tensor) -> Tensor:
    wide = x.new_zeros(B, S + 1, V)
    wide[:, 1:] = m.head(x)
    return _loss(wide[:, 1:], y)


def _columns_in_a_buffer(m: Any, x: Tensor, y: Tensor) -> Tensor:
    wide = x.new_zeros(B, S, V + 8)
    wide[..., torch.arange(V)] = m.head(x)
    return _loss(wide, y)


def _every_other_in_a_buffer(m: Any, x: Tensor, y: Tensor) -> Tensor:
    wide = x.new_zeros(B, S, 2 * V)
    wide[..., ::2] = m.head(x)
    return _loss(wide, y)


def _last_of_each(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.head(x)[torch.arange(B), y.argmax(-1)].logsumexp(-1)


REFUSED_HEADS: dict[str, tuple[Any, Cause]] = {
    "minimum": (_minimum, Cause.WRITTEN),
    "rows_set": (_rows_set, Cause.WRITTEN),
    "scattered": (_scattered, Cause.UNPROVED),
    "two_halves": (_two_halves, Cause.UNPROVED),
    "other_order": (_other_order, Cause.UNPROVED),
    "contrastive": (_contrastive, Cause.UNPROVED),
    "largest_of_sequence": (_largest_of_sequence, Cause.UNPROVED),
    "flat_margin": (_flat_margin, Cause.UNPROVED),
    "by_sequence": (_by_sequence, Cause.WRITTEN),
    "rows_in_a_buffer": (_rows_in_a_buffer, Cause.UNPROVED),
    "columns_in_a_buffer": (_columns_in_a_buffer, Cause.UNPROVED),
    "every_other_in_a_buffer": (_every_other_in_a_buffer, Cause.NO_SAVING),
    "last_of_each": (_last_of_each, Cause.UNPROVED),
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_a_head_that_is_left_alone_has_a_reason(name: str) -> None:
    function, cause = REFUSED_HEADS[name]
    report = _report(function)
    assert "vocab" in kinds(report) or [(r.kind, r.cause) for r in report.refusals] == [("vocab", cause)]


# MLPs


def _convolutions(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + m.conv_down(F.gelu(m.conv_up(x.transpose(1, 2)))).transpose(1, 2)


def _straight_through(m: Any, x: Tensor, y: Tensor) -> Tensor:
    soft = m.head(x).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), V).to(soft.dtype)
    return (hard + soft - soft.detach()) @ m.code


def _straight_through_scatter(m: Any, x: Tensor, y: Tensor) -> Tensor:
    soft = m.head(x).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard + soft - soft.detach()) @ m.code


def _first_token_inside(m: Any, x: Tensor, y: Tensor) -> Tensor:
    inner = F.gelu(m.up(x))
    return x + m.down(inner + inner[:, :1])


def _depthwise_inside(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + m.down(F.avg_pool1d(m.up(x).transpose(1, 2), 3, 1, 1).transpose(1, 2))


@pytest.mark.parametrize(
    "function",
    [_convolutions, _straight_through, _straight_through_scatter, _first_token_inside, _depthwise_inside],
)
def test_an_mlp_that_is_left_alone_has_a_reason(function: Any) -> None:
    report = _report(function)
    assert "mlp" in kinds(report) or (
        [r.kind for r in report.refusals] == ["mlp"] and report.refusals[0].reason
    )


# No places


def _gated_convolution(m: Any, x: Tensor, y: Tensor) -> Tensor:
    before, after, inner = m.mixed(x).transpose(1, 2).chunk(3, 1)
    return x + m.one((after * m.conv(before * inner)).transpose(1, 2))


def _attention(m: Any, x: Tensor, y: Tensor) -> Tensor:
    q, k, v = (f(x).view(B, S, 4, 16).transpose(1, 2) for f in (m.q, m.k, m.v))
    rotated = torch.cat([-q[..., 8:], q[..., :8]], -1) + q.double()
    scores = rotated @ k.transpose(2, 3)
    return x + m.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _outer_states(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Mamba's, in small: a convolution, then states as outer products of its parts, and a sum along the sequence."""
    inner, by, out = m.conv_up(x.transpose(1, 2)).roll(1, -1).transpose(1, 2).split([32, 16, 16], -1)
    states = (inner[..., None] * by[:, :, None]).cumsum(1)
    return x + m.o(F.pad((states * out[:, :, None]).sum(-1), (0, 32)))


def _low_rank(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + m.rank_out(m.rank_in(x)) + x.mean(1, keepdim=True)


def _diagonal_blocks(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A recurrent gate's: each part of a row meets its own block."""
    parts = x.reshape(-1, 4, 4).permute(1, 0, 2)
    return x + torch.bmm(parts, m.blocks).permute(1, 0, 2).reshape(x.shape).cumsum(1)


def _blocks_after_convolution(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Zamba's: the convolution pads, and weights stand before rows."""
    x = m.one(x)
    inner = F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), m.conv.weight, groups=H)
    heads = F.pad(inner, (0, 3))[..., :S].reshape(B, 4, 4, S).transpose(0, 1)
    by, out = (m.wide_blocks[:, None] @ heads).transpose(-1, -2).split([4, 8], -1)
    return x + (by.cumsum(2) * out[..., :4]).permute(1, 2, 0, 3).reshape(x.shape)


def _blocks_after_convolution_shared(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Half of the heads, each for two blocks."""
    heads = m.conv(m.one(x).transpose(1, 2)).view(B, 4, 4, S)[:, :2].repeat_interleave(2, 1)
    wide = m.wide_blocks @ heads
    return x + wide.view(B, 4, 3, 4, S).cumsum(-1).sum(2).flatten(1, 2).transpose(1, 2)


def _blocks_in_another_order(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Tokens are picked, by all blocks alike."""
    x = m.one(x)
    parts = x[:, torch.arange(S - 1, -1, -1)].view(B, S, 4, 4).permute(2, 0, 1, 3).flatten(1, 2)
    wide = torch.bmm(parts, m.wide_blocks.transpose(1, 2))
    return x + wide.view(4, B, S, 3, 4).cumsum(2).sum(3).permute(1, 2, 0, 3).reshape(x.shape)


def _blocks_of_repeated_heads(m: Any, x: Tensor, y: Tensor) -> Tensor:
    heads = m.one(x).view(B, S, 4, 4).transpose(1, 2)[:, :2].repeat_interleave(2, 1)
    wide = torch.einsum("bgsk,gjk->bgsj", heads, m.wide_blocks)
    return x + wide.view(B, 4, S, 3, 4).cumsum(2).sum(3).transpose(1, 2).reshape(x.shape)


def _heads_of_one_stack(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Each head projects whole rows; none is picked."""
    rows = x[:, None].expand(B, 4, S, H).reshape(B * 4, S, H)
    q, k, v, _ = torch.bmm(rows, m.ups.repeat(B, 1, 1)).view(B, 4, S, 64).chunk(4, -1)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + m.o(mixed.transpose(1, 2).flatten(2))


def _masked(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], heads: int) -> Callable[..., Tensor]:
    """Values are narrower than queries, as DeepSeek's are; the mask is a constant."""

    def function(m: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (f(x).view(B, S, heads, -1).transpose(1, 2) for f in (m.q, m.k, m.other))
        q = q + q.flip(-1) * 0.5
        mask = torch.where(torch.ones(S, S, dtype=torch.bool).tril(), 0.0, -1e9).double()
        return x + m.one(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    return function


def _added(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
    return torch.baddbmm(m.expand(B, S, S), q.flatten(0, 1), k.flatten(0, 1).mT)


MASKED = {
    "sdpa": _masked(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), 4),
    "by_name": _masked(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m == 0), 2),
    "all_by_name": _masked(
        lambda q, k, v, m: F.scaled_dot_product_attention(attn_mask=m, value=v, key=k, query=q), 2
    ),
    "baddbmm": _masked(lambda q, k, v, m: (_added(q, k, m).softmax(-1) @ v.flatten(0, 1))[:, None], 1),
    "method": _masked(
        lambda q, k, v, m: (m.expand(B, S, S).baddbmm(q[:, 0], k[:, 0].mT).softmax(-1) @ v[:, 0])[:, None], 1
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_no_weight(name: str) -> None:
    """What takes queries beside a constant mask is attention, not the second product of an MLP."""
    report = _report(MASKED[name], passes=("mlp", "vocab"), strict=True)
    assert not report.rewrites and not report.refusals


@pytest.mark.parametrize(
    "function",
    [
        _gated_convolution,
        _attention,
        _outer_states,
        _low_rank,
        _diagonal_blocks,
        _blocks_after_convolution,
        _blocks_after_convolution_shared,
        _blocks_in_another_order,
        _blocks_of_repeated_heads,
        _heads_of_one_stack,
    ],
)
def test_what_can_be_no_bulge_is_not_listed(function: Any) -> None:
    report = _report(function, passes=("mlp", "vocab"), strict=True)
    assert not report.rewrites and not report.refusals


# Experts


def _sorted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = y.flatten().argsort()
    return order, x.flatten(0, 1)[order]


def _expert_slices(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """JetMoE's: a loop over slices of the stacks, whose results are joined."""
    order, rows = _sorted(x, y)
    parts = rows.split([10, 24, 30, 16])
    inner = F.gelu(torch.cat([F.linear(part, m.ups[i].t()) for i, part in enumerate(parts)]))
    outs = [F.linear(part, m.downs[i].t()) for i, part in enumerate(inner.split([10, 24, 30, 16]))]
    return x + torch.zeros_like(rows).index_add(0, order, torch.cat(outs)).view_as(x)


def _expert_mlps(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Each expert is an MLP on rows of its own."""
    order, rows = _sorted(x, y)
    outs, start = [], 0
    for up, down, count in zip(m.ups.unbind(), m.downs.unbind(), [10, 24, 30, 16], strict=True):
        outs.append(F.gelu(rows[start : start + count] @ up) @ down)
        start += count
    return x + torch.zeros_like(rows).index_copy(0, order, torch.cat(outs)).view_as(x)


def _expert_weights(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A switch: each row picks the weights of one expert."""
    of, x = (y % 4).flatten(), x + m.one(x)
    inner = F.gelu(torch.bmm(x.view(-1, 1, H), m.ups[of]))
    return x + torch.bmm(inner, m.downs[of]).view_as(x)


def _all_experts(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Llama 4's: each expert gets all rows, times its score."""
    scores = m.rank_in(x).view(-1, 4).t().sigmoid()
    rows = x.view(-1, H).repeat(4, 1).view(4, -1, H) * scores[..., None]
    return x + torch.bmm(F.gelu(torch.bmm(rows, m.ups)), m.downs).sum(0).view_as(x)


def _up_slices(m: Any, x: Tensor, y: Tensor) -> Tensor:
    _, rows = _sorted(x, y)
    return torch.cat([part @ m.ups[i] for i, part in enumerate(rows.split([10, 24, 30, 16]))])


@pytest.mark.parametrize("function", [_expert_slices, _expert_weights, _all_experts, _up_slices])
def test_experts_are_refused_as_that(function: Any) -> None:
    """Once: what begins there. Joined results that nothing narrows are no vocabulary's."""
    (refused,) = _report(function).refusals
    assert (refused.kind, refused.cause) == ("mlp", Cause.EXPERTS)


def test_experts_that_are_rewritten_are_not_refused() -> None:
    report = _report(_expert_mlps, strict=True)
    assert kinds(report) == {"mlp": 4} and not report.refusals


def test_experts_that_only_project_are_no_bulge() -> None:
    def function(m: Any, x: Tensor, y: Tensor) -> Tensor:
        order, rows = _sorted(x, y)
        outs = [part @ m.ups[i, :, :H] for i, part in enumerate(rows.split([10, 24, 30, 16]))]
        return x + torch.zeros_like(rows).index_add(0, order, torch.cat(outs)).view_as(x)

    assert not _report(function, strict=True).refusals


# What a place is


def _padded(m: Any, x: Tensor, y: Tensor) -> Any:
    logits = m.head(x)[..., :90]
    return _loss(15 * torch.tanh(logits / 15), y.clamp(max=89)), logits


def _padded_narrow(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return _loss(m.head(x).narrow(-1, 0, 40), y.clamp(max=39))


def _padded_split(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return _loss(m.head(x).split([90, 6], -1)[0], y.clamp(max=89))


def _loss_and_accuracy(m: Any, x: Tensor, y: Tensor) -> Any:
    logits = m.head(x)[:, :-1]
    return _loss(logits, y[:, 1:]), (logits.argmax(-1) == y[:, 1:]).double().mean()


def _reward(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.score(x + m.down(F.gelu(m.up(x)))).squeeze(-1)


def _sparse(m: Any, x: Tensor, y: Tensor) -> Any:
    inner = F.relu(m.up(x))
    return x + m.down(inner), inner.sum(-1)


def _router(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.rank_in(m.down(F.gelu(m.up(x)))).topk(2, -1).values


def _maxout(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + m.head(x).view(B, S, H, V // H).amax(-1)


def _loss_and_expectation(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A product takes the logits too, beside the loss."""
    logits = m.head(x)
    return _loss(logits, y) + (logits.softmax(-1) @ m.code[:, :1]).mean()


@pytest.mark.parametrize(
    "function", [_padded, _padded_narrow, _padded_split, _loss_and_accuracy, _loss_and_expectation]
)
def test_a_head_is_a_vocabulary_rewrite(function: Any) -> None:
    assert kinds(_report(function, strict=True)) == {"vocab": 1}


@pytest.mark.parametrize("function", [_reward, _router, _maxout, _sparse])
def test_an_mlp_obeys_chunk_rows(function: Any) -> None:
    (rewrite,) = _report(function, strict=True, chunk_rows=11, vocab_chunk_rows=9).rewrites
    assert (rewrite.kind, rewrite.chunk_rows) == ("mlp", 11)


class RewardModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts(_reward)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x, x)[:, -1].square().sum()


def test_numbers_of_a_reward_model() -> None:
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    report = check_parity(RewardModel(), {"x": x}, 1e-10, 1e-10)
    assert kinds(report) == {"mlp": 1}


def test_what_fits_in_one_chunk_is_no_refusal() -> None:
    assert not _report(_largest_of_sequence, vocab_chunk_rows=B * S).refusals
    assert _report(_largest_of_sequence, vocab_chunk_rows=B * S - 1).refusals


def test_a_break_is_the_reason() -> None:
    def broken(m: Any, x: Tensor, y: Tensor) -> Tensor:
        inner = m.up(x)
        torch._dynamo.graph_break()
        return x + m.down(F.gelu(inner))

    model, x = Parts(broken), torch.randn(B, S, H, dtype=torch.float64)
    with mst_fx.watch() as report:
        compile_mst(model, SMALL_CHUNKS)(x, torch.zeros(B, S))
    (refused,) = report.refusals
    assert (refused.kind, refused.cause) == ("mlp", Cause.BREAK) and __file__ in refused.reason


@pytest.mark.parametrize(
    "product", [torch.bmm, torch.matmul, lambda x, w: torch.einsum("enh,ehi->eni", x, w)]
)
def test_a_stack_of_weights_makes_no_scores(product: Any) -> None:
    """Experts that all rows go through, as Inkling's: as many rows as hidden units, and no attention."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(2, 32, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            inner = F.silu(product(x.expand(2, -1, -1), self.up.transpose(1, 2)))
            return product(inner, self.down).sum(0)

    report = report_of(Shared(), {**SMALL_CHUNKS, "attention_chunk_rows": 8}, torch.randn(1, 32, 8))
    assert not [refused for refused in report.refusals if refused.kind == "attention"]
