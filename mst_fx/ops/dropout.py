"""Dropout inside of a loop: which elements are dropped is a function of a key, the row and the column.

A random number generator gives each call the next numbers of its stream, so that a chunk's would depend on
the chunks before it, and those of the recomputation on how large *its* chunks are. Here the generator of the
device draws a key for each row, in the graph, once a call of a dropout (``torch.manual_seed`` rules it, and
activation checkpointing keeps it); an element is then dropped or kept by a hash of its row's key and of its
column. Inductor fuses that hash into the kernel that reads the mask, which is stored nowhere.

The numbers are not those that eager draws from the same seed, as under Inductor, whose are others too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 32
_MASK = 2**_BITS - 1


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits, one to one: ``lowbias32`` of github.com/skeeto/hash-prospector.

    Without its last step, which mixes the high half into the low one: where it counts the high bits decide.

    Args:
        x: int64, from 0 to 2^32 - 1. No product leaves 63 bits, where C++ would have no answer; so the
            second factor stands there less 2^32, which changes nothing in the lower half.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**_BITS)):
        x = ((x ^ torch.bitwise_right_shift(x, shift)) * factor) & _MASK
    return x


def row_keys(sizes: Sequence[int], device: torch.device) -> Tensor:
    """A key for each row of a tensor, drawn from the device's generator: int64, of shape ``sizes``, below 2^62.

    The high word is odd, so that the columns of a row are hashed from numbers that are all different.
    """
    return torch.randint(0, 2**62, sizes, device=device) | 2**_BITS


def rank_key(rank: int) -> int:
    """What the keys of a rank's rows differ by from those of other ranks that draw the same ones; their high word stays odd."""
    digest = hashlib.sha256(str(rank).encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**62 - 1) & ~(1 << _BITS)


def dropout_rows(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)`` on any subset of the rows of a tensor.

    Few operations: what takes more than 30 (``realize_opcount_threshold``) and is read twice Inductor keeps
    as a buffer, here of 8 bytes an element.

    Args:
        x: ``[..., W]``, of any floating type.
        keys: int64 ``[...]``, of :func:`row_keys`.
        p: the probability of a zero; above 0 and below 1.
    """
    columns, keys = torch.arange(x.shape[-1], device=x.device), keys.unsqueeze(-1)
    bits = mixed((columns * torch.bitwise_right_shift(keys, _BITS) + (keys & _MASK)) & _MASK)
    return x * (bits >= round(p * 2**_BITS)) * (1 / (1 - p))
