"""Dynamo: why it ended a graph, who gets what the graph returns, and how it is told to capture a frame anew.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.code_context import code_context
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import CompileContext, TracingContext

from mst_fx.torch_api.symbols import unguarded

# ``BackendCompilerFailed`` is what an exception of a backend reaches the user in: the command line takes it off.

# How the reasons begin that Dynamo gives; all that mst-fx knows of them by text.
_BREAKS = {"DDPOptimizer": "ddp", "Dynamic shape operator": "data"}


@dataclasses.dataclass(frozen=True)
class Ending:
    """Where and why Dynamo ended a graph.

    Attributes:
        kind: "" at the end of its function; "ddp" where DDP's optimizer cut it; "data" where data decide a shape; "break"
            at any other graph break.
        reason, place: Dynamo's reason, and "file:line" of the user's code; "" at the end of its function.
    """

    kind: str = ""
    reason: str = ""
    place: str = ""

    def __str__(self) -> str:
        """The end of a sentence about what leaves the graph."""
        if self.kind == "ddp":
            return "which DDP's optimizer has cut here"
        return f"which Dynamo broke at {self.place} ({self.reason})" if self.kind else ""


def ending_of(gm: fx.GraphModule) -> Ending:
    """Where and why Dynamo ended a graph.

    ``GraphModule.compile_subgraph_reason``, a ``GraphCompileReason``: nobody else says why. It has no kind but its text,
    whose first line is the ``gb_type`` of Dynamo's registry of graph breaks.
    """
    found: Any = getattr(gm, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return Ending()
    reason = [*found.reason.splitlines(), ""][0]
    kind = next((kind for start, kind in _BREAKS.items() if reason.startswith(start)), "break")
    stack = found.user_stack
    return Ending(kind, reason, f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "")


def copy_ending(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    """Lets :func:`ending_of` say of a copy of a graph what it says of the graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None:
        new.compile_subgraph_reason = reason


def goes_on(gm: fx.GraphModule) -> bool:
    """Whether Dynamo, or code that it compiles in part, gets the outputs of a graph, rather than the user."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and (reason.graph_break or not returns_to_user())


def returns_to_user() -> bool:
    """Whether the function that is being captured is the very one that was given to ``torch.compile``.

    Others are called by Python code that Dynamo did not capture as a whole. Told by the stack of Dynamo's callback
    (``_dynamo/convert_frame.py``, ``_dynamo/eval_frame.py``): nothing else says it.
    """
    frame: FrameType | None = sys._getframe()
    is_inside = False
    while frame is not None:
        place = frame.f_code.co_filename
        if is_inside and not place.endswith("convert_frame.py"):
            return place.endswith("eval_frame.py")
        is_inside = place.endswith("convert_frame.py") and frame.f_code.co_name == "__call__"
        frame = frame.f_back
    return True


# By which code that Dynamo compiles is entered: frames have no other mark.
_ENTRY = os.path.join("torch", "_dynamo", "eval_frame.py")
_WRITTEN = ("__compiled_fn", "__resume_at", "torch_dynamo_resume")


def enters_compiled_code(code: CodeType) -> bool:
    """Whether a frame on Python's stack is where Dynamo takes over."""
    return code.co_filename.endswith(_ENTRY)


def is_transformed(code: CodeType) -> bool:
    """Whether Dynamo wrote the code, which calls compiled graphs, or goes on in functions that do: by the names that
    it gives them."""
    return any(name.startswith(_WRITTEN) for name in (code.co_name, *code.co_names))


def compilation() -> tuple[Any, int] | None:
    """The id of the compilation that is under way, and which attempt at its frame it is; None outside of any.

    ``torch._guards.CompileContext``: a backend is told neither.
    """
    context = CompileContext.try_get()
    return None if context is None else (context.compile_id, context.attempt)


def compiled_module(found: Any) -> torch.nn.Module | None:
    """The module that ``torch.compile(module)`` has wrapped; None for what it has not made.

    By ``type()``, not ``isinstance()``: that would wake up lazy modules. The wrapper's class has no public name.
    """
    return found._orig_mod if type(found) is OptimizedModule else None


def wrapped_modules() -> list[torch.nn.Module]:
    """All modules that ``torch.compile`` has wrapped, and that are alive."""
    found = (compiled_module(x) for x in gc.get_objects())
    return [module for module in found if module is not None]


def until_reset() -> dict[Any, Any]:
    """A dict of ours that ``torch._dynamo.reset()`` forgets.

    In ``torch._dynamo.code_context``, Dynamo's own place for what belongs to a function until then. Nobody is told of a
    reset, so that whatever we kept ourselves would outlive it.
    """
    return code_context.get_context(until_reset.__code__)


# Functions of Dynamo's graphs that take a float as such: AOTAutograd makes a constant of it.
_TAKE_FLOATS = {
    F.embedding,
    F.scaled_dot_product_attention,
    F.layer_norm,
    F.rms_norm,
    F.group_norm,
    F.batch_norm,
    F.dropout,
    torch.dropout,
}


def _tensorifies() -> bool:
    """Whether AOTAutograd keeps floats dynamic; torch 2.11 has no switch for it."""
    return bool(getattr(dynamo_utils, "_is_tensorify_enabled", lambda: True)())


def settle_floats(graphs: Sequence[fx.Graph]) -> None:
    """Tells torch now which floats of a graph AOTAutograd will make constants of, whatever the passes do.

    A symbol that no node reads as a number (Dynamo has one for each float64 buffer without dimensions, such as
    Gemma's embedding scale in a float64 model) is noted, and the graph stays valid.

    ``torch._dynamo.symbolic_convert.TensorifyState`` and ``torch._dynamo.exc.TensorifyScalarRestartAnalysis`` are how
    AOTAutograd tells Dynamo to capture anew with some floats as constants (``tensorify_python_scalars``, which runs
    when our passes and bodies are done). What it is bound to say is said before.

    Args:
        graphs: of the program Dynamo captured, and of those that it refers to.

    Raises:
        TensorifyScalarRestartAnalysis: what AOTAutograd would raise for the sake of others (norms' ``eps``), and
            Dynamo awaits: it captures the frame anew.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None or mode.shape_env is None or not _tensorifies():
        return
    floats, read = _open_floats(mode.shape_env), _readings(graphs)
    constants = {name for name in floats if read.get(name, True)}
    for name in constants:
        TensorifyState.specialize(name)
    if constants & read.keys():
        raise TensorifyScalarRestartAnalysis


def _open_floats(shape_env: Any) -> set[str]:
    """The symbols of floats that are not said to become constants."""
    known = getattr(shape_env, "backed_var_to_val", {})
    floats = {str(symbol) for symbol, value in known.items() if isinstance(value, sympy.Float)}
    return {name for name in floats if not TensorifyState.should_specialize(name)}


def _readings(graphs: Sequence[fx.Graph]) -> dict[str, bool]:
    """For each symbol among the numbers of graphs whether every reader takes it as a float."""
    read: dict[str, bool] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        found = node.meta.get("example_value")
        if not isinstance(found, (torch.SymFloat, torch.SymInt, torch.SymBool)):
            continue
        takes = all(user.target in _TAKE_FLOATS for user in node.users)
        for name in map(str, unguarded(found).free_symbols):
            read[name] = takes and read.get(name, True)
    return read


def runs_under_dynamo() -> bool:
    """Whether Dynamo captures what runs here, also where it falls back to eager (``torch.compiler.is_compiling`` says no there)."""
    return get_eval_frame_callback() is not None
