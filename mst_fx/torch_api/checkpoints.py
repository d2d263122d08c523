"""Checkpointed layers that Dynamo gives up, and runs eagerly.

``CheckpointHigherOrderVariable`` (``_dynamo/variables/higher_order_ops.py``): a graph break inside of a checkpointed
layer makes Dynamo run the whole layer eagerly, and in a loop over layers skip the function, so that no backend
is called that could say so; neither counters nor callbacks tell a checkpoint. Its ``_call_function`` (2.13) is
watched, or ``call_function``, whichever it has; ``tx.output.compiler_fn`` and ``innermost_backend`` say whose
compilation it is. Where a torch has none of these, nothing is said. Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch._dynamo.exc import Unsupported
from torch._dynamo.variables import higher_order_ops

from mst_fx.torch_api.dynamo import Ending
from mst_fx.torch_api.inductor import is_redirected

log = logging.getLogger("mst_fx")


def _is_ours(backend: Any) -> bool:
    """Whether a backend, in whatever Dynamo wraps it, is one of mst-fx."""
    found = eval_frame.innermost_backend(backend)
    found = getattr(found, "compiler_fn", found)  # of a backend that was given a mode or options
    if isinstance(found, torch._TorchCompileInductorWrapper):
        return is_redirected()
    return str(getattr(found, "__module__", "")).startswith("mst_fx.")


def _tell(tell: Callable[[Ending], None], tx: Any, error: Unsupported) -> None:
    """Tells of one layer; must not raise, since Dynamo is tracing."""
    try:
        is_fatal = tx.one_graph or getattr(
            tx, "error_on_graph_break", False
        )  # the user sees the error itself
        if is_fatal or not _is_ours(tx.output.compiler_fn):
            return
        stack = error.real_stack
        place = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        tell(Ending("break", [*str(error).splitlines(), ""][0], place))
    except Exception:
        log.debug("a checkpointed layer runs eagerly, and could not be told of", exc_info=True)


def watch_checkpoints(tell: Callable[[Ending], None]) -> None:
    """Makes Dynamo tell of checkpointed layers that it gives up where a backend of ours was to compile them: why, and where.

    For the rest of the process: to be called once.
    """
    variable: Any = getattr(higher_order_ops, "CheckpointHigherOrderVariable", None)
    names = [name for name in ("_call_function", "call_function") if name in vars(variable or object)]
    if not names:
        return
    before = getattr(variable, names[0])

    @functools.wraps(before)
    def call(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return before(self, tx, *args, **kwargs)
        except Unsupported as error:
            _tell(tell, tx, error)
            raise

    setattr(variable, names[0], call)
