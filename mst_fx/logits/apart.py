"""Rows of deferred logits that were computed alone, and that somebody outside knows.

In eager code they would be a view of the logits: what is written to them, the logits show. Here they have a storage of
their own, so a change is looked for before anything that overlaps with them is used. It may have come without a trace
(:mod:`mst_fx.logits.snapshot`), and through a tensor that is gone: the storage is held until it is looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mst_fx.logits.snapshot import snapshot, version
from mst_fx.logits.uses import plainly
from mst_fx.torch_api.tensors import storage_id, uses_of_storage

if TYPE_CHECKING:
    from mst_fx.logits.tensor import DeferredLogits


class Apart:
    """Rows that were computed alone.

    Args:
        part: the deferred logits whose value they are.
    """

    def __init__(self, part: DeferredLogits) -> None:
        assert part._value is not None
        with plainly():
            self._value: Tensor | None = part._value.detach()
            self._was = snapshot(part._value, is_exposed=True)
        self._before = part._version_of_value
        self.storage = storage_id(part._value)
        self.owner = weakref.ref(part._owner())
        self.row_ranges = part._row_ranges()
        self._is_changed = False

    def is_used(self) -> bool:
        """Whether somebody else still has the rows."""
        return self._value is not None and uses_of_storage(self._value) > 1

    def is_changed(self) -> bool:
        """Whether the rows are others than those that were computed; waits for the device."""
        if self._value is not None and not self._is_changed:
            with plainly():
                self._is_changed = version(self._value) != self._before or not self._was.is_of(self._value)
        return self._is_changed

    def is_done(self) -> bool:
        """Whether nobody can change the rows any more, nor has; lets go of their storage where nobody can."""
        if self.is_used():
            return False
        changed = self.is_changed()
        self._value, self.storage = None, 0
        return not changed

    def is_of(self, owner: DeferredLogits) -> bool:
        """Whether in eager code the rows would be a view of these logits, whose values are elsewhere."""
        return self.owner() is owner and owner._storage() != self.storage

    def concerns(self, member: DeferredLogits, family: Sequence[DeferredLogits]) -> bool:
        """Whether some of the rows are a member's too, under another storage, and are those of one of its family."""
        owner = self.owner()
        is_kin = member._storage() != self.storage and any(owner is m for m in family)
        return is_kin and overlap(self.row_ranges, member._row_ranges())


def overlap(one: Sequence[range], other: Sequence[range]) -> bool:
    """Whether two sets of rows, one range a leading dimension, may have a row in common."""
    return all(a and b and min(a) <= max(b) and min(b) <= max(a) for a, b in zip(one, other, strict=True))
