"""A meter of the memory of a program that runs on ``meta`` tensors: no device, no bytes, but the sizes and the lives of all storages.

``torch.utils._python_dispatch.TorchDispatchMode``: what public code calls so, too (``torch.utils.flop_counter``).
Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What CUDA's caching allocator rounds to.
_BLOCK = 512

Call = Callable[[Any, Sequence[Any], Mapping[str, Any], Any, bool], None]


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside of the block, while they live.

    What asks whether all of something are (no padding, no packed positions) is answered that they are: ``meta`` tensors have no values.

    Args:
        given: tensors that are there already, and not counted.
        on_call: told of each call: the operator, its arguments, its result, and whether it made memory.

    Attributes:
        alive, peak: bytes.
    """

    def __init__(self, given: Iterable[Tensor], on_call: Call) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._on_call = on_call
        self._known = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        result = func(*args, **kwargs)
        made = [self._note(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._on_call(func, args, kwargs, result, any(made))
        return result

    def _note(self, found: Tensor) -> bool:
        storage = found.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)
        return True

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size
