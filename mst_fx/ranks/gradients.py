"""Gradients on their way back to an operator that need not be linear in them.

``mst_fx::true_gradient(x, group, ranks) -> x``
    what all ranks have whole. Its gradient is the mean over the ranks: that of one process.

In a graph that was cut, the gradient of a value on one rank is not that of one process: of what a rank has for itself it is ``ranks`` times as
large, of what all have it is a part of the sum. A derivative is linear, and the mean of all ranks' is right. What somebody wrote
by hand may clip the gradient that it is given, or quantise it.

An operator, which no rule knows: a region of rows ends at it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_fx.torch_api.collectives import all_reduce


@torch.library.custom_op("mst_fx::true_gradient", mutates_args=())
def true_gradient(x: Tensor, group: str, ranks: int) -> Tensor:
    """A copy.

    Args:
        group: by torch's name.
        ranks: how many it has.
    """
    return x.clone()


@true_gradient.register_fake
def _(x: Tensor, group: str, ranks: int) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
    _, ctx.group, ctx.ranks = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return all_reduce(grad.contiguous(), ctx.group) / ctx.ranks, None, None


true_gradient.register_autograd(_backward, setup_context=_setup)
