"""Tensors: what tells their storages apart, how often they were written, subclasses of them, trees of them.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef  # tells when a storage is gone
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

# ``torch.utils._pytree`` is what Dynamo and AOTAutograd flatten with. Others (optree) disagree with it about None, and about
# what a model's library has registered.

SIXTEEN_BITS = (torch.float16, torch.bfloat16)

_Subclass = TypeVar("_Subclass", bound=torch.Tensor)

# What ``x.to(...)`` was told: device, dtype, non_blocking, memory format. torch parses it in C++ only; ``nn.Module.to`` asks
# this too.
parse_to: Any = torch._C._nn._parse_to


def storage_id(tensor: Any) -> int:
    """What tells a tensor's storage from others that live now, of fakes too.

    ``StorageImpl``'s address: ``data_ptr()`` is 0, or an error, for those that have no memory.

    Raises:
        NotImplementedError, RuntimeError: if it has no storage to show.
    """
    return int(tensor.untyped_storage()._cdata)


def uses_of_storage(x: torch.Tensor) -> int:
    """How many tensors, and other objects, share a tensor's storage, itself included.

    ``torch._C._storage_Use_Count``: whether somebody else still has the storage of some rows of logits
    (:mod:`mst_fx.logits.apart`). A weak reference to the storage would say it too, and take what was written there with it.
    """
    storage = x.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor, or a view of it, was written.

    ``Tensor._version``, which torch's notes on autograd describe and no public name gives.

    Raises:
        RuntimeError: for inference tensors.
    """
    return tensor._version


def wrapper(
    kind: type[_Subclass], size: Sequence[Any], dtype: torch.dtype, device: torch.device
) -> _Subclass:
    """A tensor of a wrapper subclass, which has a shape and no storage of its own.

    ``torch.Tensor._make_wrapper_subclass``: the one way to make such a tensor, as torch's own examples do.
    """
    found: _Subclass = torch.Tensor._make_wrapper_subclass(kind, size, dtype=dtype, device=device)  # type: ignore[attr-defined]
    return found


def refuse_address(tensor: torch.Tensor) -> None:
    """Lets who asks for the memory of a tensor that has none get an error.

    ``torch._C._set_throw_on_mutable_data_ptr``: what torch does for its own fakes; an override in Python is passed by where
    C++ asks.
    """
    torch._C._set_throw_on_mutable_data_ptr(tensor)
