"""Symbolic sizes and numbers: their expressions, hints and guards, and what may be assumed of them.

``torch.SymInt`` is public and shows nothing of itself: comparing two of them, or asking for a value, adds a guard, or is
traced. Everything here reads ``SymInt.node`` and ``ShapeEnv``. Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def expression(size: Any) -> Any:
    """A size as a sympy expression: arithmetic on symbolic integers would be traced, or guarded.

    Of a symbol of which a guard says what number it is, the number.
    """
    return size.node.expr if isinstance(size, SYMBOLIC) else sympy.Integer(size)


def unguarded(size: Any) -> Any:
    """The expression of a size as it was made, a symbol also where a guard says since what number it is.

    ``SymNode._expr``: ``expr`` replaces what is known.
    """
    return size.node._expr


def hint_of(found: Any) -> Any:
    """The value that a size or number has at capture: of a symbolic one its hint, None if it depends on data.

    ``SymNode.hint``: ``int(size)`` would add a guard.
    """
    return found.node.hint if isinstance(found, SYMBOLIC) else found


def guards_of(size: torch.SymInt) -> list[Any]:
    """What the shape environment of a symbolic size has assumed so far, of whatever sizes.

    ``ShapeEnv.guards``: not public, and nothing public lists them.
    """
    return [guard.expr for guard in size.node.shape_env.guards]


def bounds(size: torch.SymInt) -> Any:
    """What is known of a symbolic size without a guard: ``lower`` and ``upper``. ``ShapeEnv.bound_sympy``."""
    return size.node.shape_env.bound_sympy(expression(size))


def guards_are_checked(size: torch.SymInt) -> bool:
    """Whether a guard that is added of a symbolic size now will be checked before the graph runs.

    Whether its shape environment is that of the compilation under way, of which ``torch._guards.TracingContext`` tells;
    those of ``torch.export`` and of :func:`mst_fx.rewrite` take guards too, and nobody looks at them.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return mode is not None and mode.shape_env is size.node.shape_env


def promised_ranges(size: torch.SymInt) -> set[Any]:
    """The symbols of the sizes of a capture of which the user promised a range, which no guard may narrow.

    ``ShapeEnv.tracked_fakes`` knows of what ``mark_dynamic(x, 1, min=…, max=…)`` was told: a guard inside of it is an
    error there.
    """
    found: set[Any] = set()
    for tracked in size.node.shape_env.tracked_fakes or ():
        if not isinstance(tracked.fake, torch.Tensor):
            continue
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", ())
        for each, constraint in zip(tracked.fake.shape, constraints, strict=False):
            if isinstance(constraint, StrictMinMaxConstraint) and isinstance(each, torch.SymInt):
                found |= expression(each).free_symbols
    return found
