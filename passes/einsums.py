"""Products of attention that ``einsum`` spells, as ``matmul``: what the attention pass knows.

Before, and with any other letters and order of dimensions::

    scores = einsum("bqhd,bkhd->bhqk", q, k)
    out = einsum("bhqk,bkhd->bqhd", softmax(scores, -1), v)

After::

    scores = matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3).transpose(2, 3))
    out = matmul(softmax(scores, -1), v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)

Left alone: all but products of two tensors ``[B, H, ·, ·]``, in some order of dimensions, over one of these.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, replace_with
from mst_fx.graph.levels import Level, all_levels
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import tensor_value


class _Product(NamedTuple):
    """``left @ right``: where the dimensions of a matmul are in the operands, and where the result's are in it."""

    left: fx.Node
    right: fx.Node
    left_order: list[int]
    right_order: list[int]  # rows of the transpose: [B, H, column, inner] if it is read so
    is_transposed: bool
    out_order: list[int]


def run(context: PassContext) -> bool:
    """Rewrites the einsums of a program."""
    changed = False
    for level in all_levels(Level(context.gm)):
        for node in outside_transforms(level.gm.graph):
            product = _product(node)
            if product is not None:
                with level.gm.graph.inserting_before(node):
                    replace_with(node, _written(product))
                changed = True
    return changed


def _product(node: fx.Node) -> _Product | None:
    """What a node multiplies; None: it is no such einsum."""
    operands = _operands(node)
    if operands is None:
        return None
    equation, left, right = operands
    terms = _terms(equation)
    if terms is None:
        return None
    first, second, out = terms
    shared, out_set = set(first) & set(second), set(out)
    batch = [x for x in out if x in shared & out_set]  # in memory, too, as einsum has it
    inner = [x for x in first if x in shared - out_set]
    row = [x for x in first if x in out_set - shared]
    column = [x for x in second if x in out_set - shared]
    if [len(x) for x in (batch, inner, row, column)] != [2, 1, 1, 1]:
        return None
    # The keys of scores are [B, H, K, D], the values of an output as well: the inner dimension is the last one of the former.
    is_transposed = second.index(inner[0]) > second.index(column[0])
    rest = [*column, *inner] if is_transposed else [*inner, *column]
    result = [*batch, *row, *column]
    return _Product(
        left,
        right,
        [first.index(x) for x in (*batch, *row, *inner)],
        [second.index(x) for x in (*batch, *rest)],
        is_transposed,
        [result.index(x) for x in out],
    )


def _terms(equation: str) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result; None: these are no four letters each."""
    ins, _, out = equation.replace(" ", "").partition("->")
    first, _, second = ins.partition(",")
    are_four = all(len(x) == 4 and len(set(x)) == 4 and x.isalpha() for x in (first, second, out))
    return (first, second, out) if are_four else None


def _operands(node: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
    if operation(node) != "einsum" or node.kwargs or not node.args:
        return None
    equation, *given = node.args
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = list(given[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation or len(given) != 2:
        return None
    left, right = given
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    fakes = [tensor_value(x) for x in (left, right, node)]
    if any(fake is None or fake.ndim != 4 for fake in fakes) or len({fake.dtype for fake in fakes}) > 1:  # type: ignore[union-attr]
        return None
    return equation, left, right


def _written(product: _Product) -> fx.Node:
    """The same as a matmul, at the graph's insertion point."""
    graph = product.left.graph
    left, right = _ordered(product.left, product.left_order), _ordered(product.right, product.right_order)
    if product.is_transposed:
        right = add_call(graph, torch.transpose, right, 2, 3)
    return _ordered(add_call(graph, torch.matmul, left, right), product.out_order)


def _ordered(node: fx.Node, order: list[int]) -> fx.Node:
    is_same = all(a == b for a, b in zip(order, itertools.count(), strict=False))
    call: Any = torch.permute
    return node if is_same else add_call(node.graph, call, node, order)
