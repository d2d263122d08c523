"""Sizes that change from batch to batch: what a graph may assume of them.

Whether a place fits in one chunk is decided at the sizes of the batch that a graph is compiled for. Where such
a size is symbolic, the decision becomes a guard, so that a longer batch compiles anew; a loop takes batches of
every size, and needs none.

How many graphs that makes: each bound (queries of attention, rows of MLPs, rows of a head) at most one more. Of one
changing size the bounds lie in order, and k of them make k + 1 cases. Of sizes that change apart (the
batch and the sequence) they would make the product, so what comes after a place that did not fit, and has
other sizes, becomes a loop without a guard.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch

from mst_fx.graph.sizes import expression, hint
from mst_fx.torch_api.symbols import bounds, guards_are_checked, promised_ranges


def changes(size: Any) -> bool:
    """Whether a graph is for more than one such size."""
    return not expression(size).is_number


@dataclasses.dataclass
class Bounds:
    """What the places of one program were found to need, in the order they are looked at."""

    _exceeded: list[set[sympy.Symbol]] = dataclasses.field(default_factory=list)

    def fits(self, size: Any, most: int) -> bool:
        """Whether a size is at most so many, now and whenever the graph runs.

        Raises:
            Refusal: if the size depends on data.
        """
        if not changes(size):
            return hint(size) <= most
        symbols = expression(size).free_symbols
        is_small = hint(size) <= most and all(symbols == others for others in self._exceeded)
        if is_small and _stays_small(size, most):
            return True
        self._exceeded.append(symbols)
        return False


def _stays_small(size: torch.SymInt, most: int) -> bool:
    """Whether a size that is small now is known to be, or can be guarded.

    No guard can stand where nobody would check it (a graph of ``torch.export``), where it breaks what the user
    promised of a size (``mark_dynamic`` with a range), or leaves one size of those that he wants to change.
    """
    known, symbols = bounds(size), expression(size).free_symbols
    if known.upper <= most:
        return True
    if known.lower >= most or not guards_are_checked(size) or symbols & promised_ranges(size):
        return False
    return bool(size <= most)
