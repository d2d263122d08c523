"""Products of groups of rows with a matrix each, as operators of our own: bodies of experts are made of them.

``mst_fx::grouped_mm(x[n, K], stack[E, K, N], ends[E]) -> y[n, N]``: the rows ``ends[e - 1] <= i < ends[e]`` times matrix ``e``. Its gradient
of the stack is ``mst_fx::grouped_outer(x, dy, ends) -> [E, K, N]``, which loops add up expert by expert instead of running it.

They run ``torch.nn.functional.grouped_mm`` where its kernel takes the operands: bfloat16 on CUDA, in rows of whole 16 bytes. Elsewhere
one product a group runs, in any type, for which ``ends`` comes to the host. Groups may be empty.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ALIGNED_BYTES = 16


def _takes_kernel(*operands: Tensor) -> bool:
    return all(
        x.is_cuda
        and x.dtype == torch.bfloat16
        and all(size * x.element_size() % _ALIGNED_BYTES == 0 for size in x.shape[-1:])
        and x.data_ptr() % _ALIGNED_BYTES == 0
        for x in operands
    )


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *ends.tolist()]))


@torch.library.custom_op(
    "mst_fx::grouped_mm", mutates_args=(), schema="(Tensor x, Tensor stack, Tensor ends) -> Tensor"
)
def grouped_mm(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    x = x.contiguous()
    if _takes_kernel(x, stack if stack.stride(-1) == 1 else stack.mT):
        return torch.nn.functional.grouped_mm(x, stack, offs=ends)
    out = x.new_zeros(x.shape[0], stack.shape[2])
    for matrix, (start, end) in zip(stack, _bounds(ends), strict=True):
        if start < end:
            torch.mm(x[start:end], matrix, out=out[start:end])
    return out


@grouped_mm.register_fake
def _(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[2])


@torch.library.custom_op(
    "mst_fx::grouped_outer", mutates_args=(), schema="(Tensor x, Tensor y, Tensor ends) -> Tensor"
)
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = x.new_zeros(ends.shape[0], x.shape[1], y.shape[1])
    for result, (start, end) in zip(out, _bounds(ends), strict=True):
        if start < end:
            torch.mm(x[start:end].t(), y[start:end], out=result)
    return out


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def outer_into(result: Tensor, x: Tensor, y: Tensor, bounds: list[tuple[int, int]], ends: Tensor) -> None:
    """``result[e] = x[start:end].t() @ y[start:end]`` of each group, in place; zeros where a group is empty.

    Args:
        result: ``[groups, K, N]``.
        bounds: ``(start, end)`` of each group.
        ends: the ends, as int32 on the device.
    """
    if len(bounds) > 1 and _takes_kernel(x, y) and result.dtype == x.dtype:
        result.copy_(torch.nn.functional.grouped_mm(x.t(), y, offs=ends))
        for group, (start, end) in enumerate(bounds):
            if start == end:  # some kernels leave there what was in memory (pytorch #172439)
                result[group].zero_()
        return
    for group, (start, end) in enumerate(bounds):
        if start == end:
            result[group].zero_()
        else:
            torch.mm(x[start:end].t(), y[start:end], out=result[group])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, stack, ends = ctx.saved_tensors
    needs_x, needs_stack, _ = ctx.needs_input_grad
    return (
        grouped_mm(tangent, stack.mT, ends) if needs_x else None,
        grouped_outer(x, tangent, ends) if needs_stack else None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.mst_fx.grouped_mm)
def _flops(x: Any, stack: Any, ends: Any, *_: Any, **__: Any) -> Any:
    """Of the shapes: two for each row and element of its matrix."""
    return 2 * x[0] * stack[1] * stack[2]
