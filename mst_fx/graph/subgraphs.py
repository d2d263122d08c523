"""Graphs inside of graphs: checkpointed layers and graphs of ``torch.autograd.Function``s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.graph.spelling import operation
from mst_fx.graph.values import tensors_of, value
from mst_fx.torch_api.tensors import tree_leaves


def subgraphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The sub-GraphModules that a graph refers to (layers under ``tag_activation_checkpoint``)."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in seen:
            seen.add(node.target)
            child = attribute(gm, node.target)
            if isinstance(child, fx.GraphModule):
                yield node.target, child


def graphs_of(gm: fx.GraphModule) -> list[fx.Graph]:
    """A graph and all that it refers to."""
    return [gm.graph, *(graph for _, child in subgraphs(gm) for graph in graphs_of(child))]


def attribute(gm: torch.nn.Module, name: str) -> Any:
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part)
    return found


def is_graph(gm: torch.nn.Module, node: fx.Node) -> bool:
    """Whether a ``get_attr`` or ``call_module`` node names a graph."""
    return isinstance(attribute(gm, str(node.target)), fx.GraphModule)


def called_graph(gm: torch.nn.Module, node: fx.Node) -> fx.GraphModule | None:
    """The sub-GraphModule that a node calls with its other operands (a checkpointed layer); None for others."""
    called = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(called, fx.Node) or called.op != "get_attr":
        return None
    found = attribute(gm, str(called.target))
    return found if isinstance(found, fx.GraphModule) else None


def is_function(node: fx.Node) -> bool:
    """Whether a node applies a ``torch.autograd.Function``: a higher-order operator of its two graphs."""
    return operation(node) == "autograd_function_apply"


def function_graphs(gm: fx.GraphModule) -> set[str]:
    """The names of the sub-graphs that are a ``torch.autograd.Function``'s."""
    return {str(each.target) for n in gm.graph.nodes if is_function(n) for each in n.all_input_nodes[:2]}


def function_text(node: fx.Node) -> list[str]:
    """What tells the graphs of two nodes that apply a ``torch.autograd.Function`` apart."""
    gm = node.graph.owning_module
    assert gm is not None
    lines = []
    for each in node.args[:2]:
        graph = attribute(gm, str(each.target)).graph  # type: ignore[union-attr]
        names = {inner: f"%{index}" for index, inner in enumerate(graph.nodes)}
        for inner in graph.nodes:
            args = fx.node.map_arg((inner.args, inner.kwargs), names.__getitem__)  # type: ignore[arg-type]
            kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(inner)]
            rest = [leaf for leaf in tree_leaves(value(inner)) if not isinstance(leaf, torch.Tensor)]
            lines.append(f"{inner.op} {inner.target!r} {args!r} {kinds} {rest}")
    return lines


def called_graphs(node: fx.Node) -> list[fx.GraphModule]:
    """All sub-GraphModules that a node calls, as operands (higher-order operators) or by itself."""
    gm = node.graph.owning_module
    names = [operand.target for operand in node.all_input_nodes if operand.op == "get_attr"]
    if node.op == "call_module":
        names.append(node.target)
    found = [attribute(gm, str(name)) for name in names] if gm is not None else []
    return [each for each in found if isinstance(each, fx.GraphModule)]
