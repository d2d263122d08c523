"""What Dynamo says of a compilation that is under way, and of what it has wrapped.

Tried with torch 2.13.0 (2.11.0 by its code):

- ``torch._guards.CompileContext``: ``torch.compiler`` has no public name for the frame that is compiled, or for how
  often Dynamo has begun with it anew.
- ``torch._dynamo.eval_frame.OptimizedModule``: what ``torch.compile(module)`` returns.
- ``torch._dynamo.exc.BackendCompilerFailed``: what Dynamo raises in the place of a backend's exception.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import CompileContext

__all__ = ["BackendCompilerFailed", "attempt", "compile_id", "wrapped_modules"]


def compile_id() -> str:
    """Of the compilation under way, e.g. "0/0"; "" outside of one."""
    return str(CompileContext.current_compile_id() or "")


def attempt() -> tuple[Hashable, int] | None:
    """The frame that is compiled, and how often Dynamo has begun with it anew; None outside of a compilation."""
    context = CompileContext.try_get()
    return (context.compile_id, context.attempt) if context else None


def wrapped_modules() -> list[nn.Module]:
    """All modules that ``torch.compile`` has wrapped, and that are alive."""
    # By type(), not isinstance(): that would wake up lazy modules.
    return [x._orig_mod for x in gc.get_objects() if type(x) is OptimizedModule]
