"""Whether a tensor is what it was: by its version, and by its bits where versions do not tell.

``x.data``, NumPy, DLPack and storages write without a trace, and FSDP frees the storage of gathered weights, fills it
again after an optimizer step, and sees to it that their versions do not show it. So the bits of what somebody else can
reach are added up, along the last dimension and along the others: 1 GiB takes about a millisecond on a GPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mst_fx.torch_api.tensors import version_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_SMALL = 1 << 12  # elements of a tensor that is kept as it is

Bits = tuple[Tensor, ...]


def version(x: Tensor) -> int:
    """How often a tensor was written; inference tensors do not know (see :func:`mst_fx.logits.put_back._for_caller`)."""
    return -1 if x.is_inference() else version_of(x)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a tensor was.

    Attributes:
        version: how often it had been written.
        bits: their sums, where the version may not tell all.
    """

    version: int
    bits: Bits | None

    def is_of(self, x: Tensor) -> bool:
        """Whether the tensor is still the same; waits for the device if there are bits to compare."""
        if version(x) != self.version:
            return False
        return self.bits is None or all(map(torch.equal, self.bits, _sums_of_bits(x)))


def snapshot(x: Tensor, is_exposed: bool) -> Snapshot:
    """What a tensor is.

    Args:
        is_exposed: somebody else has it, and may write to it without a trace.
    """
    is_unseen = is_exposed and _has_plain_storage(x) and x.itemsize in _BITS and not x.is_quantized
    return Snapshot(version(x), _sums_of_bits(x) if is_unseen else None)


def is_freed(x: object) -> bool:
    """Whether a tensor's storage was freed behind its back: reading it would read any memory."""
    return (
        isinstance(x, Tensor)
        and _has_plain_storage(x)
        and x.numel() > 0
        and x.untyped_storage().nbytes() == 0
    )


def _sums_of_bits(x: Tensor) -> Bits:
    """Of each row and of each column, so that it matters where a bit is; of a small tensor all bits."""
    with torch.no_grad():
        bits = x.detach()
        bits = torch.view_as_real(bits) if bits.is_complex() else bits
        bits = bits.reshape(1, -1) if bits.ndim < 2 else bits
        bits = bits if bits.stride(-1) == 1 else bits.contiguous()
        if bits.numel() <= _SMALL:
            return (bits.view(_BITS[bits.itemsize]).clone(),)
        # Several at once is faster. Doubles go in halves: their exponents' sum would be a multiple of 2 ** 64.
        is_fit = bits.itemsize < 8 and bits.is_contiguous() and bits.shape[-1] * bits.itemsize % 8 == 0
        bits = bits.view(
            torch.int64 if is_fit and bits.storage_offset() * bits.itemsize % 8 == 0 else _BITS[bits.itemsize]
        )
        return bits.sum(-1, dtype=torch.int64), bits.sum(tuple(range(bits.ndim - 1)), dtype=torch.int64)


def _has_plain_storage(x: Tensor) -> bool:
    is_plain = type(x) in (Tensor, torch.nn.Parameter)
    return is_plain and x.layout == torch.strided and x.device.type != "meta"
