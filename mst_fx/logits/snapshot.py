"""Whether a tensor is what it was: by its version, and by its bits where versions do not tell.

FSDP frees the storage of gathered weights and fills it again after an optimizer step, and sees to it that their
versions do not show it. So while ``torch.distributed`` is in use the bits of a weight are added up: 1 GiB takes
about half a millisecond on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mst_fx.torch_api.tensors import version_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def version(x: Tensor) -> int:
    """How often a tensor was written; inference tensors do not know (see :func:`mst_fx.logits.put_back._deferred`)."""
    return -1 if x.is_inference() else version_of(x)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a tensor was.

    Attributes:
        version: how often it had been written.
        bits: their sum, where the version may not tell all.
    """

    version: int
    bits: Tensor | None

    def is_of(self, x: Tensor) -> bool:
        """Whether the tensor is still the same; waits for the device if there are bits to compare."""
        if version(x) != self.version:
            return False
        return self.bits is None or torch.equal(self.bits, _sum_of_bits(x))


def snapshot(x: Tensor, is_weight: bool) -> Snapshot:
    is_unseen = is_weight and _has_plain_storage(x) and _is_distributed() and x.itemsize in _BITS
    return Snapshot(version(x), _sum_of_bits(x) if is_unseen else None)


def is_freed(x: Any) -> bool:
    """Whether a tensor's storage was freed behind its back: reading it would read any memory."""
    return _has_plain_storage(x) and x.numel() > 0 and x.untyped_storage().nbytes() == 0


def _sum_of_bits(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.detach().view(_BITS[x.itemsize]).sum(dtype=torch.int64)


def _has_plain_storage(x: Any) -> bool:
    is_plain = type(x) in (Tensor, torch.nn.Parameter)
    return is_plain and x.layout == torch.strided and x.device.type != "meta"


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
