"""Gradients of bodies: as terms, so that a weight's is summed in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.sizes import SIXTEEN_BITS

aten = torch.ops.aten
prims = torch.ops.prims


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of a weight's gradient: ``left @ right`` or ``value``, transposed where so marked.

    ``left``, ``right`` and ``value`` are positions among the backward body's outputs. Of a ``grouped`` one ``left`` and ``right`` hold
    rows, and each group of them adds ``left.t() @ right`` to its matrix of a stack.
    """

    left: int = -1
    right: int = -1
    left_transposed: bool = False
    right_transposed: bool = False
    value: int = -1
    transposed: bool = False
    grouped: bool = False


@dataclasses.dataclass(frozen=True)
class GradientPositions:
    """Where a backward body's outputs go.

    Attributes:
        first: position of the first row gradient; the forward outputs, if any, come before.
        terms: of each weight's gradient.
    """

    first: int
    terms: tuple[tuple[Term, ...], ...]


def as_leaves(inputs: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]


def gradients(
    leaves: Sequence[torch.Tensor],
    needs: Sequence[bool],
    outs: Sequence[torch.Tensor],
    has_tangent: Sequence[bool],
    tangents: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    given = iter(tangents)
    pairs = [(out, next(given)) for out, has in zip(outs, has_tangent, strict=True) if has]
    pairs = [(out, tangent) for out, tangent in pairs if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in wanted]
    outputs, grad_outputs = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, grads, strict=True)
    ]


# Gradient terms

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_CASTS = (aten._to_copy.default, prims.convert_element_type.default)


def split_into_terms(gm: fx.GraphModule, first: int, wide: Sequence[bool]) -> tuple[tuple[Term, ...], ...]:
    """Replaces the weight gradients among a body's outputs by the values their terms are made of.

    Args:
        gm: outputs: ``first`` values as they are, then one gradient a weight.
        wide: for each weight, whether its accumulator is wider than the weight (float32).
    """
    output = gm.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    outputs, gradients = values[:first], values[first:]
    positions: dict[fx.Node, int] = {}

    def position(node: fx.Node) -> int:
        if node not in positions:
            positions[node] = len(outputs)
            outputs.append(node)
        return positions[node]

    all_terms = []
    for gradient, is_wide in zip(gradients, wide, strict=True):
        terms = []
        for node, transposed in _summands(gradient, is_wide):
            if node.target is torch.ops.mst_fx.grouped_outer.default:
                left, right = node.args[1::-1] if transposed else node.args[:2]
                terms.append(Term(position(left), position(right), grouped=True))  # type: ignore[arg-type]
            elif node.target is aten.mm.default:
                left, right = node.args
                if transposed:  # (left @ right).t() == right.t() @ left.t()
                    left, right = right, left
                a, a_transposed = _strip_transposes(left, transposed)  # type: ignore[arg-type]
                b, b_transposed = _strip_transposes(right, transposed)  # type: ignore[arg-type]
                terms.append(Term(position(a), position(b), a_transposed, b_transposed))
            else:
                summand = _in_float32(gm.graph, node) if is_wide else node
                terms.append(Term(value=position(summand), transposed=transposed))
        all_terms.append(tuple(terms))
    output.args = (outputs,)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return tuple(all_terms)


def _summands(node: fx.Node, wide: bool, transposed: bool = False) -> list[tuple[fx.Node, bool]]:
    """The summands of a gradient, each with whether it must be transposed."""
    if _is_transpose(node):
        return _summands(node.args[0], wide, not transposed)  # type: ignore[arg-type]
    if node.target in VIEWS and _shape(node) == _shape(node.args[0]):
        return _summands(node.args[0], wide, transposed)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and not node.kwargs:
        left, right = node.args
        if all(isinstance(part, fx.Node) and _shape(part) == _shape(node) for part in (left, right)):
            return [*_summands(left, wide, transposed), *_summands(right, wide, transposed)]  # type: ignore[arg-type]
    if wide and node.target in _CASTS and _is_narrowing(node):
        return _summands(node.args[0], wide, transposed)  # type: ignore[arg-type]
    return [(node, transposed)]


def _is_transpose(node: Any) -> bool:
    """Whether a node transposes a matrix, or each matrix of a stack."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.t.default:
        return True
    ndim = len(_shape(node)) if node.target in (aten.permute.default, aten.transpose.int) else 0
    order = [*range(ndim - 2), ndim - 1, ndim - 2]
    if ndim not in (2, 3):
        return False
    if node.target is aten.permute.default:
        return [d % ndim for d in node.args[1]] == order  # type: ignore[operator, union-attr]
    return {d % ndim for d in node.args[1:]} == {ndim - 2, ndim - 1}  # type: ignore[operator]


def _strip_transposes(node: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    while _is_transpose(node):
        node, transposed = node.args[0], not transposed  # type: ignore[assignment]
    return node, transposed


def _shape(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _is_narrowing(node: fx.Node) -> bool:
    source, out = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return source == torch.float32 and out in SIXTEEN_BITS


def _in_float32(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A 16-bit sum over rows, redone in float32 so that partial sums are not rounded."""
    if node.target in VIEWS:
        source = _in_float32(graph, node.args[0])  # type: ignore[arg-type]
        if source is node.args[0]:
            return node
        return _derived(graph, node, (source, *node.args[1:]), node.kwargs)
    if node.target in _CASTS and _is_narrowing(node):
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.sum.dim_IntList and node.meta["val"].dtype in SIXTEEN_BITS:
        return _derived(graph, node, node.args, {**node.kwargs, "dtype": torch.float32})
    if node.target in _ADDED_BY_INDEX and node.meta["val"].dtype in SIXTEEN_BITS:
        zeros, places, values, *is_sum = node.args
        wide = [_cast(graph, each, torch.float32) for each in (zeros, values)]
        return _derived(graph, node, (wide[0], places, wide[1], *is_sum), node.kwargs)
    return node


_ADDED_BY_INDEX = (aten.index_put.default, aten._unsafe_index_put.default)


def _cast(graph: fx.Graph, node: Any, dtype: torch.dtype) -> fx.Node:
    with graph.inserting_after(node):
        new = graph.call_function(prims.convert_element_type.default, (node, dtype))
    new.meta["val"] = node.meta["val"].to(dtype)
    return new


def _derived(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    with graph.inserting_after(node):
        new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    new.meta["val"] = node.meta["val"].to(torch.float32)
    return new
