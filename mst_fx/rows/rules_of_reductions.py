"""Rules of what works along dimensions: sums and other reductions, softmaxes, sorts, norms."""

from __future__ import annotations

from typing import Any

import torch

from mst_fx.rows.checks import along_one, check_along
from mst_fx.rows.labels import SUMMED, Call, Label, Row, Rule, tensors, wrap

aten = torch.ops.aten


def _reduction(call: Call) -> Label:
    """Reductions over given dimensions; all of them when none is given."""
    source = call.args[0]
    is_norm = call.func in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
    which = call.arg(2 if is_norm else 1, "dim")
    if which is None or which == []:
        which = range(source.ndim)
    dims = {wrap(d, source.ndim) for d in ([which] if isinstance(which, int) else which)}
    return Row(check_along(call, source, sorted(dims, reverse=True)))


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


def _layer_norm(call: Call) -> list[Label]:
    """Normalises over the last dimensions; statistics keep the others."""
    source, shape = call.args[:2]
    dim = call.only_row_dim(source)
    if dim >= source.ndim - len(shape):
        raise call.refusal("normalises over the rows")
    return [Row(dim)] * len(tensors(call.out))


REDUCTION_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten._softmax.default,
            aten._log_softmax.default,
            aten.cumsum.default,
            aten.cumprod.default,
        ),
        along_one(1),
    ),
    aten.sort.default: along_one(1, -1),
    aten.sort.stable: along_one(2, -1),
    aten.topk.default: along_one(2, -1),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), _sum),
    aten.mean.default: _mean_of_all,
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
    **dict.fromkeys((aten.native_layer_norm.default, aten._fused_rms_norm.default), _layer_norm),
}
