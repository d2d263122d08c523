"""Sizes, types and bytes: what is known of them before any tensor exists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.graph.values import tensors_of
from mst_fx.torch_api.symbols import expression as expression
from mst_fx.torch_api.symbols import hint_of
from mst_fx.torch_api.tensors import SIXTEEN_BITS as SIXTEEN_BITS


def row_bytes(tensor: torch.Tensor, rows: int) -> int:
    """Bytes a row of a tensor that holds ``rows`` rows (sizes by hint)."""
    return hint(tensor.numel()) * tensor.element_size() // max(1, rows)


def hint(size: Any) -> int:
    """The size that a symbolic integer has at capture.

    Raises:
        Refusal: if it depends on data (how many tokens are picked), and is not known then.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not is_known(size):
        raise Refusal(f"the size {size} depends on data")
    return int(hint_of(size))


def is_one(size: Any) -> bool:
    """Whether a size is 1 whatever the lengths are."""
    return isinstance(size, int) and size == 1


def is_same(size: Any, other: Any) -> bool:
    """Whether two sizes are one expression, without a guard."""
    return bool(expression(size) == expression(other))


def is_known(size: Any) -> bool:
    """Whether a size has a value at capture."""
    return hint_of(size) is not None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of a type are summed: float32 for 16-bit ones."""
    return torch.float32 if dtype in SIXTEEN_BITS else dtype


def settled(sizes: Iterable[Any]) -> tuple[Any, ...]:
    """Sizes, with ints for symbols that Dynamo has found to be one number since it made them (an input's width)."""
    return tuple(
        int(expr) if isinstance(size, torch.SymInt) and (expr := expression(size)).is_number else size
        for size in sizes
    )


def static_sizes(nodes: Iterable[fx.Node]) -> set[int]:
    """All sizes of the tensors of some nodes, but for symbolic ones."""
    return {size for n in nodes for t in tensors_of(n) for size in settled(t.shape) if isinstance(size, int)}
