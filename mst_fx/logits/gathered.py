"""All rows of logits of which each rank of a group has its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_fx.group import group_of
from mst_fx.logits.tensor import DeferredLogits


def gather_rows(logits: Tensor, mesh: Any) -> Tensor:
    """The logits ``[B, S, V]`` of a model that was compiled with ``sequence_parallel``, an ordinary tensor on all ranks of the group.

    All ranks have to call it. Differentiable: a loss of all rows that each rank adds to its own has the gradients that it has in one process.
    Logits of which a rank has all rows (without gradients, and of short sequences) are given back as they are.

    Args:
        logits: an output of the model.
        mesh: as the option ``sequence_parallel``.

    Raises:
        OptionError: if it is no 1-D mesh or process group.
        ValueError: if they are cut among the ranks of another group, or are a part of the logits.
    """
    group = group_of(mesh)
    rows = logits._source.of_rank if isinstance(logits, DeferredLogits) else None
    if rows is None or not isinstance(logits, DeferredLogits):
        return logits
    if rows.group != group.name:
        raise ValueError("the logits are cut among the ranks of another group than that of the mesh")
    if logits._parent is not None:
        raise ValueError(
            "these are a part of logits that are cut among ranks: gather all rows first, and take the part of them"
        )
    mine = logits._source.rows_of_rank()
    gather = torch.ops.mst_fx.gather_rows.default
    return gather(mine, rows.dim, rows.batch, list(rows.rows_of), rows.me, rows.group)  # type: ignore[no-any-return]
