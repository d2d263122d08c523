"""Products with weights: which operands are rows and which a weight, how wide they are, how many rows a convolution has."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.declared import is_declared
from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.spelling import (
    ATTENTION,
    CONVOLUTIONS,
    MATRIX_PRODUCTS,
    is_of_library,
    multiplied,
    operation,
)
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.torch_api.ops import HigherOrderOperator

# Of two operands, all of which may hold rows.
ROW_PRODUCTS = MATRIX_PRODUCTS | ATTENTION


def convolution_rows(graph: fx.Graph) -> Iterator[Any]:
    """The numbers of rows of convolutions with a kernel of 1, whose rows lie behind the channels."""
    for node in graph.nodes:
        fake = tensor_value(node)
        weights = [n for n in node.all_input_nodes if isinstance(tensor_value(n), torch.nn.Parameter)]
        is_linear = operation(node) in CONVOLUTIONS and fake is not None and bool(weights)
        if is_linear and fake is not None and fake.ndim > 2 and _is_by_row(node, weights[0]):
            count: Any = fake.shape[0]
            for size in fake.shape[2:]:
                count = count * size
            if is_known(count):
                yield count


def weight_product(analysis: RowAnalysis, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The rows and the weight of a product with a constant matrix, or of a convolution with a kernel of 1."""
    if node.op not in ("call_function", "call_method"):
        return None
    is_convolution = operation(node) in CONVOLUTIONS
    if not is_convolution and operation(node) not in ROW_PRODUCTS and not analysis.states[node].matmuls:
        return None
    operands = multiplied(node)
    weights = [n for n in operands if analysis.states[n].constant and tensor_value(n).ndim >= 2]  # type: ignore[union-attr]
    others = [n for n in operands if not analysis.states[n].constant]
    if not weights or not others:
        return None
    if operation(node) in ATTENTION and others != operands[:1]:
        return None  # queries meet keys or values of rows
    if is_convolution and not _is_by_row(node, weights[0]):
        return None
    return others[0], weights[0]


def _is_by_row(convolution: fx.Node, weight: fx.Node) -> bool:
    """Whether a convolution has a kernel of 1 and one group: a linear on channels."""
    fake, kernel = tensor_value(convolution.all_input_nodes[0]), tensor_value(weight)
    assert kernel is not None
    return (
        fake is not None
        and fake.ndim == kernel.ndim
        and kernel.shape[1] == fake.shape[1]
        and all(size == 1 for size in kernel.shape[2:])
    )


def numel_of(node: fx.Node) -> int:
    """The number of elements of a value; 0 where data decide it."""
    fakes = tensors_of(node)
    return sum(hint(x.numel()) if is_known(x.numel()) else 0 for x in fakes)


def width_in(product: fx.Node) -> int | None:
    """Elements a row that go into a product: the dimension its weight contracts."""
    for node in multiplied(product):
        fake, out = tensor_value(node), tensor_value(product)
        if fake is None or out is None or fake.ndim < 2:
            continue
        dim = 1 if operation(product) in CONVOLUTIONS else -1
        return hint(fake.shape[dim]) if is_known(fake.shape[dim]) else None
    return None


def is_part(node: fx.Node) -> bool:
    """Whether a value is a part of a larger one: a slice, or a member of a split; not elements picked by tensors."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    picks = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    is_picked = any(isinstance(part, (fx.Node, list)) and not _is_number(part) for part in picks)
    return not is_picked and numel_of(node) < numel_of(node.args[0])


def _is_number(part: Any) -> bool:
    """Whether a part of an index is a size or another number of the graph."""
    return isinstance(part, fx.Node) and tensor_value(part) is None


def is_attention(node: fx.Node) -> bool:
    """Higher-order operators (flex attention, scans) and operators of libraries on several values of rows."""
    is_unknown = is_of_library(node) and not is_declared(node.target)
    return isinstance(node.target, HigherOrderOperator) or is_unknown
