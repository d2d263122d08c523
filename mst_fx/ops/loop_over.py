"""A loop's backward pass over the memory of a tangent.

``mst_fx::loop_backward_over(…, over, result) -> gradients``
    is ``mst_fx::loop_backward``, but the row gradient of number ``result`` is written over ``over``, one of the tangents once more, chunk by
    chunk: the rows of a tangent are read when the same rows of the gradient are made, and never again. In its place, and from the last
    gradient up to :data:`MOST`, results are empty. (What writes to operands may not give a list to Inductor.) Nobody calls it
    but :mod:`mst_fx.torch_api.overwriting`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mst_fx.ops.loop import gradients_of
from mst_fx.torch_api.overwriting import MOST


@torch.library.custom_op(
    "mst_fx::loop_backward_over",
    mutates_args=("over",),
    schema=(
        "(Tensor[] row_inputs, Tensor[] shared, Tensor[] tangents, bool[] has_tangent, bool[] needs, str body_key,"
        f" int chunk_rows, Tensor(a!) over, int result) -> ({', '.join(['Tensor'] * MOST)})"
    ),
    tags=(torch.Tag.needs_fixed_stride_order,),  # no eager call has called it so
)
def loop_backward_over(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    tangents: list[Tensor],
    has_tangent: list[bool],
    needs: list[bool],
    body_key: str,
    chunk_rows: int,
    over: Tensor,
    result: int,
) -> tuple[Tensor, ...]:
    operands = (row_inputs, shared, tangents)
    return _apart(
        gradients_of(*operands, has_tangent, needs, body_key, chunk_rows, {result: over}), over, result
    )


@loop_backward_over.register_fake
def _(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    tangents: list[Tensor],
    has_tangent: list[bool],
    needs: list[bool],
    body_key: str,
    chunk_rows: int,
    over: Tensor,
    result: int,
) -> tuple[Tensor, ...]:
    wanted = [x for x, need in zip([*row_inputs, *shared], needs, strict=True) if need]
    found = [x if index == result else x.new_empty(x.shape) for index, x in enumerate(wanted)]
    return _apart(found, over, result)


def _apart(found: list[Tensor], over: Tensor, result: int) -> tuple[Tensor, ...]:
    """Results without the one that is written over an operand."""
    found[result] = over.new_empty(0)
    return (*found, *(over.new_empty(0) for _ in range(MOST - len(found))))
