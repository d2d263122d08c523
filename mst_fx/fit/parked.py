"""The step of an optimizer, whose states may be parked (:mod:`mst_fx.parking`): bytes here and there, and seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from mst_fx.parking.parked import cut_in_buckets
from mst_fx.plan.costs import Cost, Device

# Buckets on the device together: one leaves, one is updated, one comes.
_TOGETHER = 3


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parameters that are updated together.

    Attributes:
        states: bytes of their states that are on the host between steps.
        update: what it costs to update them.
    """

    states: int
    update: Cost


@dataclasses.dataclass(frozen=True)
class Stepping:
    """What an optimizer has, and how it steps.

    Attributes:
        resident: bytes of states that are always on the device.
        buckets: of all that is trained, in their order.
    """

    resident: int
    buckets: tuple[Bucket, ...]

    @property
    def host(self) -> int:
        """Bytes of states that are on the host between steps."""
        return sum(bucket.states for bucket in self.buckets)

    @property
    def peak(self) -> int:
        """Bytes of states on the device at the highest moment of a step."""
        sizes = [bucket.states for bucket in self.buckets]
        return self.resident + max(
            (sum(sizes[first : first + _TOGETHER]) for first in range(len(sizes))), default=0
        )

    def seconds(self, device: Device) -> float:
        """Of a step: copies run beside updates, in the order in which :class:`~mst_fx.parking.parked.Parking` waits for them."""
        came = updated = left = 0.0
        ends: list[tuple[float, float]] = []  # of each bucket, its update and its copy to the host
        for index, bucket in enumerate(self.buckets):
            copy = bucket.states / device.link
            started = max(ends[index - 2][0] if index > 1 else 0.0, ends[index - 3][1] if index > 2 else 0.0)
            came = max(came, started) + copy
            updated = max(updated, came, ends[index - 2][1] if index > 1 else 0.0)
            updated += bucket.update.seconds(device)
            left = max(left, updated) + copy
            ends.append((updated, left))
        return left


def stepping(trained: Sequence[Tensor], states: Sequence[int], host: int, size: int | None) -> Stepping:
    """How an optimizer steps.

    Args:
        trained: parameters, in its order.
        states: bytes of the states of each.
        host: bytes of the host that parked states may take; 0: none are parked.
        size: bytes of a bucket's states; None: all states are one bucket, as those of optimizers that are not torch's.
    """
    number = {id(parameter): index for index, parameter in enumerate(trained)}
    parts = cut_in_buckets(list(trained), list(states), sum(states) if size is None else size)
    resident = 0
    is_full = False
    buckets = []
    for part in parts:
        there = sum(states[number[id(parameter)]] for parameter in part)
        # What finds no place stays, and so does all that comes behind it.
        is_full = is_full or there > host
        host -= 0 if is_full else there
        resident += there if is_full else 0
        # Weights are read and written, gradients read; of states both.
        moved = 3 * sum(parameter.nbytes for parameter in part) + 2 * there
        buckets.append(Bucket(0 if is_full else there, Cost(moved=moved)))
    return Stepping(resident, tuple(buckets))
