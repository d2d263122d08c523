"""What many rules check: that an operator works along no dimension of the rows, and where operands have theirs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mst_fx.rows.labels import Call, Label, Row, Rule, is_same_size, tensors, wrap
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


def check_along(call: Call, source: torch.Tensor, dims: Iterable[int]) -> int:
    """The row dimension of an operator that works along ``dims``, none of which may hold rows.

    Nor, where the batch is folded away, may one lie before the rows: a size of 1 stands for it there. A
    composite operator may have moved that size elsewhere, so no dimension of size 1 is trusted.
    """
    row_dim = call.only_row_dim(source)
    for dim in dims:
        if dim == row_dim:
            raise call.refusal("works along the rows")
        if call.tracer.folds and (dim < row_dim or is_same_size(source.shape[dim], 1)):
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


def along_one(position: int, default: int = 0) -> Rule:
    """Rule for an operator that works along one dimension, which must not be the rows'."""

    def rule(call: Call) -> Label:
        source = call.args[0]
        along = wrap(call.arg(position, "dim", default), source.ndim)
        return Row(check_along(call, source, [along]))

    return rule


def product(sizes: Sequence[Any]) -> Any:
    """Of ints and symbolic integers."""
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
