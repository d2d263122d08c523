"""Operators as objects: what kinds there are, and what the schema of one says.

``torch.ops.aten.add.Tensor`` has a public name and a private class. ``torch.library`` registers operators and shows none.
Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

from typing import Any

from torch._library.custom_ops import CustomOpDef
from torch._ops import HigherOrderOperator as HigherOrderOperator  # flex attention, checkpoints, scans
from torch._ops import OpOverload as OpOverload  # aten.add.Tensor
from torch._ops import OpOverloadPacket as OpOverloadPacket  # aten.add


def operator_of(op: Any) -> Any:
    """The operator that an operator, a packet of one, or what ``torch.library.custom_op`` gave stands for; None: none, or one of several.

    ``CustomOpDef._opoverload``.
    """
    if isinstance(op, OpOverloadPacket):
        names = op.overloads()
        return getattr(op, names[0]) if len(names) == 1 else None
    if isinstance(op, CustomOpDef):
        return op._opoverload
    return op if isinstance(op, OpOverload) else None


def schema_of(target: Any) -> Any:
    """The schema of an operator (``arguments``, ``is_mutable``); None of what is no operator, or a packet of them.

    ``OpOverload._schema``: no public name tells which arguments are written to.
    """
    return getattr(target, "_schema", None)


def same_overload(packet: Any, operator: Any) -> Any:
    """The operator of a packet that takes the same arguments as one of another: of ``add``, that of ``add_.Tensor``;
    None if there is none. ``OpOverload._overloadname``."""
    return getattr(packet, operator._overloadname, None)
