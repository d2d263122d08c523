"""One name for all spellings of an operation, and none for what is not torch's."""

from __future__ import annotations

import operator
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_fx.graph import spelling

aten = torch.ops.aten


def softmax(x: Tensor) -> Tensor:  # a user's, whose name says nothing
    return x


def _node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    operands = [graph.placeholder(f"x{i}") if arg is Ellipsis else arg for i, arg in enumerate(args)]
    op = "call_method" if isinstance(target, str) else "call_function"
    return graph.create_node(op, target, tuple(operands), kwargs)


def _tensor() -> fx.Node:
    node = _node(torch.relu, ...)
    node.meta["val"] = torch.ones(2)
    return node


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mul", [torch.mul, torch.multiply, operator.mul, operator.imul, "mul", "mul_", "__mul__", "__rmul__", "__imul__", aten.mul.Tensor, aten.mul_.Tensor, torch.Tensor.mul]),
        ("div", [torch.div, torch.true_divide, operator.truediv, operator.itruediv, "div_", "divide"]),
        ("sub", [torch.sub, torch.subtract, operator.sub, operator.isub, "__isub__"]),
        ("rsub", [torch.rsub, "__rsub__", aten.rsub.Scalar]),
        ("bitwise_and", [operator.and_, operator.iand, torch.bitwise_and, "__and__", "bitwise_and_"]),
        ("bitwise_not", [operator.invert, operator.inv, "__invert__", torch.bitwise_not]),
        ("le", [operator.le, torch.le, torch.less_equal, "__le__", "less_equal_"]),
        ("softmax", [F.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default]),
        ("cross_entropy", [F.cross_entropy, aten.cross_entropy_loss.default]),
        ("matmul", [torch.matmul, operator.matmul, "matmul", "__matmul__", aten.matmul.default]),
        ("addmm", [torch.addmm, "addmm", aten.addmm.default, "addmm_"]),
        ("getitem", [operator.getitem, "__getitem__"]),
        ("transpose", ["transpose", "swapaxes", torch.swapdims, aten.transpose.int]),
        ("to", ["to", aten._to_copy.default]),
        ("", [softmax, int, operator.concat, types.SimpleNamespace, "".title]),
        ("pow", [torch.pow, "__pow__", "__ipow__", operator.ipow]),
        ("rpow", ["__rpow__"]),
        ("rmatmul", ["__rmatmul__"]),  # its factors stand the other way round
        ("batch_norm", [F.batch_norm, torch.batch_norm, aten.batch_norm.default]),
        ("mst_fx::loop", [torch.ops.mst_fx.loop.default, torch.ops.mst_fx.loop]),
    ],
)  # fmt: skip
def test_one_name(name: str, targets: list[Any]) -> None:
    assert {spelling.operation(_node(target, ...)) for target in targets} == {name}


def test_nodes_that_call_nothing_have_none() -> None:
    graph = fx.Graph()
    assert spelling.operation(graph.placeholder("softmax")) == ""
    assert spelling.operation(graph.call_module("softmax")) == ""


@pytest.mark.parametrize(
    "node",
    [
        _node(F.softmax, ..., -1),
        _node(F.softmax, ..., dim=-1),
        _node(torch.softmax, ..., -1),
        _node("softmax", ..., -1),
        _node("softmax", ..., dim=-1),
        _node(aten.softmax.int, ..., -1),
    ],
)
def test_arguments_by_name(node: fx.Node) -> None:
    assert spelling.argument(node, "dim") == -1
    assert spelling.argument(node, "dtype", "not given") == "not given"


@pytest.mark.parametrize(
    ("node", "probability"),
    [
        (_node(F.dropout, ...), 0.5),
        (_node(F.dropout, ..., 0.1, True), 0.1),
        (_node(F.dropout, ..., p=0.1, training=False), 0),
        (_node(torch.dropout, ..., 0.1, True), 0.1),
        (_node(aten.dropout.default, ..., p=0.1, train=False), 0),
        (_node(torch.relu, ...), None),
    ],
)
def test_dropouts(node: fx.Node, probability: float | None) -> None:
    assert spelling.dropout_probability(node) == probability


def test_factors_of_products() -> None:
    rows, bias = _node(torch.relu, ...), _node(torch.relu, ...)
    assert spelling.product_operands(_node(torch.addmm, bias, rows, bias)) == (rows, bias)
    assert spelling.product_operands(_node("matmul", rows, bias)) == (rows, bias)
    assert spelling.product_operands(_node("mul", rows, bias)) is None


@pytest.mark.parametrize(
    ("node", "dim"),
    [
        (_node("std", ..., True), None),  # unbiased
        (_node("std", ..., 1), 1),
        (_node("std", ..., axis=1), 1),
        (_node("sum", ..., -1, True), -1),
        (_node("sum", ..., dtype=torch.float32), None),
        (_node(torch.max, ..., _tensor()), None),
        (_node(torch.max, ..., 1), 1),
        (_node(torch.split, ..., 2, 1), 1),
        (_node(operator.getitem, ..., 1), None),
        (_node(torch.Tensor.__eq__, ..., 1), None),  # every object has one, ATen's namespace too
    ],
)
def test_arguments_of_overloads(node: fx.Node, dim: int | None) -> None:
    assert spelling.argument(node, "dim") == dim


@pytest.mark.parametrize(
    ("target", "twin"),
    [
        (operator.iadd, operator.add),
        (operator.iand, operator.and_),
        ("__imul__", operator.mul),
        ("__ior__", operator.or_),
        ("mul_", "mul"),
        ("absolute_", "absolute"),
        (torch.relu_, torch.relu),
        (aten.add_.Tensor, aten.add.Tensor),
        (operator.add, None),
        (operator.index, None),
        ("__add__", None),
        ("mul", None),
        ("uniform_", None),  # draws
        ("copy_", None),
        (torch.mul, None),
        (operator.setitem, None),
        ("__idiv__", None),
        (operator.ilshift, operator.lshift),
    ],
)
def test_out_of_place(target: Any, twin: Any) -> None:
    assert spelling.out_of_place(target) == twin
