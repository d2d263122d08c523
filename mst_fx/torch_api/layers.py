"""Layers that are traced once, and called in a graph that goes to Inductor as one graph of which it makes code once.

Before, of a backward graph: ``found = mst_fx.layer_backward([x, w, …], [tangent], key)`` for each layer. After::

    graph = get_attr layer_graph_0                      # (x, w, …, tangent) → gradients
    found = invoke_subgraph(graph, "layer_graph_0", x, w, …, tangent)

- ``torch._functorch.aot_autograd.aot_export_joint_simple``: forward and backward pass of a function as one ATen graph; it raises where
  the function writes to operands, or gives what shares memory with one.
- ``torch._inductor.compile_fx._recursive_joint_graph_passes``, ``torch._functorch.compile_utils.fx_graph_cse``: what Inductor and its
  partitioner do with such a graph before they cut it in two.
- ``torch.ops.higher_order.invoke_subgraph`` (public name: ``torch.compiler.nested_compile_region``, which Dynamo makes it of): put in
  behind AOTAutograd, so that its derivative is not asked for. Inductor lowers the graph once, whatever the number of calls, and frees
  operands inside of it. It reads ``meta`` of the output node for strides that have to be kept.
- ``torch._inductor.config``: what has no such calls (``cpp_wrapper``), or takes addresses of operands for granted (CUDA graphs).

Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_joint_graph_passes
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_fx.torch_api.overwriting import is_made_new, memory_of, write_over_dead_operands

_FORWARD, _BACKWARD = "mst_fx::layer", "mst_fx::layer_backward"
_BYTES = 16  # of which Inductor takes the address of what a graph is given for a multiple


class Layer(Protocol):
    """What an operator names by its key."""

    @property
    def forward_graph(self) -> fx.GraphModule: ...
    @property
    def backward_graph(self) -> fx.GraphModule: ...


def why_not_called(patches: Mapping[str, Any]) -> str:
    """Why Inductor, with these config patches, should not get calls of graphs; "" if it may."""
    with inductor_config.patch(dict(patches)):
        if inductor_config.cpp_wrapper:
            return "Inductor's C++ wrapper has no calls of graphs"
        if inductor_config.triton.cudagraphs:
            return "CUDA graphs take the addresses of parameters for granted"
        if inductor_config.freezing:
            return "Inductor freezes parameters"
    return ""


def both_passes(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], mode: FakeTensorMode, has_backward: bool
) -> fx.GraphModule:
    """The ATen graph of ``(*inputs, *tangents)`` → ``(*outputs, *gradients)``, with None for inputs that get no gradient.

    Args:
        inputs: fakes of ``mode``.
        has_backward: without, of ``inputs`` → ``outputs``.

    Raises:
        RuntimeError: if the function writes to an input, or gives what shares memory with one, or with another result.
    """
    table = dict(select_decomp_table())
    with tracing(TracingContext(mode)):
        found = aot_export_joint_simple(
            function, tuple(inputs), trace_joint=has_backward, decompositions=table
        )
    assert isinstance(found, fx.GraphModule)
    return found


def prepared(gm: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """What Inductor makes of a graph of both passes before it is cut in two."""
    with tracing(TracingContext(mode)):
        gm = _recursive_joint_graph_passes(gm)
        return fx.GraphModule(gm, fx_graph_cse(gm.graph))


def part(
    gm: fx.GraphModule, outputs: Sequence[fx.Node], inputs: Collection[int] | None = None
) -> fx.GraphModule:
    """A graph that gives only some values of another one.

    Args:
        inputs: which of the inputs it has, by number, and no other one does it read; None: all.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
    _set_outputs(graph.output(()), [copies[node] for node in outputs])
    graph.eliminate_dead_code()
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        if inputs is not None and index not in inputs:
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(gm, graph)


def inputs_read(gm: fx.GraphModule, outputs: Sequence[fx.Node]) -> tuple[int, ...]:
    """The inputs of a graph, by number, that some of its values are made of."""
    read, waiting = set(outputs), list(outputs)
    while waiting:
        following = set(waiting.pop().all_input_nodes) - read
        read |= following
        waiting += following
    return tuple(i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in read)


def _set_outputs(output: fx.Node, given: Sequence[fx.Node]) -> None:
    """What a graph gives, whose strides Inductor has to keep."""
    output.args = (tuple(given),)
    output.meta["user_visible_output_idxs"] = list(range(len(given)))
    output.meta["original_output_strides"] = [node.meta["val"].stride() for node in given]


def call_graphs(gm: fx.GraphModule, layers: Mapping[str, Layer], know: Callable[[fx.Graph], None]) -> None:
    """Puts calls of their graphs in the place of the operators of layers, in a graph that goes to Inductor.

    Args:
        know: is told of each of these graphs.
    """
    known: dict[Any, _Called] = {}
    calls = [node for node in gm.graph.nodes if _name(node) in (_FORWARD, _BACKWARD)]
    for node, dead in [(node, _dead_tangents(node, layers)) for node in calls]:
        are_aligned = tuple(is_aligned(x.meta["val"]) for x in _operands(node))
        key = (node.args[-1], _name(node), dead, are_aligned)
        if key not in known:
            called = known[key] = _called(f"layer_graph_{len(known)}", _graph_of(node, layers), dead)
            know(called.gm.graph)
            gm.register_module(called.name, called.gm)
        _call(gm.graph, node, known[key])
    if known:
        gm.graph.lint()
        gm.recompile()


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(node.args, found.append)
    return found


def _name(node: fx.Node) -> str:
    target = node.target
    return target.name() if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) else ""


def _graph_of(node: fx.Node, layers: Mapping[str, Layer]) -> fx.GraphModule:
    layer = layers[str(node.args[-1])]
    return layer.backward_graph if _name(node) == _BACKWARD else layer.forward_graph


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def _dead_tangents(node: fx.Node, layers: Mapping[str, Layer]) -> tuple[int, ...]:
    """The tangents that a call alone reads, once, and that share their memory with nothing, counted from the last operand."""
    operands = _operands(node)
    tangents: Any = node.args[1] if _name(node) == _BACKWARD else ()
    return tuple(
        index - len(tangents)
        for index, tangent in enumerate(tangents)
        if list(tangent.users) == [node] and operands.count(tangent) == 1 and _is_apart(tangent, layers)
    )


def _is_apart(tangent: fx.Node, layers: Mapping[str, Layer]) -> bool:
    """Whether a call has made memory for a value alone."""
    if memory_of(tangent) is not tangent or not is_made_new(tangent):
        return False
    source: Any = tangent.args[0] if tangent.target is operator.getitem else tangent
    if _name(source) not in (_FORWARD, _BACKWARD):
        return True
    bases = [memory_of(x) for x in _outputs(_graph_of(source, layers))]
    base = bases[tangent.args[1]]  # type: ignore[index]
    return bases.count(base) == 1 and base.op == "call_function" and is_made_new(base)


@dataclasses.dataclass(frozen=True)
class _Called:
    """A graph that is called, and where what the layer gives is: which of the graph's outputs it is, or of its inputs."""

    name: str
    gm: fx.GraphModule
    outputs: tuple[tuple[str, int], ...]


def _called(name: str, whole: fx.GraphModule, dead: Collection[int]) -> _Called:
    """A layer's graph, to be changed by Inductor, whose outputs share memory neither with each other nor with an input: whoever calls it
    takes them for tensors of its own, and may write to them.

    Args:
        dead: inputs that it may write over, counted from the last.
    """
    gm = part(whole, _outputs(whole))
    inputs = gm.graph.find_nodes(op="placeholder")
    apart: dict[fx.Node, fx.Node] = {}
    bases = set(inputs)
    for node in _outputs(gm):
        if node not in inputs and node not in apart:
            apart[node] = _copy(gm.graph, node) if memory_of(node) in bases else node
            bases.add(memory_of(node))
    kept = list(apart)
    places = [("input", inputs.index(x)) if x in inputs else ("output", kept.index(x)) for x in _outputs(gm)]
    _set_outputs(gm.graph.output_node(), list(apart.values()))
    write_over_dead_operands(gm.graph, {inputs[index] for index in dead})
    gm.recompile()
    return _Called(name, gm, tuple(places))


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    found = node.meta["val"]
    with graph.inserting_before(graph.output_node()):
        copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta["val"] = _new_fake(found.fake_mode, found)
    return copy


def _new_fake(mode: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _call(graph: fx.Graph, node: fx.Node, called: _Called) -> None:
    """Puts a call of a graph in the place of an operator."""
    inputs = called.gm.graph.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        name = graph.get_attr(called.name)
        given = [
            _as_traced(graph, x, known.meta["val"]) for x, known in zip(_operands(node), inputs, strict=True)
        ]
        new = graph.call_function(torch.ops.higher_order.invoke_subgraph, (name, called.name, *given))
    new.meta = {key: found for key, found in node.meta.items() if key not in ("eager_input_vals", "val")}
    found: list[Any] = [None] * len(_outputs(called.gm))
    for member in list(node.users):
        kind, index = called.outputs[member.args[1]]  # type: ignore[index]
        if kind == "input":
            member.replace_all_uses_with(given[index])
            graph.erase_node(member)
        else:
            member.args = (new, index)
            found[index] = member.meta["val"]
    new.meta["val"] = tuple(found)
    graph.erase_node(node)


def _as_traced(graph: fx.Graph, node: fx.Node, known: torch.Tensor) -> fx.Node:
    """An operand with the strides of the input that a graph was traced with."""
    if node.meta["val"].stride() == known.stride():
        return node
    kind: dict[str, Any] = {"dtype": known.dtype, "device": known.device}
    shape = list(known.shape), list(known.stride())
    empty = graph.call_function(torch.ops.aten.empty_strided.default, shape, kind)
    copy = graph.call_function(torch.ops.aten.copy.default, (empty, node))
    empty.meta["val"] = copy.meta["val"] = _new_fake(known.fake_mode, known)  # type: ignore[attr-defined]
    return copy


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor starts where Inductor's kernels may count on, if its storage does."""
    offset = tensor.storage_offset()
    return isinstance(offset, int) and offset * tensor.element_size() % _BYTES == 0


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor shows the memory of another one. ``Tensor._is_view``: public names tell a storage, and not whose it was first."""
    return tensor._is_view()


@functools.cache
def is_random(target: Any) -> bool:
    """Whether an operator draws random numbers, or may run any other: a higher-order one."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
