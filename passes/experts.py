"""Loops of experts, before a program is cut among the ranks of a group (:mod:`mst_fx.passes.sequence`).

Before::

    order = keys.argsort(); y = grouped_mm(rows[order // k], w, ends); out = (y[inverse] * weights).view(N, k, H).sum(1)

After::

    out = mst_fx.experts_loop([rows], [weights], keys, [w], body, k, experts, …)

A sort of slots by expert mixes the tokens of all ranks, and what experts make of their slots does not: as one operator it works on each token alone,
so that each rank runs it on its own. Elsewhere :mod:`mst_fx.passes.mlp` makes the same loops, with all others.
"""

from __future__ import annotations

import torch
from torch import fx

from mst_fx.chunking_experts import chunk_experts
from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, eliminate_dead_code
from mst_fx.graph.spelling import CASTS, RESHAPES, operation
from mst_fx.graph.values import tensor_value

_LOOP = torch.ops.mst_fx.experts_loop.default


def matches(context: PassContext) -> bool:
    return context.options.group is not None and "mlp" in context.options.passes


def run(context: PassContext) -> None:
    """Rewrites all experts of a graph."""
    chunk_experts(context)
    for node in context.graph.find_nodes(op="call_function", target=_LOOP):
        rows, slots, key, *rest = node.args
        node.args = (rows, [_by_rows(x) for x in slots], _by_rows(key), *rest)  # type: ignore[union-attr, arg-type]
    eliminate_dead_code(context.graph)


def _by_rows(node: fx.Node) -> fx.Node:
    """What there is of each slot, ``[N, k, …]``, where it was flattened: of ``[N·k, …]`` no dimension has tokens alone.

    Before: ``weights.reshape(-1).unsqueeze(-1)``. After: ``weights.unsqueeze(-1)``.
    """
    if not node.args or not isinstance(node.args[0], fx.Node) or tensor_value(node.args[0]) is None:
        return node
    source, name = node.args[0], operation(node)
    if name in RESHAPES and _is_flattened(source, node):
        return source
    is_behind = name in CASTS or (name == "unsqueeze" and node.args[1:] == (-1,)) or _adds_last(node)
    found = _by_rows(source) if is_behind else source
    if found is source:
        return node
    with node.graph.inserting_before(node):
        if name in CASTS:
            return add_call(node.graph, node.target, found, *node.args[1:], **node.kwargs)
        return add_call(node.graph, "unsqueeze", found, -1)


def _is_flattened(source: fx.Node, node: fx.Node) -> bool:
    """``[N, k]`` to ``[N·k]``."""
    was, now = tensor_value(source), tensor_value(node)
    return was is not None and now is not None and was.dtype == now.dtype and (was.ndim, now.ndim) == (2, 1)


def _adds_last(node: fx.Node) -> bool:
    """``x[:, None]`` of one dimension."""
    fake = tensor_value(node)
    added = ((slice(None), None), (Ellipsis, None))
    return operation(node) == "getitem" and node.args[1] in added and fake is not None and fake.ndim == 2
