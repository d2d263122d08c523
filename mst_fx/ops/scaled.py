"""A gradient times a scalar of another type, in one pass over its memory.

``mst_fx::scaled(gradient, tangent) -> gradient`` is what the derivative of ``mst_fx::loop_with_grad`` is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_fx.bodies.body import Body
from mst_fx.bodies.product import product_body
from mst_fx.graph.sizes import SIXTEEN_BITS
from mst_fx.ops.chunks import plain_mode
from mst_fx.torch_api.dynamo import until_reset

# Fewer elements are not worth a kernel of their own.
_LEAST = 2**20


def product(gradient: Tensor, tangent: Tensor) -> Tensor:
    """``gradient * tangent``, of the gradient's type; the tangent is not rounded to it first.

    On a GPU ATen multiplies two types element by element: 2.5 ms for the gradient of a head (128,256 x 4,096 in
    bfloat16) on an H200, where reading and writing it would take 0.5. So Inductor's kernel does it there.

    Args:
        gradient: of any shape.
        tangent: one element, float32 if the gradient has 16 bits.
    """
    count = gradient.numel()
    if gradient.is_cuda and gradient.dtype in SIXTEEN_BITS and gradient.is_contiguous() and count >= _LEAST:
        run = _body(gradient.dtype, tangent.dtype, gradient.device).compiled_forward({count}).run
        found: Tensor = run([count, gradient.view(-1), tangent.view(1)])[0]
        return found.view(gradient.shape)
    # With a dimension the tangent counts for the type of the product.
    return torch.mul(gradient, tangent.view(1), out=torch.empty_like(gradient))


def _body(*key: Any) -> Body:
    known = until_reset()
    if key not in known:
        known[key] = product_body(*key)
    return known[key]  # type: ignore[no-any-return]


@torch.library.custom_op(
    "mst_fx::scaled", mutates_args=(), schema="(Tensor gradient, Tensor tangent) -> Tensor"
)
def scaled(gradient: Tensor, tangent: Tensor) -> Tensor:
    """``gradient * tangent``, as an op of its own; the tangent is a scalar, float32 where that is wider.

    Inductor would make one kernel of all such products and hold every gradient twice at once. One call
    a gradient holds one twice: the saved one is freed before the next call.
    """
    with plain_mode():
        return product(gradient, tangent)


@scaled.register_fake
def _(gradient: Tensor, tangent: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)
