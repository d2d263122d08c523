"""Autograd: what it saves, and how long one backward pass lives.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """Hides the user's ``saved_tensors_hooks`` from what autograd saves inside of the block: of fakes, and
    of values that live and die inside of an operator.

    ``torch._C._autograd._saved_tensors_hooks_set_tracing``: what AOTAutograd itself does while it traces.
    ``torch.autograd.graph.disable_saved_tensors_hooks`` raises where there are hooks, and hooks of our own may not be
    pushed where somebody else has disabled them.
    """
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


def keep_through_backward(thing: object) -> None:
    """Keeps something alive until the backward pass that is under way has ended, or has raised.

    ``torch.autograd.Variable._execution_engine.queue_callback``: what DDP and FSDP call; the only thing of ours that
    lives as long as one backward pass, also one that raises. What is called at its end, and what the pass drops when it is over, is
    written in C: the thread that began the pass looks for signals in the first function of Python's behind it, and if that is one that runs
    when something dies, Ctrl-C is raised there and goes no further.

    Raises:
        RuntimeError: outside of a backward pass.
    """
    kept = [thing]
    torch.autograd.Variable._execution_engine.queue_callback(kept.clear)  # type: ignore[attr-defined]


def is_checkpointed() -> bool:
    """Whether what autograd saves now is counted by a non-reentrant checkpoint, by hooks of its own.

    ``torch._C._autograd._top_saved_tensors_default_hooks``: whose hooks they are is told by nothing else.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__module__
