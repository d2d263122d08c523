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
    of_rows, shared = _operands(said, call)
    dim = _row_dim(said, call, of_rows, shared)
    first = of_rows[0]
    lead = tuple(first.shape[:-1])
    if dim >= len(lead):
        raise call.refusal(
            "was declared row-wise, and is given rows in the last dimension, which is one row's"
        )
    for x in of_rows:
        if not (_begins(x, lead) and x.ndim <= len(lead) + 1):
            raise call.refusal(
                f"was declared row-wise, and is given {tuple(x.shape)} beside {tuple(first.shape)}"
            )
    labels: list[Label] = []
    for position, out in enumerate(tensors(call.out)):
        is_sum = position in said.sums
        if is_sum and any(map(call.tracer.is_rows, out.shape)):
            raise call.refusal(f"was declared to give a sum over rows, and gives {tuple(out.shape)}")
        if not is_sum and not _begins(out, lead):
            raise call.refusal(
                f"was declared row-wise, and gives {tuple(out.shape)} for {tuple(first.shape)}"
            )
        labels.append(SUMMED if is_sum else Row(dim))
    _note_product(
        call,
        first,
        shared,
        [x for x, label in zip(tensors(call.out), labels, strict=True) if label is not SUMMED],
        dim,
    )
    call.tracer.declared.append(call)
    return labels


def _operands(said: Declaration, call: Call) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that were declared to hold rows, and all others."""
    names = [x.name for x in schema_of(call.func).arguments]
    given = {name: call.arg(index, name) for index, name in enumerate(names)}
    of_rows = [x for name in said.row_args if isinstance(x := given[name], torch.Tensor)]
    return of_rows, tensors([x for name, x in given.items() if name not in said.row_args])


def _row_dim(said: Declaration, call: Call, of_rows: list[torch.Tensor], shared: list[torch.Tensor]) -> int:
    names = ", ".join(said.row_args) or "none"
    if any(call.label(x) is not None for x in shared):
        raise call.refusal(f"is given rows in an argument that was not declared to hold some ({names})")
    dims = {call.row_dim(x) for x in of_rows}
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None:
        raise call.refusal(f"was declared row-wise, and is given no rows, or others, in one of {names}")
    return dim


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
