"""Rules of products with shared matrices."""

from __future__ import annotations

from typing import Any

import torch

from mst_fx.rows.checks import product
from mst_fx.rows.labels import Call, Label, Matmul, Row, Rule, is_same_size, tensors

aten = torch.ops.aten


def _mm(call: Call) -> Label:
    left, right = call.args[-2:]
    row_dims = (call.row_dim(left), call.row_dim(right))
    if row_dims not in ((0, None), (None, 1)):
        raise call.refusal("multiplies rows with rows")
    (dim,) = (d for d in row_dims if d is not None)
    if call.func is aten.addmm.default:
        _check_bias(call, call.args[0], 2 - dim)
    _note_matmul(call, left if dim == 0 else right, contracted=1 - dim)
    return Row(dim)


def _bmm(call: Call) -> Label:
    left, right = call.args[-2:]
    row_dims = (call.row_dim(left), call.row_dim(right))
    if row_dims not in ((1, None), (None, 2), (0, 0)):
        raise call.refusal("multiplies rows with rows")
    dim = next(d for d in row_dims if d is not None)
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
    widths = (_row_bytes(tensor, call) for tensor in (source, out))
    call.tracer.matmuls.append(Matmul(*widths))


def _row_bytes(tensor: torch.Tensor, call: Call) -> int:
    sizes = [size for size in tensor.shape if not call.tracer.is_rows(size)]
    return int(product(sizes)) * tensor.element_size()


PRODUCT_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.mm.default, aten.addmm.default), _mm),
    **dict.fromkeys((aten.bmm.default, aten.baddbmm.default), _bmm),
    aten.mv.default: _mv,
}
