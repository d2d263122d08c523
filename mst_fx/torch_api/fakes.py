"""Fake tensors, and graphs that are traced with them.

``torch._subclasses`` and ``torch.fx.experimental`` have no stable counterpart: ``torch.export`` gives fakes of its own and
takes no mode of ours. Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.fx.experimental.proxy_tensor import make_fx as make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# ``FunctionalTensor`` is what AOTAutograd traces with, where writes are followed. ``make_fx`` traces a function to ATen, under
# a fake mode of ours.


def fake_mode(*, is_symbolic: bool) -> FakeTensorMode:
    """A fake mode of our own, apart from Dynamo's; real tensors among the operands become fakes.

    Args:
        is_symbolic: whether it may have sizes that are symbols.
    """
    return FakeTensorMode(shape_env=ShapeEnv() if is_symbolic else None, allow_non_fake_inputs=True)


def mode_of(fake: Any) -> FakeTensorMode:
    """The mode of a tensor that is a fake."""
    mode: FakeTensorMode = fake.fake_mode
    return mode


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode of the first fake among some values."""
    for found in values:
        if isinstance(found, FakeTensor):
            return found.fake_mode
    return None


def new_fake(mode: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    """What ``torch.empty_strided`` gives in a mode for a tensor's sizes, strides, dtype and device, in a quarter of the time."""
    with in_kernel_invocation_manager(mode), torch.no_grad():
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(mode, made, like.device)


def fake_view(mode: FakeTensorMode, base: torch.Tensor, like: torch.Tensor, offset: int) -> torch.Tensor:
    """What ``torch.as_strided`` gives in a mode: a fake with a tensor's sizes and strides in the memory of another one, in a fifth of the time."""
    with in_kernel_invocation_manager(mode), torch.no_grad():
        made = base.as_strided(like.shape, like.stride(), offset)
    return FakeTensor(mode, made, base.device)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Trying a node on folded rows may fail, which is an answer; torch logs it as an error, under a private name."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(_is_critical)  # a new level would clear the caches of all loggers
    try:
        yield
    finally:
        logger.removeFilter(_is_critical)


def _is_critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Runs its block on real tensors, whatever fake mode is active: constants of a graph are computed.

    ``unset_fake_temporarily``: what Dynamo itself does for them. Without the Python dispatcher, under which a collective of gloo takes the GIL
    and waits for a lock that gloo's thread holds while it waits for the GIL.
    """
    with unset_fake_temporarily(), torch.no_grad(), no_python_dispatcher():
        yield
