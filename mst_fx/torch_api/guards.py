"""Guards on symbolic sizes: ``ShapeEnv.suppress_guards``, and that what a backend asks of a symbol is a guard of the frame.

Tried with torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def without_guards(mode: FakeTensorMode) -> Iterator[None]:
    """What runs on fakes inside of the block adds no guard."""
    if mode.shape_env is None:
        yield
        return
    with mode.shape_env.suppress_guards():
        yield


def guard_at_most(size: Any, most: int) -> None:
    """What is compiled now is not run with a larger size: Dynamo compiles anew then. Nothing for a number.

    Args:
        size: whose hint is at most ``most``.
    """
    assert bool(size <= most)
