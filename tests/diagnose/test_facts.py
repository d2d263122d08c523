"""What a graph is said to hold, by its operators and not by what their names contain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_fx.diagnose.facts import _calls
from mst_fx.graph.spelling import LOSSES, ROUTERS

aten = torch.ops.aten


def stopk(x: Tensor) -> Tensor:  # a user's
    return x


def _graph(target: Any) -> fx.GraphModule:
    graph = fx.Graph()
    op = "call_method" if isinstance(target, str) else "call_function"
    graph.output(graph.create_node(op, target, (graph.placeholder("x"),)))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("target", [torch.topk, "topk", aten.topk.default, F.one_hot])
def test_routers(target: Any) -> None:
    assert _calls(_graph(target), ROUTERS)


@pytest.mark.parametrize(
    "target",
    [
        F.cross_entropy,
        F.nll_loss,
        F.binary_cross_entropy_with_logits,
        F.gaussian_nll_loss,
        aten.nll_loss2d.default,
    ],
)
def test_losses(target: Any) -> None:
    assert _calls(_graph(target), LOSSES)


def test_a_users_function_is_neither() -> None:
    assert not _calls(_graph(stopk), ROUTERS | LOSSES)
