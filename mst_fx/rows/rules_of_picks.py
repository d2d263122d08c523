"""Rules of what picks elements by indices, and of losses, which pick by labels."""

from __future__ import annotations

from typing import Any

import torch

from mst_fx.rows.checks import check_along, pointwise
from mst_fx.rows.labels import Call, Label, Row, Rule, tensors, wrap

aten = torch.ops.aten


def _gather(call: Call) -> Label:
    source, along, index = call.args[:3]
    dim = call.row_dim(source)
    if dim is None or call.row_dim(index) != dim:
        raise call.refusal("picks from other rows")
    if wrap(along, source.ndim) <= dim:
        raise call.refusal("works along the rows or the batch")
    return Row(dim)


def _scatter(call: Call) -> Label:
    source, along, index, value = call.args[:4]
    dim = call.row_dim(source)
    row_dims = {call.row_dim(t) for t in (index, value) if isinstance(t, torch.Tensor) and t.ndim}
    if dim is None or row_dims != {dim} or wrap(along, source.ndim) <= dim:
        raise call.refusal("writes to other rows")
    return Row(dim)


def _index_fill(call: Call) -> Label:
    source, along, index, filled = call.args[:4]
    if any(call.label(t) is not None for t in (index, filled) if isinstance(t, torch.Tensor)):
        raise call.refusal("picks columns by row")
    return Row(check_along(call, source, [wrap(along, source.ndim)]))


def _index_select(call: Call) -> Label:
    source, along, index = call.args[:3]
    if call.label(index) is not None:
        raise call.refusal("picks columns by row")
    return Row(check_along(call, source, [wrap(along, source.ndim)]))


def _index(call: Call) -> Label:
    """``x[..., columns]``: one list of places, the same for each row."""
    source, indices = call.args[:2]
    picks = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    dims = [dim for dim, _ in picks]
    if len(picks) != 1 or picks[0][1].ndim != 1 or picks[0][1].dtype not in (torch.int32, torch.int64):
        raise call.refusal("picks elements of several dimensions, or by a mask")
    if call.label(picks[0][1]) is not None:
        raise call.refusal("picks columns by row")
    return Row(check_along(call, source, dims))


def _nll_loss(call: Call) -> list[Label]:
    """Per-row losses only; means and sums are rewritten to them before (:mod:`mst_fx.passes.sum_losses`)."""
    source, target, weight, reduction = call.args[:4]
    if (call.row_dim(source), call.row_dim(target)) != (0, 0) or source.ndim != 2:
        raise call.refusal("picks from other rows")
    if reduction != 0 or (weight is not None and call.label(weight) is not None):
        raise call.refusal("reduces over the rows")
    return [Row(0), None]


def _loss(position: int) -> Rule:
    """Rule for a loss that is pointwise if nothing is reduced (:mod:`mst_fx.passes.sum_losses` sees to that).

    Args:
        position: of ``reduction`` among the arguments.
    """

    def rule(call: Call) -> Label:
        if call.arg(position, "reduction", 1) != 0:
            raise call.refusal("reduces over the rows")
        return pointwise(call)

    return rule


def _log_sigmoid(call: Call) -> list[Label]:
    """The second result is what the gradient needs: as large as the first one on a CPU, empty elsewhere."""
    row = pointwise(call)
    return [row, row if tensors(call.out)[1].ndim == call.args[0].ndim else None]


def nll_loss_parts(
    source: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: Any = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = aten.nll_loss_forward.default(
        source, target, weight, reduction, ignore_index
    )
    return found


PICK_RULES: dict[Any, Rule] = {
    aten.gather.default: _gather,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.scatter_add.default), _scatter),
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    **dict.fromkeys((aten.index_fill.int_Scalar, aten.index_fill.int_Tensor), _index_fill),
    **dict.fromkeys(
        (
            aten.mse_loss.default,
            aten.smooth_l1_loss.default,
            aten.huber_loss.default,
            aten.soft_margin_loss.default,
        ),
        _loss(2),
    ),
    aten.binary_cross_entropy.default: _loss(3),
    aten.binary_cross_entropy_with_logits.default: _loss(4),
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.nll_loss_forward.default: _nll_loss,
}
