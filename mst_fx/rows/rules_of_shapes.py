"""Rules of operators that move values, or make some: views, permutations, slices, joins, pads, fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mst_fx.rows.checks import along_one, check_along, product
from mst_fx.rows.labels import Call, Label, Row, Rule, is_same_size, tensors, wrap

aten = torch.ops.aten


def _same(call: Call) -> Label:
    """The result has the dimensions of the first operand."""
    return Row(call.only_row_dim(call.args[0]))


def _view(call: Call) -> Label:
    """A reshape that keeps the rows whole: the dimensions before them have the same product."""
    source, out = call.args[0], tensors(call.out)[0]
    dim = call.only_row_dim(source)
    before = product(source.shape[:dim])
    passed: Any = 1
    for d, size in enumerate(out.shape):
        if is_same_size(passed, before) and is_same_size(size, call.tracer.rows):
            return Row(d)
        passed = passed * size
    raise call.refusal(f"mixes rows with other dimensions ({source.shape} to {out.shape})")


def _unsqueeze(call: Call) -> Label:
    source = call.args[0]
    dim, at = call.only_row_dim(source), wrap(call.args[1], source.ndim + 1)
    return Row(dim + (at <= dim))


def _squeeze(call: Call) -> Label:
    source = call.args[0]
    dim = call.only_row_dim(source)
    which = call.arg(1, "dim")
    if which is None:
        which = range(source.ndim)
    dims = {wrap(d, source.ndim) for d in ([which] if isinstance(which, int) else which)}
    gone = [d for d in dims if is_same_size(source.shape[d], 1)]
    return Row(dim - sum(d < dim for d in gone))


def _permute(call: Call) -> Label:
    order = [wrap(d, call.args[0].ndim) for d in call.args[1]]
    return _reordered(call, order)


def _transpose(call: Call) -> Label:
    source = call.args[0]
    a, b = (0, source.ndim - 1) if call.func is aten.t.default else call.args[1:3]
    order = list(range(source.ndim))
    order[a], order[b] = order[b], order[a]
    return _reordered(call, order)


def _reordered(call: Call, order: Sequence[int]) -> Label:
    """The dimensions in another order.

    A size of 1 stands for each dimension that was folded into the rows: if there are several, no shape tells ``[B, N, S, H]`` from
    ``[N, B, S, H]``, which has its rows in another order. So they and the rows behind them have to keep theirs. One alone shows
    in where the rows of a node's result lie: einsum moves rows past it, and goes back.
    """
    dim = call.only_row_dim(call.args[0])
    if call.tracer.folded > 1 and [d for d in order if d <= dim] != list(range(dim + 1)):
        raise call.refusal("brings the rows into another order")
    return Row(order.index(dim))


def _expand(call: Call) -> Label:
    source, out = call.args[0], tensors(call.out)[0]
    return Row(call.only_row_dim(source) + out.ndim - source.ndim)


def _slice(call: Call) -> Label:
    source, out = call.args[0], tensors(call.out)[0]
    along = wrap(call.arg(1, "dim", 0), source.ndim)
    whole = is_same_size(source.shape[along], out.shape[along]) and call.arg(4, "step", 1) == 1
    if whole and call.arg(2, "start", 0) in (0, None):
        return Row(call.only_row_dim(source))
    return Row(check_along(call, source, [along]))


def _select(call: Call) -> Label:
    source = call.args[0]
    return Row(check_along(call, source, [wrap(call.args[1], source.ndim)]))


def _unbind(call: Call) -> Label:
    source = call.args[0]
    return Row(check_along(call, source, [wrap(call.arg(1, "dim", 0), source.ndim)]))


def _cat(call: Call) -> Label:
    dims = {call.row_dim(tensor) for tensor in call.args[0]}
    (dim, *others) = dims
    out_ndim = tensors(call.out)[0].ndim
    along = wrap(call.arg(1, "dim", 0), out_ndim)
    if others or dim is None:
        raise call.refusal("joins rows with something else")
    if call.func is aten.stack.default:
        return Row(dim + (along <= dim))
    if along == dim:
        raise call.refusal("works along the rows")
    return Row(dim)


def _scatter_part(call: Call) -> Label:
    """slice_scatter, select_scatter: ``source`` with another tensor in a part of one dimension."""
    source, part, along = call.args[0], call.args[1], wrap(call.arg(2, "dim", 0), call.args[0].ndim)
    dim, dim_of_part = call.row_dim(source), call.row_dim(part)
    if dim is None or dim_of_part is None or dim_of_part != dim or part.ndim + (along > dim) < source.ndim:
        raise call.refusal("joins rows with something else")
    return Row(check_along(call, source, [along]))


def _constant_like(call: Call) -> Label:
    """new_zeros and the like take no values from their operand."""
    return call.tracer.label_of_constant(call.func, tensors(call.out)[0])


def _filled_in_place(call: Call) -> Label:
    raise call.refusal(
        "makes memory that the function then fills in place, with random numbers or a case for each"
    )


def _pad(call: Call) -> Label:
    source, pad = call.args[:2]
    dim = call.only_row_dim(source)
    after = 2 * (source.ndim - 1 - dim)  # pads of the dimensions after the rows come first
    if any(amount != 0 for amount in pad[after:]):
        raise call.refusal("pads the rows")
    return Row(dim)


def _along_given(call: Call) -> Label:
    """flip, roll: the dimensions are a list."""
    source = call.args[0]
    dims = call.arg(2 if call.func is aten.roll.default else 1, "dims", [])
    if not dims:
        raise call.refusal("works along the rows")
    return Row(check_along(call, source, [wrap(d, source.ndim) for d in dims]))


SHAPE_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.permute.default: _permute,
    **dict.fromkeys((aten.transpose.int, aten.t.default), _transpose),
    aten.expand.default: _expand,
    **dict.fromkeys(
        (
            aten.alias.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.detach.default,
            aten._to_copy.default,
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
        ),
        _same,
    ),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _constant_like),
    **dict.fromkeys((aten.empty_like.default, aten.new_empty.default), _filled_in_place),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), along_one(2)),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _cat),
    **dict.fromkeys((aten.slice_scatter.default, aten.select_scatter.default), _scatter_part),
    aten.constant_pad_nd.default: _pad,
    **dict.fromkeys((aten.flip.default, aten.roll.default), _along_given),
}
