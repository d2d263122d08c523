"""Which operators run, those inside of loops included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def operators(run: Callable[[], Any]) -> list[tuple[str, list[list[int]]]]:
    """Name and operands' shapes of every operator that runs.

    As the profiler records them: what it makes of its records takes longer than the step.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    records: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    return [(record.name(), record.shapes()) for record in records.events()]


def widest_operand(run: Callable[[], Any]) -> int:
    """Elements of the largest operand of any operator that runs."""
    shapes = [
        shape for _, found in operators(run) for shape in found if all(isinstance(d, int) for d in shape)
    ]
    return max(map(math.prod, filter(None, shapes)))
