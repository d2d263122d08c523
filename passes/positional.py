"""``linear(input=x, weight=w)`` → ``linear(x, w)``: whoever reads a node finds its operands in one place.

Only the arguments that follow the positional ones without a gap are moved, and those that code asks for by keyword stay.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.graph.values import tensor_value
from mst_fx.torch_api.ops import OpOverload, schema_of

aten = torch.ops.aten


# Arguments that code asks for by keyword, and other names that torch takes for the same argument.
_LEFT_AS_KEYWORDS = ("inplace", "out", "dtype")
_OTHER_NAMES = {"self": ("input",), "dim": ("axis",), "keepdim": ("keepdims",)}


def run(context: PassContext) -> bool:
    """Makes arguments positional in a program and in all graphs that it refers to."""
    return sum(make_positional(graph) for graph in graphs_of(context.gm)) > 0


def make_positional(graph: fx.Graph) -> bool:
    """Makes arguments positional in one graph; returns whether there were any."""
    has_moved = False
    for node in graph.nodes:
        if not node.kwargs or not any(tensor_value(n) is not None for n in node.all_input_nodes):
            continue
        found = {_positional(node, names) for names in _signatures(node)}
        if len(found) == 1 and (moved := found.pop()):
            args = [*node.args, *(node.kwargs[key] for key in moved)]
            node.kwargs = {key: given for key, given in node.kwargs.items() if key not in moved}
            node.args = tuple(args)
            has_moved = True
    return has_moved


def _positional(node: fx.Node, names: Sequence[str]) -> tuple[str, ...]:
    """The keywords of a node that are its next positional arguments."""
    moved: list[str] = []
    for name in names[len(node.args) :]:
        keys = [key for key in (name, *_OTHER_NAMES.get(name, ())) if key in node.kwargs]
        if len(keys) != 1 or name in _LEFT_AS_KEYWORDS:
            break
        moved += keys
    return tuple(moved)


def _signatures(node: fx.Node) -> list[tuple[str, ...]]:
    """The names of the positional arguments of what a node calls: of each overload that takes its keywords."""
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, target, None)
    if isinstance(target, types.FunctionType) and target.__module__.startswith("torch."):
        parameters = inspect.signature(target).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return []
        return [tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)]
    if isinstance(target, OpOverload):
        schemas = [schema_of(target)]
    elif isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
        packet = getattr(aten, target.__name__, None)
        schemas = (
            [schema_of(getattr(packet, name)) for name in packet.overloads()] if packet is not None else []
        )
    else:
        return []
    found = []
    for schema in schemas:
        taken = {name for a in schema.arguments for name in (a.name, *_OTHER_NAMES.get(a.name, ()))}
        if node.kwargs.keys() <= taken:
            found.append(tuple(a.name for a in schema.arguments if not a.kwarg_only))
    return found
