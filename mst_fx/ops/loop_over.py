"""A loop's backward pass over the memory of a tangent.

``mst_fx::loop_backward_over(…, over, result) -> gradients``
    is ``mst_fx::loop_backward``, but the row gradient of number ``result`` is written over ``over``, one of the tangents once more, chunk by
    chunk: the rows of a tangent are read when the same rows of the gradient are made, and never again. In its place, and from the last
    gradient up to :data:`MOST`, results are empty. (What writes to operands may not give a list to Inductor.) Nobody calls it
    but :mod:`mst_fx.torch_api.overwriting`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_fx.ops.loop import BACKWARD_SCHEMA, gradient_fakes, gradients_of
from mst_fx.torch_api.overwriting import MOST


@torch.library.custom_op(
    "mst_fx::loop_backward_over",
    mutates_args=("over",),
    schema=f"({BACKWARD_SCHEMA}, Tensor(a!) over, int result) -> ({', '.join(['Tensor'] * MOST)})",
    tags=(torch.Tag.needs_fixed_stride_order,),  # no eager call has called it so
)
def loop_backward_over(*args: Any) -> tuple[Tensor, ...]:
    *operands, over, result = args
    found = gradients_of(*[*operands, {result: over}])
    return _apart(found, over, result)


@loop_backward_over.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    row_inputs, shared, _, _, needs, *_, over, result = args
    return _apart(gradient_fakes(row_inputs, shared, needs), over, result)


def _apart(found: list[Tensor], over: Tensor, result: int) -> tuple[Tensor, ...]:
    """Results without the one that is written over an operand."""
    found[result] = over.new_empty(0)
    return (*found, *(over.new_empty(0) for _ in range(MOST - len(found))))
