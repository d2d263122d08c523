"""GraphModules whose code is made when it is first asked for.

``torch.fx._lazy_graph_module``: Dynamo's own GraphModules, whose code is made when they first run. Others make it
whenever they get a graph, which was half the time of the passes: nobody runs a copy that they work on.
Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module


def graph_module(root: torch.nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule whose code is made when it is first asked for, as Dynamo's is."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph, class_name=name)


def make_code(gm: fx.GraphModule) -> None:
    """Makes the code of a graph, and of those in it, for who looks at it: ``fx.Tracer``, a module's new owner."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            module.code  # noqa: B018
