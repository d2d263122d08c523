"""Guards on symbolic sizes. ``ShapeEnv.suppress_guards``: tried with torch 2.13, in 2.11 by its code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def without_guards(mode: FakeTensorMode) -> Iterator[None]:
    """What runs on fakes inside of the block adds no guard."""
    if mode.shape_env is None:
        yield
        return
    with mode.shape_env.suppress_guards():
        yield
