"""The rule of operators that were declared row-wise (:mod:`mst_fx.declared`): what of the user's word can be checked, is."""

from __future__ import annotations

from typing import Any

import torch

from mst_fx.declared import Declaration
from mst_fx.rows.checks import product
from mst_fx.rows.labels import SUMMED, Call, Label, Matmul, Row, is_same_size, tensors
from mst_fx.torch_api.ops import schema_of


def declared(said: Declaration, call: Call) -> list[Label]:
    """All dimensions but the last of the first row argument lead, ``*``; others, and the results, begin with them."""
    names = [x.name for x in schema_of(call.func).arguments]
    given = {name: call.arg(index, name) for index, name in enumerate(names)}
    of_rows = [x for name in said.rows if isinstance(x := given[name], torch.Tensor)]
    shared = tensors([x for name, x in given.items() if name not in said.rows])
    if any(call.label(x) is not None for x in shared):
        raise call.refusal(f"is given rows in an argument that was not declared ({_names(said)})")
    dims = {call.row_dim(x) for x in of_rows}
    if len(dims) != 1 or None in dims:
        raise call.refusal(
            f"was declared row-wise, and is given no rows, or others, in one of {_names(said)}"
        )
    (dim,) = dims
    assert dim is not None
    lead = tuple(of_rows[0].shape[:-1])
    if dim >= len(lead):
        raise call.refusal(
            "was declared row-wise, and is given rows in the last dimension, which is one row's"
        )
    for x in of_rows:
        if not (_begins(x, lead) and x.ndim <= len(lead) + 1):
            raise call.refusal(
                f"was declared row-wise, and is given {tuple(x.shape)} beside {tuple(of_rows[0].shape)}"
            )
    outs = tensors(call.out)
    for position, out in enumerate(outs):
        is_sum = position in said.sums
        if is_sum and any(map(call.tracer.is_rows, out.shape)):
            raise call.refusal(f"was declared to give a sum over rows, and gives {tuple(out.shape)}")
        if not is_sum and not _begins(out, lead):
            raise call.refusal(
                f"was declared row-wise, and gives {tuple(out.shape)} for {tuple(of_rows[0].shape)}"
            )
    _note_product(call, of_rows[0], shared, [x for i, x in enumerate(outs) if i not in said.sums], dim)
    call.tracer.declared.append(call)
    return [SUMMED if position in said.sums else Row(dim) for position in range(len(outs))]


def _names(said: Declaration) -> str:
    return ", ".join(said.rows) or "none"


def _begins(x: torch.Tensor, lead: tuple[Any, ...]) -> bool:
    return x.ndim >= len(lead) and all(map(is_same_size, x.shape, lead))


def _note_product(
    call: Call, source: torch.Tensor, shared: list[torch.Tensor], outs: list[torch.Tensor], dim: int
) -> None:
    """A product with what all rows share may be where a bulge begins: one with a matrix, or that changes the width."""
    if not outs:
        return
    widths = [int(product(x.shape[dim + 1 :])) for x in (source, outs[0])]
    if any(x.ndim > 1 for x in shared) or (shared and widths[0] != widths[1]):
        in_bytes, out_bytes = (
            width * x.element_size() for width, x in zip(widths, (source, outs[0]), strict=True)
        )
        call.tracer.matmuls.append(Matmul(in_bytes, out_bytes))
