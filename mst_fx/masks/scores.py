"""Products that are scores of an attention, by what they multiply, and those that only look so."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import MATMULS, PRODUCTS, operation
from mst_fx.graph.values import tensor_value, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.masks.places import order_of

_PRODUCTS = MATMULS | {"baddbmm", "einsum"}


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, or stacks of them."""
    return operation(node) in _PRODUCTS


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is a parameter, or made of one alone: transposed, cast."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return isinstance(value(node), torch.nn.Parameter)


def is_of_scores(node: fx.Node) -> bool:
    """Whether a softmax, or a product itself, is that of :func:`scores_of`."""
    return scores_of(node) is not None


def scores_of(node: fx.Node) -> fx.Node | None:
    """The product of two activations, ``[.., Q, D]`` and ``[.., D, K]``, behind a softmax, or a product itself; None: it is of logits, whose
    one factor is a matrix, or of experts', whose one factor is a stack of them."""
    fake = tensor_value(node)
    if fake is None:
        return None
    count, stack, seen = expression(fake.numel()), [node], set()
    while stack:
        current = stack.pop()
        found = tensor_value(current)
        if current in seen or found is None or expression(found.numel()) != count:
            continue
        seen.add(current)
        if is_product(current):
            factors = current.all_input_nodes[-2:]
            fakes = [x for x in map(tensor_value, factors) if x is not None]
            is_known = (
                len(fakes) == 2 and all(x.ndim > 2 for x in fakes) and not any(map(_is_weight, factors))
            )
            return current if is_known else None
        stack += current.all_input_nodes
    return None


def is_of_block(scores: fx.Node) -> bool:
    """Whether scores are those of a block of a sequence, of which mixers make one after the other or all at once
    ``[B, H, blocks, Q, K]``: as many in all as there are tokens, times the size of a block."""
    fake = tensor_value(scores)
    return fake is not None and (fake.ndim > 4 or any(map(_is_cut, scores.all_input_nodes[-2:])))


def _is_cut(factor: fx.Node) -> bool:
    """Whether a value is one of several of a larger one (``x[:, :, i]``, ``x[:, :, start:end]``), through what works on each number."""
    stack, seen = [factor], set()
    while stack:
        node = stack.pop()
        fake = tensor_value(node)
        if node in seen or fake is None:
            continue
        seen.add(node)
        index = node.args[1] if operation(node) == "getitem" and len(node.args) == 2 else None
        parts = index if isinstance(index, tuple) else (index,)
        if tensor_value(node.all_input_nodes[0] if node.all_input_nodes else node) is None:
            continue
        if any(isinstance(x, int) or (isinstance(x, slice) and x.stop is not None) for x in parts[2:3]):
            return True
        size = expression(fake.numel())
        stack += [x for x in node.all_input_nodes if operation(node) not in PRODUCTS and _numel(x) == size]
    return False


def _numel(node: fx.Node) -> Any:
    fake = tensor_value(node)
    return None if fake is None else expression(fake.numel())


def transposed(node: Any) -> fx.Node | None:
    """What a value ``[.., D, K]`` is, with its last two dimensions exchanged: of ``k.transpose(2, 3)``, ``k.mT``, ``k.permute(0, 1, 3, 2)``.

    None: it is no such thing, or was exchanged in place, so that what was there before is, too.
    """
    fake = tensor_value(node) if isinstance(node, fx.Node) else None
    if fake is None or operation(node) not in ("transpose", "permute", "getattr") or writes_in_place(node):
        return None
    *leading, row, column = range(fake.ndim)
    source = node.args[0] if node.args and order_of(node, fake.ndim) == [*leading, column, row] else None
    return source if isinstance(source, fx.Node) else None
