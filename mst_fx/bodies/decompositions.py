"""How bodies are decomposed for Inductor, where torch's own decompositions cost memory or passes over logits.

A cross-entropy and its gradient, over logits ``[C, V]`` in bfloat16, become two kernels that read the logits
once each, and the second one writes over them::

    most, total = reduce(logits)                            # online softmax
    gradient = (exp(logits - lse) - (label == arange(V))) * scale

torch's decompositions scatter the labels into a float32 buffer ``[C, V]``, sum that buffer up again, and on a
GPU are fused to one kernel that reads the logits three times and cannot write over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.graph.formula import without_op
from mst_fx.graph.sizes import sum_dtype
from mst_fx.torch_api.inductor import decompositions, decompositions_of

aten = torch.ops.aten

# Aten keeps these whole; decomposed, the sums over rows inside can be accumulated in float32.
_ALWAYS = decompositions_of([aten.native_layer_norm_backward, aten._fused_rms_norm_backward])


def body_decompositions(inner: str) -> dict[Any, Any]:
    """The table with which ``make_fx`` traces a body that ``inner`` compiles."""
    always = {**_ALWAYS, torch.ops.mst_fx.with_gradient.default: without_op}
    if inner != "inductor":
        return always
    ours = {aten.nll_loss_backward.default: _nll_loss_backward, aten._log_softmax.default: _log_softmax}
    return always | decompositions(inner) | ours


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    wide = x.to(sum_dtype(x.dtype))
    most = torch.amax(wide, dim, keepdim=True)
    total = torch.log(torch.sum(torch.exp(wide - most), dim, keepdim=True))
    if x.is_cuda:  # a buffer of the sums is a border between the kernel that reduces and the one that writes
        most, total = torch.ops.mst_fx.buffer(most), torch.ops.mst_fx.buffer(total)
    found = wide - most - total
    return found if half_to_float else found.to(x.dtype)


def _nll_loss_backward(
    tangent: Tensor,
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    classes = torch.arange(log_probs.shape[-1], device=log_probs.device)
    counts = target != ignore_index
    scale = tangent / total_weight if reduction == 1 else tangent  # 1: mean
    if weight is not None:
        scale = scale * weight[torch.where(counts, target, 0)]
    scale = torch.where(counts, scale, 0.0).to(log_probs.dtype)
    return torch.where(target.unsqueeze(-1) == classes, -scale.unsqueeze(-1), 0.0)


def add_up_labels(graph: fx.Graph) -> None:
    """``where(label == arange(V), value, 0).sum(-1)`` → ``value``: a label is below V, or has the value 0."""
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        source = node.args[0]
        if source.target is not aten.where.self or node.args[1] not in ([1], [-1]):
            continue
        condition, value, other = source.args
        is_label = condition.target is aten.eq.Tensor and _counts_up(condition.args[1])
        if is_label and _is_zero(other) and value.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(value)


def _counts_up(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not torch.ops.prims.iota.default:
        return False
    return (node.kwargs["start"], node.kwargs["step"]) == (0, 1)


def _is_zero(node: fx.Node) -> bool:
    return node.target is aten.scalar_tensor.default and node.args == (0,)
