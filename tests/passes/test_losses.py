"""The losses of torch.nn.functional on logits: right numbers in chunks, or a refusal that says the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx.errors import Cause
from tests.helpers import SMALL_CHUNKS, compile_mst, kinds, relative_error, report_of

V, H, N = 160, 32, 66
torch.manual_seed(0)
HIDDEN, WEIGHT = torch.randn(N, H, dtype=torch.float64), 0.1 * torch.randn(V, H, dtype=torch.float64)
LABELS, TARGETS = torch.randint(V, (N,)), torch.rand(N, V, dtype=torch.float64)
SIGNS = torch.where(TARGETS > 0.5, 1.0, -1.0).double()

WEIGHTS = torch.rand(V, dtype=torch.float64)
_NUMBERS = {"none": 0, "mean": 1, "sum": 2}
aten = torch.ops.aten

Loss = Callable[[Tensor, str], Tensor]
f: Any = F  # torch's stubs lack some arguments

REWRITTEN: dict[str, Loss] = {
    "multi_margin": lambda x, r: F.multi_margin_loss(x, LABELS, reduction=r),
    "multi_margin, margin": lambda x, r: F.multi_margin_loss(x, LABELS, 2, 0.5, reduction=r),
    "MultiMarginLoss": lambda x, r: nn.MultiMarginLoss(reduction=r)(x, LABELS),
    "multilabel_soft_margin": lambda x, r: F.multilabel_soft_margin_loss(
        x, TARGETS.round(), TARGETS[0], reduction=r
    ),
    "poisson_nll": lambda x, r: F.poisson_nll_loss(x, 5 * TARGETS, full=True, reduction=r),
    "huber": lambda x, r: F.huber_loss(x, TARGETS, reduction=r, delta=0.5),
    "huber, weights": lambda x, r: f.huber_loss(x, TARGETS, reduction=r, weight=TARGETS.flip(0)),
    "smooth_l1": lambda x, r: F.smooth_l1_loss(x, TARGETS, reduction=r, beta=0.5),
    "l1": lambda x, r: F.l1_loss(x, TARGETS, reduction=r),
    "l1, weights": lambda x, r: f.l1_loss(x, TARGETS, reduction=r, weight=TARGETS.flip(0)),
    "l1, weights, none": lambda x, r: f.l1_loss(x, TARGETS, reduction=r, weight=TARGETS.flip(0)),
    "mse": lambda x, r: F.mse_loss(x, TARGETS, reduction=r),
    "mse, weights": lambda x, r: f.mse_loss(x, TARGETS, reduction=r, weight=TARGETS.flip(0)),
    "kl_div, log_target": lambda x, r: F.kl_div(
        x.log_softmax(-1), TARGETS.log_softmax(-1), reduction=r, log_target=True
    ),
    "kl_div, batchmean": lambda x, r: F.kl_div(x.log_softmax(-1), TARGETS, reduction="batchmean"),
    "margin_ranking": lambda x, r: F.margin_ranking_loss(x, TARGETS, SIGNS, 0.1, reduction=r),
    "margin_ranking of columns": lambda x, r: F.margin_ranking_loss(
        x[:, 0], x[:, 1], SIGNS[:, 0], reduction=r
    ),
    "triplet_margin": lambda x, r: F.triplet_margin_loss(x, TARGETS, TARGETS.flip(1), swap=True, reduction=r),
    "triplet_margin_with_distance": lambda x, r: F.triplet_margin_with_distance_loss(
        x, TARGETS, TARGETS.flip(1), reduction=r
    ),
    "cross_entropy of ATen": lambda x, r: aten.cross_entropy_loss.default(
        x, LABELS, None, _NUMBERS[r], 3, 0.1
    ),
    "cross_entropy of ATen, any overload": lambda x, r: aten.cross_entropy_loss(
        x, LABELS, reduction=_NUMBERS[r]
    ),
    "nll of ATen": lambda x, r: aten.nll_loss(x.log_softmax(-1), LABELS, WEIGHTS, _NUMBERS[r], 5),
    "soft_margin": lambda x, r: F.soft_margin_loss(x, SIGNS, reduction=r),
    "binary_cross_entropy, weights": lambda x, r: F.binary_cross_entropy(
        x.sigmoid(), TARGETS, TARGETS.flip(0), reduction=r
    ),
}
REFUSED: dict[str, tuple[Loss, str, Cause]] = {
    "multi_margin, weights": (
        lambda x, r: F.multi_margin_loss(x, LABELS, weight=TARGETS[0], reduction=r),
        "multi_margin_loss",
        Cause.UNPROVED,
    ),
    "multilabel_margin": (
        lambda x, r: F.multilabel_margin_loss(x, LABELS[:, None].expand(N, V), reduction=r),
        "once torch decomposes it",
        Cause.UNPROVED,
    ),
    "cosine_embedding": (
        lambda x, r: F.cosine_embedding_loss(x, TARGETS, SIGNS[:, 0], reduction=r),
        "(cosine_embedding_loss) aten.empty_like.default makes memory",
        Cause.UNPROVED,
    ),
    "hinge_embedding": (
        lambda x, r: F.hinge_embedding_loss(x, SIGNS, reduction=r),
        "hinge_embedding_loss",
        Cause.UNPROVED,
    ),
}


def _step(head: Any, weight: Tensor = WEIGHT) -> list[Tensor]:
    """A loss and the gradients of rows and weights."""
    hidden, weight = HIDDEN.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = head(hidden, weight)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def _head(loss: Loss, reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = loss(F.linear(hidden, weight), reduction)
        if reduction != "none":
            return rows
        return (rows * torch.linspace(1, 2, rows.numel(), dtype=rows.dtype).view(rows.shape)).sum()

    return head


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_loss_in_chunks(name: str) -> None:
    if name == "binary_cross_entropy, weights" and torch.__version__ < torch.torch_version.TorchVersion(
        "2.12"
    ):
        pytest.skip("torch 2.11's broadcasts the weights by sizes that must be numbers: refused")
    for reduction in (
        ("mean", "sum") if name == "multi_margin" else ("none",) if "none" in name else ("mean",)
    ):
        head = _head(REWRITTEN[name], reduction)
        truth = _step(head)
        with mst_fx.watch() as report:
            found = _step(compile_mst(head))
        assert kinds(report) == {"vocab": 1} and not report.refusals, reduction
        assert max(relative_error(f, t) for f, t in zip(found, truth, strict=True)) <= 1e-9, reduction


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_is_refused(name: str) -> None:
    loss, reason, cause = REFUSED[name]
    report = report_of(_head(loss, "mean"), SMALL_CHUNKS, HIDDEN, nn.Parameter(WEIGHT))
    (refused,) = report.refusals
    assert (refused.kind, refused.cause) == ("vocab", cause) and reason in refused.reason
    assert not report.rewrites


@pytest.mark.slow
def test_heads_under_vmap_are_heads() -> None:
    """They are refused as what they are; an MLP there is one."""
    rows, labels, weight = torch.randn(3, 24, H), torch.randint(V, (3, 24)), nn.Parameter(torch.randn(V, H))
    up, down = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), y)

    def written_out(x: Tensor, y: Tensor) -> Tensor:
        logits = x @ weight.t()
        return (logits.logsumexp(-1) - logits.gather(-1, y[:, None])[:, 0]).mean()

    def of_a_token(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight)[None], y[None])

    def mlp(x: Tensor) -> Tensor:
        return down(F.gelu(up(x)))  # type: ignore[no-any-return]

    cases: list[tuple[str, Callable[[], Tensor]]] = [
        ("vocab", lambda: torch.vmap(loss)(rows, labels).mean()),
        ("vocab", lambda: torch.func.vmap(written_out)(rows, labels).mean()),
        ("vocab", lambda: torch.vmap(torch.vmap(of_a_token))(rows, labels).mean()),
        ("vocab", lambda: torch.func.grad(lambda x: loss(x, labels[0]))(rows[0]).sum()),
        ("mlp", lambda: torch.vmap(mlp)(rows).sum()),
    ]
    for kind, case in cases:
        (refused,) = report_of(case).refusals
        assert (refused.kind, refused.cause) == (kind, Cause.NOT_PLAIN)


class LM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))  # type: ignore[no-any-return]


class Distillation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = LM(), LM()

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(ids).softmax(-1)
        return F.kl_div(self.student(ids).log_softmax(-1), teacher, reduction="batchmean")


@pytest.mark.slow
def test_heads_of_two_models_have_both_names() -> None:
    ids = torch.randint(V, (2, 40))

    def distilled(m: nn.Module, other: nn.Module, ids: Tensor) -> Tensor:
        return F.kl_div(m(ids).log_softmax(-1), other(ids).softmax(-1), reduction="batchmean")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Distillation()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids)  # type: ignore[no-any-return]

    heads, rows = [nn.Linear(H, V), nn.Linear(H, V)], torch.randn(80, H, requires_grad=True)
    for report, names in (
        (report_of(Distillation(), None, ids), {"student.head", "teacher.head"}),
        (report_of(Outer(), None, ids), {"model.student.head", "model.teacher.head"}),
        (report_of(distilled, None, LM(), LM(), ids), {"m.head", "other.head"}),
        (report_of(distilled, None, *heads, rows), {"m", "other"}),
    ):
        (rewrite,) = (rewrite for rewrite in report.rewrites if rewrite.kind == "vocab")
        assert set(rewrite.name.split(", ")) == names
