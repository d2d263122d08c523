"""A step of the eager program, run on ``meta`` tensors: every storage is counted while it lives, every call by what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mst_fx.fit.costs import cost_of_call
from mst_fx.plan.costs import Cost, plus
from mst_fx.torch_api.gpu_attention import GpuAttention
from mst_fx.torch_api.storages import StorageMeter


@dataclasses.dataclass(frozen=True)
class EagerStep:
    """Forward and backward pass.

    Attributes:
        peak: bytes at the highest moment, beside parameters and inputs.
        cost: of the step.
    """

    peak: int
    cost: Cost


def recomputing_contexts() -> tuple[Any, Any]:
    """For torch's checkpointing (``context_fn``): what is made again attends by the same kernels."""
    return contextlib.nullcontext(), GpuAttention()


def eager_step(model: nn.Module, inputs: Mapping[str, Tensor]) -> EagerStep:
    """Runs a step.

    Args:
        model: on ``meta``, in training mode; if it is checkpointed, with :func:`recomputing_contexts`. It returns a loss.
        inputs: on ``meta``.
    """
    costs: list[Cost] = []

    def note(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, makes: bool) -> None:
        costs.append(cost_of_call(func, args, kwargs, result, makes))

    given = [*model.parameters(), *model.buffers(), *inputs.values()]
    meter = StorageMeter(given, note)
    with meter:
        with GpuAttention():
            loss = model(**inputs).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    return EagerStep(meter.peak, plus(costs))
