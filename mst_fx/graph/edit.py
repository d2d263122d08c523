"""Graphs copied and changed."""

from __future__ import annotations

from typing import Any

from torch import fx

from mst_fx.graph.effects import has_effects
from mst_fx.graph.fill import call
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.subgraphs import subgraphs
from mst_fx.graph.values import VALUE, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.graphs import graph_module


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a GraphModule; parameters are shared, and the sub-GraphModules its graph names."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    new = graph_module(gm, graph, type(gm).__name__)
    new.meta.update(gm.meta)
    for old_node, node in zip(gm.graph.nodes, graph.nodes, strict=True):
        node.meta = dict(old_node.meta)
    return new


def copy_tree(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a GraphModule and of the sub-GraphModules its graph names; parameters are shared."""
    new = copy_graph(gm)
    for name, child in subgraphs(gm):
        new.set_submodule(name, copy_tree(child))
    return new


def drop_unused_subgraphs(gm: fx.GraphModule) -> None:
    """Removes the sub-GraphModules that a graph does not refer to any more."""
    used = {name for name, _ in subgraphs(gm)}
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule) and name not in used:
            delattr(gm, name)


PROVENANCE = (
    "nn_module_stack",
    "stack_trace",
    "source_fn_stack",
)  # meta keys: the line of the model behind a node


def copy_provenance(old: fx.Node, new: fx.Node) -> None:
    """Lets ``new`` say that it comes from the line of the model that ``old`` comes from."""
    new.meta |= {key: old.meta[key] for key in PROVENANCE if key in old.meta}


def replace_with(old: fx.Node, new: fx.Node) -> None:
    """Puts ``new`` in the place of ``old``, which is erased: its readers and its provenance."""
    copy_provenance(old, new)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def add_call(graph: fx.Graph, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a ``call_function`` (or, for a string, ``call_method``) node with its fake value.

    The node goes to the graph's insertion point.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    fakes, fake_kwargs = fx.node.map_arg((args, kwargs), value)
    found = call(op, target, fakes, fake_kwargs)  # before there is a node: this may fail
    node = graph.create_node(op, target, args, kwargs)
    node.meta[VALUE] = found
    return node


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Removes nodes without readers: not those that write to an argument or have effects, and none inside
    of a ``torch.func`` transform, where a value is marked by passing through functions.

    ``fx.Graph.eliminate_dead_code`` takes a test of impurity, but goes on into sub-graphs (layers under
    activation checkpoints) without it, and there removes ``scatter_`` and ``x[i] = y``.
    """
    for node in reversed(outside_transforms(graph)):
        if not node.users and not has_effects(node) and not writes_in_place(node):
            graph.erase_node(node)
