"""The form of a mask in words, for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from mst_fx.masks import formula, reach
from mst_fx.masks.formula import Compare, Holds, Mask
from mst_fx.masks.reach import CAUSAL, FULL, Vectors


def form_name(mask: Mask, table: Tensor | None, vectors: Vectors | None, queries: int) -> str:
    """The form in words, for the report: what is known when the graph is compiled."""
    if table is not None:
        form = int(table[0, 0])
        if form in (CAUSAL, FULL):
            return {CAUSAL: "causal", FULL: "full"}[form]
    if vectors is not None:
        exact = reach.interval_of(mask, vectors, queries, queries, torch.device("cpu"))
        if bool(exact.exact) and exact.lo.shape[-1] == queries == exact.hi.shape[-1]:
            place = torch.arange(queries)
            width = int((exact.hi - exact.lo).max())
            if bool((exact.hi == place + 1).all()):
                if bool((exact.lo == (place + 1 - width).clamp(min=0)).all()):
                    return f"window {width}"
                return "documents"
    parts = {_part_name(part) for part in formula.conjuncts(mask)}
    if "" in parts:
        return f"general: {formula.describe(mask)}"
    if len(parts - {"causal", "padding"}) > 0:
        parts.discard("causal")  # goes without saying
    return " + ".join(sorted(parts))


def _part_name(mask: Mask) -> str:
    match mask:
        case Holds(vector) if formula.is_key(vector):
            return "padding"
        case Compare("eq", left, right) if left and right:
            return "documents"
        case Compare("le", left, right, 0) | Compare("lt", left, right, 1) if left and right:
            return "causal"
        case Compare("gt" | "ge" as op, left, right, offset) if left and right and offset < 0:
            return f"window {-offset + (op == 'ge')}"
    return ""
