"""An embedding whose gradient is summed in the weight's own type.

Inductor decomposes the gradient of an embedding into a scatter-add to a float32 table of the vocabulary's
size: 2 GiB for Llama3-8B, at the end of the backward pass, where memory is shortest. ATen's own
operator needs less: on a GPU the sums of each ten rows with one index, in float32, and memory for as many as there could be
(``EmbeddingBackwardKernel.cu``: 0.55 GiB for 32,768 tokens of width 4,096, 2.2 for 131,072). Some columns at a time, and it is
that much fewer. Only a custom op reaches it: taking the decomposition out of Inductor's table is
refused when the graph is lowered, and another table turns the caches off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What columns at a time may take beside the gradient: their gradient, their tangents, and their sums.
_SCRATCH = 2**28
_ROWS_A_SUM = 10
_FEW_ROWS = 3072  # are summed up without scratch
_LEAST_COLUMNS = 64  # and a multiple of them


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
    width = tangent.shape[-1]
    columns = columns_at_once(indices.numel(), vocabulary, width, tangent.dtype) if tangent.is_cuda else width
    return gradient(tangent, indices, vocabulary, padding_idx, columns)


def gradient(tangent: Tensor, indices: Tensor, vocabulary: int, padding_idx: int, columns: int) -> Tensor:
    """The gradient of :func:`embedding_backward`, so many columns at a time: the same to the bit."""
    if columns >= tangent.shape[-1]:
        return torch.ops.aten.embedding_dense_backward.default(  # type: ignore[no-any-return]
            tangent.contiguous(), indices, vocabulary, padding_idx, False
        )
    found = tangent.new_empty((vocabulary, tangent.shape[-1]))
    for some, of in zip(found.split(columns, -1), tangent.split(columns, -1), strict=True):
        some.copy_(gradient(of, indices, vocabulary, padding_idx, columns))
    return found


def columns_at_once(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> int:
    """The columns of a gradient that a GPU makes by one call: all, if that takes little beside the gradient."""
    if _bytes_of_sums(rows, vocabulary, width) <= _SCRATCH:
        return width
    parts = -(-_bytes_of_part(rows, vocabulary, width, dtype) // _SCRATCH)
    return min(width, max(1, width // parts // _LEAST_COLUMNS) * _LEAST_COLUMNS)


def scratch_bytes(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> int:
    """What :func:`embedding_backward` takes on a GPU beside operands and result."""
    columns = columns_at_once(rows, vocabulary, width, dtype)
    if columns == width:
        return _bytes_of_sums(rows, vocabulary, width)
    return _bytes_of_part(rows, vocabulary, columns, dtype)


def _bytes_of_part(rows: int, vocabulary: int, columns: int, dtype: torch.dtype) -> int:
    return (rows + vocabulary) * columns * dtype.itemsize + _bytes_of_sums(rows, vocabulary, columns)


def _bytes_of_sums(rows: int, vocabulary: int, columns: int) -> int:
    if rows <= _FEW_ROWS:
        return 0
    return (rows // _ROWS_A_SUM + min(rows, vocabulary)) * columns * 4


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
