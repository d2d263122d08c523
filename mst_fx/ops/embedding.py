"""An embedding whose gradient is summed in the weight's own type.

Inductor decomposes the gradient of an embedding into a scatter-add to a float32 table of the vocabulary's
size: 2 GiB for Llama3-8B, at the end of the backward pass, where memory is shortest. ATen's own
operator needs none. Only a custom op reaches it: taking the decomposition out of Inductor's table is
refused when the graph is lowered, and another table turns the caches off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import SIXTEEN_BITS
from mst_fx.graph.values import tensor_value


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


def keep_embeddings_whole(graph: fx.Graph) -> None:
    """Exchanges the trained 16-bit embeddings of a graph."""
    for node in outside_transforms(graph):
        if node.target is not F.embedding or len(node.args) < 2:
            continue
        indices, weight = node.args[:2]
        given = dict(
            zip(
                ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
                node.args[2:],
                strict=False,
            )
        )
        given |= node.kwargs
        fake = tensor_value(weight) if isinstance(weight, fx.Node) else None
        if fake is None or fake.dtype not in SIXTEEN_BITS or not fake.requires_grad:
            continue
        if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
            continue
        padding: Any = given.get("padding_idx")
        padding = -1 if padding is None else padding % fake.shape[0]
        with graph.inserting_before(node):
            new = add_call(graph, torch.ops.mst_fx.embedding.default, weight, indices, padding)
        new.meta = {**node.meta, **new.meta}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
