"""A number that changes from step to step as a tensor of one element."""

from __future__ import annotations

import operator

import torch
from torch import fx

from mst_fx.graph.values import VALUE


def number_as_tensor(graph: fx.Graph, number: fx.Node, dtype: torch.dtype) -> list[fx.Node]:
    """``ones((), float64) * number``, as ``dtype``, at the graph's insertion point; a fake mode must be active.

    Returns:
        The nodes that were added behind the ``ones``; the last one is the tensor.
    """
    one = graph.call_function(torch.ones, ((),), {"dtype": torch.float64, "device": torch.device("cpu")})
    added = [graph.call_function(operator.mul, (one, number))]
    for node in (one, added[0]):
        node.meta[VALUE] = torch.empty((), dtype=torch.float64, device="cpu")
    if dtype != torch.float64:
        added.append(graph.call_method("to", (added[0], dtype)))
        added[-1].meta[VALUE] = torch.empty((), dtype=dtype, device="cpu")
    return added
