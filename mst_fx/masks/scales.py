"""Numbers by which scores are multiplied or capped, in written-out attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import FLOAT_CASTS, operation
from mst_fx.graph.values import tensor_value, value
from mst_fx.masks.constants import number_of


def softcap_of(product: fx.Node | None) -> tuple[float, fx.Node | None]:
    """The softcap of ``tanh(scores / softcap) * softcap``, and the number that changes by which it is multiplied; 0, None: none."""
    tanh = product.args[0] if product is not None and product.args else None
    inner = tanh.args[0] if _is_tanh(tanh) and tanh.args else None  # type: ignore[union-attr]
    if product is None or not isinstance(inner, fx.Node):
        return 0.0, None
    changing = [is_scaling(node) for node in (product, inner)]
    if any(changing):  # no value of it may be written down, nor two be compared
        is_cap = all(changing) and product.args[1] is inner.args[1]
        is_cap = is_cap and (operation(product), operation(inner)) == ("mul", "div")
        return (1.0, product.args[1]) if is_cap else (0.0, None)  # type: ignore[return-value]
    cap, divisor = factor(product), factor(inner)
    is_softcap = cap is not None and divisor is not None and abs(divisor * cap - 1.0) <= 1e-6
    return (cap or 0.0, None) if is_softcap else (0.0, None)


def is_scaling(node: fx.Node) -> bool:
    """Whether a node is ``x * c`` or ``x / c`` with a number that changes: no value of it may be written down."""
    number = value(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], fx.Node) else None
    is_scaled = operation(node) in ("mul", "div") and not node.kwargs
    return is_scaled and isinstance(number, torch.SymFloat) and not expression(number).is_number


def factor(node: fx.Node | None) -> float | None:
    """``c`` of ``x * c`` and ``1 / c`` of ``x / c``."""
    if node is None or len(node.args) != 2 or node.kwargs:
        return None
    if operation(node) == "mul":
        return number_of(node.args[1])
    if operation(node) == "div":
        divisor = number_of(node.args[1])
        return None if not divisor else 1.0 / divisor
    return None


def is_wide_cast(node: fx.Node) -> bool:
    """Whether a node casts scores to a type in which a softmax is computed."""
    fake = tensor_value(node)
    is_wide = fake is not None and fake.dtype in (torch.float32, torch.float64)
    return operation(node) in FLOAT_CASTS and is_wide and isinstance(node.args[0], fx.Node)


def have_same_type(node: fx.Node, source: Any) -> bool:
    """Whether a value has the shape and the type of its source."""
    fake, inner = tensor_value(node), tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or inner is None or fake.dtype != inner.dtype:
        return False
    return list(map(expression, fake.shape)) == list(map(expression, inner.shape))


def _is_tanh(node: Any) -> bool:
    return isinstance(node, fx.Node) and operation(node) == "tanh"


def cast_for(*nodes: fx.Node) -> torch.dtype | None:
    """The wider type of scores, query and key on one hand, value and output on the other; None: all are of one, or autocast was there."""
    fakes = [tensor_value(node) for node in nodes]
    types = [fake.dtype for fake in fakes if fake is not None]
    first, last = types[0], types[-1]
    is_cast = len(types) == 5 and types == [first] * 3 + [last] * 2 and first != last
    return torch.promote_types(first, last) if is_cast else None
