"""Dropouts in a form that a region can hold, while regions are looked for.

Before::

    d = dropout(x, p)

After (:mod:`mst_fx.ops.dropout`), so that a region that holds ``d`` reads the keys of its rows::

    keys = row_keys(sizes); d = dropout_rows(x, keys, p)

What no loop has taken is put back. Left alone: dropouts in place, and those of which no input has the sizes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_fx.context import Exchanged, PassContext
from mst_fx.graph.edit import add_call
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import dropout_probability
from mst_fx.graph.values import is_plain, tensor_value, value
from mst_fx.ops.dropout import dropout_rows, row_keys


def put_in(context: PassContext) -> None:
    """Exchanges the dropouts of a graph for their seeded form."""
    sizes: dict[Any, fx.Node | None] = {}
    for node in outside_transforms(context.graph):
        out = tensor_value(node)
        if out is not None and _can_be_seeded(node, out):
            lead = [_size(context.graph, size, sizes) for size in out.shape[:-1]]
            if all(size is not None for size in lead):
                context.exchanged.append(_exchange(node, out, lead))


def take_out(context: PassContext) -> None:
    """Puts every dropout back that is not inside of a loop."""
    graph = context.graph
    alive = set(graph.nodes)
    for old in reversed(context.exchanged):
        new = old.new
        if new not in alive:
            continue
        x, keys = new.args[:2]
        with graph.inserting_before(new):
            dropout = graph.create_node(old.op, old.target, (x, *old.args[1:]), old.kwargs)
        dropout.meta = old.meta
        new.replace_all_uses_with(dropout)
        graph.erase_node(new)
        graph.erase_node(keys)  # type: ignore[arg-type]


def _can_be_seeded(node: fx.Node, out: Tensor) -> bool:
    p = dropout_probability(node)
    if p is None or not 0 < p < 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if _is_in_place(node) or out.ndim < 2 or not is_plain(out):
        return False
    return out.is_floating_point() and not isinstance(out.shape[-1], torch.SymInt)


def _exchange(node: fx.Node, out: Tensor, lead: list[Any]) -> Exchanged:
    """Puts the seeded form in the place of a dropout whose keys have the sizes ``lead``."""
    graph = node.graph
    # A node without operands that are tensors would have a real value.
    with graph.inserting_before(node), fake_mode_of([out]) or contextlib.nullcontext():
        keys = add_call(graph, row_keys, lead, out.device)
        new = add_call(graph, dropout_rows, node.args[0], keys, dropout_probability(node))
    new.meta = {**node.meta, **new.meta}
    old = Exchanged(node.op, node.target, node.args, dict(node.kwargs), dict(node.meta), new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return old


def _size(graph: fx.Graph, size: Any, known: dict[Any, fx.Node | None]) -> Any:
    """A size as an int, or as a node made of the graph's inputs alone, which no region computes; None if no input
    has it."""
    if not isinstance(size, torch.SymInt):
        return size
    wanted = expression(size)
    if wanted not in known:
        known[wanted] = _input_with(graph, wanted)
    return known[wanted]


def _input_with(graph: fx.Graph, wanted: Any) -> fx.Node | None:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        found = value(node)
        if isinstance(found, torch.SymInt) and expression(found) == wanted:
            return node
        for dim, other in enumerate(found.shape if isinstance(found, Tensor) else ()):
            if isinstance(other, torch.SymInt) and expression(other) == wanted:
                with graph.inserting_before(first):
                    return add_call(graph, "size", node, dim)
    return None


def _is_in_place(node: fx.Node) -> bool:
    """F.dropout(x, p, training, inplace)."""
    return bool(node.kwargs.get("inplace")) or (
        node.target is F.dropout and len(node.args) > 3 and bool(node.args[3])
    )
