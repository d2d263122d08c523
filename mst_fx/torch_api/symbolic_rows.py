"""A symbolic number of rows in a fake mode of its own: what is traced with it holds for chunks of all sizes.

``torch.export``'s dynamic shapes would do, but for one number without a whole program around it. Tried: torch 2.11, 2.13.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

# Stands for the number of rows while tracing: a prime that no size of the region equals.
_STAND_INS = (2053, 2063, 2069, 2081, 2083, 2087, 2089, 2099)


def symbolic_rows(avoid: Collection[int] = (), least: int | None = None) -> tuple[FakeTensorMode, Any]:
    """A fake mode with a shape environment of its own, and a symbolic integer ``n`` in it.

    Args:
        avoid: sizes that the number that stands in for ``n`` must not equal.
        least: the least that it shall be.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
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
        self._symbol = n.node._expr  # not ``expr``, which is a number where a guard says which
        self._guards = [guard.expr for guard in n.node.shape_env.guards]

    def failed(self, rows: int) -> list[Any]:
        """The guards that do not hold for a number of rows."""
        return [guard for guard in self._guards if guard.subs(self._symbol, rows) is sympy.false]
