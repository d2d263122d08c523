"""Indices of tensors, ``x[2:, ..., 0]``, a part for each dimension."""

from __future__ import annotations

from typing import Any

FULL = slice(None, None, None)


def are_places(part: Any) -> bool:
    """Whether a part of an index is a list of numbers, as in ``logits[..., [3, 5]]``, or a tuple of them."""
    return isinstance(part, (list, tuple)) and bool(part) and all(type(place) is int for place in part)


def expanded(parts: list[Any], ndim: int) -> list[Any]:
    """The index with the full slices that an ellipsis, or nothing at its end, stands for.

    Args:
        ndim: how many dimensions of the tensor the index takes, those that its tensors pick counted as one each.
    """
    count = sum(part is not None and part is not Ellipsis for part in parts)
    parts = [*parts, Ellipsis] if Ellipsis not in parts else parts
    at = parts.index(Ellipsis)
    full = [*parts[:at], *[FULL] * (ndim - count), *parts[at + 1 :]]
    return [FULL if isinstance(part, slice) and part == FULL else part for part in full]
