"""What in a graph is known before it runs: numbers, tensors that are full of one, and values that depend on no input."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.graph.fill import call
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.fakes import real_tensors
from mst_fx.torch_api.tensors import tree_map_only

_FILLS = {"ones": 1, "ones_like": 1, "new_ones": 1, "zeros": 0, "zeros_like": 0, "new_zeros": 0}


def fill_of(node: fx.Node, mutated: Collection[int] = ()) -> float | bool | None:
    """The number that all elements of a node are: ``x.new_zeros(shape)``, ``full(shape, True)``."""
    name, fake = operation(node), tensor_value(node)
    if node.op not in ("call_function", "call_method") or any(map(writes_in_place, node.users)):
        return None
    if fake is None or not is_plain(fake) or storage_key(fake) in mutated:
        return None
    if name in _FILLS:
        return _FILLS[name]
    if name in ("full", "full_like", "new_full"):
        at = 2 if name == "new_full" else 1
        filled = node.args[at] if len(node.args) > at else node.kwargs.get("fill_value")
        return filled if isinstance(filled, (bool, int, float)) else None
    return None


def number_of(found: Any) -> float | None:
    """A Python number; of Dynamo's dynamic floats the value at capture, guarded."""
    if isinstance(found, fx.Node):
        found = value(found)
    if isinstance(found, torch.SymFloat):
        return float(float(found))
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return float(found) if is_number else None


def number_in(found: Any, mutated: Collection[int]) -> float | None:
    """:func:`number_of`, of tensors of one element that are constant too."""
    if not isinstance(found, fx.Node):
        return number_of(found)
    known = evaluated(found, {}, 1, mutated)
    return float(known) if isinstance(known, Tensor) and known.numel() == 1 else None


def evaluated(node: fx.Node, known: dict[fx.Node, Any], limit: int, mutated: Collection[int]) -> Any:
    """The value of a node on the CPU; None if it depends on an input, or is larger than ``limit`` elements.

    Args:
        known: what was asked before; is added to.
        mutated: storages that something writes to: what they hold depends on when it is read.
    """
    if node in known:
        return known[node]
    known[node] = None
    if not _may_be_constant(node, limit, mutated):
        return None
    operands = {operand: evaluated(operand, known, limit, mutated) for operand in node.all_input_nodes}
    if any(found is None for found in operands.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    try:
        with real_tensors():
            known[node] = call(node.op, node.target, args, kwargs)
    except Exception:  # not a constant then
        return None
    return known[node]


def _may_be_constant(node: fx.Node, limit: int, mutated: Collection[int]) -> bool:
    fake = tensor_value(node)
    # Named one by one: a random number is no constant, and neither is what somebody writes to.
    is_known = operation(node) in _CONSTANT and not writes_in_place(node)
    is_large = fake is not None and hint(fake.numel()) > limit
    is_symbolic = isinstance(value(node), torch.SymInt)
    is_written = fake is not None and storage_key(fake) in mutated  # through a view of it, perhaps
    is_fixed = not is_written and not any(map(writes_in_place, node.users))
    return is_known and is_fixed and not is_large and not is_symbolic


_NAMES_OF_CONSTANTS = """
    arange zeros ones full new_zeros new_ones new_full zeros_like ones_like tensor scalar_tensor
    add sub mul floor_divide remainder neg abs clamp diff cumsum
    eq ne le lt ge gt bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not where
    getitem unsqueeze squeeze expand view reshape flatten contiguous clone cat repeat repeat_interleave
    to bool int long float type size
"""
_CONSTANT = frozenset(_NAMES_OF_CONSTANTS.split())
