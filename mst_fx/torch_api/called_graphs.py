"""Calls of graphs, in a graph that goes to Inductor, which makes code of each once.

Before, of a backward graph: ``found = mst_fx.layer_backward([x, w, …], [tangent], key)`` for each layer, or the calls of each layer one by one.
After::

    graph = get_attr layer_graph_0                      # (x, w, …, tangent) → gradients
    found = invoke_subgraph(graph, "layer_graph_0", x, w, …, tangent)

- ``torch.ops.higher_order.invoke_subgraph`` (public name: ``torch.compiler.nested_compile_region``, which Dynamo makes it of): put in
  behind AOTAutograd, so that its derivative is not asked for. Inductor lowers the graph once, whatever the number of calls, and frees
  operands inside of it. It reads ``meta`` of the output node for strides that have to be kept.
- ``torch._inductor.config``: what has no such calls (``cpp_wrapper``), or takes addresses of operands for granted (CUDA graphs).
- ``torch.ops.prims.inductor_seeds``, ``inductor_lookup_seed``: what AOTAutograd's random operators become in front of its partitioner.
- ``codegen_mix_order_reduction`` (``torch/_inductor/codegen/simd.py``): :func:`keeps_its_shape`.

Tried with torch 2.11.0 (CPU and CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_fx.torch_api.layers import is_random, part, set_outputs
from mst_fx.torch_api.overwriting import (
    GIVES_NEW,
    is_made_new,
    leaves,
    memory_of,
    write_over_dead_operands,
)

aten, prims = torch.ops.aten, torch.ops.prims

_FORWARD, _BACKWARD = "mst_fx::layer", "mst_fx::layer_backward"
_SUMS = (aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
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


def call_layers(gm: fx.GraphModule, layers: Mapping[str, Layer], know: Callable[[fx.Graph], None]) -> None:
    """Puts calls of their graphs in the place of the operators of layers, in a graph that goes to Inductor.

    Args:
        know: is told of each of these graphs.
    """
    known: dict[Any, _Called] = {}
    calls = [node for node in gm.graph.nodes if _name(node) in (_FORWARD, _BACKWARD)]
    for node, dead in [(node, _dead_tangents(node, layers)) for node in calls]:
        are_aligned = tuple(is_aligned(x.meta["val"]) for x in leaves(node))
        key = (node.args[-1], _name(node), dead, are_aligned)
        if key not in known:
            called = _called(f"layer_graph_{len(known)}", _graph_of(node, layers), dead)
            known[key] = _registered(gm, called, know)
        _call_in_place_of(gm.graph, node, known[key])
    if known:
        gm.graph.lint()
        gm.recompile()


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
    operands = leaves(node)
    tangents: Any = node.args[1] if _name(node) == _BACKWARD else ()
    return tuple(
        index - len(tangents)
        for index, tangent in enumerate(tangents)
        if list(tangent.users) == [node] and operands.count(tangent) == 1 and _is_apart(tangent, layers)
    )


def _is_apart(tangent: fx.Node, layers: Mapping[str, Layer]) -> bool:
    """Whether a call has made memory for a value alone."""
    if not _has_own_memory(tangent):
        return False
    source: Any = tangent.args[0] if tangent.target is operator.getitem else tangent
    if _name(source) not in (_FORWARD, _BACKWARD):
        return True
    bases = [memory_of(x) for x in _outputs(_graph_of(source, layers))]
    base = bases[tangent.args[1]]  # type: ignore[index]
    return bases.count(base) == 1 and base.op == "call_function" and is_made_new(base)


def _has_own_memory(node: fx.Node) -> bool:
    return memory_of(node) is node and is_made_new(node)


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
    set_outputs(gm.graph.output_node(), list(apart.values()))
    write_over_dead_operands(gm.graph, {inputs[index] for index in dead})
    gm.recompile()
    return _Called(name, gm, tuple(places))


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    found = node.meta["val"]
    with graph.inserting_before(graph.output_node()):
        copy = graph.call_function(aten.clone.default, (node,))
    copy.meta["val"] = _new_fake(found.fake_mode, found)
    return copy


def _new_fake(mode: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _registered(gm: fx.GraphModule, called: _Called, know: Callable[[fx.Graph], None]) -> _Called:
    know(called.gm.graph)
    gm.register_module(called.name, called.gm)
    return called


def _call_in_place_of(graph: fx.Graph, node: fx.Node, called: _Called) -> None:
    """Puts a call of a graph in the place of an operator."""
    inputs = called.gm.graph.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        given = [
            _as_traced(graph, x, known.meta["val"]) for x, known in zip(leaves(node), inputs, strict=True)
        ]
    results = {member: called.outputs[member.args[1]] for member in node.users}  # type: ignore[index]
    new = _call(graph, node, called, given, results)
    new.meta |= {key: found for key, found in node.meta.items() if key not in ("eager_input_vals", "val")}
    for member in results:
        graph.erase_node(member)
    graph.erase_node(node)


def _call(
    graph: fx.Graph,
    before: fx.Node,
    called: _Called,
    given: Sequence[fx.Node],
    results: Mapping[fx.Node, tuple[str, int]],
) -> fx.Node:
    """Calls a graph, and gives the readers of some nodes what it gives.

    Args:
        results: for each of these nodes the place that a ``_Called`` has for it.
    """
    with graph.inserting_before(before):
        name = graph.get_attr(called.name)
        new = graph.call_function(torch.ops.higher_order.invoke_subgraph, (name, called.name, *given))
        found: list[Any] = [None] * len(_outputs(called.gm))
        for node, (kind, index) in results.items():
            if kind == "input":
                node.replace_all_uses_with(given[index])
                continue
            found[index] = node.meta["val"]
            member = graph.call_function(operator.getitem, (new, index))
            member.meta = {key: x for key, x in node.meta.items() if key != "eager_input_vals"}
            node.replace_all_uses_with(member)
    new.meta |= {"val": tuple(found), GIVES_NEW: True}
    return new


def _as_traced(graph: fx.Graph, node: fx.Node, known: torch.Tensor) -> fx.Node:
    """An operand with the strides of the input that a graph was traced with."""
    if node.meta["val"].stride() == known.stride():
        return node
    kind: dict[str, Any] = {"dtype": known.dtype, "device": known.device}
    shape = list(known.shape), list(known.stride())
    empty = graph.call_function(aten.empty_strided.default, shape, kind)
    copy = graph.call_function(aten.copy.default, (empty, node))
    empty.meta["val"] = copy.meta["val"] = _new_fake(known.fake_mode, known)  # type: ignore[attr-defined]
    return copy


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor starts where Inductor's kernels may count on, if its storage does."""
    offset = tensor.storage_offset()
    return isinstance(offset, int) and offset * tensor.element_size() % _BYTES == 0


class Repetition(Protocol):
    """As :class:`mst_fx.graph.repetitions.Repetition`."""

    @property
    def stretches(self) -> Sequence[Sequence[fx.Node]]: ...
    @property
    def inputs(self) -> Sequence[Sequence[fx.Node]]: ...
    @property
    def slots(self) -> Mapping[tuple[int, int], int]: ...
    @property
    def outputs(self) -> Sequence[Sequence[int]]: ...


def call_repetitions(
    gm: fx.GraphModule, repetitions: Sequence[Repetition], know: Callable[[fx.Graph], None]
) -> None:
    """Puts calls of one graph in the place of equal stretches of calls, in a graph that goes to Inductor: of one for all those that give
    the same values, so that none holds what nobody reads behind it.

    Args:
        know: is told of each of these graphs.
    """
    # Before anything is changed: who reads a value is asked of the node that made it.
    all_dead = [list(map(_dead_inputs, each.stretches, each.inputs)) for each in repetitions]
    for index, (each, dead_inputs) in enumerate(zip(repetitions, all_dead, strict=True)):
        known: dict[Any, _Called] = {}
        for stretch, places, dead in zip(each.stretches, each.outputs, dead_inputs, strict=True):
            given = _given(each, stretch)
            results = [stretch[at] for at in places]
            key = (places, dead, tuple(is_aligned(x.meta["val"]) for x in given))
            if key not in known:
                graph = _graph_of_stretch(gm, each.slots, stretch, given, results)
                called = _called(f"repeated_graph_{index}_{len(known)}", graph, dead)
                known[key] = _registered(gm, called, know)
            _call(
                gm.graph, results[0], known[key], given, dict(zip(results, known[key].outputs, strict=True))
            )
            for node in reversed(stretch):
                gm.graph.erase_node(node)
    if repetitions:
        gm.graph.lint()
        gm.recompile()


def _given(repetition: Repetition, stretch: Sequence[fx.Node]) -> list[fx.Node]:
    """What a stretch reads of the rest of the graph, as it is by now."""
    found: dict[int, fx.Node] = {}
    for (at, leaf), slot in repetition.slots.items():
        found[slot] = leaves(stretch[at])[leaf]
    return [found[slot] for slot in range(len(found))]


def _graph_of_stretch(
    gm: fx.GraphModule,
    slots: Mapping[tuple[int, int], int],
    stretch: Sequence[fx.Node],
    given: Sequence[fx.Node],
    results: Sequence[fx.Node],
) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{slot}") for slot in range(len(given))]
    for placeholder, node in zip(inputs, given, strict=True):
        placeholder.meta["val"] = node.meta["val"]
    copies: dict[fx.Node, fx.Node] = {}
    for at, node in enumerate(stretch):
        operands = [
            inputs[slots[at, leaf]] if (at, leaf) in slots else copies[x]
            for leaf, x in enumerate(leaves(node))
        ]
        copies[node] = graph.node_copy(node, functools.partial(_next, iter(operands)))
        copies[node].meta = dict(node.meta)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(gm, graph)


def _next(operands: Iterator[fx.Node], _: fx.Node) -> fx.Node:
    """The operands of a copy, in the order in which it asks for them: of one value it may be given several."""
    return next(operands)


def _dead_inputs(stretch: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> tuple[int, ...]:
    """The inputs that a stretch alone reads, and that share their memory with nothing."""
    inside = set(stretch)
    return tuple(
        slot
        for slot, node in enumerate(inputs)
        if node.op == "call_function"
        and inputs.count(node) == 1
        and _has_own_memory(node)
        and inside.issuperset(node.users)
    )


def raise_seeds(graph: fx.Graph) -> None:
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


def keeps_its_shape(node: fx.Node) -> bool:
    """Whether Inductor's kernels give a value with the dimensions that it has: sums of columns that they make beside sums of rows come with one,
    whatever they have (up to torch 2.12). A view of such a sum is right, and is what others may be given."""
    if node.target not in _SUMS or node.meta["val"].ndim == 1:
        return True
    source: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return not dims or bool({-1, source.meta["val"].ndim - 1} & set(dims))
