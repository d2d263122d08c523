"""A symbolic number of rows in a fake mode of its own: what is traced with it holds for chunks of all sizes.

``torch.export``'s dynamic shapes would do, but for one number without a whole program around it. Tried with torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from mst_fx.torch_api.fakes import fake_mode
from mst_fx.torch_api.symbols import guards_of, unguarded

# Stands for the number of rows while tracing: a prime that no size of the region equals.
_STAND_INS = (2053, 2063, 2069, 2081, 2083, 2087, 2089, 2099)


def symbolic_rows(avoid: Collection[int] = (), least: int | None = None) -> tuple[FakeTensorMode, Any]:
    """A fake mode with a shape environment of its own, and a symbolic integer ``n`` in it.

    Args:
        avoid: sizes that the number that stands in for ``n`` must not equal.
        least: the least that it shall be.
    """
    mode = fake_mode(is_symbolic=True)
    # Each node runs once in a mode: torch's cache of results would take longer to fill than it saves.
    mode.cache_enabled = False
    candidates = _STAND_INS if least is None else filter(sympy.isprime, itertools.count(least))
    stand_in = next(size for size in candidates if size not in avoid)
    with torch.device("meta"):
        vector = torch.empty(stand_in)
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode, mode.from_tensor(vector, symbolic_context=dynamic).shape[0]


class RowGuards:
    """What a shape environment has assumed of a symbolic number of rows so far."""

    def __init__(self, n: Any) -> None:
        self._symbol = unguarded(n)
        self._guards = guards_of(n)

    def failed(self, rows: int) -> list[Any]:
        """The guards that do not hold for a number of rows."""
        return [guard for guard in self._guards if guard.subs(self._symbol, rows) is sympy.false]
