"""Layers that were traced once, written out again in the graph of both passes.

Before::

    h1 = mst_fx.layer([h0, w0], key)[0]
    …
    d_h0, d_w0 = mst_fx.layer_backward([h0, w0], [d_h1], key)

After: in the place of each operator the calls of the layer's graph that it stands for. The backward pass reads what the forward pass has made, and
nothing is made twice: it is the graph that tracing each layer by itself would have given, up to the names of its nodes. Whoever decides what is
kept, and where, finds no operators of layers.

What gathers a weight for a layer alone, and what takes its gradient to where it goes, was in front of the operators and behind them: it moves to
where the weight is read first, and to where the gradient is made.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.layer import LAYERS, LayerGraph
from mst_fx.graph.names import clean_path
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import storage_key, storage_keys
from mst_fx.torch_api.fakes import FakeTensor, FakeTensorMode, fake_mode_of, fake_view, new_fake
from mst_fx.torch_api.overwriting import shows_operand
from mst_fx.torch_api.tensors import tree_leaves

_FORWARD, _BACKWARD = "mst_fx::layer", "mst_fx::layer_backward"


def write_out(graph: fx.Graph) -> int:
    """Puts the calls of layers in the place of their operators, in a joint graph.

    Returns:
        How many layers.
    """
    calls = [node for node in graph.nodes if operation(node) == _FORWARD]
    gradients = {
        (node.args[2], tuple(node.args[0])): node for node in graph.nodes if operation(node) == _BACKWARD
    }
    layers = []
    for node in calls:
        layer = LAYERS[node.args[1]]
        saved = tuple(node.args[0][index] for index in layer.reads)
        layers.append(_Layer(graph, layer, node, gradients.pop((layer.key, saved), None)))
    if gradients:
        raise AssertionError(f"{next(iter(gradients.values()))} is of no layer")
    # In the order in which they run: a view is made of what is there already.
    for each in layers:
        each.write_forward()
    for each in reversed(layers):
        each.write_backward()
    return len(calls)


class _Layer:
    """One layer of a joint graph."""

    def __init__(
        self, graph: fx.Graph, layer: LayerGraph, forward: fx.Node, backward: fx.Node | None
    ) -> None:
        self._graph, self._layer = graph, layer
        self._forward, self._backward = forward, backward
        self._copies: dict[fx.Node, fx.Node] = {}
        self._given: dict[fx.Node, Any] = {}
        self._storages: set[int] = set()  # of the values in the layer's graph so far
        mode = fake_mode_of(tree_leaves([x.meta["val"] for x in forward.args[0]]))  # type: ignore[union-attr]
        assert mode is not None
        self._mode: FakeTensorMode = mode
        self._path = _path(forward.meta.get("nn_module_stack"))
        template = layer.both_passes.graph
        self._inputs = template.find_nodes(op="placeholder")
        self._inner = [node for node in template.nodes if node.op not in ("placeholder", "output")]
        self._results: Any = template.output_node().args[0]
        # All of the forward pass comes before what depends on a tangent.
        tangents = set(self._inputs[len(layer.needs) :])
        depend = [self._depends(node, tangents) for node in self._inner]
        self._first = (*depend, True).index(True)

    def write_forward(self) -> None:
        operands: Any = self._forward.args[0]
        self._take_in(self._inputs[: len(operands)], operands)
        results = self._results[: len(self._layer.outputs)]
        self._know(self._forward, results)
        moved: set[fx.Node] = set()
        for node in self._inner[: self._first]:
            for operand in node.all_input_nodes:
                if operand.op == "placeholder" and operand not in moved:
                    moved.add(operand)
                    self._bring(self._copies[operand])
            self._copy(node, self._forward)
        self._replace(self._forward, results)

    def _know(self, call: fx.Node, results: Sequence[fx.Node]) -> None:
        """Remembers the fakes of what an operator gives, of which there are views already."""
        self._given |= {results[user.args[1]]: user.meta["val"] for user in call.users}  # type: ignore[index]

    def write_backward(self) -> None:
        if self._backward is None:
            return
        tangents: Any = self._backward.args[1]
        self._take_in(self._inputs[len(self._layer.needs) :], tangents)
        results = [x for x in self._results[len(self._layer.outputs) :] if x is not None]
        self._know(self._backward, results)
        for node in self._inner[self._first :]:
            self._copy(node, self._backward)
        for gradient in self._replace(self._backward, results):
            self._take(gradient)

    def _take_in(self, inputs: Sequence[fx.Node], operands: Sequence[fx.Node]) -> None:
        self._copies |= zip(inputs, operands, strict=True)
        for given in inputs:
            self._storages |= storage_keys(given)

    @staticmethod
    def _depends(node: fx.Node, tangents: set[fx.Node]) -> bool:
        """(In order of the nodes: those that do join the tangents.)"""
        if tangents.isdisjoint(node.all_input_nodes):
            return False
        tangents.add(node)
        return True

    def _copy(self, node: fx.Node, before: fx.Node) -> None:
        with self._graph.inserting_before(before):
            if node.op == "get_attr":
                new = self._constant(node)
            else:
                new = self._graph.node_copy(node, self._copies.__getitem__)
        new.meta = self._meta(node)
        self._copies[node] = new
        if "val" in node.meta:
            new.meta["val"] = self._value(node, new)
        self._storages |= storage_keys(node)

    def _constant(self, node: fx.Node) -> fx.Node:
        owner = self._graph.owning_module
        assert owner is not None
        name = next(
            name
            for index in itertools.count()
            if not hasattr(owner, name := f"mst_fx_layer_constant_{index}")
        )
        setattr(owner, name, getattr(self._layer.both_passes, str(node.target)))
        return self._graph.get_attr(name)

    def _value(self, node: fx.Node, new: fx.Node) -> Any:
        """A fake for a copy, whose memory is shared as that of the node's is: with what is shown, and with no other layer."""
        value = node.meta["val"]
        if node.op == "get_attr":
            return value
        if node.target is operator.getitem:
            return new.args[0].meta["val"][new.args[1]]  # type: ignore[union-attr, index]
        if shows_operand(node) or not self._storages.isdisjoint(storage_keys(node)):
            return self._shown(node, new)
        if isinstance(value, torch.Tensor):
            return self._given[node] if node in self._given else new_fake(self._mode, value)
        if isinstance(value, (list, tuple)):
            return type(value)(new_fake(self._mode, x) if isinstance(x, torch.Tensor) else x for x in value)
        return value

    def _shown(self, node: fx.Node, new: fx.Node) -> Any:
        """A view in the memory of the operand of the copy, where the node's lies in that of its own; else what the operator gives."""
        value = node.meta["val"]
        for base in node.all_input_nodes:
            here, there = base.meta["val"], self._copies[base].meta["val"]
            if _has_memory_of(value, here):
                offset = value.storage_offset() - here.storage_offset() + there.storage_offset()
                return fake_view(self._mode, there, value, offset)
        with self._mode:
            args, kwargs = fx.node.map_arg((new.args, new.kwargs), lambda x: x.meta["val"])
            return new.target(*args, **kwargs)  # type: ignore[operator]

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        meta = dict(node.meta)
        stack = meta.get("nn_module_stack")
        if stack:
            meta["nn_module_stack"] = {
                key: (renumbered(clean_path(str(where)), self._layer.path, self._path), kind)
                for key, (where, kind) in stack.items()
            }
        return meta

    def _replace(self, call: fx.Node, results: Sequence[fx.Node]) -> list[fx.Node]:
        """Puts results in the place of what an operator gives; what stands for those that somebody reads."""
        found = []
        for user in list(call.users):
            new = self._copies[results[user.args[1]]]  # type: ignore[index]
            found.append(new)
            user.replace_all_uses_with(new)
            self._graph.erase_node(user)
        self._graph.erase_node(call)
        return found

    def _bring(self, operand: fx.Node) -> None:
        """Moves what gathers a weight to where the layer reads it first, which is where calls are inserted."""
        readers = {self._forward, self._backward}
        for node in _gathering(operand, readers):
            self._forward.prepend(node)

    def _take(self, gradient: fx.Node) -> None:
        """Moves what is made of a gradient alone, call by call, to where the gradient is made."""
        last = gradient
        while len(last.users) == 1:
            (user,) = last.users
            if user.op != "call_function" or user.all_input_nodes != [last]:
                return
            last.append(user)
            last = user


def _gathering(operand: fx.Node, readers: set[fx.Node | None]) -> list[fx.Node]:
    """The calls that make an operand of inputs of the graph, for these readers alone, in order; none if it is made of other things too."""
    found: list[fx.Node] = []
    last = operand
    while last.op == "call_function":
        if not all(user in readers or user in found for user in last.users) or len(last.all_input_nodes) != 1:
            return []
        found.append(last)
        (last,) = last.all_input_nodes
    return found[::-1] if last.op == "placeholder" else []


def _has_memory_of(value: Any, other: Any) -> bool:
    """Whether a tensor is another's memory, with the numbers that are there."""
    if not isinstance(value, FakeTensor) or not isinstance(other, FakeTensor):
        return False
    is_as_there = value.dtype == other.dtype and not value.is_conj() and not value.is_neg()
    key = storage_key(value)
    return is_as_there and key is not None and key == storage_key(other)


def _path(stack: Mapping[str, Any] | None) -> str:
    return clean_path(str(list(stack.values())[-1][0])) if stack else ""


def renumbered(path: str, first: str, other: str) -> str:
    """The path of a module in another layer, told by those of one module in both: ``layers.0.mlp``, ``layers.0.norm`` and
    ``layers.3.norm`` make ``layers.3.mlp``."""
    parts, firsts, others = (each.split(".") for each in (path, first, other))
    at = next((i for i, (a, b) in enumerate(zip(firsts, others, strict=False)) if a != b), None)
    if at is None or len(parts) <= at or parts[:at] != firsts[:at]:
        return path
    if not (parts[at].isdigit() and firsts[at].isdigit() and others[at].isdigit()):
        return path
    parts[at] = str(int(parts[at]) + int(others[at]) - int(firsts[at]))
    return ".".join(parts)
