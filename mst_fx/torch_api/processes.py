"""Process groups: where their ranks leave words for each other, which errors are of a collective, and the backward pass in which one stands.

- ``ProcessGroup.get_group_store``: the store by which the ranks of a group met; ``torch.distributed`` has no public name for it.
- gloo raises plain ``RuntimeError`` with the path of its source, or the one text below; NCCL's errors have classes.
- ``CompiledFunction._backward_impl``: what AOTAutograd calls for a compiled backward pass, also of a graph from a cache. What compiles that pass could
  be wrapped instead, but not for those.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

_OF_GLOO = ("gloo/", "Application timeout caused pair closure")
_GUARDED = "_mst_fx_is_guarded"


def store_of(process_group: Any) -> Any:
    """The store that the ranks of a group share, with keys of its own."""
    return process_group.get_group_store()


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error says that other ranks did not come, or could not be reached."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _OF_GLOO)


def guard_backward(results: Any, guard: Callable[[], AbstractContextManager[None]]) -> None:
    """The compiled backward pass of what a compiled graph gave runs inside of a context from now on."""
    for x in results if isinstance(results, (list, tuple)) else [results]:
        kind: Any = getattr(type(getattr(x, "grad_fn", None)), "_forward_cls", None)
        if not hasattr(kind, "_backward_impl") or hasattr(kind, _GUARDED):
            continue

        def run(*args: Any, _inner: Any = kind._backward_impl) -> Any:
            with guard():
                return _inner(*args)

        kind._backward_impl = staticmethod(run)
        setattr(kind, _GUARDED, True)
