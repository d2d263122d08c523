"""Equal checkpointed layers are traced and compiled once.

Before: ``h1 = checkpoint(layer_0, h0, w0, …)``, ``h2 = checkpoint(layer_1, h1, w1, …)``: a sub-graph for each. After::

    h1 = mst_fx.layer([h0, w0, …], key)[0]
    h2 = mst_fx.layer([h1, w1, …], key)[0]

whose forward pass saves its operands, as a checkpoint does, and whose derivative runs the layer's backward pass, the layer made again in
it. AOTAutograd sees two operators; Inductor gets calls of one graph for each pass (:mod:`mst_fx.torch_api.called_graphs`), and makes code of it
once, whatever the number of layers.

torch's own way to say so, ``invoke_subgraph`` in the captured graph (``torch.compiler.nested_compile_region``), gives the same numbers and falls
short in memory (tried with torch 2.13, a Llama of 4 layers): instead of a checkpoint it keeps what the inside of each layer makes (2.4 times as much
in all); inside of one AOTAutograd's partitioner keeps the input of the first layer alone (of checkpointed layers it saves no member of a list, which
is what the operator gives), so that the backward pass makes all layers again before it starts.

Left as they are: layers of which there is one; whose policy keeps a part (selective checkpointing); that draw random numbers, which the
backward pass would draw anew; that write to what they are given, or give it; with experts in a loop, whose routing is kept; with sizes
that change; whose results get no gradient. No layers at all where the joint graph is planned (``memory``), with a group of ranks, for
other compilers than Inductor, and for its settings that know no calls. What is left as it is may still be compiled once
(:mod:`mst_fx.repeated_parts`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

import mst_fx.ops  # noqa: F401  (registers the operators)
from mst_fx import repeated_parts
from mst_fx.bodies.layer import LAYERS, LayerGraph, traced_alone
from mst_fx.errors import Refusal, defect
from mst_fx.graph.edit import copy_graph, drop_unused_subgraphs
from mst_fx.graph.modes import Context, autocast_contexts, contexts
from mst_fx.graph.names import module_path
from mst_fx.graph.spelling import CHECKPOINTS, operation
from mst_fx.graph.subgraphs import called_graph, subgraphs
from mst_fx.graph.values import is_plain, storage_keys, tensors_of, value
from mst_fx.options import Options
from mst_fx.torch_api import layers as torch_layers
from mst_fx.torch_api.called_graphs import is_aligned
from mst_fx.torch_api.fakes import mode_of
from mst_fx.torch_api.ops import HigherOrderOperator
from mst_fx.torch_api.tensors import tree_leaves

log = logging.getLogger("mst_fx")

LEAST = 2  # layers that are worth a graph of their own
_KEEPS_ROUTING = "mst_fx::experts_loop"  # :mod:`mst_fx.passes.routing`


def fold_equal_layers(
    gm: fx.GraphModule, options: Options, patches: Mapping[str, Any]
) -> tuple[fx.GraphModule, dict[str, LayerGraph]]:
    """Puts the operators of layers in the place of checkpointed layers of which there are several.

    Args:
        gm: the captured graph, rewritten; it is not changed.
        patches: of Inductor's config.

    Returns:
        The new graph (``gm`` itself if there are no such layers), and the layers by the key by which it names them: whoever runs it keeps
        them alive.
    """
    reason = _why_none(options, patches)
    new = gm if reason else copy_graph(gm)
    groups = {} if reason else _groups(new)
    folded: dict[str, LayerGraph] = {}
    for nodes in groups.values():
        if len(nodes) < LEAST:
            continue
        try:
            layer = LAYERS.the_one(_traced(new, nodes[0], patches))
        except Refusal as refusal:
            reason = str(refusal)
            continue
        except Exception as error:
            if options.strict:
                raise
            reason = defect("traces layers one by one", error)
            continue
        folded[layer.key] = layer
        for node in nodes:
            _replace(new.graph, node, layer)
        log.info(
            "%d equal layers are compiled once: %s …", len(nodes), module_path(nodes[0]) or nodes[0].name
        )
    if reason:
        log.info("layers are traced one by one: %s", reason)
    if not folded:
        return gm, {}
    drop_unused_subgraphs(new)
    new.graph.lint()
    new.recompile()
    return new, folded


def _why_none(options: Options, patches: Mapping[str, Any]) -> str:
    if reason := repeated_parts.why_none(options, patches):
        return reason
    if options.memory is not None:
        return "the memory plan looks into them"
    if options.group is not None:
        return "a group of ranks works on each sequence"
    return "inference_mode" if torch.is_inference_mode_enabled() else ""


def _groups(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The checkpointed layers, by what tells them apart."""
    found: dict[str, list[fx.Node]] = {}
    modes = contexts(gm.graph)
    for node in gm.graph.nodes:
        child = called_graph(gm, node) if operation(node) in CHECKPOINTS else None
        if child is not None:
            found.setdefault(_text(node, child, modes[node]), []).append(node)
    return found


def _text(node: fx.Node, child: fx.GraphModule, modes: Context) -> str:
    """A layer up to the names of its nodes: the modes that it runs in, its operands and its graph, with all values."""
    names = {inner: f"%{index}" for index, inner in enumerate(child.graph.nodes)}
    meta = {key: found for key, found in child.meta.items() if "checkpoint" in str(key)}
    lines = [repr((modes, node.kwargs, meta, [_described(x) for x in node.args[1:]]))]
    for inner in child.graph.nodes:
        args = fx.node.map_arg((inner.args, inner.kwargs), names.__getitem__)  # type: ignore[arg-type]
        target = "" if inner.op == "placeholder" else inner.target
        lines.append(repr((inner.op, target, args, _described(inner))))
    return "\n".join(lines)


def _described(operand: Any) -> Any:
    if not isinstance(operand, fx.Node):
        return operand
    return [
        (
            leaf.shape,
            leaf.stride(),
            leaf.dtype,
            leaf.device,
            leaf.requires_grad,
            is_aligned(leaf),
        )
        if isinstance(leaf, torch.Tensor) and is_plain(leaf)
        else (type(leaf), leaf)
        for leaf in tree_leaves(value(operand))
    ]


def _traced(gm: fx.GraphModule, node: fx.Node, patches: Mapping[str, Any]) -> LayerGraph:
    """The graph of both passes of a layer.

    Raises:
        Refusal: if it cannot be one that others share.
    """
    child, modes = called_graph(gm, node), contexts(gm.graph)[node]
    assert child is not None
    given = [_operand(x) for x in node.args[1:]]
    if len({x.device for x in given}) != 1:
        raise Refusal("a layer is given tensors of several devices, or none")
    outputs = _checked(node, child, modes)
    has_backward = modes.grad and any(x.requires_grad for x in given)
    if has_backward and not all(x.requires_grad for each in outputs for x in tensors_of(each)):
        raise Refusal("a layer gives what has no gradient")

    # What shows memory that the layer made is given as memory of its own; Inductor leaves the copy out.
    are_views = [torch_layers.is_view(x) for each in outputs for x in tensors_of(each)]

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with autocast_contexts(modes.autocast):
            found = child(*operands)
        return tuple(x.clone() if is_view else x for x, is_view in zip(found, are_views, strict=True))

    with torch.set_grad_enabled(modes.grad):
        joint = traced_alone(run, given, has_backward)
    if any(torch_layers.is_random(inner.target) for inner in joint.graph.nodes):
        raise Refusal("a layer draws random numbers, or calls graphs of its own")
    needs = [has_backward and x.requires_grad for x in given]
    return LayerGraph(joint, needs, len(outputs), mode_of(given[0]), sorted(patches.items()))


def _operand(operand: Any) -> torch.Tensor:
    fake = value(operand) if isinstance(operand, fx.Node) else None
    if not isinstance(fake, torch.Tensor) or not is_plain(fake):
        raise Refusal("a layer is given something else than plain tensors")
    if not all(isinstance(size, int) for size in (*fake.shape, *fake.stride())):
        raise Refusal("the sizes change")
    return fake


def _checked(node: fx.Node, child: fx.GraphModule, modes: Context) -> list[fx.Node]:
    """What a layer gives.

    Raises:
        Refusal: if it does something that others cannot share.
    """
    if set(node.kwargs) - {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}:
        raise Refusal("a layer's checkpoint has arguments of its own")
    if any("context_fn" in str(key) for key in child.meta):
        raise Refusal("a policy says what a layer keeps")
    if modes.level or modes.inference:
        raise Refusal("a layer lies inside of a torch.func transform, or of inference_mode")
    if next(subgraphs(child), None) is not None or child.graph.find_nodes(op="get_attr"):
        raise Refusal("a layer has constants, or graphs of its own")
    if any(isinstance(inner.target, HigherOrderOperator) for inner in child.graph.nodes):
        raise Refusal("a layer has graphs of its own")
    if any(operation(inner) == _KEEPS_ROUTING for inner in child.graph.nodes):
        raise Refusal("which experts a row goes to is kept")
    outputs = child.graph.output_node().args[0]
    given: Sequence[Any] = outputs if isinstance(outputs, (tuple, list)) else [None]
    if not all(isinstance(x, fx.Node) and isinstance(value(x), torch.Tensor) for x in given):
        raise Refusal("a layer gives something else than tensors")
    memory = {key for x in child.graph.find_nodes(op="placeholder") for key in storage_keys(x)}
    if any(not memory.isdisjoint(storage_keys(x)) for x in given):
        raise Refusal("a layer gives what it is given")
    return list(given)


def _replace(graph: fx.Graph, node: fx.Node, layer: LayerGraph) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.mst_fx.layer.default, (list(node.args[1:]), layer.key))
    new.meta = dict(node.meta)
    called: Any = node.args[0]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if not called.users:
        graph.erase_node(called)
