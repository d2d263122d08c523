"""Which nodes write to their arguments, and to which storages."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterable
from typing import Any

from torch import fx

from mst_fx.graph.spelling import is_in_place_operator
from mst_fx.graph.values import is_plain, storage_keys, tensors_of
from mst_fx.torch_api.ops import OpOverload, OpOverloadPacket, schema_of
from mst_fx.torch_api.tensors import tree_leaves


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node may write to one of its arguments."""
    if isinstance(node.target, OpOverload):
        return schema_of(node.target).is_mutable
    if isinstance(node.target, OpOverloadPacket):
        return bool(_written_by_schema(node))
    if is_in_place_operator(node.target) or node.kwargs.get("out") is not None:
        return True
    place = _inplace_place(node.target)
    if node.kwargs.get("inplace") or any(node.args[place : place + 1]):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_, not_ write to nothing
        return False
    return node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")


@functools.cache
def _inplace_place(target: Any) -> int:
    """Where ``inplace`` stands among the arguments of a function such as ``F.relu``; beyond them if nowhere."""
    if not isinstance(target, types.FunctionType):
        return sys.maxsize - 1
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else sys.maxsize - 1


def mutated_storages(graph: fx.Graph) -> set[int]:
    """The storages that some node writes to; what reads them depends on when it runs."""
    return storages_written_by(graph.nodes)


def storages_written_by(nodes: Iterable[fx.Node]) -> set[int]:
    """Those of some nodes of a graph."""
    storages = set()
    for node in nodes:
        if not writes_in_place(node):
            continue
        for operand in _written(node):
            storages |= storage_keys(operand)
            if not all(map(is_plain, tensors_of(operand))):
                storages |= _storages_behind(operand)
    return storages


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node in place may write to."""
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return _written_by_schema(node)
    if node.kwargs.get("out") is not None:
        return node.all_input_nodes
    first = [leaf for leaf in tree_leaves(node.args[:1]) if isinstance(leaf, fx.Node)]
    return first or node.all_input_nodes[:1]


def _written_by_schema(node: fx.Node) -> list[fx.Node]:
    """The operands of an operator, or of a packet of overloads, that a schema says it writes to."""
    target: Any = node.target
    is_packet = isinstance(target, OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if is_packet else [target]
    found: list[fx.Node] = []
    for overload in overloads:
        for index, argument in enumerate(schema_of(overload).arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                is_positional = index < len(node.args) and not argument.kwarg_only
                given = node.args[index] if is_positional else node.kwargs.get(argument.name)
                found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, fx.Node)]
    return found


def _storages_behind(node: fx.Node) -> set[int]:
    """The storages of the plain tensors that a value that is none was made from, or that were made from it."""
    found, seen, waiting = set(), {node}, [node]
    while waiting:
        current = waiting.pop()
        for other in (*current.all_input_nodes, *current.users):
            if other in seen or other.op == "output":
                continue
            seen.add(other)
            if all(map(is_plain, tensors_of(other))):
                found |= storage_keys(other)
            else:
                waiting.append(other)
    return found
