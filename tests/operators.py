"""Which operators run, those inside of loops included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

# What attention runs on a CPU, with masks or without.
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def operators(run: Callable[[], Any]) -> list[tuple[str, list[list[int]]]]:
    """Name and operands' shapes of every operator that runs.

    As the profiler records them: what it makes of its records takes longer than the step.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    records: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    return [(record.name(), record.shapes()) for record in records.events()]


def times_run(operator: str, run: Callable[[], Any]) -> int:
    """How often an operator runs, ``namespace::name``: a compiled graph may have fewer calls of it than the graph that was given."""
    return [name for name, _ in operators(run)].count(operator)


def widest_operand(run: Callable[[], Any]) -> int:
    """Elements of the largest operand of any operator that runs."""
    shapes = [
        shape for _, found in operators(run) for shape in found if all(isinstance(d, int) for d in shape)
    ]
    return max(map(math.prod, filter(None, shapes)))
