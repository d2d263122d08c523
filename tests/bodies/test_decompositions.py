"""Decompositions of bodies for Inductor: the same numbers, and no buffer as wide as the vocabulary in float32."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mst_fx.bodies.decompositions import add_up_labels, body_decompositions
from tests.helpers import relative_error

aten = torch.ops.aten
ROWS, VOCAB = 12, 17


def _gradient(logits: Tensor, labels: Tensor, weight: Tensor, loss: functools.partial[Tensor]) -> Tensor:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf.to(weight.dtype), labels, weight=weight)
    (found,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return found


def _traced(
    logits: Tensor, labels: Tensor, weight: Tensor, loss: functools.partial[Tensor]
) -> fx.GraphModule:
    gm = make_fx(
        functools.partial(_gradient, loss=loss), decomposition_table=body_decompositions("inductor")
    )(logits, labels, weight)
    add_up_labels(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_of_a_cross_entropy(
    reduction: str, smoothing: float, ignored: int, dtype: torch.dtype
) -> None:
    logits, weight = torch.randn(ROWS, VOCAB, dtype=dtype), torch.rand(VOCAB, dtype=dtype)
    labels = torch.randint(VOCAB, (ROWS,))
    labels[2:5] = ignored
    loss = functools.partial(
        F.cross_entropy, reduction=reduction, label_smoothing=smoothing, ignore_index=ignored
    )
    found = _traced(logits, labels, weight, loss)(logits, labels, weight)
    truth = _gradient(logits.double(), labels, weight.double(), loss)
    assert relative_error(found, truth) <= (1e-14 if dtype == torch.float64 else 1e-6)


def test_labels_are_compared_not_scattered_and_not_summed_up() -> None:
    loss = functools.partial(F.cross_entropy, reduction="sum")
    inputs = (torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,)), torch.ones(VOCAB))
    targets = [node.target for node in _traced(*inputs, loss).graph.nodes]
    assert not [t for t in targets if t in (aten.scatter.value, aten.scatter_.value)]
    assert targets.count(aten.sum.dim_IntList) == 1  # of the exponentials


def test_sums_of_other_comparisons_stay() -> None:
    def counted(x: Tensor, places: Tensor) -> Tensor:
        value = torch.where(places[:, None] == torch.arange(1, VOCAB + 1), x[:, None], 0.0)
        return value.sum(1, keepdim=True)

    x, places = torch.randn(ROWS), torch.arange(ROWS)
    gm = make_fx(counted, decomposition_table=body_decompositions("inductor"))(x, places)
    add_up_labels(gm.graph)
    gm.recompile()
    assert torch.equal(gm(x, places), counted(x, places)) and gm(x, places)[0] == 0.0
