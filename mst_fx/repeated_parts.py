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
from mst_fx.torch_api.called_graphs import why_not_called
from mst_fx.torch_api.layers import is_random
from mst_fx.torch_api.ops import HigherOrderOperator, schema_of
from mst_fx.torch_api.overwriting import shows_operand

log = logging.getLogger("mst_fx")
aten, prims = torch.ops.aten, torch.ops.prims

_CONSTANTS = (aten.full.default, aten.scalar_tensor.default, prims.iota.default)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_OF_A_LAYER = ("mst_fx::loop", "mst_fx::attention", "mst_fx::experts")
_SUMS = (aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
_FEWEST = 16  # calls that are worth a graph of their own


def may_fold(options: Options, patches: Mapping[str, Any]) -> bool:
    """Whether what is equal may be compiled once."""
    return options.layers == "once" and options.inner == "inductor" and not why_not_called(patches)


def repeated_parts(graph: fx.Graph, strict: bool = False) -> list[Repetition]:
    """Equal layers of a graph that goes to Inductor. Values of the graph that cost nothing are made once more for each reader.

    Args:
        graph: of one pass, as AOTAutograd's partitioner gives it.
        strict: whether a defect of ours is raised; else the graph is compiled whole, as it would be without.
    """
    if any(map(_has_symbols, graph.nodes)):
        return []
    try:
        _raise_seeds(graph)
        sink_free_calls(graph, _is_free)
        found = list(find_repetitions(graph, _is_of_a_layer, _is_apart, _is_wait, _may_cross, _FEWEST))
    except Exception as error:
        if strict:
            raise
        defect("looks for no equal parts in a graph", error)
        return []
    for each in found:
        log.info("%d equal parts of %d calls are compiled once", len(each.stretches), len(each.stretches[0]))
    return found


def _has_symbols(node: fx.Node) -> bool:
    """Whether a size of what a node gives, or a number, is not known."""
    found = value(node)
    every = found if isinstance(found, list | tuple) else [found]
    sizes = [
        x
        for each in every
        for x in ((*each.shape, *each.stride()) if isinstance(each, torch.Tensor) else (each,))
    ]
    return any(isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) for x in sizes)


def _raise_seeds(graph: fx.Graph) -> None:
    """Draws and reads the seeds of random numbers in front of all else: each layer's has another number, and the first layer would draw
    them for all."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    first = next((at for at, node in enumerate(calls) if is_random(node.target)), len(calls))
    drawn = [node for node in calls[: first + 1] if node.target is prims.inductor_seeds.default]
    read = [node for node in calls if node.target is prims.inductor_lookup_seed.default]
    inputs = graph.find_nodes(op="placeholder")
    known = {*inputs, *drawn}
    for node in reversed([*drawn, *(node for node in read if node.args[0] in known)]):
        inputs[-1].append(node)


def _is_free(node: fx.Node) -> bool:
    """Whether a call makes nothing: a view, or a constant, which Inductor writes into kernels."""
    if node.op != "call_function" or not shows_operand(node):
        return node.target in _CONSTANTS
    return not _is_flattened(node.args[0])  # type: ignore[arg-type]


def _may_cross(node: fx.Node) -> bool:
    return not _is_flattened(node)


def _is_flattened(node: fx.Node) -> bool:
    """Whether the kernels of a sum may give it with one dimension, whatever it has: as columns' sums that Inductor makes beside rows'
    (``codegen_mix_order_reduction``, torch 2.11 and 2.12). A view of it is right, and is what others are given."""
    if node.target not in _SUMS or node.meta["val"].ndim == 1:
        return False
    source: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return bool(dims) and not {-1, source.meta["val"].ndim - 1} & set(dims)


def _is_of_a_layer(node: fx.Node) -> bool:
    """Whether a call is one of those by which layers are found."""
    return node.target in _PRODUCTS or operation(node).startswith(_OF_A_LAYER)


def _is_apart(node: fx.Node) -> bool:
    """Whether a call may be no part of a graph that is called: it calls a graph itself, or writes to what it is given."""
    if isinstance(node.target, HigherOrderOperator) or any(x.op == "get_attr" for x in node.all_input_nodes):
        return True
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def _is_wait(node: fx.Node) -> bool:
    """Whether a call writes, whatever it says, to the memory of what it is given: what a collective brings."""
    return node.target is torch.ops._c10d_functional.wait_tensor.default
