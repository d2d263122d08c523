"""Where queries and keys lie among the dimensions of a value, and of what an index or another order of dimensions was made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from mst_fx.graph.sizes import expression, is_one
from mst_fx.graph.spelling import argument, operation
from mst_fx.graph.values import tensor_value

_WHOLE = slice(None, None, None)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where queries and keys lie in a value."""

    queries: int
    keys: int

    def of(self, node: fx.Node) -> tuple[Any, Any]:
        """The sizes there; 1 where there is no such dimension."""
        fake = tensor_value(node)
        assert fake is not None
        return tuple(fake.shape[at] if 0 <= at < fake.ndim else 1 for at in (self.queries, self.keys))  # type: ignore[return-value]

    def moved(self, by: int) -> Place:
        return Place(self.queries + by, self.keys + by)


def order_of(node: fx.Node, ndim: int) -> list[int] | None:
    """Of each dimension of a result, which one of the source it is."""
    if operation(node) == "t" and ndim == 2 and len(node.args) == 1:
        return [1, 0]
    if operation(node) == "getattr" and len(node.args) == 2:
        named = {"T": list(range(ndim))[::-1], "mT": [*range(ndim - 2), ndim - 1, ndim - 2]}
        return named.get(str(node.args[1]))
    is_swap = operation(node) == "transpose"
    rest: Any = [argument(node, "dim0"), argument(node, "dim1")] if is_swap else node.args[1:]
    dims = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if (
        (node.kwargs and not is_swap)
        or len(dims) != (2 if is_swap else ndim)
        or not all(isinstance(dim, int) for dim in dims)
    ):
        return None
    order = [dim % ndim for dim in dims]
    if is_swap:
        (a, b), order = order, list(range(ndim))
        order[a], order[b] = b, a
    return order


def viewed(node: fx.Node, source: fx.Node, place: Place) -> Place | None:
    """Where queries and keys lie in the source of a view that only gives it more, or fewer, dimensions of size 1."""
    fakes = [x for x in (tensor_value(node), tensor_value(source)) if x is not None]
    wide = [[at for at, size in enumerate(x.shape) if not is_one(size)] for x in fakes]
    sizes = [[expression(x.shape[at]) for at in ats] for x, ats in zip(fakes, wide, strict=True)]
    if len(fakes) < 2 or sizes[0] != sizes[1]:
        return None
    to = dict(zip(wide[0], wide[1], strict=True))
    return Place(to[place.queries], to[place.keys]) if {place.queries, place.keys} <= to.keys() else None


def picked(parts: list[Any], place: Place) -> tuple[fx.Node, Place] | None:
    """The index of ``table[:, index]``, and where queries and keys lie in it."""
    index, where = tensor_value(parts[-1]), place.moved(1 - len(parts))
    is_number = index is not None and index.dtype in (torch.int32, torch.int64)
    if index is None or not is_number or any(x != _WHOLE for x in parts[:-1]):
        return None
    places = (where.queries, where.keys)
    return (parts[-1], where) if min(places) >= 0 and max(places) < index.ndim else None


def widened(node: fx.Node, source: fx.Node, parts: list[Any], place: Place) -> tuple[fx.Node, Place] | None:
    """The source of an index that only adds dimensions."""
    fake, inner = tensor_value(node), tensor_value(source)
    if (
        fake is None
        or inner is None
        or not all(x is None or x is Ellipsis or isinstance(x, slice) for x in parts)
    ):
        return None
    missing = [_WHOLE] * (inner.ndim - sum(isinstance(part, slice) for part in parts))
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts = [*parts[:at], *missing, *parts[at + 1 :]]
    kept = [at for at, part in enumerate(parts) if part is not None]
    is_whole = [expression(fake.shape[at]) for at in kept] == [expression(x) for x in inner.shape]
    steps = all(parts[at].step in (None, 1) for at in kept)
    if not is_whole or not steps or place.queries not in kept or place.keys not in kept:
        return None
    return source, Place(kept.index(place.queries), kept.index(place.keys))
