"""Trained 16-bit embeddings whose gradient is summed in the weight's own type.

Before::

    h = embedding(indices, weight)

After (:mod:`mst_fx.ops.embedding`)::

    h = mst_fx.embedding(weight, indices, padding_idx)

Left alone: frozen ones and those of wider types; ``max_norm``, ``scale_grad_by_freq`` and ``sparse``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import SIXTEEN_BITS
from mst_fx.graph.values import tensor_value


def keep_embeddings_whole(graph: fx.Graph) -> None:
    """Exchanges the trained 16-bit embeddings of a graph."""
    for node in outside_transforms(graph):
        if node.target is not F.embedding or len(node.args) < 2:
            continue
        indices, weight = node.args[:2]
        given = dict(
            zip(
                ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
                node.args[2:],
                strict=False,
            )
        )
        given |= node.kwargs
        fake = tensor_value(weight) if isinstance(weight, fx.Node) else None
        if fake is None or fake.dtype not in SIXTEEN_BITS or not fake.requires_grad:
            continue
        if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
            continue
        padding: Any = given.get("padding_idx")
        padding = -1 if padding is None else padding % fake.shape[0]
        with graph.inserting_before(node):
            new = add_call(graph, torch.ops.mst_fx.embedding.default, weight, indices, padding)
        new.meta = {**node.meta, **new.meta}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
