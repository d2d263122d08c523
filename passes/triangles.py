"""Triangles of ones and of numbers, as comparisons of positions: what a mask is read as.

Before::

    below = tril(ones(Q, K), d)
    above = triu(full((Q, K), fill), d)

After, with ``q = arange(Q)[:, None]`` and ``k = arange(K)``::

    below = where(k <= q + d, 1, 0)
    above = where(k < q + d, 0, fill)

Left alone: triangles of anything but one number, and where a size is not known to be that of the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, replace_with
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.levels import Level, all_levels
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.spelling import argument, operation
from mst_fx.graph.values import storage_key, tensor_value, tensors_of
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.masks.constants import fill_of


def run(context: PassContext) -> bool:
    """Rewrites the triangles of a program."""
    changed = False
    for level in all_levels(Level(context.gm)):
        graph = level.gm.graph
        written = mutated_storages(graph)
        for node in outside_transforms(graph):
            fill = _fill(node, written)
            if fill is not None:
                with graph.inserting_before(node):
                    replace_with(node, _compared(node, fill))
                changed = True
    return changed


def _fill(node: fx.Node, written: Collection[int]) -> float | bool | None:
    """The number of which a node is a triangle; None: it is no such thing."""
    source = node.args[0] if node.args else None
    if operation(node) not in ("tril", "triu") or writes_in_place(node) or not isinstance(source, fx.Node):
        return None
    fake, diagonal = tensor_value(node), argument(node, "diagonal", 0)
    if fake is None or fake.ndim < 2 or not isinstance(diagonal, int) or storage_key(fake) in written:
        return None
    if not all(isinstance(size, int) for size in fake.shape):
        return None
    return fill_of(source, written) or None  # of nothing but zeros there is no triangle


def _compared(node: fx.Node, fill: float | bool) -> fx.Node:
    """The triangle, at the graph's insertion point."""
    graph, fake, diagonal = node.graph, tensor_value(node), argument(node, "diagonal", 0)
    assert fake is not None
    rows, columns = fake.shape[-2:]

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(graph, target, *args, **kwargs)

    with fake_mode_of(tensors_of(node)) or contextlib.nullcontext():
        keys, queries = (add(torch.arange, size, device=fake.device) for size in (columns, rows))
        numbers = [add(torch.full, (), number, dtype=fake.dtype, device=fake.device) for number in (fill, 0)]
    queries = add(torch.add, add(torch.unsqueeze, queries, 1), diagonal)
    is_lower = operation(node) == "tril"
    inside = add(torch.le if is_lower else torch.ge, keys, queries)
    for _ in range(fake.ndim - 2):
        inside = add(torch.unsqueeze, inside, 0)
    if fake.ndim > 2:
        inside = add(
            "contiguous", add("expand", inside, *fake.shape)
        )  # as it was: whoever views it counts on that
    if fake.dtype == torch.bool:
        return inside
    return add(
        torch.where, *((inside, *numbers) if is_lower else (add(torch.logical_not, inside), *numbers[::-1]))
    )
