"""Vectors of positions that count tokens one by one, and where they start."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from mst_fx.graph.levels import Level
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import CASTS, COPIES, EXPANDS, operation
from mst_fx.graph.values import storage_key, tensor_value
from mst_fx.masks.constants import evaluated

# What counts tokens without rounding.
EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
_VIEWS_OF_VECTORS = CASTS | COPIES | EXPANDS | {"getitem", "unsqueeze", "view", "reshape", "squeeze"}


def first_position(node: fx.Node, level: Level, mutated: Collection[int]) -> int | None:
    """The first position of a vector that counts tokens; None: it is no such vector."""
    shift, current = 0, level.resolve(node)
    while True:
        fake = tensor_value(current)
        if fake is None or fake.dtype not in EXACT or storage_key(fake) in mutated:
            return None
        if operation(current) == "arange":
            start = _start_of_arange(current, fake)
            return _constant_first(node, mutated) if start is None else start + shift
        source = current.args[0] if current.args else None
        inner = tensor_value(source) if isinstance(source, fx.Node) else None
        if inner is None or expression(inner.numel()) != expression(fake.numel()):
            return _constant_first(node, mutated)
        if operation(current) in ("add", "sub") and len(current.args) == 2 and not current.kwargs:
            other = current.args[1]
            if not isinstance(other, int) or isinstance(other, bool):
                return _constant_first(node, mutated)
            shift += other if operation(current) == "add" else -other
        elif operation(current) not in _VIEWS_OF_VECTORS or not _keeps_order(current):
            return _constant_first(node, mutated)
        current = level.resolve(source)  # type: ignore[arg-type]


def _constant_first(node: fx.Node, mutated: Collection[int]) -> int | None:
    fake = tensor_value(node)
    assert fake is not None
    known = evaluated(node, {}, hint(fake.numel()), mutated)
    if not isinstance(known, torch.Tensor) or known.dtype not in EXACT or not known.numel():
        return None
    flat = known.flatten()
    counted = torch.arange(len(flat), dtype=flat.dtype) + flat[0]
    return int(flat[0]) if bool((flat == counted).all()) and float(flat[0]).is_integer() else None


def _keeps_order(node: fx.Node) -> bool:
    """Whether a view that has as many elements as its source has the same ones: an index by a tensor may pick others."""
    if operation(node) != "getitem":
        return not any(isinstance(arg, torch.dtype) for arg in node.args) or operation(node) in CASTS
    parts = node.args[1] if isinstance(node.args[1], (tuple, list)) else [node.args[1]]
    return all(part is None or part is Ellipsis or isinstance(part, slice) for part in parts)


def _start_of_arange(node: fx.Node, fake: Any) -> int | None:
    """Where ``arange`` starts, if it counts by ones."""
    given = list(node.args)
    if any(name in node.kwargs for name in ("start", "end", "step")) or not given:
        return None
    start = given[0] if len(given) > 1 else 0
    step = given[2] if len(given) > 2 else 1
    is_int = isinstance(start, int) and not isinstance(start, bool)
    return start if is_int and step == 1 and fake.ndim == 1 else None  # type: ignore[return-value]
