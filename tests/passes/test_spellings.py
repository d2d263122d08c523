"""Ways of writing the same thing: each is rewritten, agrees with eager, and makes no ``[rows, V]`` value."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx import chunking
from mst_fx.bodies.body import BodyConfig
from mst_fx.context import PassContext, Shared
from mst_fx.errors import Cause
from mst_fx.graph.writes import writes_in_place
from mst_fx.options import make_options
from mst_fx.passes import functional, sum_losses
from tests.direct import results, rewritten, worst
from tests.helpers import check_parity, kinds, report_of
from tests.operators import widest_operand

WIDTH, INNER, VOCAB, BATCH, LENGTH, PARTS = 16, 64, 48, 2, 32, 4
F64 = torch.float64
Step = Callable[["Toy", Tensor, Tensor], Any]


class Toy(nn.Module):
    """Hidden rows ``x`` [B, S, H] and labels ``y`` [B, S] to whatever ``step`` makes of them."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.head, self.teacher = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, VOCAB)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.weights, self.token_weights = (
            torch.rand(VOCAB, dtype=F64) + 1,
            torch.rand(BATCH, LENGTH, dtype=F64),
        )
        self.codes = torch.randint(0, VOCAB // PARTS, (BATCH, LENGTH, PARTS))
        self.codes[:, :2] = -100
        self.given = torch.rand(BATCH, LENGTH, VOCAB, dtype=F64)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.step(self, x, y)


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    y = torch.randint(0, 40, (BATCH, LENGTH))
    y[:, :3] = -100
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=F64, requires_grad=True), y


def _check(step: Step, wide: int) -> mst_fx.Report:
    """Parity with eager; and no operand of ``wide`` elements, but for given ones, if something is rewritten."""
    model, batch = Toy(step), _batch()
    truth = results(model, batch, model)
    run, report = rewritten(model)
    assert worst(results(run, batch, model), truth) <= 1e-9
    if wide and report.rewrites:
        assert widest_operand(lambda: results(run, batch, model)) < wide
    return report


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def _of_labels(edit: Callable[[Tensor], Tensor]) -> Step:
    return lambda m, x, y: _loss(m.head(x), edit(y))


def _of_logits(edit: Callable[[Toy, Tensor], Tensor]) -> Step:
    return lambda m, x, y: _loss(edit(m, m.head(x)), y)


def _inside(edit: Callable[[Tensor], Tensor]) -> Step:
    return lambda m, x, y: x + m.down(edit(m.up(x)))


# Labels edited in place


def _masked(y: Tensor) -> Tensor:
    t = y.clone()
    t[t == -100] = 0
    return t


def _shifted_into_full(y: Tensor) -> Tensor:
    t = y.new_full(y.shape, -100)
    t[:, :-1] = y[:, 1:]
    return t


def _shifted_into_zeros(y: Tensor) -> Tensor:
    t = torch.zeros_like(y)
    t[..., :-1] = y[..., 1:]
    t[:, -1] = -100
    return t


def _copied_and_filled(y: Tensor) -> Tensor:
    t = torch.empty_like(y)
    t[:, :-1].copy_(y[:, 1:])
    t[:, -1:].fill_(-100)
    return t


def _through_a_view(y: Tensor) -> Tensor:
    t = y.clone()
    flat = t.view(-1)
    flat[flat == 5] = -100
    return t


def _several_writes(y: Tensor) -> Tensor:
    t = y.clone()
    before = t * 1
    t[t == 3] = 4
    t[0] = -100
    t[:, torch.tensor([4, 5])] = 7
    t.clamp_(min=-100).masked_fill_(before == 9, -100)
    t += 1
    t.sub_(1)
    return t


LABELS = {
    "masked": _masked,
    "shifted_into_full": _shifted_into_full,
    "shifted_into_zeros": _shifted_into_zeros,
    "copied_and_filled": _copied_and_filled,
    "through_a_view": _through_a_view,
    "several_writes": _several_writes,
}

# Logits written in place


def _set(index: Any, value: Any) -> Callable[[Toy, Tensor], Tensor]:
    def edit(m: Toy, logits: Tensor) -> Tensor:
        logits[index] = m.weights[:8] if value is None else value
        return logits

    return edit


def _add_to_columns(m: Toy, logits: Tensor) -> Tensor:
    logits[..., 40:] += -1e4
    return logits


def _through_views(m: Toy, logits: Tensor) -> Tensor:
    logits.view(-1, VOCAB)[:, 40:] = -1e4
    logits.narrow(-1, 40, 4).mul_(2)
    logits.select(-1, 41).copy_(logits.sum(-1) * 0.1)
    return logits


def _chained(m: Toy, logits: Tensor) -> Tensor:
    logits.div_(0.7)
    logits *= 2
    F.relu(logits.clamp_(-3, 3), True)
    return logits


def _masked_rows(m: Toy, logits: Tensor) -> Tensor:
    logits[logits > 0.5] = 0.1
    logits[logits.sum(-1) > 0] = 1.0
    return logits


LOGITS = {
    "columns": _set((..., slice(40, None)), float("-inf")),
    "columns_of_three": _set((slice(None), slice(None), slice(40, 48)), -1e4),
    "columns_of_a_tensor": _set((..., slice(40, None)), None),
    "every_other": _set((..., slice(1, None, 2)), 0.5),
    "one": _set((..., 47), -1e4),
    "picked": _set((..., torch.tensor([41, 43])), -1e4),
    "listed": _set((..., [41, 43]), -1e4),
    "added_to": _add_to_columns,
    "through_views": _through_views,
    "chained": _chained,
    "masked_rows": _masked_rows,
}

# Temporaries of an MLP, and tensors that are read after somebody wrote to them


def _eight_bits(h: Tensor) -> Tensor:
    scale = 127 / h.abs().max(-1, keepdim=True).values.clamp_(min=1e-5)
    return h + ((h * scale).round_().clamp_(-128, 127).div_(scale) - h).detach()


def _scaled_where(h: Tensor) -> Tensor:
    keep = torch.ones_like(h)
    keep[h < 0] = 0.1
    return h * keep


def _own_columns(h: Tensor) -> Tensor:
    t = h * 2
    t.add_(h)
    t[..., :4] = h[..., 4:8]
    return t


def _shared_expert(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    out = x + m.down(m.up(x).relu_())
    out.add_((x * 2).tanh())
    return out * out.sin()


def _added_to_some(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    stack = torch.stack([x, x * 2, x * 3])
    stack[1:] += m.down(F.gelu(m.up(x)))
    return stack.sin()


TEMPORARIES = {
    "eight_bits": _inside(_eight_bits),
    "scaled_where": _inside(_scaled_where),
    "own_columns": _inside(_own_columns),
    "shared_expert": _shared_expert,
    "added_to_some": _added_to_some,
}

# Everything by keywords


def _linear(m: Toy, x: Tensor) -> Tensor:
    return F.linear(weight=m.head.weight, bias=m.head.bias, input=x)


def _keyword_log_probabilities(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    logp = F.log_softmax(input=torch.matmul(other=m.head.weight.T, input=x), dim=-1)
    return -torch.gather(input=logp, dim=-1, index=y.clamp(min=0).unsqueeze(dim=-1)).mean()


KEYWORDS = {
    "shifted": lambda m, x, y: F.cross_entropy(
        target=y[:, 1:].reshape(-1), input=_linear(m, x)[:, :-1].reshape(-1, VOCAB)
    ),
    "classes_first": lambda m, x, y: F.cross_entropy(target=y, input=_linear(m, x).transpose(dim0=1, dim1=2)),
    "log_probabilities": _keyword_log_probabilities,
    "addmm": lambda m, x, y: F.nll_loss(
        input=F.log_softmax(
            torch.addmm(input=m.head.bias, mat1=x.reshape(-1, WIDTH), mat2=m.head.weight.t()), dim=1
        ),
        target=y.view(-1),
    ),
    "narrow": lambda m, x, y: _loss(
        torch.narrow(input=_linear(m, x), dim=1, start=0, length=LENGTH - 1), y[:, 1:]
    ),
}

# Layouts of logits


def _shift_first(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    return _loss(m.head(x.transpose(0, 1))[:-1], y.t()[1:])


def _halves(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    chosen, rejected = m.head(x).chunk(2, 0)
    return _loss(chosen, y[:1]) - 0.5 * _loss(rejected, y[1:])


def _token_weighted(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(m.head(x).transpose(1, 2), y, reduction="none")
    return (losses * m.token_weights).sum() / m.token_weights.sum()


def _codes(m: Toy, x: Tensor) -> Tensor:
    return m.head(x).view(BATCH, LENGTH, PARTS, VOCAB // PARTS)


def _sequences_apart(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    norms = torch.stack([sequence.logsumexp(-1) for sequence in logits])
    return (norms - logits.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)).mean()


LAYOUTS: dict[str, Step] = {
    "token_weights": _token_weighted,
    "classes_first_none": lambda m, x, y: (
        F.nll_loss(m.head(x).log_softmax(-1).mT, y, reduction="none").square().sum()
    ),
    "classes_first_weights": lambda m, x, y: F.cross_entropy(
        m.head(x).movedim(-1, 1), y, weight=m.weights, label_smoothing=0.1
    ),
    "classes_first_scaled": lambda m, x, y: F.cross_entropy(
        m.head(x).permute(0, 2, 1) / 0.7, y, reduction="sum"
    ),
    "log_softmax_of_classes_first": lambda m, x, y: F.nll_loss(
        F.log_softmax(m.head(x).transpose(1, 2).contiguous(), 1), y
    ),
    "soft_classes_first": lambda m, x, y: F.cross_entropy(
        m.head(x).transpose(1, 2), m.head(x).detach().softmax(-1).transpose(1, 2)
    ),
    "codes": lambda m, x, y: F.cross_entropy(_codes(m, x).permute(0, 3, 1, 2), m.codes),
    "codes_swapped": lambda m, x, y: F.cross_entropy(
        _codes(m, x).permute(0, 3, 2, 1), m.codes.transpose(1, 2), weight=m.weights[: VOCAB // PARTS]
    ),
    "codes_as_rows": lambda m, x, y: F.cross_entropy(m.head(x).view(-1, VOCAB // PARTS), m.codes.view(-1)),
    "codes_flattened": lambda m, x, y: F.cross_entropy(_codes(m, x).flatten(0, 2), m.codes.flatten()),
    "codes_of_rows": lambda m, x, y: F.cross_entropy(
        m.head(x).view(-1, PARTS, VOCAB // PARTS).transpose(1, 2), m.codes.view(-1, PARTS)
    ),
    "length_first": _shift_first,
    "narrowed": lambda m, x, y: _loss(m.head(x).narrow(1, 0, LENGTH - 1), y[:, 1:]),
    "ellipsis": lambda m, x, y: _loss(m.head(x)[..., :-1, :].contiguous(), y[..., 1:].contiguous()),
    "flat": lambda m, x, y: _loss(m.head(x).view(-1, VOCAB)[:-1], y.view(-1)[1:]),
    "one_sequence": lambda m, x, y: _loss(m.head(x[0])[:-1], y[0, 1:]),
    "log_softmax_then_shift": lambda m, x, y: (
        -m.head(x).log_softmax(-1)[:, :-1].gather(-1, y[:, 1:, None].clamp(min=0)).mean()
    ),
    "shift_of_classes_first": lambda m, x, y: F.cross_entropy(m.head(x).transpose(1, 2)[..., :-1], y[:, 1:]),
    "halves": _halves,
    "padded_shifted_at_once": lambda m, x, y: _loss(m.head(x)[:, :-1, : VOCAB // 2], y[:, 1:] % (VOCAB // 2)),
    "padded_by_narrow_and_shifted": lambda m, x, y: _loss(
        m.head(x).narrow(-1, 0, VOCAB // 2)[..., :-1, :], y[:, 1:] % (VOCAB // 2)
    ),
    "columns_selected": lambda m, x, y: _loss(
        m.head(x).index_select(-1, torch.arange(1, VOCAB - 3)), y.clamp(max=VOCAB - 9)
    ),
    "columns_picked": lambda m, x, y: _loss(
        m.head(x)[..., torch.arange(1, VOCAB - 3)], y.clamp(max=VOCAB - 9)
    ),
    "margin_of_the_label": lambda m, x, y: _loss(
        m.head(x).scatter_add(-1, y.clamp(min=0)[..., None], m.token_weights[..., None]), y
    ),
    "last_row_beside": lambda m, x, y: _loss(m.head(x), y) + m.head(x)[:, -1].logsumexp(-1).mean(),
    "sequences_apart": _sequences_apart,
    "padded_and_shifted": lambda m, x, y: _loss(LOGITS["columns"](m, m.head(x))[:, :-1], y[:, 1:]),
}

# One element of each row, and logits in wider buffers


def _margin(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """CosFace's: the label's logit less a constant."""
    logits, y = m.head(x).view(-1, VOCAB), y.clamp(min=0).flatten()
    logits[torch.arange(len(y)), y] -= 0.35
    return F.cross_entropy(logits * 4, y)


def _angle(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """ArcFace's: a function of the label's logit."""
    logits, y = F.linear(F.normalize(x, dim=-1), F.normalize(m.head.weight, dim=-1)), y.clamp(min=0)
    rows = (torch.arange(y.shape[0])[:, None], torch.arange(y.shape[1]))
    target = logits[(*rows, y)]
    logits[(*rows, y)] = torch.cos(torch.acos(target) + 0.2)
    return _loss(logits * 4, y)


def _margins_put(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """Out of place, added, and of labels counted from the end."""
    logits, labels = m.head(x).view(-1, VOCAB), y.flatten() - 40
    places = torch.arange(BATCH * LENGTH), torch.where(labels < -VOCAB, 5, labels)
    first = logits.index_put(places, m.token_weights.flatten(), accumulate=True)
    second = torch.index_put(logits, places, torch.tensor(0.25, dtype=F64))
    third = torch.zeros_like(logits)
    third[places] = 0.5
    fourth = logits * 2
    fourth[places] *= 0.5
    return sum((_loss(each, y) for each in (first, second, third + logits, fourth)), x.sum() * 0)


def _likelihood(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    y = y.clamp(min=0).flatten()
    return -m.head(x).view(-1, VOCAB).log_softmax(-1)[torch.arange(y.shape[0], dtype=torch.long), y].mean()


PICKS: dict[str, Step] = {
    "margin": _margin,
    "angle": _angle,
    "margins_put": _margins_put,
    "likelihood": _likelihood,
}


def _into(make: Callable[[Toy, Tensor], Tensor], at: slice) -> Step:
    """Logits written to a part of a wider buffer that ``make`` gives, and their loss."""

    def step(m: Toy, x: Tensor, y: Tensor) -> Tensor:
        wide = make(m, x)
        wide[..., at] = m.head(x)
        return _loss(wide, y)

    return step


def _two_heads(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    wide = x.new_empty(BATCH, LENGTH, 2 * VOCAB + 1)
    wide[..., :VOCAB], wide[..., VOCAB:-1] = m.head(x), m.teacher(x)
    wide[..., -1] = -1e4
    return _loss(wide, y)


def _copied(m: Toy, x: Tensor, y: Tensor) -> Any:
    wide = torch.full((BATCH, LENGTH, VOCAB + 8), fill_value=-1e4, dtype=F64)
    wide.narrow(-1, 0, VOCAB).copy_(m.head(x))
    return _loss(15 * torch.tanh(wide / 15), y)


SIZE = (BATCH, LENGTH, VOCAB + 8)
BUFFERS: dict[str, Step] = {
    "full": _into(lambda m, x: x.new_full(SIZE, -1e4), slice(None, VOCAB)),
    "zeros": _into(lambda m, x: torch.zeros(SIZE, dtype=F64), slice(8, None)),
    "filled": _into(lambda m, x: x.new_empty(SIZE).fill_(-3.0), slice(3, -5)),
    "two_heads": _two_heads,
    "copied": _copied,
}

# Losses


def _mixture(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    p, q = m.head(x).log_softmax(-1), m.teacher(x).detach().log_softmax(-1)
    mean = torch.logsumexp(torch.stack([p - math.log(2), q - math.log(2)]), dim=0)
    return F.kl_div(mean, p, log_target=True, reduction="batchmean") + F.kl_div(
        mean, q, log_target=True, reduction="batchmean"
    )


def _divergences(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    p, q = m.head(x).log_softmax(-1), m.teacher(x).detach().log_softmax(-1)
    return torch.stack([(p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)], dim=0).mean(0).sum()


def _poly(logits: Tensor, hot: Tensor, y: Tensor) -> Tensor:
    return _loss(logits, y) + (1 - (logits.softmax(-1) * hot).sum(-1)).mean()


LOSSES: dict[str, Step] = {
    "logsigmoid": lambda m, x, y: -F.logsigmoid(m.head(x)).sum(-1).mean(),
    "logsigmoid_of_rows": lambda m, x, y: -F.logsigmoid(m.head(x).amax(-1)).sum(),
    "bce": lambda m, x, y: F.binary_cross_entropy_with_logits(m.head(x), m.given, pos_weight=m.weights),
    "bce_rows": lambda m, x, y: (
        F.binary_cross_entropy_with_logits(m.head(x), m.given, m.weights, reduction="none").mean(-1).sum()
    ),
    "bce_sum": lambda m, x, y: F.binary_cross_entropy_with_logits(
        m.head(x), m.given, m.token_weights[..., None], reduction="sum", pos_weight=m.weights
    ),
    "mse": lambda m, x, y: F.mse_loss(m.head(x).softmax(-1), m.given),
    "soft_margin": lambda m, x, y: F.soft_margin_loss(m.head(x), m.given - 0.5),
    "mixture": _mixture,
    "divergences": _divergences,
    "one_hot": lambda m, x, y: _poly(m.head(x), F.one_hot(y.clamp(min=0), VOCAB), y),
    "one_hot_counted": lambda m, x, y: F.cross_entropy(
        m.head(x).view(-1, VOCAB), 0.9 * F.one_hot(y.clamp(min=0).view(-1), num_classes=VOCAB).double()
    ),
}

NARROW = ("mixture", "divergences", "one_hot", "one_hot_counted")  # the others are given as much as logits

HEADS: dict[str, tuple[Step, bool]] = {
    **{f"logits_{name}": (_of_logits(edit), True) for name, edit in LOGITS.items()},
    **{f"keywords_{name}": (step, True) for name, step in KEYWORDS.items()},
    **{f"layout_{name}": (step, True) for name, step in LAYOUTS.items()},
    **{f"loss_{name}": (step, name in NARROW) for name, step in LOSSES.items()},
    **{f"picks_{name}": (step, True) for name, step in PICKS.items()},
    **{f"buffer_{name}": (step, True) for name, step in BUFFERS.items()},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    step, is_narrow = HEADS[name]  # what is given is as wide as logits
    report = _check(step, (LENGTH - 1) * VOCAB if is_narrow else 0)
    assert "vocab" in kinds(report)
    assert not any(refused.kind == "vocab" for refused in report.refusals)


@pytest.mark.slow
def test_labels_edited_in_place() -> None:
    report = _check(
        lambda m, x, y: sum(_of_labels(edit)(m, x, y) for edit in LABELS.values()), LENGTH * VOCAB
    )
    assert kinds(report) == {"vocab": len(LABELS)} and not report.refusals


@pytest.mark.parametrize("name", TEMPORARIES)
def test_temporaries_of_an_mlp(name: str) -> None:
    report = _check(TEMPORARIES[name], BATCH * LENGTH * INNER)
    assert report.rewrites and not report.refusals


@pytest.mark.filterwarnings("ignore:aten::nll_loss")
def test_on_the_meta_device() -> None:
    """``explain`` of a model without memory: there, cross entropies are made of other operators."""

    def step(m: Toy, x: Tensor, y: Tensor) -> Tensor:
        return _loss(m.head(x)[:, :-1], y[:, 1:]) + F.nll_loss(m.teacher(x).log_softmax(-1).mT, y)

    model, (x, y) = Toy(step).to("meta"), _batch()
    report = report_of(model, None, x.detach().to("meta"), y.to("meta"))
    assert kinds(report) == {"vocab": 2}


# Under no_grad


def _distilled(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    student = m.head(x)
    with torch.no_grad():
        teacher = m.teacher(x)
    divergence = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    return divergence + _loss(student, y)


def _old_log_probabilities(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    labels = y.clamp(min=0)[..., None]
    with torch.no_grad():
        old = m.teacher(x).log_softmax(-1).gather(-1, labels)
    ratio = (m.head(x).log_softmax(-1).gather(-1, labels) - old).exp()
    return -torch.min(ratio, ratio.clamp(0.8, 1.2)).sum()


def _itself(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """The same weights with and without a gradient."""
    with torch.no_grad():
        sure = m.head(x).softmax(-1).amax(-1)
    return (F.cross_entropy(m.head(x).transpose(1, 2), y, reduction="none") * sure).sum()


def _accuracy_last(m: Toy, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last node of the region has no gradient, and the loss is divided behind it."""
    logits = m.head(x)
    loss = _loss(logits, y)
    with torch.no_grad():
        p = logits.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        accuracy = (logits.argmax(-1) == y).double().mean()
    return loss, entropy, accuracy


def _gradient_inside(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = m.teacher(x)
        with torch.enable_grad():
            student = m.head(x)
        sure = (teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    return (F.cross_entropy(student.view(-1, VOCAB), y.view(-1), reduction="none") * sure.view(-1)).sum()


def _statistics(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.up(x).relu().amax(-1, keepdim=True)
    return (x + m.down(m.up(x).relu() / (1 + scale))).square().sum()


NO_GRAD: dict[str, Step] = {
    "distilled": _distilled,
    "old_log_probabilities": _old_log_probabilities,
    "itself": _itself,
    "accuracy_last": _accuracy_last,
    "gradient_inside": _gradient_inside,
    "statistics": _statistics,
}


@pytest.mark.parametrize("name", NO_GRAD)
def test_parts_without_gradients(name: str) -> None:
    """The same parameters have gradients as in eager: a teacher that is not frozen has none."""
    x, y = _batch()
    model = Toy(NO_GRAD[name])
    report = check_parity(model, {"x": x, "y": y}, 1e-10, 1e-9)
    assert len(report.rewrites) == 1 and not report.refusals


def test_what_ran_without_gradients_has_none() -> None:
    model, (x, y) = Toy(_accuracy_last), _batch()
    run, report = rewritten(model)
    loss, entropy, _ = run(x, y)
    assert report.rewrites and loss.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("shift", [0, 1])
def test_autocast_of_a_part(shift: int) -> None:
    """A head in bfloat16, its loss in float32 behind the region: one loop, rounded as in eager."""

    def step(m: Toy, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = m.head(x)
        with torch.autocast("cpu", enabled=False):
            return _loss(logits[:, : LENGTH - shift].float(), y[:, shift:])

    model, (x, y) = Toy(step).float(), _batch()
    report = check_parity(model, {"x": x.detach().float(), "y": y}, 1e-5, 1e-2)
    assert kinds(report) == {"vocab": 1}


def test_picks_and_buffers_of_lengths_that_change() -> None:
    """One graph more for all lengths: no size becomes a number."""

    def step(m: Toy, x: Tensor, y: Tensor) -> Tensor:
        logits, y = m.head(x).view(-1, VOCAB), y.flatten()
        logits[torch.arange(len(y)), y] -= 0.35
        wide = logits.new_full((len(y), VOCAB + 8), -1e4)
        wide[:, :VOCAB] = logits
        return F.cross_entropy(wide * 4, y)

    model = Toy(step)
    run, report = rewritten(model)
    for length in (20, 31, 45):
        x = torch.randn(3, length, WIDTH, dtype=F64, requires_grad=True)
        batch = x, torch.randint(0, VOCAB, (3, length))
        assert worst(results(run, batch, model), results(model, batch, model)) <= 1e-9
    assert report.graphs == 2 and kinds(report) == {"vocab": 2} and not report.refusals


# Picks that are none of one element a row


def _of_rows(index: Callable[[], Any]) -> Step:
    """Margins at rows that ``index`` gives: eager's numbers, and no loop."""

    def step(m: Toy, x: Tensor, y: Tensor) -> Tensor:
        logits, y = m.head(x).view(-1, VOCAB), y.clamp(min=0).flatten()
        logits[index(), y] -= 0.35
        return F.cross_entropy(logits, y)

    return step


def _swapped(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """As many sequences as tokens, and rows that are those of others."""
    logits, y, i = m.head(x).view(8, 8, VOCAB), y.clamp(min=0).view(8, 8), torch.arange(8)
    return (logits[i, i[:, None], y] * logits.amax(-1)).sum()


def _counted_and_moved() -> Tensor:
    rows = torch.arange(BATCH * LENGTH)
    rows[1:] = rows[:-1].clone()
    return rows


@pytest.mark.parametrize(
    "step",
    [
        _of_rows(lambda: torch.arange(BATCH * LENGTH).flip(0)),
        _of_rows(lambda: torch.arange(BATCH * LENGTH - 1, -1, -1)),
        _of_rows(lambda: torch.arange(1, 1 + BATCH * LENGTH) % 7),
        _of_rows(lambda: torch.arange(BATCH).repeat_interleave(LENGTH)),
        _of_rows(_counted_and_moved),
        _swapped,
    ],
)
def test_picks_of_other_rows_are_refused(step: Step) -> None:
    report = _check(step, 0)
    assert not report.rewrites
    assert [(r.kind, r.cause) for r in report.refusals] == [("vocab", Cause.UNPROVED)]


# Writes that others see, or that autograd does not


def _into_an_input(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    y[y == -100] = 0
    return _loss(m.head(x), y)


def _into_a_view_of_an_input(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    y.view(-1)[:3] = 1
    return _loss(m.head(x), y)


def _behind_autograds_back(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x) * 1
    logits.detach()[..., 40:] = 0.5
    return _loss(logits, y)


def _under_no_grad(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x) * 1
    with torch.no_grad():
        logits.mul_(0.5)
    return logits.sin().sum(-1).sum()


def _two_outputs(m: Toy, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = m.head(x)
    logits[..., 40:] = 0.0
    return _loss(logits, y), logits, logits[:, 0]


def _read_around(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """What is read before a write keeps its value; a view sees the write."""
    logits = m.head(x) + 0.0
    view, before = logits[..., 40:], logits * 2
    logits[..., 41] = 0.25
    between = view.sum(-1)
    view.add_(1)
    return (logits.sin() + before.cos()).sum(-1).sum() + (between * view.prod(-1)).sum()


def _positional_relu(m: Toy, x: Tensor, y: Tensor) -> Tensor:
    """``relu(h, True)`` writes too: what reads ``h`` afterwards reads its result."""
    h = m.up(x)
    other = h.view(-1, INNER)
    r = F.relu(h, True)
    return m.down(other.view(BATCH, LENGTH, INNER)) * 2 + r.sum(-1, keepdim=True)


HOSTILE: dict[str, Step] = {
    "into_an_input": _into_an_input,
    "into_a_view_of_an_input": _into_a_view_of_an_input,
    "behind_autograds_back": _behind_autograds_back,
    "under_no_grad": _under_no_grad,
    "two_outputs": _two_outputs,
    "read_around": _read_around,
    "positional_relu": _positional_relu,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_writes_that_others_see(name: str) -> None:
    """Right, rewritten or not; and the inputs hold afterwards what eager leaves in them."""
    model, (x, y) = Toy(HOSTILE[name]), _batch()
    eager_y, found_y = y.clone(), y.clone()
    truth = results(model, (x, eager_y), model)
    run, report = rewritten(model)
    assert worst(results(run, (x, found_y), model), truth) <= 1e-9
    assert torch.equal(eager_y, found_y)
    assert name not in ("behind_autograds_back", "under_no_grad", "two_outputs") or not report.rewrites


_EDITS: list[Callable[[Tensor, float], Any]] = [
    lambda t, a: t.mul_(1 + a),
    lambda t, a: t.__iadd__(a),
    lambda t, a: t.__setitem__((..., slice(-1, None)), a),
    lambda t, a: t.__setitem__(t > a, -a),
    lambda t, a: t.__setitem__(0, a),
    lambda t, a: t[..., :1].copy_(t.sum() * a),
]
_VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.reshape(-1),
    lambda t: t.transpose(0, -1),
    lambda t: t[..., : max(1, t.shape[-1] // 2)],
    lambda t: t[0] if t.ndim > 1 else t[1:],
    lambda t: t.unsqueeze(0),
]


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_through_views(seed: int) -> None:
    """Writes, views and reads in any order: no write is left, values and gradients are eager's."""
    chosen = random.Random(seed)
    steps = [(chosen.randrange(3), chosen.random(), chosen.randrange(30)) for _ in range(9)]

    def run(x: Tensor) -> Tensor:
        pool, total = [x * 1.5 + 0.1], torch.zeros((), dtype=F64)
        for kind, amount, pick in steps:
            t = pool[pick % len(pool)]
            if kind == 0:
                pool.append(_VIEWS[pick % len(_VIEWS)](t))
            elif kind == 1:
                _EDITS[pick % len(_EDITS)](t, amount)
            else:
                total = total + (t * 2).sin().sum()
        return sum((t.cos().sum() for t in pool), total)

    left: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        functional.run(PassContext(gm, make_options({}), BodyConfig("eager", "auto", ()), True, Shared()))
        gm.recompile()
        left.extend(node for node in gm.graph.nodes if writes_in_place(node))
        return gm

    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend)
    assert worst(results(compiled, [x]), results(run, [x])) <= 1e-12
    assert not left


# Exceptions of ours


def test_an_exception_costs_one_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = chunking.trace_body  # type: ignore[attr-defined]

    def fails_for_mlps(analysis: Any, region: Any, *args: Any) -> Any:
        if region.name == "up":
            raise IndexError("tuple index out of range")
        return trace(analysis, region, *args)

    monkeypatch.setattr(chunking, "trace_body", fails_for_mlps)
    with caplog.at_level(logging.DEBUG, "mst_fx"):
        report = _check(lambda m, x, y: _loss(m.head(x + m.down(F.gelu(m.up(x)))), y), 0)
    assert kinds(report) == {"vocab": 1}
    assert {(r.name, r.cause) for r in report.refusals} == {("up", Cause.DEFECT)}
    assert any(record.exc_info for record in caplog.records)


def test_an_exception_in_one_loss_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = sum_losses._layout_of

    def fails_for_rank_3(logits: Any) -> Any:
        assert logits.meta["example_value"].ndim == 2
        return layout(logits)

    monkeypatch.setattr(sum_losses, "_layout_of", fails_for_rank_3)
    report = _check(lambda m, x, y: _loss(m.head(x), y) + F.cross_entropy(m.teacher(x).transpose(1, 2), y), 0)
    assert kinds(report) == {"vocab": 1}
    assert Cause.DEFECT in {refused.cause for refused in report.refusals}
