"""Trained 16-bit embeddings whose gradient is summed in the weight's own type.

Before::

    h = embedding(indices, weight)

After (:mod:`mst_fx.ops.embedding`)::

    h = mst_fx.embedding(weight, indices, padding_idx)

Left alone: frozen ones and those of wider types; ``max_norm``, ``scale_grad_by_freq`` and ``sparse``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import SIXTEEN_BITS
from mst_fx.graph.spelling import argument
from mst_fx.graph.values import tensor_value

_NOT_OURS = ("scale_grad_by_freq", "sparse")


def matches(context: PassContext) -> bool:
    return any(True for _ in _found(context.graph))


def run(context: PassContext) -> bool:
    """Exchanges the trained 16-bit embeddings of a graph."""
    found = list(_found(context.graph))
    for node, args in found:
        with context.graph.inserting_before(node):
            new = add_call(context.graph, torch.ops.mst_fx.embedding.default, *args)
        new.meta = {**node.meta, **new.meta}
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
    return bool(found)


def _found(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """The embeddings to exchange, and what their new form is called with."""
    for node in outside_transforms(graph):
        if node.target is not F.embedding or len(node.args) < 2:
            continue
        indices, weight = node.args[:2]
        fake = tensor_value(weight) if isinstance(weight, fx.Node) else None
        if fake is None or fake.dtype not in SIXTEEN_BITS or not fake.requires_grad:
            continue
        if argument(node, "max_norm") is None and not any(argument(node, name) for name in _NOT_OURS):
            padding = argument(node, "padding_idx")
            yield node, (weight, indices, -1 if padding is None else padding % fake.shape[0])
