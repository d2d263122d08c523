"""An embedding whose gradient is summed in the weight's own type.

Inductor decomposes the gradient of an embedding into a scatter-add to a float32 table of the vocabulary's
size: 2 GiB for Llama3-8B, at the end of the backward pass, where memory is shortest. ATen's own
operator needs none. Only a custom op reaches it: taking the decomposition out of Inductor's table is
refused when the graph is lowered, and another table turns the caches off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("mst_fx::embedding", mutates_args=())
def embedding(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    """``weight[indices]``: [V, H] and any shape of int → [..., H]."""
    return torch.ops.aten.embedding.default(  # type: ignore[no-any-return]
        weight, indices, padding_idx
    )


@embedding.register_fake
def _(weight: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


@torch.library.custom_op("mst_fx::embedding_backward", mutates_args=())
def embedding_backward(tangent: Tensor, indices: Tensor, vocabulary: int, padding_idx: int) -> Tensor:
    """The gradient [V, H] of the weight."""
    return torch.ops.aten.embedding_dense_backward.default(  # type: ignore[no-any-return]
        tangent.contiguous(), indices, vocabulary, padding_idx, False
    )


@embedding_backward.register_fake
def _(tangent: Tensor, indices: Tensor, vocabulary: int, padding_idx: int) -> Tensor:
    return tangent.new_empty((vocabulary, tangent.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    weight, indices, ctx.padding_idx = inputs
    ctx.vocabulary = weight.shape[0]
    ctx.save_for_backward(indices)


def _backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return embedding_backward(tangent, indices, ctx.vocabulary, ctx.padding_idx), None, None


embedding.register_autograd(_backward, setup_context=_setup)
