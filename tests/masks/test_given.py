"""Attention whose mask is a tensor that no formula describes: the scores of all heads are not made, and the numbers are eager's."""

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
from torch.utils.checkpoint import checkpoint

import mst_fx
from tests.helpers import check_parity, compile_mst, step, worst_error

OPTIONS: dict[str, Any] = {"inner": "aot_eager", "attention_chunk_rows": 16, "passes": ("attention",)}
BATCH, SEQ, HEADS, WIDTH = 2, 67, 4, 32
LOW = torch.finfo(torch.float64).min
_BAR = 1e-12
Form = Callable[["Attention", Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention as ``form`` writes it, of queries, keys and values ``[B, H, S, D]`` and a tensor that it is given."""

    def __init__(self, form: Form, heads: int = HEADS, size: int = SEQ, width: int = WIDTH) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(size, size))
        self.of_keys = nn.Parameter(torch.randn(size))
        self.of_heads = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        shown = torch.rand(1, 1, size + 3, size + 3) < 0.5
        shown[:, :, 5] = False  # a query that sees nothing
        self.shown = nn.Buffer(shown)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        batch, size, _ = x.shape
        q, k, v = (y.view(batch, size, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = self.form(self, q, k, v, given)
        loss: Tensor = (self.out(out.transpose(1, 2).reshape(batch, size, -1)) * x.detach().roll(1, 1)).sum()
        return loss


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[3])


def _weigh(scores: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(scores.softmax(-1), v)


def _causal(q: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    return torch.zeros((), dtype=q.dtype).where(place <= place[:, None], LOW)


def _hidden(q: Tensor, k: Tensor) -> Tensor:
    """All but the nine keys that scored highest, ``[B, 1, Q, K]``."""
    best = _scores(q, k).detach().mean(1).topk(9, -1).indices
    return torch.ones(*best.shape[:2], k.shape[2], dtype=torch.bool).scatter(-1, best, False)[:, None]


# What is rewritten


def added(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + (1.0 - given[:, None]) * -1e9, v)


def added_to_all_sequences(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + given[0], v)


def hides_all_of_a_query(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """By a number: those keys count alike."""
    return _weigh(_scores(q, k) + torch.zeros((), dtype=q.dtype).where(m.shown[:, :, :SEQ, :SEQ], LOW), v)


def learned(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.bias, v)


def learned_for_each_sequence(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + (m.bias * given)[:, None], v)


def learned_beside_what_is_learned_of_keys(
    m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor
) -> Tensor:
    return _weigh(_scores(q, k) + m.bias + m.of_keys, v)


def top_keys(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of DeepSeek 3.2, with a causal mask."""
    return _weigh(_scores(q, k) + _causal(q).masked_fill(_hidden(q, k), LOW), v)


def filled(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k).masked_fill(_hidden(q, k), -math.inf), v)


def filled_with_a_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh((_scores(q, k) + m.bias).masked_fill(_hidden(q, k), -math.inf), v)


def chosen_before_a_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of GPT-Neo, of whose buffer nothing is known: a query may see no key of those that the mask shows."""
    fill = torch.tensor(LOW, dtype=q.dtype)
    return _weigh(torch.where(m.shown[:, :, :SEQ, :SEQ], _scores(q, k), fill) + _causal(q), v)


def hidden_before_a_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k).masked_fill(_hidden(q, k), -1e9) + _causal(q), v)


def filled_before_and_after(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    scores = torch.where(m.shown[:, :, :SEQ, :SEQ], _scores(q, k), -1e30) + m.bias
    return _weigh(scores.masked_fill(_hidden(q, k), -1e9), v)


def capped(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(torch.tanh(_scores(q, k) / 2.0) * 2.0 + given[0], v)


def grouped(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    few = [x[:, ::2, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v)]
    return _weigh(_scores(q, few[0]) + m.bias, few[1])


def fewer_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    out = _weigh(_scores(q[:, :, 20:], k) + m.bias[20:], v)
    return torch.cat([v[:, :, :20], out], 2)


def fused_with_a_gradient(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)


def fused_with_narrow_values(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """No kernel of a CPU has them; a query that sees nothing has 0."""
    shown = m.shown[:, :, :SEQ, :SEQ] & ~_hidden(q, k)
    out = F.scaled_dot_product_attention(q, k, v[..., :4], attn_mask=shown)
    return torch.cat([out, v[..., 4:]], -1)


def fused_that_adds_infinity(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    mask = m.bias.masked_fill(~m.shown[:, :, :SEQ, :SEQ], -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def checkpointed(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """With one mask made outside of the layer, and one inside."""
    mask = (1.0 - given[:, None]) * -1e9

    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return _weigh(_scores(q, k).masked_fill(_hidden(q, k), -1e9) + mask, v)

    out: Tensor = checkpoint(layer, q, k, v, mask, use_reentrant=False)
    return out


def made_without_grad(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    with torch.no_grad():
        bias = m.bias * 2.0
    return _weigh(_scores(q, k) + bias, v)


def twice(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """One tensor for two layers: its gradients add up."""
    return _weigh(_scores(_weigh(_scores(q, k) + m.bias, v), k) + m.bias, v)


def differs_between_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + torch.stack([m.bias, m.bias.T, m.bias.sin(), m.bias.exp()]), v)


def of_sequences_and_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """A number a head, for all pairs, and one a query, beside what each pair has (Inkling's is like this)."""
    of_queries = m.qkv(given[..., :WIDTH])[..., :HEADS].transpose(1, 2)[..., None]
    return _weigh(_scores(q, k) * m.of_heads + of_queries * given[:, None].sin(), v)


def written_to_later(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """Sums keep nothing of what they add."""
    mask = (1.0 - given[:, None]) * -1e9
    out = _weigh(_scores(q, k) + mask, v)
    mask.add_(3.0)
    return out + mask.mean()


def written_to_before(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    mask = (1.0 - given[:, None]) * -1e9
    mask[:, :, 3] = 0.5
    return _weigh(_scores(q, k) + mask, v)


def boolean_that_is_added(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k) + m.shown[:, :, :SEQ, :SEQ], v)


def scaled_with_it(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh((_scores(q, k) + m.bias) / 3.0, v)


def bounded_below(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(torch.max(_scores(q, k) + m.bias, torch.tensor(-1.0, dtype=q.dtype)), v)


def of_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """One number a query and none a key."""
    return _weigh(_scores(q, k) + given[:, None, :, :1] * m.bias.mean(), v)


def multiplied(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of OpenAI's GPT, whose keys are brought into their order at once."""
    keys = k.transpose(1, 2).contiguous().permute(0, 2, 3, 1)
    shown = given[:, None]
    return _weigh(torch.matmul(q, keys) / 3.0 * shown + -1e4 * (1 - shown), v)


def step_by_step(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """All that is known."""
    scores = 0.25 + torch.tanh(m.bias.cos()[None] + _scores(q, k) / (given[:, None] + 1.5)) * 5.0
    scores = (scores - 0.75) * m.of_heads - m.bias
    weights = scores.clone(memory_format=torch.contiguous_format).contiguous().softmax(3)
    return torch.matmul(weights.masked_fill(_hidden(q, k), 0.0) * m.of_heads, v)


def sums_of_products(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of XLNet: scores by place beside those by content, a bias that is made of queries."""
    by_place = torch.einsum("bnid,bnjd->bnij", q + 1.0, k.roll(3, 2))
    scores = (torch.einsum("bnid,bnjd->bnij", q, k) + by_place.flip(3)) * 0.3
    return torch.einsum("bnij,bnjd->bnid", (scores - 1e30 * (1 - given[:, None])).softmax(3), v)


def hidden_in_place(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of XLM."""
    scores = _scores(q, k)
    scores.masked_fill_((given == 0)[:, None, :1].expand_as(scores), LOW)
    return torch.matmul(scores.float().softmax(-1).type_as(scores), v)


def weights_of_padding(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of CPM-Ant: a query that sees nothing has no weights."""
    hidden = (given == 0)[:, None] == torch.tensor(True)
    scores = torch.masked_fill(
        _scores(q, k) + m.bias, hidden, torch.scalar_tensor(-1e300, dtype=q.dtype, device=q.device)
    )
    weights = torch.masked_fill(scores.softmax(-1), hidden, torch.scalar_tensor(0.0, dtype=q.dtype))
    return torch.matmul(weights, v)


def with_sinks(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of HunYuan 4: a number a head, and keys that scored highest."""
    sinks = m.of_heads.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([_scores(q, k) + _causal(q).masked_fill(_hidden(q, k), LOW), sinks], -1)
    both = both - both.max(-1, keepdim=True).values
    return torch.matmul(both.softmax(-1, dtype=both.dtype)[..., :-1], v)


def with_sinks_first(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """Each query's own."""
    sinks = q.sum(-1, keepdim=True)
    return torch.matmul(torch.cat([sinks, _scores(q, k) + given[0]], -1).softmax(-1)[..., 1:], v)


def scores_before_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """As of GPT-NeoX Japanese, with a mask of its own."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k)]
    zeros = torch.zeros(flat[0].shape[0], SEQ, SEQ, dtype=q.dtype)
    scores = torch.baddbmm(zeros, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.3)
    return _weigh(scores.view(*q.shape[:2], SEQ, -1) + given[:, None] * m.bias, v)


def layers_that_share_a_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """Checkpointed; as of T5, the bias is made by none of them."""
    bias = torch.stack([m.bias * number for number in range(HEADS)])

    def layer(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return _weigh(_scores(q, k) + bias, v)

    for _ in range(2):
        q = checkpoint(layer, q, k, v, bias, use_reentrant=False)
    return q


FIRE: list[tuple[Form, int]] = [
    *((form, 1) for form in (
        added, added_to_all_sequences, hides_all_of_a_query, learned, learned_for_each_sequence,
        learned_beside_what_is_learned_of_keys, top_keys, filled, filled_with_a_bias, chosen_before_a_mask,
        hidden_before_a_mask, filled_before_and_after, capped, grouped, fewer_queries, fused_with_a_gradient,
        fused_with_narrow_values, fused_that_adds_infinity, checkpointed, made_without_grad, differs_between_heads,
        of_sequences_and_heads, written_to_later, written_to_before, boolean_that_is_added, scaled_with_it, bounded_below,
        of_queries, multiplied, step_by_step, sums_of_products, hidden_in_place, weights_of_padding, with_sinks,
        with_sinks_first, scores_before_heads,
    )),
    (twice, 2),
    (layers_that_share_a_bias, 2),
]  # fmt: skip


# What is left


def weights_that_are_read(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    weights = (_scores(q, k) + m.bias).softmax(-1)
    return torch.matmul(weights, v) + weights.square().mean()


def with_a_kernel(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """Torch's, which makes no scores of all heads."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=given[:, None])


def added_without_grad(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    scores = _scores(q, k)
    with torch.no_grad():
        weights = (scores + m.bias).softmax(-1)
    return torch.matmul(weights, v)


def weights_without_grad(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    scores = _scores(q, k)
    with torch.no_grad():
        weights = (scores + given[0]).softmax(-1)
    return torch.matmul(weights, v)


def causal_weights_without_grad(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    scores = _scores(q, k) + _causal(q)
    with torch.no_grad():
        weights = scores.softmax(-1)
    return torch.matmul(weights, v)


def bias_without_grad(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """Its sum has a gradient, and its softmax none."""
    scores = _scores(q.detach(), k.detach()) + m.bias
    with torch.no_grad():
        weights = scores.softmax(-1)
    return torch.matmul(weights, v)


def given_is_written_to(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """What the caller has changes after it was read."""
    given.clamp_(max=1.0)
    out = _weigh(_scores(q, k) + given[:, None], v)
    given.mul_(2.0)
    return out


def _scores_of_what_changes(q: Tensor, k: Tensor, given: Tensor) -> Tensor:
    """Queries are other ones when the weights are made."""
    given.clamp_(max=1.0)
    queries = given.transpose(1, 2)[:, None, :, : q.shape[3]].expand(-1, HEADS, -1, -1)
    scores = torch.matmul(queries, k.detach().transpose(2, 3))
    given.mul_(2.0)
    return scores


def queries_written_to(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores_of_what_changes(q, k, given) + m.bias.detach(), v)


def queries_written_to_beside_a_formula(
    m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor
) -> Tensor:
    return _weigh(_scores_of_what_changes(q, k, given) + _causal(q), v)


def dropped_at_random(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return torch.matmul(F.dropout((_scores(q, k) + m.bias).softmax(-1), 1.0), v)


def scores_that_are_read(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    scores = _scores(q, k) + m.bias
    return _weigh(scores + scores.mean(-1, keepdim=True), v)


def detached_on_the_way(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    return _weigh(_scores(q, k).detach() + m.bias, v)


def bias_that_is_wider(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """It makes the scores of several sequences of one."""
    return _weigh(_scores(q[:1], k[:1]) + given[:, None] * m.bias, v)


def of_all_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """A softmax along the queries."""
    return torch.matmul((_scores(q, k) + m.bias).softmax(2), v)


def hidden_by_what_changes(m: Attention, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    fill = torch.full((1,), -1e30, dtype=q.dtype)
    scores = torch.where(given[:, None] > 0, _scores(q, k), fill) + m.bias
    fill.copy_(given[0, 0, :1])
    return _weigh(torch.where(given[:, None] > 0, scores, fill), v)


LEFT: list[Form] = [
    weights_without_grad, causal_weights_without_grad, bias_without_grad, added_without_grad, weights_that_are_read,
    with_a_kernel, given_is_written_to, queries_written_to, queries_written_to_beside_a_formula, dropped_at_random, scores_that_are_read, detached_on_the_way,
    bias_that_is_wider, of_all_queries, hidden_by_what_changes,
]  # fmt: skip


def _batch(size: int = SEQ) -> dict[str, Tensor]:
    given = (torch.rand(BATCH, size, size) < 0.5).double()
    given[0, 3] = 0.0
    return {"x": torch.randn(BATCH, size, WIDTH, dtype=torch.float64), "given": given}


def _given(report: mst_fx.Diagnosis) -> int:
    return sum(r.kind == "attention" and r.form == "given" for r in report.rewrites)


@pytest.mark.parametrize(("form", "count"), FIRE, ids=lambda x: getattr(x, "__name__", ""))
def test_numbers(form: Form, count: int) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert _given(report) == len(report.rewrites) == count, report.refusals
    assert not report.refusals


@pytest.mark.parametrize("form", LEFT, ids=lambda x: x.__name__)
def test_what_is_left(form: Form) -> None:
    torch.manual_seed(0)
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)
    assert not report.rewrites
    assert any(refusal.kind == "attention" for refusal in report.refusals)


def test_one_chunk_gains_nothing() -> None:
    torch.manual_seed(0)
    one = OPTIONS | {"attention_chunk_rows": SEQ}
    assert not check_parity(Attention(added).double(), _batch(), _BAR, _BAR, one).rewrites


@pytest.mark.parametrize(
    "form", [grouped, learned_for_each_sequence, fused_with_narrow_values, of_sequences_and_heads, with_sinks]
)
def test_some_heads_at_a_time(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients of one tensor add up."""
    torch.manual_seed(0)
    monkeypatch.setattr("mst_fx.ops.masked._MOST_SCORES", 1)
    assert _given(check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", [chosen_before_a_mask, learned_beside_what_is_learned_of_keys, with_sinks])
def test_with_inductor_and_dynamic_sizes(form: Form) -> None:
    torch.manual_seed(0)
    options = {key: x for key, x in OPTIONS.items() if key != "inner"}
    assert _given(check_parity(Attention(form).double(), _batch(), _BAR, _BAR, options)) == 1
    report = check_parity(Attention(form).double(), _batch(), _BAR, _BAR, OPTIONS, dynamic=True)
    assert _given(report) == 1, report.refusals


@pytest.mark.parametrize("form", [learned, filled_with_a_bias, with_sinks_first, scores_before_heads])
def test_autocast(form: Form) -> None:
    """Scores have the type that they have in eager mode, and so has all that is done to them."""
    torch.manual_seed(0)
    model, batch = Attention(form).double(), _batch()
    _, truth = step(model, model, batch)
    model, batch = model.float(), {name: x.float() for name, x in batch.items()}
    errors = []
    for run in (model, compile_mst(model, OPTIONS)):
        with torch.autocast("cpu", torch.bfloat16), mst_fx.watch() as report:
            errors.append(worst_error(step(model, run, batch)[1], truth))
    assert _given(report) == 1 and errors[1] <= 1.1 * errors[0], errors


@pytest.mark.slow
def test_operator() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    of_keys = torch.randn(2, 1, 1, 7, dtype=torch.float64, requires_grad=True)
    pairs = [torch.rand(2, 1, 9, 7) < 0.8, bias, of_keys]
    hows, numbers = ["times", "show", "add", "add", "softmax"], [0.7, -1.0, 0.0, 0.0, 0.0]
    args = (query, key, value, pairs, hows, numbers, 4, False)
    torch.library.opcheck(torch.ops.mst_fx.masked_attention.default, args)

    def attend(*leaves: Tensor) -> Tensor:
        found: Tensor = torch.ops.mst_fx.masked_attention(*leaves[:3], [pairs[0], *leaves[3:]], *args[4:])
        return found

    assert torch.autograd.gradcheck(attend, (query, key, value, bias, of_keys))


def test_gpt_neo() -> None:
    """Its scores are of float32 in a model of float64, and stay so."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "window_size": 8,
        "max_position_embeddings": 128,
        "attn_implementation": "eager",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for name in ("attention_dropout", "embed_dropout", "resid_dropout"):
        fields[name] = 0.0
    ids = torch.randint(0, 64, (2, SEQ))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    for dtype, bar in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model: nn.Module = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**fields))
        model.to(dtype)
        report = check_parity(model, batch, bar, bar, OPTIONS)
        assert _given(report) == 2 and not report.refusals, report.refusals


@pytest.mark.slow
@pytest.mark.parametrize("form", [added, learned, fused_with_a_gradient], ids=lambda x: x.__name__)
def test_no_scores_of_all_heads_in_memory(form: Form) -> None:
    size, heads = 1024, 16
    model = Attention(form, heads=heads, size=size).double()
    x, given = torch.randn(1, size, WIDTH, dtype=torch.float64), torch.ones(1, size, size).double()
    largest = {}
    for name, run in (("eager", model), ("mst", compile_mst(model, OPTIONS | {"attention_chunk_rows": 64}))):
        run(x, given).backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run(x, given).backward()
        largest[name] = max(event.self_cpu_memory_usage for event in found.events())
    assert largest["mst"] <= 2 * size**2 * 8 < heads * size**2 * 8 <= largest["eager"]
