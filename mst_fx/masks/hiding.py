"""Whether a bias may hide keys by a number, as padding that is added to scores does.

Such a bias is no harm where a mask hides keys by minus infinity. But where all keys that a finite mask lets through are hidden by a bias,
those that the mask hides count, too. And fused kernels give wrong gradients for a query of which all scores are that low: the logarithm
of its sum drowns in the number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mst_fx.graph.levels import Level
from mst_fx.graph.sizes import expression, is_one
from mst_fx.graph.spelling import EMBEDDINGS, EXPANDS, PRODUCTS, RESHAPES, operation
from mst_fx.graph.values import tensor_value, value
from mst_fx.torch_api.tensors import tree_leaves

# Biases that only weigh keys stay far below: a slope of 1 and ten thousand tokens are it.
_LARGE = 1e4
_LOGARITHMS = frozenset(("log", "log2", "log10", "logit"))
_MOVES = frozenset(("add", "sub", "rsub", "clamp", "remainder", "floor_divide"))
_SAY_SIZES = (
    RESHAPES | EXPANDS | {"arange", "getitem", "zeros", "ones", "new_zeros", "new_ones", "narrow", "size"}
)


def may_hide(bias: fx.Node, level: Level, heads: Any, keys: Any) -> bool:
    """Whether a bias is made with a large number, with a logarithm, or of numbers that the graph is given.

    Args:
        heads, keys: H and K. What is given and has one number a head is a slope.
    """
    stack, seen = [bias], set()
    while stack:
        node = level.resolve(stack.pop())
        fake, name = tensor_value(node), operation(node)
        if node in seen or fake is None or fake.dtype == torch.bool or name in PRODUCTS | EMBEDDINGS:
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            if _is_unknown(node, fake, heads, keys):
                return True
        elif name in _LOGARITHMS or (
            not _moves_positions(node, fake) and any(map(_is_large, _numbers(node)))
        ):
            return True
        elif name == "getitem":  # what is picked by is no bias
            stack.append(node.args[0])  # type: ignore[arg-type]
        else:
            stack += node.all_input_nodes
    return False


def _moves_positions(node: fx.Node, fake: Any) -> bool:
    """Whether the numbers of a node are sizes, or those by which positions are moved: as large as a sequence is long."""
    name = operation(node)
    return name in _SAY_SIZES or (name in _MOVES and not fake.is_floating_point())


def _numbers(node: fx.Node) -> list[float]:
    return [abs(x) for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, (int, float))]


def _is_large(number: float) -> bool:
    """Of numbers that are not 0 the smallest are divisors, and make large ones."""
    return not 1.0 / _LARGE < number < _LARGE and number != 0.0


def _is_unknown(node: fx.Node, fake: Any, heads: Any, keys: Any) -> bool:
    """Whether the numbers of an input may be any: those of parameters are learned, and those of slopes small."""
    if not fake.is_floating_point() or isinstance(value(node), torch.nn.Parameter):
        return False
    wide = [expression(size) for size in fake.shape if not is_one(size)]
    return wide != [expression(heads)] or wide == [expression(keys)]
