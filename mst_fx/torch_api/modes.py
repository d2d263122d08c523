"""Modes that a node, a body or a thread is under: autocast, grad mode, dispatch modes and keys, ``__torch_function__``.

Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

from mst_fx.torch_api.autograd import without_saved_tensors_hooks

# ``TorchDispatchMode`` is the one way to see every ATen operator that runs; torch's own documentation names it by its
# private module. ``enable_python_dispatcher`` makes operators on fakes with gradients take their composite parts apart
# in Python, symbolic sizes and all, as AOTAutograd does while it traces.

# What Dynamo writes into a graph where ``torch.autocast`` and ``torch.set_grad_enabled`` begin and end: found there, and
# written there by us. The public context managers are no functions of a graph.
ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled

# Runs its block without the dispatch keys of autocast, on all devices; ``torch.autocast(device, enabled=False)`` is for one.
without_autocast: Any = torch._C._DisableAutocast

# Runs its block on subclasses as if they had no ``__torch_function__``; ``torch._C.DisableTorchFunction`` would switch
# modes off too.
without_torch_function: Any = torch._C.DisableTorchFunctionSubclass

# The ``__torch_function__`` of a subclass that wants to hear of ATen operators only: ``torch.Tensor``'s own would give its
# results the subclass's type.
NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl


@functools.cache
def _neutral_keys() -> tuple[Any, Any]:
    """The dispatch keys a thread starts with: autograd on, autocast off."""

    def read() -> tuple[Any, Any]:
        return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(read).result()


@contextlib.contextmanager
def outside_of_kernels() -> Iterator[None]:
    """Runs its block as if not called from inside of an op's kernel.

    Bodies are traced and compiled when a loop first runs: below autograd, which must work in the trace.
    Another thread would be cleaner, and would wait forever: on CUDA a backward kernel runs on the
    device's autograd thread, which the gradient in the trace needs too. From that thread itself the
    engine takes it as a reentrant backward pass. ``torch._C._ForceDispatchKeyGuard`` alone sets the keys of a thread.
    """
    with (
        torch._C._ForceDispatchKeyGuard(*_neutral_keys()),
        torch.enable_grad(),
        without_saved_tensors_hooks(),
    ):
        yield


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Runs its block under no dispatch mode.

    ``torch.utils._python_dispatch._disable_current_modes``: deferred logits that are used first under a mode (selective
    checkpointing's, which counts operators) are not its business.
    """
    with _disable_current_modes():
        yield
