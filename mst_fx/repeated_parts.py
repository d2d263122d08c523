"""Equal layers are compiled once, whatever was done to them: of each pass's graph, where it repeats itself.

Before, of a graph that goes to Inductor: the calls of layer 0, those of layer 1, …: equal ones, with other operands. After::

    h1, saved_1 = invoke_subgraph(graph, "repeated_graph_0_0", h0, w0, …)
    h2, saved_2 = invoke_subgraph(graph, "repeated_graph_0_0", h1, w1, …)

It stands behind all that decides (the memory plan, exchanges of ranks, AOTAutograd's partitioner), and asks nothing about modules: what a plan keeps
or sends to the host in one layer and not in another makes two kinds of layers, each compiled once. Tracing is what it was; for checkpointed layers
of one process :mod:`mst_fx.equal_layers` spares that, too.

Left as it is: what is shorter than a layer, or has no product (Inductor would fuse less, to spare little); graphs with sizes that change; calls that
write to what they are given, or call a graph themselves.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mst_fx.errors import defect
from mst_fx.graph.repetitions import Repetition, find_repetitions, sink_free_calls
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import value
from mst_fx.options import Options
from mst_fx.plan.joint_graph import is_wait
from mst_fx.torch_api.called_graphs import keeps_its_shape, raise_seeds, why_not_called
from mst_fx.torch_api.ops import HigherOrderOperator, schema_of
from mst_fx.torch_api.overwriting import PRODUCTS, shows_operand
from mst_fx.torch_api.symbols import SYMBOLIC
from mst_fx.torch_api.tensors import tree_leaves

log = logging.getLogger("mst_fx")
aten = torch.ops.aten

_CONSTANTS = (aten.full.default, aten.scalar_tensor.default, torch.ops.prims.iota.default)
_OF_A_LAYER = ("mst_fx::loop", "mst_fx::attention", "mst_fx::experts")
_GATE = "mst_fx::gate"
_FEWEST = 16  # calls that are worth a graph of their own


def why_none(options: Options, patches: Mapping[str, Any]) -> str:
    """Why nothing may be compiled once for several; "" if it may.

    Args:
        patches: of Inductor's config.
    """
    if options.layers == "each":
        return "the option layers says so"
    if options.inner != "inductor":
        return f"inner is {options.inner}"
    return why_not_called(patches)


def repeated_parts(graph: fx.Graph, strict: bool = False) -> list[Repetition]:
    """Equal layers of a graph that goes to Inductor. Values of the graph that cost nothing are made once more for each reader.

    Args:
        graph: of one pass, as AOTAutograd's partitioner gives it.
        strict: whether a defect of ours is raised; else the graph is compiled whole, as it would be without.
    """
    if any(map(has_symbols, graph.nodes)):
        return []
    try:
        raise_seeds(graph)
        sink_free_calls(graph, _is_free)
        found = list(find_repetitions(graph, is_of_a_layer, _is_apart, is_wait, keeps_its_shape, _FEWEST))
    except Exception as error:
        if strict:
            raise
        defect("looks for no equal parts in a graph", error)
        return []
    for each in found:
        log.info("%d equal parts of %d calls are compiled once", len(each.stretches), len(each.stretches[0]))
    return found


def has_symbols(node: fx.Node) -> bool:
    """Whether a size of what a node gives, or a number, is not known."""
    every = tree_leaves(value(node))
    sizes = [(*x.shape, *x.stride()) if isinstance(x, torch.Tensor) else (x,) for x in every]
    return any(isinstance(x, SYMBOLIC) for x in itertools.chain(*sizes))


def _is_free(node: fx.Node) -> bool:
    """Whether a call makes nothing, wherever it is: a view, or a constant, which Inductor writes into kernels."""
    if operation(node).startswith(_GATE):  # what it waits for would be held up to where it is
        return False
    if node.op != "call_function" or not shows_operand(node):
        return node.target in _CONSTANTS
    return keeps_its_shape(node.args[0])  # type: ignore[arg-type]


def is_of_a_layer(node: fx.Node) -> bool:
    """Whether a call is one of those by which layers are found."""
    return node.target in PRODUCTS or operation(node).startswith(_OF_A_LAYER)


def _is_apart(node: fx.Node) -> bool:
    """Whether a call may be no part of a graph that is called: it calls a graph itself, or writes to what it is given."""
    if isinstance(node.target, HigherOrderOperator) or any(x.op == "get_attr" for x in node.all_input_nodes):
        return True
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable
