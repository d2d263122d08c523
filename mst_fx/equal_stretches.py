"""Equal layers of a program with a memory plan are traced once.

Before, of a captured graph: the calls of layer 0, those of layer 1, …: equal ones, with other operands. After::

    h1 = mst_fx.layer([h0, w0, …], key)[0]
    h2 = mst_fx.layer([h1, w1, …], key)[0]

AOTAutograd traces an operator in the place of some hundred calls. In its graph of both passes these are written out again
(:mod:`mst_fx.bodies.write_out`), before anything looks at it: the plan, and the partitioner, find what tracing each layer would have given. What
is compiled once is found behind them (:mod:`mst_fx.repeated_parts`).

Weights that are gathered for a layer (DTensors) are gathered outside: what is traced once is given plain tensors.

Left as it is: layers of which there is one; checkpointed ones, whose insides Dynamo captures as graphs of their own; what draws random numbers; what
gives a view; graphs that write to what they are given, with sizes that change, or with a joint pass of the user's.
"""

from __future__ import annotations

import collections
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

import mst_fx.ops  # noqa: F401  (registers the operators)
from mst_fx import repeated_parts
from mst_fx.bodies.layer import LAYERS, LayerGraph, traced_alone
from mst_fx.errors import Refusal, defect
from mst_fx.graph.edit import copy_graph
from mst_fx.graph.effects import inference_change, level_change
from mst_fx.graph.modes import Context, autocast_contexts, contexts
from mst_fx.graph.names import module_path
from mst_fx.graph.repetitions import Repetition, find_repetitions
from mst_fx.graph.spelling import ATTENTION_KERNELS, argument, operation
from mst_fx.graph.values import is_plain, storage_keys, tensors_of, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.options import Options
from mst_fx.ranks.agreement import of_ranks
from mst_fx.torch_api import layers as torch_layers
from mst_fx.torch_api.fakes import mode_of
from mst_fx.torch_api.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED
from mst_fx.torch_api.ops import HigherOrderOperator

log = logging.getLogger("mst_fx")

_FEWEST = 8  # calls that are worth it
_MODES = (ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED)


def fold_equal_stretches(
    gm: fx.GraphModule, options: Options, patches: Mapping[str, Any]
) -> tuple[fx.GraphModule, dict[str, LayerGraph]]:
    """Puts the operators of layers in the place of equal stretches of calls; all ranks of a group do, or none.

    Args:
        gm: the captured graph, rewritten; it is not changed.
        patches: of Inductor's config.

    Returns:
        The new graph (``gm`` itself if there are none), and the layers by the key by which it names them: whoever runs it keeps them alive.
    """
    try:
        reason = _why_none(gm, options, patches)
        new, folded = (gm, {}) if reason else _folded(gm, patches)
    except Refusal as refusal:
        reason, new, folded = str(refusal), gm, {}
    except Exception as error:
        if options.strict and options.group is None:
            raise
        reason, new, folded = defect("traces layers one by one", error), gm, {}
    if options.group is not None and options.memory is not None:
        counts = [node.op for node in new.graph.nodes].count("call_function") if folded else 0
        if len(set(of_ranks(options.group, counts))) > 1:  # the calls of one rank would be in another order
            reason, new, folded = "not on all ranks are there equal ones", gm, {}
    if reason:
        log.info("layers are traced one by one: %s", reason)
    return new, folded


def _why_none(gm: fx.GraphModule, options: Options, patches: Mapping[str, Any]) -> str:
    if options.memory is None:
        return "there is no memory plan"
    if reason := repeated_parts.why_none(options, patches):
        return reason
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return "there is no backward pass"
    if torch_layers.has_joint_passes(patches):
        return "a joint pass of the user's looks into them"
    if any(map(repeated_parts.has_symbols, gm.graph.nodes)):
        return "the sizes change"
    if any(node.op.startswith("call_") and writes_in_place(node) for node in gm.graph.nodes):
        return "the program writes to what it is given"
    return ""


def _folded(gm: fx.GraphModule, patches: Mapping[str, Any]) -> tuple[fx.GraphModule, dict[str, LayerGraph]]:
    """
    Raises:
        Refusal: if there are no equal stretches, or what there is cannot be traced alone.
    """
    new = copy_graph(gm)
    shadow, originals = _shadow(new.graph)
    modes = contexts(new.graph)
    folded: dict[str, LayerGraph] = {}
    given: dict[fx.Node, fx.Node] = {}  # what stands for a result of a layer
    for each in find_repetitions(shadow, _is_of_a_layer, _is_apart, lambda node: False, _may_cross, _FEWEST):
        stretches = _alike(each, originals)
        if len(stretches) < 2:
            continue
        layer = LAYERS.the_one(_traced(new, stretches[0], modes[stretches[0].calls[0]], patches))
        folded[layer.key] = layer
        for stretch in stretches:
            given |= _replace(new.graph, stretch, [given.get(x, x) for x in stretch.inputs], layer)
        log.info("%d equal parts of %d calls are traced once", len(stretches), len(stretches[0].calls))
    if not folded:
        raise Refusal("there are no equal ones")
    new.graph.lint()
    new.recompile()
    return new, folded


def _shadow(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph of the calls that can be parts of layers, as they stand, and what each of its nodes is a copy of: methods are functions, and what
    makes plain tensors of others (a gathered weight) is an input."""
    new, copies, odd = fx.Graph(), dict[fx.Node, fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        is_call = node.op in ("call_function", "call_method")
        is_odd = not odd.isdisjoint(node.all_input_nodes)
        if not all(map(is_plain, tensors_of(node))) and (is_odd or not is_call):
            odd.add(node)
        if node.op == "output":
            copies[node] = new.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        elif node.target in _MODES:
            copies[node] = new.call_function(
                node.target
            )  # the end of a region reads its beginning: no value is alive between
        elif is_call and not is_odd:
            target = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = new.call_function(target, args, kwargs)
        else:
            copies[node] = new.placeholder(node.name)
        copies[node].meta["val"] = value(node)
    return new, {copy: node for node, copy in copies.items()}


def _is_of_a_layer(node: fx.Node) -> bool:
    return node.target in (F.linear, F.scaled_dot_product_attention) or repeated_parts.is_of_a_layer(node)


def _is_apart(node: fx.Node) -> bool:
    """Whether a call may be no part of a layer that is traced alone."""
    if isinstance(node.target, HigherOrderOperator) or node.target in _MODES:
        return True
    if level_change(node) or inference_change(node):
        return True
    return node.meta.get("val") is None  # it does something, or gives what cannot be looked at


def _is_random(node: fx.Node) -> bool:
    """Whether a call of an ATen graph draws random numbers. (Attention may, and does not without dropout.)"""
    if operation(node) in ATTENTION_KERNELS and not argument(node, "dropout_p", 0.0):
        return False
    return torch_layers.is_random(node.target)


def _may_cross(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, torch.Tensor) and is_plain(found)


class _Stretch:
    """Equal calls of one layer.

    Attributes:
        calls: in order.
        inputs: what they read of the rest of the graph.
        outputs: which of them the rest of the graph reads, by place.
    """

    def __init__(self, calls: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: tuple[int, ...]) -> None:
        self.calls, self.inputs, self.outputs = tuple(calls), tuple(inputs), outputs

    @property
    def results(self) -> list[fx.Node]:
        return [self.calls[at] for at in self.outputs]

    @property
    def named(self) -> fx.Node:
        """The first call of which it is known what module it is of."""
        return next((node for node in self.calls if module_path(node)), self.calls[0])

    def gradients(self) -> tuple[bool, ...]:
        """Of inputs and results, whether they get a gradient."""
        return tuple(bool(value(node).requires_grad) for node in (*self.inputs, *self.results))


def _alike(found: Repetition, originals: Mapping[fx.Node, fx.Node]) -> list[_Stretch]:
    """Most of the stretches: those that give the same, and whose operands get gradients alike."""
    every = [
        _Stretch([originals[x] for x in calls], [originals[x] for x in inputs], outputs)
        for calls, inputs, outputs in zip(found.stretches, found.inputs, found.outputs, strict=True)
    ]
    kinds = collections.Counter((each.outputs, each.gradients()) for each in every)
    kind, _ = kinds.most_common(1)[0]
    return [each for each in every if (each.outputs, each.gradients()) == kind]


def _traced(gm: fx.GraphModule, stretch: _Stretch, modes: Context, patches: Mapping[str, Any]) -> LayerGraph:
    """The graph of both passes of a stretch.

    Raises:
        Refusal: if it cannot be one that others share.
    """
    _check(stretch, modes)
    given, results = [value(x) for x in stretch.inputs], [value(x) for x in stretch.results]
    part = fx.Interpreter(_part(gm, stretch))

    def run(*operands: torch.Tensor) -> Any:
        with autocast_contexts(modes.autocast), fx.traceback.preserve_node_meta():
            return part.run(*operands)

    joint = traced_alone(run, given, has_backward=True)
    if any(map(_is_random, joint.graph.nodes)):
        raise Refusal("a layer draws random numbers, or calls graphs of its own")
    traced: Any = joint.graph.output_node().args[0]
    if any(a.stride() != b.meta["val"].stride() for a, b in zip(results, traced, strict=False)):
        raise Refusal("a layer gives what is laid out otherwise when it is traced")
    path = module_path(stretch.named)
    needs = [x.requires_grad for x in given]
    layer = LayerGraph(joint, needs, len(results), mode_of(given[0]), (path, sorted(patches.items())), path)
    layer.prepare()  # what fails does so before anything has changed
    return layer


def _check(stretch: _Stretch, modes: Context) -> None:
    """
    Raises:
        Refusal: if it is seen in the captured graph that a stretch cannot be traced alone.
    """
    if modes.level or modes.inference or not modes.grad:
        raise Refusal("a layer lies inside of a torch.func transform, or gets no gradients")
    if not all(value(x).requires_grad for x in stretch.results):
        raise Refusal("a layer gives what has no gradient")
    memory = {key for x in stretch.inputs for key in storage_keys(x)}
    for result in stretch.results:
        if torch_layers.is_view(value(result)) or not memory.isdisjoint(storage_keys(result)):
            raise Refusal("a layer gives a view")


def _part(gm: fx.GraphModule, stretch: _Stretch) -> fx.GraphModule:
    """``inputs`` → results."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in stretch.inputs}
    for node in stretch.calls:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    graph.output(tuple(copies[node] for node in stretch.results))
    return fx.GraphModule(gm, graph)


def _replace(
    graph: fx.Graph, stretch: _Stretch, inputs: Sequence[fx.Node], layer: LayerGraph
) -> dict[fx.Node, fx.Node]:
    """What stands for each result."""
    found: dict[fx.Node, fx.Node] = {}
    with graph.inserting_after(stretch.calls[-1]):
        call = last = graph.call_function(torch.ops.mst_fx.layer.default, (list(inputs), layer.key))
    call.meta = {**stretch.named.meta, "example_value": [value(node) for node in stretch.results]}
    for index, node in enumerate(stretch.results):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, index))
        last.meta = dict(node.meta)
        found[node] = last
        node.replace_all_uses_with(last)
    for node in reversed(stretch.calls):
        graph.erase_node(node)
    return found
