"""What is row-wise: a rule a dispatched ATen operator, applied while the operators run on fakes.

A *row* is one token. While a graph is analysed, and again when a body is traced, every tensor
that holds rows is *folded*: its leading dimensions that make up the rows become ``[1, ..., n]``,
with ``n`` a symbolic integer that equals no other size. :class:`RowTracer` watches the operators
run and gives each result a *label*:

``Row(dim)``
    Row ``i`` of the result depends on row ``i`` of the labelled operands and on unlabelled ones only.
``SUMMED``
    A sum over rows: the results of two chunks add up to the result of both.
``None``
    No dependence on any row.

An operator without a rule, or whose rule does not hold, raises :class:`~mst_fx.errors.Refusal`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import mst_fx.graph.formula  # noqa: F401  (registers the op)
from mst_fx.rows.labels import SUMMED, Call, Label, Matmul, Row, Rule, is_same_size, tensors, wrap
from mst_fx.torch_api.ops import same_overload

aten = torch.ops.aten


@functools.cache
def is_pointwise(func: Any) -> bool:
    """By tag; of an in-place form also by the tag of the other form (``masked_fill_`` has none itself)."""
    if torch.Tag.pointwise in func.tags:
        return True
    name = func.overloadpacket.__name__
    packet = getattr(aten, name[:-1], None) if func.namespace == "aten" and name.endswith("_") else None
    other = same_overload(packet, func)
    return other is not None and torch.Tag.pointwise in other.tags


def _check_along(call: Call, source: torch.Tensor, dims: Iterable[int]) -> int:
    """The row dimension of an operator that works along ``dims``, none of which may hold rows.

    Nor may one lie before the rows: the batch was folded away there, and a size of 1 stands for it. A
    composite operator may have moved that size elsewhere, so no dimension of size 1 is trusted.
    """
    row_dim = call.only_row_dim(source)
    for dim in dims:
        if dim == row_dim:
            raise call.refusal("works along the rows")
        if dim < row_dim or is_same_size(source.shape[dim], 1):
            raise call.refusal("may work along the batch")
    return row_dim


def pointwise(call: Call) -> Label:
    """Operands broadcast from the right: the rows must lie at one place, counted from the right."""
    inputs = tensors((call.args, call.kwargs))
    from_right = {t.ndim - d for t in inputs if (d := call.row_dim(t)) is not None}
    if len(from_right) != 1:
        raise call.refusal("combines rows along different dimensions")
    (place,) = from_right
    for tensor in inputs:
        at_rows = tensor.shape[-place] if tensor.ndim >= place else 1
        if call.row_dim(tensor) is None and not is_same_size(at_rows, 1):
            raise call.refusal("combines rows with an operand of as many shared values")
    return Row(tensors(call.out)[0].ndim - place)


def _same(call: Call) -> Label:
    """The result has the dimensions of the first operand."""
    return Row(call.only_row_dim(call.args[0]))


def _view(call: Call) -> Label:
    """A reshape that keeps the rows whole: the dimensions before them have the same product."""
    source, out = call.args[0], tensors(call.out)[0]
    dim = call.only_row_dim(source)
    before = _product(source.shape[:dim])
    product: Any = 1
    for d, size in enumerate(out.shape):
        if is_same_size(product, before) and is_same_size(size, call.tracer.rows):
            return Row(d)
        product = product * size
    raise call.refusal(f"mixes rows with other dimensions ({source.shape} to {out.shape})")


def _product(sizes: Sequence[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


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
    source = call.args[0]
    order = [wrap(d, source.ndim) for d in call.args[1]]
    return Row(order.index(call.only_row_dim(source)))


def _transpose(call: Call) -> Label:
    source = call.args[0]
    dim = call.only_row_dim(source)
    a, b = (0, source.ndim - 1) if call.func is aten.t.default else call.args[1:3]
    swap = {wrap(a, source.ndim): wrap(b, source.ndim), wrap(b, source.ndim): wrap(a, source.ndim)}
    return Row(swap.get(dim, dim))


def _expand(call: Call) -> Label:
    source, out = call.args[0], tensors(call.out)[0]
    return Row(call.only_row_dim(source) + out.ndim - source.ndim)


def _along(position: int, default: int = 0) -> Rule:
    """Rule for an operator that works along one dimension, which must not be the rows'."""

    def rule(call: Call) -> Label:
        source = call.args[0]
        along = wrap(call.arg(position, "dim", default), source.ndim)
        return Row(_check_along(call, source, [along]))

    return rule


def _slice(call: Call) -> Label:
    source, out = call.args[0], tensors(call.out)[0]
    along = wrap(call.arg(1, "dim", 0), source.ndim)
    whole = is_same_size(source.shape[along], out.shape[along]) and call.arg(4, "step", 1) == 1
    if whole and call.arg(2, "start", 0) in (0, None):
        return Row(call.only_row_dim(source))
    return Row(_check_along(call, source, [along]))


def _select(call: Call) -> Label:
    source = call.args[0]
    return Row(_check_along(call, source, [wrap(call.args[1], source.ndim)]))


def _unbind(call: Call) -> Label:
    source = call.args[0]
    return Row(_check_along(call, source, [wrap(call.arg(1, "dim", 0), source.ndim)]))


def _cat(call: Call) -> Label:
    tensors = call.args[0]
    dims = {call.row_dim(tensor) for tensor in tensors}
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


def _reduction(call: Call) -> Label:
    """Reductions over given dimensions; all of them when none is given."""
    source = call.args[0]
    is_norm = call.func in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
    which = call.arg(2 if is_norm else 1, "dim")
    if which is None or which == []:
        which = range(source.ndim)
    dims = {wrap(d, source.ndim) for d in ([which] if isinstance(which, int) else which)}
    return Row(_check_along(call, source, sorted(dims, reverse=True)))


def _sum(call: Call) -> Label:
    source = call.args[0]
    which = call.arg(1, "dim") if call.func is aten.sum.dim_IntList else None
    dims = {wrap(d, source.ndim) for d in which or range(source.ndim)}
    if call.only_row_dim(source) in dims:
        return SUMMED
    return _reduction(call)


def _mean_of_all(call: Call) -> Label:
    raise call.refusal(
        "averages over the rows, inside of a function that is not known as a sum of row losses"
    )


def _filled_later(call: Call) -> Label:
    raise call.refusal(
        "makes memory that the function then fills in place, with random numbers or a case for each"
    )


def _mm(call: Call) -> Label:
    left, right = call.args[-2:]
    rows = (call.row_dim(left), call.row_dim(right))
    if rows not in ((0, None), (None, 1)):
        raise call.refusal("multiplies rows with rows")
    (dim,) = (d for d in rows if d is not None)
    if call.func is aten.addmm.default:
        _check_bias(call, call.args[0], 2 - dim)
    _note_matmul(call, left if dim == 0 else right, contracted=1 - dim)
    return Row(dim)


def _bmm(call: Call) -> Label:
    left, right = call.args[-2:]
    rows = (call.row_dim(left), call.row_dim(right))
    if rows not in ((1, None), (None, 2), (0, 0)):
        raise call.refusal("multiplies rows with rows")
    dim = next(d for d in rows if d is not None)
    if call.func is aten.baddbmm.default:
        _check_bias(call, call.args[0], 3 - dim)
    if dim:
        _note_matmul(call, left if dim == 1 else right, contracted=3 - dim)
    return Row(dim)


def _mv(call: Call) -> Label:
    if (call.row_dim(call.args[0]), call.row_dim(call.args[1])) != (0, None):
        raise call.refusal("multiplies rows with rows")
    return Row(0)


def _check_bias(call: Call, bias: torch.Tensor, place: int) -> None:
    """A bias broadcasts over the rows, or has them at the same place as the product."""
    dim = call.row_dim(bias)
    if dim is not None and bias.ndim - dim != place:
        raise call.refusal("adds rows along another dimension")
    if dim is None and bias.ndim >= place and not is_same_size(bias.shape[-place], 1):
        raise call.refusal("adds an operand of as many shared values to rows")


def _note_matmul(call: Call, source: torch.Tensor, contracted: int) -> None:
    out = tensors(call.out)[0]
    widths = (_row_bytes(tensor, call.tracer.rows) for tensor in (source, out))
    call.tracer.matmuls.append(Matmul(*widths))


def _row_bytes(tensor: torch.Tensor, rows: torch.SymInt) -> int:
    sizes = [size for size in tensor.shape if not is_same_size(size, rows)]
    return int(_product(sizes)) * tensor.element_size()


def _layer_norm(call: Call) -> list[Label]:
    """Normalises over the last dimensions; statistics keep the others."""
    source, shape = call.args[:2]
    dim = call.only_row_dim(source)
    if dim >= source.ndim - len(shape):
        raise call.refusal("normalises over the rows")
    return [Row(dim)] * len(tensors(call.out))


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
    rows = {call.row_dim(t) for t in (index, value) if isinstance(t, torch.Tensor) and t.ndim}
    if dim is None or rows != {dim} or wrap(along, source.ndim) <= dim:
        raise call.refusal("writes to other rows")
    return Row(dim)


def _scatter_part(call: Call) -> Label:
    """slice_scatter, select_scatter: ``source`` with another tensor in a part of one dimension."""
    source, part, along = call.args[0], call.args[1], wrap(call.arg(2, "dim", 0), call.args[0].ndim)
    dim, dim_of_part = call.row_dim(source), call.row_dim(part)
    if dim is None or dim_of_part is None or dim_of_part != dim or part.ndim + (along > dim) < source.ndim:
        raise call.refusal("joins rows with something else")
    return Row(_check_along(call, source, [along]))


def _index_fill(call: Call) -> Label:
    source, along, index, filled = call.args[:4]
    if any(call.label(t) is not None for t in (index, filled) if isinstance(t, torch.Tensor)):
        raise call.refusal("picks columns by row")
    return Row(_check_along(call, source, [wrap(along, source.ndim)]))


def _index_select(call: Call) -> Label:
    source, along, index = call.args[:3]
    if call.label(index) is not None:
        raise call.refusal("picks columns by row")
    return Row(_check_along(call, source, [wrap(along, source.ndim)]))


def _index(call: Call) -> Label:
    """``x[..., columns]``: one list of places, the same for each row."""
    source, indices = call.args[:2]
    picks = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    dims = [dim for dim, _ in picks]
    if len(picks) != 1 or picks[0][1].ndim != 1 or picks[0][1].dtype not in (torch.int32, torch.int64):
        raise call.refusal("picks elements of several dimensions, or by a mask")
    if call.label(picks[0][1]) is not None:
        raise call.refusal("picks columns by row")
    return Row(_check_along(call, source, dims))


def _nll_loss(call: Call) -> list[Label]:
    """Per-row losses only; means and sums are rewritten to them before (mst_fx.canonical)."""
    source, target, weight, reduction = call.args[:4]
    if (call.row_dim(source), call.row_dim(target)) != (0, 0) or source.ndim != 2:
        raise call.refusal("picks from other rows")
    if reduction != 0 or (weight is not None and call.label(weight) is not None):
        raise call.refusal("reduces over the rows")
    return [Row(0), None]


def _loss(position: int) -> Rule:
    """Rule for a loss that is pointwise if nothing is reduced (:mod:`mst_fx.passes.canonical` sees to that).

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


def _constant_like(call: Call) -> Label:
    """new_zeros and the like take no values from their operand."""
    return call.tracer.label_of_constant(call.func, tensors(call.out)[0])


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
    return Row(_check_along(call, source, [wrap(d, source.ndim) for d in dims]))


def _with_gradient(call: Call) -> list[Label]:
    """Gives its first operands; the gradient was proved with the formula (mst_fx.function)."""
    return [call.label(tensor) for tensor in call.args[0]]


RULES: dict[Any, Rule] = {
    torch.ops.mst_fx.with_gradient.default: _with_gradient,
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
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _along(2)),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _cat),
    **dict.fromkeys(
        (
            aten._softmax.default,
            aten._log_softmax.default,
            aten.cumsum.default,
            aten.cumprod.default,
        ),
        _along(1),
    ),
    aten.sort.default: _along(1, -1),
    aten.sort.stable: _along(2, -1),
    aten.topk.default: _along(2, -1),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), _sum),
    aten.mean.default: _mean_of_all,
    **dict.fromkeys((aten.empty_like.default, aten.new_empty.default), _filled_later),
    **dict.fromkeys(
        (
            aten.mean.dim,
            aten.amax.default,
            aten.amin.default,
            aten.argmax.default,
            aten.argmin.default,
            aten.max.dim,
            aten.min.dim,
            aten.any.dim,
            aten.all.dim,
            aten.prod.dim_int,
            aten.logsumexp.default,
            aten.var.dim,
            aten.var.correction,
            aten.std.correction,
            aten.var_mean.correction,
            aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim,
        ),
        _reduction,
    ),
    **dict.fromkeys((aten.mm.default, aten.addmm.default), _mm),
    **dict.fromkeys((aten.bmm.default, aten.baddbmm.default), _bmm),
    aten.mv.default: _mv,
    **dict.fromkeys((aten.native_layer_norm.default, aten._fused_rms_norm.default), _layer_norm),
    aten.gather.default: _gather,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.scatter_add.default), _scatter),
    **dict.fromkeys((aten.slice_scatter.default, aten.select_scatter.default), _scatter_part),
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
    aten.constant_pad_nd.default: _pad,
    **dict.fromkeys((aten.flip.default, aten.roll.default), _along_given),
}

OF_SUMS = frozenset({aten.view.default, aten.alias.default, aten.detach.default})

CONSTANT_FILLS = frozenset(
    {
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.scalar_tensor.default,
    }
)
