"""DTensors: the part of one that this process has, and one of the same kind around another part.

Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU). Nothing public makes a DTensor of a mesh of GPUs around memory of the host
(``DTensor.from_local`` copies it to the mesh's device); FSDP2 does, by the constructor, for its ``CPUOffloadPolicy``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # then there are none

    class DTensor(Tensor):  # type: ignore[no-redef]
        """No tensor is one."""


def is_shard(x: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(x) is DTensor


def local_of(x: Tensor) -> Tensor:
    """What this process has of a DTensor, not a copy of it; any other tensor itself."""
    return x._local_tensor if is_shard(x) else x  # type: ignore[attr-defined, no-any-return]


def around(local: Tensor, like: Tensor) -> Tensor:
    """A tensor that is ``like``, but for the memory of what this process has of it, and its device."""
    if not is_shard(like):
        return local
    make: Any = DTensor
    return make(local, like._spec, requires_grad=False)  # type: ignore[attr-defined, no-any-return]


def are_cut_alike(x: Tensor, y: Tensor) -> bool:
    """Whether both are DTensors of one mesh and with the same placements, or neither is one."""
    if not (is_shard(x) and is_shard(y)):
        return is_shard(x) == is_shard(y)
    return bool(x.device_mesh == y.device_mesh and x.placements == y.placements)  # type: ignore[attr-defined]
