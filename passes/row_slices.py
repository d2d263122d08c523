"""Slices of rows before the head: losses that shift the logits.

Before::

    logits = linear(x, w).float(); loss(logits[:, :-1], ...)

After, for this use of the logits only::

    loss(linear(x[:, :-1], w).float(), ...)

Slices of any dimensions but the last, narrows and members of chunks are hoisted, through what works on each row and
through flattened batches. Left alone: what lies in another autocast region, or behind anything that mixes rows.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, copy_provenance, eliminate_dead_code, replace_with
from mst_fx.graph.indices import FULL
from mst_fx.graph.modes import Context, contexts, in_context, outside_transforms
from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.spelling import CUTS, FLATTENS, operation
from mst_fx.graph.values import tensor_value
from mst_fx.rows.links import (
    is_link,
    leaves_last_dim,
    linked,
    order_of,
    permuted,
    sizes_of,
)

aten = torch.ops.aten


def run(context: PassContext) -> None:
    """Moves slices of rows of logits before the head."""
    graph = context.graph
    with context.place("vocab", ""):
        _slice_before_permuting(graph)
        _split_cuts(graph)
    modes = contexts(graph)
    for node in outside_transforms(graph):
        with context.at("vocab", node):
            _hoist(context, node, modes)
    eliminate_dead_code(graph)


def _hoist(context: PassContext, node: fx.Node, modes: dict[fx.Node, Context]) -> None:
    graph = context.graph
    chain = _sliced_chain(node)
    if chain is None or any(modes.get(link) != modes.get(chain[0]) for link in chain):
        return
    mode, place = modes[chain[0]], node
    if modes[node] != mode:  # the slice lies behind an autocast region: the clones go where the logits are
        place = chain[0].next
        if modes[node].grad != mode.grad or len(node.all_input_nodes) > 1 or tensor_value(chain[0]) is None:
            return
    head, links = chain[-1], chain[-2::-1]
    with graph.inserting_before(place), in_context(mode):
        hidden = head.args[0]
        for link in links:
            if operation(link) in FLATTENS:
                hidden = _reshaped_rows(graph, link, hidden)
        current = add_call(graph, head.target, _sliced(graph, node, hidden), *head.args[1:], **head.kwargs)
        clones = [(head, current)]
        for link in links:
            if operation(link) not in FLATTENS:
                current = linked(graph, link, current)
                clones.append((link, current))
    for link, clone in clones:
        copy_provenance(link, clone)
        context.clones[clone] = context.clones.get(link, link)
        modes[clone] = mode
    node.replace_all_uses_with(current)
    graph.erase_node(node)


def _slice_before_permuting(graph: fx.Graph) -> None:
    """``x.transpose(1, 2)[..., :-1]`` → ``x[:, :-1].transpose(1, 2)``."""
    for node in outside_transforms(graph):
        source = node.args[0] if node.args else None
        if node.target is not operator.getitem or not isinstance(source, fx.Node):
            continue
        order = order_of(source)
        parts = _index_parts(node.args[1], len(order)) if order is not None else None
        if order is None or parts is None or not any(map(_is_cut, parts)):
            continue
        with graph.inserting_before(node):
            index = tuple(parts[order.index(dim)] for dim in range(len(order)))
            new = add_call(graph, operator.getitem, source.args[0], index)
            replace_with(node, permuted(graph, new, order))


def _split_cuts(graph: fx.Graph) -> None:
    """``logits[:, :-1, :V]`` → ``logits[:, :-1][..., :V]``, ``logits[:, -1]`` → ``logits[:, -1:].squeeze(1)``.

    Slices of rows are hoisted by themselves, and those of columns are links of a chain if spelled so.
    """
    modes = contexts(graph)
    for node in outside_transforms(graph):
        source, parts = _cut_parts(node)
        if source is None or parts is None or _chain_from(source) is None:
            continue
        *leading, columns = parts
        cuts = [slice(i, i + 1 or None) if isinstance(i, int) else i for i in leading]
        steps: list[tuple[Any, Any]] = [(operator.getitem, tuple(cuts))] if any(map(_is_cut, cuts)) else []
        steps += [(operator.getitem, (Ellipsis, columns))] if _is_cut(columns) else []
        steps += [("squeeze", dim) for dim in reversed(range(len(leading))) if isinstance(leading[dim], int)]
        if len(steps) == 1 and (node.target, node.args[1]) == steps[0]:
            continue
        with graph.inserting_before(node), in_context(modes[node]):
            current = source
            for target, argument in steps:
                current = add_call(graph, target, current, argument)
                copy_provenance(node, current)
        replace_with(node, current)
    eliminate_dead_code(graph)


def _cut_parts(node: fx.Node) -> tuple[fx.Node | None, list[Any] | None]:
    """A tensor and the slice or the index of each of its dimensions that a node takes, columns as a slice."""
    source = node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or node.kwargs or fake is None or fake.ndim < 2:
        return None, None
    if node.target is operator.getitem:
        return source, _parts_of_index(node.args[1], fake.ndim)
    if operation(node) == "narrow" and len(node.args) == 4:
        dim, start, length = node.args[1:]
        is_columns = isinstance(dim, int) and dim % fake.ndim == fake.ndim - 1
        if is_columns and isinstance(start, int) and isinstance(length, int) and start >= 0:
            return source, [*[FULL] * (fake.ndim - 1), slice(start, start + length)]
    return None, None


def _parts_of_index(taken: Any, ndim: int) -> list[Any] | None:
    """:func:`_cut_parts` of an index; None if it takes no part of the rows, or no columns and not all either."""
    index = taken if isinstance(taken, tuple) else (taken,)
    columns = index[-1] if _are_columns(index[-1]) else None
    parts = _index_parts((*index[:-1], FULL) if columns is not None else index, ndim, picks=True)
    is_known = parts is not None and len(parts) == ndim and isinstance(parts[-1], slice)
    if columns is not None and parts is not None:  # but for those of all rows, which are read as they are
        is_known = len(index) == ndim or Ellipsis in index
        parts = [*parts[:-1], columns] if any(map(_is_cut, parts[:-1])) else None
    return parts if is_known and any(map(_is_cut, parts or ())) else None


def _sliced_chain(node: fx.Node) -> list[fx.Node] | None:
    """The links from a tensor whose rows are sliced back to the linear that made it, last link first."""
    source = _sliced_source(node)
    return None if source is None else _chain_from(source)


def _chain_from(source: fx.Node) -> list[fx.Node] | None:
    """The links from logits back to the linear that made them."""
    chain: list[fx.Node] = []
    current: Any = source
    while isinstance(current, fx.Node) and (fake := tensor_value(current)) is not None and fake.ndim > 1:
        chain.append(current)
        operand = current.args[0] if current.args else None
        if not isinstance(operand, fx.Node):
            return None
        if operation(current) == "linear":
            wide = tensor_value(operand)
            widths = [fake.shape[-1], wide.shape[-1]] if wide is not None else []
            return (
                chain if widths and all(map(is_known, widths)) and hint(widths[0]) > hint(widths[1]) else None
            )
        if not (
            leaves_last_dim(current) or is_link(current, fake.ndim - 1, rank=1) or _cuts_columns(current)
        ):
            return None
        current = operand
    return None


def _sliced_source(node: fx.Node) -> fx.Node | None:
    """What a node takes rows of: slices of any dimensions but the last."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs:
        return None
    fake, name = tensor_value(source), operation(node)
    if node.target is operator.getitem and fake is None:
        return _parted_source(source)
    if fake is None or fake.ndim < 2:
        return None
    if node.target is operator.getitem:
        parts = _index_parts(node.args[1], fake.ndim)
        is_rows = parts is not None and parts[-1] == FULL and any(map(_is_cut, parts))
        return source if is_rows else None
    if name in ("narrow", "slice") and len(node.args) > 2 and isinstance(node.args[1], int):
        return source if node.args[1] % fake.ndim != fake.ndim - 1 else None
    return None


def _are_columns(part: Any) -> bool:
    """Whether a part of an index picks columns by their numbers."""
    fake = tensor_value(part) if isinstance(part, fx.Node) else None
    return fake is not None and fake.ndim == 1 and fake.dtype == torch.int64


def _is_cut(part: Any) -> bool:
    if isinstance(part, fx.Node):
        return True
    return part not in (FULL, slice(0, None, None))


def _parted_source(node: fx.Node) -> fx.Node | None:
    """What ``chunk`` or ``split`` cuts along another dimension than the last."""
    source = node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if operation(node) not in CUTS or fake is None or not isinstance(source, fx.Node):
        return None
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return source if isinstance(dim, int) and dim % fake.ndim != fake.ndim - 1 else None


def _index_parts(index: Any, ndim: int, picks: bool = False) -> list[Any] | None:
    """The slice of each dimension that an index takes, with ``picks`` its place; None if it does anything else."""
    parts = list(index) if isinstance(index, tuple) else [index]
    known = (slice, int) if picks else (slice,)
    if (
        any(
            part is not Ellipsis and (not isinstance(part, known) or isinstance(part, bool)) for part in parts
        )
        or parts.count(Ellipsis) > 1
    ):
        return None
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    full = [FULL] * (ndim - len(parts) + (Ellipsis in parts))
    return [*parts[:at], *full, *parts[at + 1 :]]


def _sliced(graph: fx.Graph, node: fx.Node, hidden: Any) -> fx.Node:
    """The slice that a node takes of logits, of the rows that the logits are made of."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    fake = tensor_value(source)
    if fake is None:
        parts = add_call(graph, source.target, hidden, *source.args[1:], **source.kwargs)
        return add_call(graph, operator.getitem, parts, node.args[1])
    if node.target is operator.getitem:
        index = _index_parts(node.args[1], fake.ndim)
        assert index is not None
        while index and not _is_cut(index[-1]):
            index.pop()
        return add_call(graph, operator.getitem, hidden, tuple(index))
    dim: Any = node.args[1]
    return add_call(graph, node.target, hidden, dim % fake.ndim, *node.args[2:])


def _reshaped_rows(graph: fx.Graph, node: fx.Node, hidden: Any) -> fx.Node:
    """The reshape of logits, done to the rows that they are made of."""
    if operation(node) == "flatten":
        start = node.args[1] if len(node.args) > 1 else 0
        ndim = tensor_value(node.args[0]).ndim  # type: ignore[arg-type, union-attr]
        return add_call(graph, "flatten", hidden, start % ndim, node.args[2] % ndim)  # type: ignore[operator]
    width = tensor_value(hidden).shape[-1]  # type: ignore[union-attr]
    sizes = [-1 if size == -1 else size for size in sizes_of(node)[:-1]]
    return add_call(graph, "reshape", hidden, (*sizes, width))


def _cuts_columns(node: fx.Node) -> bool:
    """Whether a node takes a slice of the last dimension alone."""
    source = node.args[0]
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if node.target is not operator.getitem or fake is None or not isinstance(node.args[1], tuple):
        return False
    parts = _index_parts(node.args[1], fake.ndim)
    return parts is not None and node.args[1][0] is Ellipsis and not any(map(_is_cut, parts[:-1]))
