"""Views of what Inductor has not laid out yet.

``torch._inductor.ir.View.create``, up to torch 2.13: of a buffer whose strides are open, and not contiguous by then (padded, as those of a length
that is no multiple of 8 are), it makes a view with the strides of that moment. Where the buffer then gets others, the view reads what is not its
own: wrong numbers of any ``torch.compile``, without a word. Later versions settle the strides first (pull request 192575 of pytorch), and so does
:func:`settled_views` here. Private, too: ``as_storage_and_layout`` and what asks for layouts.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from torch._inductor import ir

_create: Any = ir.View.create.__func__  # type: ignore[attr-defined]
# What ``create`` asks before it makes a buffer contiguous: by the second name from 2.13 on.
_is_contiguous: Any = getattr(
    ir, "is_dense_contiguous_storage_and_layout", ir.is_contiguous_storage_and_layout
)


@contextlib.contextmanager
def settled_views() -> Iterator[None]:
    """What is compiled inside of the block makes no view of a buffer whose strides may change."""
    with mock.patch.object(ir.View, "create", classmethod(_create_of_settled)):
        yield


def _create_of_settled(cls: Any, x: Any, new_size: Sequence[Any]) -> Any:
    """``View.create``, of a buffer whose strides are settled, unless it is one that can be settled as contiguous, as ``create`` does."""
    is_same = list(x.get_size()) == list(new_size)
    if not is_same and ir.is_storage_and_layout(x) and not _is_contiguous(x):
        ir.as_storage_and_layout(x, freeze=True)
    return _create(cls, x, new_size)
