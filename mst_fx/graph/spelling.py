"""What a node calls, however it is spelled."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten


_DROPOUTS = {F.dropout: 0.5, torch.dropout: None, aten.dropout.default: None}


def dropout_probability(node: fx.Node) -> float | None:
    """The probability with which a dropout drops, 0 when not training; None for other nodes."""
    if node.target not in _DROPOUTS:
        return None
    default = _DROPOUTS[node.target]
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", default)
    training = (
        node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    )
    if training is False:
        return 0.0
    return float(p) if isinstance(p, (int, float)) and training is True else None


def is_identity_dropout(node: fx.Node) -> bool:
    """Whether a dropout is the identity: probability 0, or not training."""
    return dropout_probability(node) == 0


MATRIX_PRODUCTS = {
    F.linear: (0, 1),
    aten.linear.default: (0, 1),
    torch.matmul: (0, 1),
    operator.matmul: (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    torch.mm: (0, 1),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    torch.addmm: (1, 2),
    aten.addmm.default: (1, 2),
    "addmm": (1, 2),
    torch.einsum: (1, 2),
}
