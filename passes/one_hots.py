"""``one_hot(y, V)`` → zeros with ones scattered into them, which each row does alone.

The operator looks at all labels to see whether they are less than V; so does ``scatter``. Left alone: a number of classes
that is not known.
"""

from __future__ import annotations

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, replace_with
from mst_fx.graph.modes import contexts, in_context, outside_transforms
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import tensor_value


def run(context: PassContext) -> None:
    """Replaces the one-hots of a graph."""
    graph = context.graph
    modes = contexts(graph)
    for node in outside_transforms(graph):
        labels = node.args[0] if node.args else None
        classes = node.args[1] if len(node.args) > 1 else node.kwargs.get("num_classes")
        fake = tensor_value(labels) if isinstance(labels, fx.Node) else None
        if operation(node) != "one_hot" or fake is None or not isinstance(classes, int) or classes < 1:
            continue
        with context.at("vocab", node), graph.inserting_before(node), in_context(modes[node]):
            index = add_call(graph, "unsqueeze", labels, -1)
            wide = add_call(graph, "expand", index, *[-1] * fake.ndim, classes)
            replace_with(
                node, add_call(graph, "scatter", add_call(graph, torch.zeros_like, wide), -1, index, 1)
            )
