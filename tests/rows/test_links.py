"""Spellings of what stands between a head and its readers: known however they are spelled, never in place."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mst_fx.graph.values import VALUE
from mst_fx.rows.links import is_link, order_of

aten = torch.ops.aten


def _call(target: Any, *args: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[VALUE] = torch.ones(2, 3)
    op = "call_method" if isinstance(target, str) else "call_function"
    node = graph.create_node(op, target, (x, *args))
    node.meta[VALUE] = torch.ones(2, 3)
    return node


def mul(x: Tensor, y: float) -> Tensor:  # a user's
    return x.flip(0)


def permute(x: Tensor, dims: tuple[int, ...]) -> Tensor:  # a user's
    return x


@pytest.mark.parametrize(
    "target", [torch.multiply, operator.mul, "__mul__", "__rmul__", aten.mul.Tensor, "divide", torch.clip]
)
def test_spellings_of_links(target: Any) -> None:
    assert is_link(_call(target, 2.0), 1)


@pytest.mark.parametrize("target", ["mul_", operator.imul, aten.mul_.Tensor, mul, "__rpow__", "cumsum"])
def test_no_links(target: Any) -> None:
    assert not is_link(_call(target, 2.0), 1)


@pytest.mark.parametrize("target", [torch.transpose, "swapaxes", torch.swapdims, aten.transpose.int])
def test_spellings_of_orders(target: Any) -> None:
    assert order_of(_call(target, 0, 1)) == (1, 0)


@pytest.mark.parametrize(
    ("target", "args"), [("transpose_", (0, 1)), ("t_", ()), ("swapaxes_", (0, 1)), (permute, ((1, 0),))]
)
def test_no_orders(target: Any, args: tuple[Any, ...]) -> None:
    assert order_of(_call(target, *args)) is None
