"""Leaf modules (``nn.Linear`` in symbolic traces) are replaced by what they call: no rule looks into a module."""

from __future__ import annotations

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.errors import Refusal
from mst_fx.graph.subgraphs import is_graph
from mst_fx.torch_api.graphs import make_code


class _Inliner(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, fx.GraphModule)


def matches(context: PassContext) -> bool:
    return any(node.op == "call_module" and not is_graph(context.gm, node) for node in context.graph.nodes)


def run(context: PassContext) -> None:
    """Traces the program anew, through its leaf modules.

    Raises:
        Refusal: if a module cannot be traced.
    """
    make_code(context.gm)
    try:
        context.gm = fx.GraphModule(context.gm, _Inliner().trace(context.gm))
    except Exception as error:
        raise Refusal(f"a module of the graph cannot be traced: {error}") from error
