"""Losses over a vocabulary: every spelling is found, and agrees with eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from tests.direct import DIRECT, check
from tests.helpers import compile_mst, kinds

WIDTH, VOCAB, ROWS = 8, 56, 41


class Head(nn.Module):
    """Hidden rows to logits to whatever ``loss`` makes of them."""

    def __init__(self, loss: Callable[[Head, Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.loss, self.head = loss, nn.Linear(WIDTH, VOCAB, bias=bias)
        self.other = nn.Linear(WIDTH, VOCAB)
        self.register_buffer("class_weights", torch.rand(VOCAB) + 0.5)
        self.register_buffer("targets", torch.rand(ROWS, VOCAB).softmax(-1))
        self.double()

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self, hidden, labels)


def _ce(**kwargs: object) -> Callable[[Head, Tensor, Tensor], Tensor]:
    return lambda m, h, y: F.cross_entropy(m.head(h), y, **kwargs)  # type: ignore[arg-type]


def _weighted(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y, weight=m.class_weights)  # type: ignore[arg-type]


def _weighted_sum(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y, m.class_weights, reduction="sum")  # type: ignore[arg-type]


def _weighted_rows(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y, m.class_weights, reduction="none")  # type: ignore[arg-type]


def _soft_targets(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), m.targets)  # type: ignore[arg-type]


def _smoothed_soft_targets(m: Head, h: Tensor, y: Tensor) -> Tensor:
    weight: Tensor = m.class_weights  # type: ignore[assignment]
    return F.cross_entropy(m.head(h), m.targets, weight, label_smoothing=0.1)  # type: ignore[arg-type]


def _softcap(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(m.head(h) / 3.0) * 3.0, y)


def _z_loss(m: Head, h: Tensor, y: Tensor) -> Tensor:
    logits = m.head(h)
    return F.cross_entropy(logits, y) + 1e-2 * logits.logsumexp(-1).square().mean()


def _masked_mean(m: Head, h: Tensor, y: Tensor) -> Tensor:
    valid = y != -100
    picked = m.head(h).log_softmax(-1).gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    return -(picked * valid).sum() / valid.sum()


def _teacher(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(m.head(h).log_softmax(-1), m.targets, reduction="batchmean")  # type: ignore[arg-type]


def _nll(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(m.head(h).log_softmax(-1), y)


def _two_heads(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y) + 0.3 * F.cross_entropy(m.other(h), y)


def _head_twice(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y) + 0.3 * F.cross_entropy(m.head(h.tanh()), y.flip(0))


def _positional(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y.where(y >= 0, 3), None, None, 3, None, "mean")


def _module(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return nn.CrossEntropyLoss(ignore_index=-100)(m.head(h), y)  # type: ignore[no-any-return]


def _upcast(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h.float(), m.head.weight.float()).double(), y)


def _counted(m: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(h), y, reduction="sum") / torch.tensor(17)


SCALARS = {
    "mean": _ce(),
    "sum": _ce(reduction="sum"),
    "ignore_index": lambda m, h, y: F.cross_entropy(m.head(h), y.where(y >= 0, 5), ignore_index=5),
    "class_weights": _weighted,
    "class_weights_sum": _weighted_sum,
    "softcap": _softcap,
    "logit_scale": lambda m, h, y: F.cross_entropy(m.head(h) * 0.25, y),
    "z_loss": _z_loss,
    "masked_mean": _masked_mean,
    "nll": _nll,
    "positional": _positional,
    "module": _module,
    "upcast": _upcast,
    "num_items": _counted,
    "label_smoothing": _ce(label_smoothing=0.1),
    "label_smoothing_sum": _ce(label_smoothing=0.1, reduction="sum"),
    "soft_targets": _soft_targets,
    "smoothed_soft_targets": _smoothed_soft_targets,
    "teacher": _teacher,
}

PER_ROW = {
    "losses": _ce(reduction="none"),
    "weighted_losses": _weighted_rows,
    "soft_losses": lambda m, h, y: F.cross_entropy(m.head(h), m.targets, reduction="none"),
    "log_probabilities": lambda m, h, y: (
        m.head(h).log_softmax(-1).gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    ),
    "selected_minus_logsumexp": lambda m, h, y: (
        (logits := m.head(h)).gather(-1, y.clamp(min=0)[:, None]).squeeze(-1) - logits.logsumexp(-1)
    ),
    "label_smoothing": _ce(label_smoothing=0.1, reduction="none"),
    "entropy": lambda m, h, y: -((logp := m.head(h).log_softmax(-1)).exp() * logp).sum(-1),
}


def _batch() -> tuple[Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[::6] = -100
    return hidden, labels


@pytest.mark.parametrize("name", SCALARS)
def test_scalar_losses(name: str) -> None:
    report = check(Head(SCALARS[name]), _batch(), 1e-5 if name == "upcast" else 1e-9)
    assert kinds(report) == {"vocab": 1} and not report.refusals
    # Two sums, one of losses and one of squares, have two tangents.
    assert report.rewrites[0].gradient == ("recompute" if name == "z_loss" else "forward")
    assert report.rewrites[0].chunks == 5


@pytest.mark.parametrize("name", PER_ROW)
def test_losses_per_row(name: str) -> None:
    report = check(Head(PER_ROW[name]), _batch())
    assert kinds(report) == {"vocab": 1} and not report.refusals
    assert report.rewrites[0].gradient == "recompute"


@pytest.mark.parametrize("name", ["mean", "class_weights", "softcap", "z_loss"])
def test_head_bias(name: str) -> None:
    assert kinds(check(Head(SCALARS[name], bias=True), _batch())) == {"vocab": 1}


def test_weighted_rows_of_a_policy() -> None:
    """What RL trainers compute: log-probabilities times advantages, clipped, averaged."""

    def policy(m: Head, h: Tensor, y: Tensor) -> Tensor:
        logp = PER_ROW["log_probabilities"](m, h, y)
        ratio = (logp - logp.detach()).exp()
        advantage = torch.linspace(-1, 1, ROWS, dtype=h.dtype)
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    assert kinds(check(Head(policy), _batch())) == {"vocab": 1}


def test_two_heads() -> None:
    assert kinds(check(Head(_two_heads), _batch()))["vocab"] >= 1


def test_head_used_twice() -> None:
    assert kinds(check(Head(_head_twice), _batch()))["vocab"] >= 1


def test_losses_without_a_batch_dimension_to_flatten() -> None:
    """``[B, V, S]`` logits, as ``cross_entropy`` takes them for sequences."""

    def loss(m: Head, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m.head(h).transpose(1, 2), y)

    hidden, labels = _batch()
    hidden = hidden[:40].detach().view(2, 20, WIDTH).requires_grad_()
    assert kinds(check(Head(loss), (hidden, labels[:40].view(2, 20)))) == {"vocab": 1}


@pytest.mark.parametrize("batch", [1, 2])
def test_shifted_loss_of_a_batch(batch: int) -> None:
    """``logits[:, :-1]`` against ``labels[:, 1:]``: the loss that everybody writes by hand."""

    def loss(m: Head, h: Tensor, y: Tensor) -> Tensor:
        logits = m.head(h)[:, :-1].reshape(-1, VOCAB)
        return F.cross_entropy(logits, y[:, 1:].reshape(-1))

    hidden, labels = _batch()
    hidden = hidden[:40].detach().view(batch, -1, WIDTH).requires_grad_()
    report = check(Head(loss), (hidden, labels[:40].view(batch, -1)))
    assert kinds(report) == {"vocab": 1}


@pytest.mark.parametrize("name", ["mean", "masked_mean"])
def test_nothing_but_ignored_rows(name: str) -> None:
    hidden, labels = _batch()
    labels[:] = -100
    check(Head(SCALARS[name]), (hidden, labels))


def test_frozen_head() -> None:
    model = Head(_ce(), bias=True)
    model.head.requires_grad_(False)
    assert kinds(check(model, _batch())) == {"vocab": 1}


def test_frozen_rows() -> None:
    hidden, labels = _batch()
    assert kinds(check(Head(_ce()), (hidden.detach(), labels))) == {"vocab": 1}


def test_wide_results_are_left_alone() -> None:
    """Logits that leave the graph, and a softmax that does: nothing is narrow again."""
    assert not check(Head(lambda m, h, y: m.head(h).softmax(-1)), _batch()).rewrites


def test_losses_that_mix_rows_are_refused() -> None:
    def contrastive(m: Head, h: Tensor, y: Tensor) -> Tensor:
        return m.head(h).softmax(0).square().sum()

    report = check(Head(contrastive), _batch())
    assert not report.rewrites
    assert report.refusals and all("softmax" in refused.reason for refused in report.refusals)


def test_narrow_functions_beside_the_loss() -> None:
    """What is said of each row is a result of the loop: deferred, its first use would make the logits."""
    torch.manual_seed(0)
    head = nn.Linear(2 * WIDTH, VOCAB).double()

    def run(hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = head(hidden)
        best = logits.detach().softmax(-1).max(-1)
        return F.cross_entropy(logits, labels), best.values, best.indices

    hidden = torch.randn(ROWS, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,))
    truth, weight = run(hidden, labels), head.weight
    torch._dynamo.reset()
    with mst_fx.watch() as report:
        found = compile_mst(run, DIRECT)(hidden, labels)
        for result, wanted in zip(found, truth, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (found[0], truth[0])]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert [(rewrite.kind, rewrite.deferred) for rewrite in report.rewrites] == [("vocab", False)]
    assert not report.refusals


def _some(m: Head, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Five results of one or two elements a row: together more than a quarter of the row."""
    logits = m.head(h)
    p = logits.log_softmax(-1)
    return (
        p.gather(-1, y[:, None]).squeeze(-1),
        -(p.exp() * p).sum(-1),
        logits.logsumexp(-1),
        logits.topk(2, -1).values,
    )


def _top(m: Head, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Values and places of the largest: more than the row."""
    return tuple(m.head(h).log_softmax(-1).topk(6, -1))


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize(
    "loss",
    [_ce(reduction="none"), _some, _top, lambda m, h, y: m.head(h).logsumexp(-1)],
    ids=["losses", "some", "top", "largest"],
)
def test_results_of_each_row(loss: Callable[[Head, Tensor, Tensor], Tensor], needs_gradient: bool) -> None:
    """A head as any other, by ``vocab_chunk_rows``, whether or not the trunk is frozen."""
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.randint(0, VOCAB, (ROWS,))
    report = check(Head(loss), [hidden.requires_grad_(needs_gradient), labels], 1e-10)
    assert [(r.kind, r.chunk_rows) for r in report.rewrites] == [("vocab", DIRECT["vocab_chunk_rows"])]
    assert not report.refusals


COLUMNS: dict[str, Callable[[Head, Tensor, Tensor], Tensor]] = {
    "list": lambda m, h, y: m.head(h)[:, -1, [3, 7]],
    "tuple": lambda m, h, y: m.head(h).softmax(-1)[:, -1, (3, -7)],
    "tensor": lambda m, h, y: m.head(h)[:, -1, torch.tensor([0, 5])],
    "loss": lambda m, h, y: F.cross_entropy(m.head(h)[:, -1][:, [3, 7]], y[:, 0] % 2),
    "slice": lambda m, h, y: m.head(h)[:, -2:, [1, 2, 3]].log_softmax(-1),
    "dots": lambda m, h, y: m.head(h)[..., -1, [3, 7]],
    "labels": lambda m, h, y: m.head(h)[:, -1, y[0, :3]],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_the_last_token(name: str) -> None:
    """Yes or no, a score of some answers: the head is applied to the rows that are asked for."""
    model = Head(COLUMNS[name])
    hidden, labels = (
        torch.randn(ROWS, 5, WIDTH, dtype=torch.float64, requires_grad=True),
        torch.randint(0, VOCAB, (ROWS, 5)),
    )
    report = check(model, [hidden, labels], 1e-10)
    rows = ROWS * (2 if name == "slice" else 1)
    assert [(r.kind, r.rows) for r in report.rewrites] == [("vocab", rows)] and not report.refusals
    short = check(model, [hidden[:4].detach(), labels[:4]], 1e-10)
    assert not short.rewrites and not short.refusals  # of few sequences, little is made at all


def test_columns_of_all_tokens() -> None:
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    report = check(Head(lambda m, h, y: m.head(h)[..., [3, 7]]), [hidden, torch.zeros(1)], 1e-10)
    assert kinds(report) == {"vocab": 1} and not report.refusals
