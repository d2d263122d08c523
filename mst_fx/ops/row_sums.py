"""Rows that are added to those of a sum, several to one.

torch's ``index_add_`` wants the type of the sum, so that 16-bit rows are widened in memory first, and runs over elements, not over
rows: on an H200 10.7 ms of the 37 of Qwen3-30B-A3B's experts at 32,768 tokens (benchmarks/experts-h200). The kernel here reads a row once
and adds it as it lies.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_BLOCK = 1024
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def add_rows(total: Tensor, places: Tensor, values: Tensor) -> None:
    """``total[places[i]] += values[i]`` of each ``i``, in place, in the type of ``total``.

    On CUDA the order of the additions differs from run to run, and with it the last bits; not under
    ``torch.use_deterministic_algorithms(True)``.

    Args:
        total: ``[N, ...]``, contiguous.
        places: ``[n]``, integers in ``[0, N)``.
        values: ``[n, ...]``, of a type no wider than that of ``total``.
    """
    if _HAS_TRITON and total.is_cuda and values.numel() and not torch.are_deterministic_algorithms_enabled():
        values = values.contiguous()
        width = values[0].numel()
        with torch.cuda.device(total.device):
            _add[values.shape[0], -(-width // _BLOCK)](total, places, values, width, _BLOCK)
    else:
        total.index_add_(0, places, values.to(total.dtype))


if _HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _add(total, places, values, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """A program adds ``BLOCK`` columns of one row."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_inside = columns < width
        place = tl.load(places + row).to(tl.int64)
        found = tl.load(values + row * width + columns, mask=is_inside).to(total.dtype.element_ty)
        tl.atomic_add(total + place * width + columns, found, mask=is_inside, sem="relaxed")
