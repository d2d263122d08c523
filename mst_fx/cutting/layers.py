"""Checkpointed layers: a graph that another one calls is walked through in turn, and called with what it reads by then.

Before::

    h = tag_activation_checkpoint(layer, h, cos, weight, …)      # h [B, S, E], cos [B, S, D] and weight whole

After; what the layer reads of its own tokens alone is cut outside, and what nobody in it reads is no operand any more::

    h = tag_activation_checkpoint(layer, h, weight, …, cos_of_rank)      # [B, S/P, E], [B, S/P, D]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mst_fx.cutting.values import Leaf, Share, Standing, local_fake
from mst_fx.graph.edit import copy_tree
from mst_fx.graph.levels import placeholders_of
from mst_fx.graph.spelling import CHECKPOINTS, operation
from mst_fx.graph.subgraphs import called_graph
from mst_fx.graph.values import VALUE, tensor_value, value
from mst_fx.torch_api.tensors import tree_map_only

if TYPE_CHECKING:
    from mst_fx.cutting.program import Cutter


def is_layer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a layer whose results are tensors alone."""
    layer_graph = called_graph(gm, node) if operation(node) in CHECKPOINTS else None
    return layer_graph is not None and all(
        isinstance(x, fx.Node) and tensor_value(x) is not None for x in _results(layer_graph)
    )


def walk_through(cutter: Cutter, node: fx.Node) -> None:
    """Writes the call of a layer that works on this rank's tokens."""
    get, *operands = node.args
    assert isinstance(get, fx.Node)
    name, layer_graph = _body_of(cutter, node, str(get.target))
    inside = cutter.inside(layer_graph, node)
    for inner, operand in zip(placeholders_of(layer_graph), operands, strict=True):
        known = cutter.now.get(operand) if isinstance(operand, fx.Node) else None
        if known is not None and known.leaves[0].place is not None:
            inside.enter(inner, known.leaves[0].place)
    inside.run()
    output = layer_graph.graph.output_node()
    leaves = [x if isinstance(x, Leaf) else Leaf(x) for x in inside.outputs(_results(layer_graph))]
    nodes = [leaf.node for leaf in leaves]
    is_many = isinstance(output.args[0], (tuple, list))
    output.args = (tuple(nodes) if is_many else nodes[0],)
    inside.finish()
    given = [_operand(cutter, operand) for operand in operands] + inside.imported
    given = [
        operand for operand, inner in zip(given, placeholders_of(layer_graph), strict=True) if inner.users
    ]
    for inner in placeholders_of(layer_graph):
        if not inner.users:
            layer_graph.graph.erase_node(inner)
    layer_graph.recompile()
    places = [leaf.place for leaf in leaves]
    waiting = iter(places)

    def fake(x: torch.Tensor) -> torch.Tensor:
        place = next(waiting)
        return local_fake(x, place, Share.of(cutter.group, place.count) if place is not None else None)

    with cutter.graph.inserting_before(node):
        if name != get.target:
            get = cutter.graph.get_attr(name)
        new = cutter.graph.create_node(node.op, node.target, (get, *given), node.kwargs)
        new.meta = {**node.meta, VALUE: tree_map_only(torch.Tensor, fake, value(node))}
        cutter.modes[new] = cutter.modes[node]
        cutter.now[node] = Standing(tuple(cutter.leaves_of(new, places)), tensor_value(node) is None)


def _results(layer_graph: fx.GraphModule) -> list[Any]:
    (found,) = layer_graph.graph.output_node().args
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _body_of(cutter: Cutter, node: fx.Node, name: str) -> tuple[str, fx.GraphModule]:
    """The graph of a layer, for this call alone: another one may be cut in another way."""
    layer_graph = called_graph(cutter.gm, node)
    assert layer_graph is not None
    gets = cutter.graph.find_nodes(op="get_attr", target=name)
    if sum(len(get.users) for get in gets) > 1:
        layer_graph, name = copy_tree(layer_graph), f"{name}_{node.name}"
        cutter.gm.add_module(name, layer_graph)
    return name, layer_graph


def _operand(cutter: Cutter, operand: Any) -> Any:
    known = cutter.now.get(operand) if isinstance(operand, fx.Node) else None
    return operand if known is None else known.leaves[0].node
