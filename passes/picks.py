"""One element of each row, picked by its index: reads and writes along the last dimension, row by row.

Before (``l`` is ``[N, V]``, ``y`` is ``[N]``; ``[B, S, V]`` with ``arange(B)[:, None], arange(S), y`` likewise)::

    i = arange(N); t = l[(i, y)]; u = l.index_put((i, y), t - m)

After::

    k = where(y < 0, y + V, y)[..., None]
    t = l.gather(-1, k).squeeze(-1); u = l.scatter(-1, k, (t - m)[..., None])

The indices of all dimensions but the last must count the rows themselves, so that nothing of another row is read, and
no element is written to twice. Lists of columns, ``l[..., [3, 7]]``, become tensors, which bodies take from outside.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, replace_with
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.indices import are_places
from mst_fx.graph.modes import contexts, in_context, outside_transforms
from mst_fx.graph.spelling import SAME_ORDER, operation
from mst_fx.graph.values import storage_key, tensor_value
from mst_fx.graph.writes import writes_in_place
from mst_fx.rows.fold import fold_rank

aten = torch.ops.aten


def run(context: PassContext) -> None:
    """Replaces the picks of a graph by ``gather``, ``scatter`` and ``scatter_add``."""
    graph = context.graph
    modes = contexts(graph)
    for node in outside_transforms(graph):
        is_read = node.target is operator.getitem
        if not is_read and (operation(node) != "index_put" or writes_in_place(node)):
            continue
        with context.at("vocab", node), graph.inserting_before(node), in_context(modes[node]):
            new = _read(graph, node) if is_read else _put(graph, node)
            if new is not None:
                replace_with(node, new)


def _read(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    source, index = node.args
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or not isinstance(index, (tuple, list)):
        return None
    if isinstance(index, tuple) and are_places(index[-1]) and not any(map(_is_pick, index[:-1])):
        with fake_mode_of([fake]) or contextlib.nullcontext():
            listed = add_call(graph, torch.tensor, list(index[-1]), device=fake.device)  # type: ignore[arg-type]
        return add_call(graph, operator.getitem, source, (*index[:-1], listed))
    columns = _columns(graph, fake, index)
    if columns is None:
        return None
    return add_call(graph, "squeeze", add_call(graph, "gather", source, -1, columns), -1)


def _is_pick(part: Any) -> bool:
    return isinstance(part, (fx.Node, list, tuple, bool)) or part is None


def _put(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    if node.kwargs or not 3 <= len(node.args) <= 4:
        return None
    source, index, values = node.args[:3]
    adds = len(node.args) == 4 and node.args[3]
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    given = tensor_value(values) if isinstance(values, fx.Node) else None
    if fake is None or given is None or not isinstance(index, (tuple, list)) or given.dtype != fake.dtype:
        return None
    if given.ndim and not _same(given.shape, fake.shape[:-1]):
        return None
    columns = _columns(graph, fake, index)
    if columns is None:
        return None
    if given.ndim:
        values = add_call(graph, "unsqueeze", values, -1)
    else:  # one number for all rows
        picked = add_call(graph, "gather", add_call(graph, "detach", source), -1, columns)
        number = _filled_with(values)
        like = torch.full_like if number is not None else torch.zeros_like
        made = add_call(graph, like, picked, *([] if number is None else [number]))
        values = made if number is not None else add_call(graph, torch.add, made, values)
    return add_call(graph, "scatter_add" if adds else "scatter", source, -1, columns, values)


def _filled_with(values: Any) -> float | None:
    """The number that fills a tensor without dimensions, as ``new_full((), 0.5)`` does; None if nobody knows."""
    is_full = isinstance(values, fx.Node) and operation(values) == "new_full" and len(values.args) == 3
    number = values.args[2] if is_full and not _is_written(values) else None
    return number if isinstance(number, (int, float)) else None


def _columns(graph: fx.Graph, fake: torch.Tensor, index: Sequence[Any]) -> fx.Node | None:
    """``[..., 1]``, from 0 on: the column that an index takes of each row; None if it does anything else."""
    if len(index) != fake.ndim or fake.ndim < 2 or not isinstance(fake.shape[-1], int):
        return None
    *leading, last = index
    columns = tensor_value(last) if isinstance(last, fx.Node) else None
    if columns is None or columns.dtype != torch.int64 or not _same(columns.shape, fake.shape[:-1]):
        return None
    if not all(_counts(part, dim, fake) for dim, part in enumerate(leading)):
        return None
    negative = add_call(graph, torch.lt, last, 0)
    wrapped = add_call(graph, torch.where, negative, add_call(graph, torch.add, last, fake.shape[-1]), last)
    return add_call(graph, "unsqueeze", wrapped, -1)


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether shapes are equal, or a guard says so."""
    return len(left) == len(right) and all(fold_rank([a], b) == 1 for a, b in zip(left, right, strict=True))


def _counts(part: Any, dim: int, fake: torch.Tensor) -> bool:
    """Whether an index is 0, 1, 2, … along a dimension of the rows, and the same along all others."""
    found = tensor_value(part) if isinstance(part, fx.Node) else None
    if found is None or found.dtype != torch.int64:
        return False
    behind = fake.ndim - 2 - dim
    wanted = [fake.shape[dim], *[1] * behind]
    ahead = found.ndim - len(wanted)
    if not 0 <= ahead <= dim or not _same(found.shape, [*[1] * ahead, *wanted]):
        return False
    node = part
    # None of these moves elements, unless it takes a part of them.
    while operation(node) in SAME_ORDER and not writes_in_place(node):
        source = node.args[0] if node.args else None
        before = tensor_value(source) if isinstance(source, fx.Node) else None
        if before is None or not _same([before.numel()], [found.numel()]) or before.dtype != torch.int64:
            return False
        if operation(node) == "getitem" and not _only_adds_dims(node.args[1]):
            return False
        node = source
    is_count = node.target in (torch.arange, aten.arange.default, aten.arange.start) and not _is_written(node)
    ends = node.args[1:] if len(node.args) == 2 and node.args[0] == 0 else node.args
    rest = node.kwargs.keys() - {"device", "dtype", "requires_grad"}
    return is_count and len(ends) == 1 and not rest


def _is_written(node: fx.Node) -> bool:
    """Whether something in the graph writes to a tensor that a node has made."""
    key = storage_key(tensor_value(node))  # type: ignore[arg-type]
    written = (n.args[0] for n in node.graph.nodes if n.args and writes_in_place(n))
    fakes = (tensor_value(n) for n in written if isinstance(n, fx.Node))
    return any(fake is not None and storage_key(fake) == key for fake in fakes)


def _only_adds_dims(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None, None, None) for part in parts)
