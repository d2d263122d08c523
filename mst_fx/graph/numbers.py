"""Numbers that change from step to step, as tensors: written into a graph, each value would be a compilation."""

from __future__ import annotations

import operator

import torch
from torch import fx

from mst_fx.graph.values import VALUE

MARK = "mst_number"  # a meta key of the tensors that are made here


def number_as_tensor(graph: fx.Graph, number: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A number as a tensor of one element, at the graph's insertion point; a fake mode must be active."""
    one = graph.call_function(torch.ones, ((),), {"dtype": torch.float64, "device": torch.device("cpu")})
    made = graph.call_function(operator.mul, (one, number))
    for node in (one, made):
        node.meta[VALUE] = torch.empty((), dtype=torch.float64, device="cpu")
    if dtype != torch.float64:
        made.meta[MARK] = True
        made = graph.call_method("to", (made, dtype))
        made.meta[VALUE] = torch.empty((), dtype=dtype, device="cpu")
    made.meta[MARK] = True
    return made
