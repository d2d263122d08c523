"""What the calls of a whole step cost: beside products of matrices and attention, the memory that kernels read and write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from mst_fx.bodies.body import Body, body_of
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import argument, operation
from mst_fx.plan.costs import Cost, attention_flops, flops_of
from mst_fx.plan.joint_graph import (
    bytes_of,
    is_attention,
    is_attention_backward,
    is_cheap,
    is_transfer,
    is_view,
    source_of,
    tensor_of,
)
from mst_fx.torch_api.ops import schema_of
from mst_fx.torch_api.tensors import tree_leaves

# Products of a backward kernel of attention, against those of the forward one: five for two.
_BACKWARD = 2.5
# Passes over the values inside of a loop's body: forward, and backward with the inside made again.
_PASSES = {"mst_fx::loop": 1, "mst_fx::loop_list": 1, "mst_fx::loop_backward": 3, "mst_fx::loop_with_grad": 2}


def cost_of_node(node: fx.Node, made: set[fx.Node]) -> Cost:
    """What a call of a joint graph costs on its own, sizes by hint.

    Args:
        made: the nodes whose values are made; others are computed where they are read.
    """
    name = operation(node)
    if is_attention(node):
        return Cost(attention=attention_flops(node))
    if is_attention_backward(node):
        return Cost(attention=_BACKWARD * attention_flops(node))
    if name in _PASSES:
        return Cost(products=flops_of(node), moved=_PASSES[name] * _moved_inside(node))
    flops = flops_of(node)
    if (
        flops or is_view(node) or node not in made or is_transfer(source_of(node))
    ):  # copies run beside the rest
        return Cost(products=flops)
    return Cost(moved=bytes_of(node) + sum(map(bytes_of, _sources(node, made))))


def _sources(node: fx.Node, made: set[fx.Node]) -> set[fx.Node]:
    """The values in memory that a kernel reads to compute one."""
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source in made or source.op != "call_function":
            found.add(source)
        elif is_cheap(source):
            waiting += source.all_input_nodes
    return found


def _moved_inside(node: fx.Node) -> int:
    """Bytes that the kernels between the products of a loop's body read and write, over all rows."""
    run: Body = body_of(str(argument(node, "body_key")))
    rows = tensor_of(next(arg for arg in tree_leaves(node.args[0]) if isinstance(arg, fx.Node)))
    assert rows is not None
    count = hint(next(n for n in run.forward.graph.nodes if n.op == "placeholder").meta["val"])
    calls = [n for n in run.forward.graph.nodes if n.op == "call_function" and tensor_of(n) is not None]
    products = [n for n in calls if flops_of(n)]
    # Each product is read by what is pointwise behind it, which writes the operand of the next one.
    moved = sum(bytes_of(n) for n in products) + sum(
        bytes_of(n.all_input_nodes[0]) for n in products if n.all_input_nodes[0].op == "call_function"
    )
    total = math.prod(map(hint, rows.shape[: rows.ndim - len(run.row_metas[0].shape)]))
    return moved * total // count


def cost_of_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, makes: bool) -> Cost:
    """What a call of an eager program costs.

    Args:
        makes: whether it made memory; a view costs nothing.
    """
    of_flops = flop_registry.get(func.overloadpacket)
    if of_flops is not None and "attention" in func.name():
        names = [each.name for each in schema_of(func).arguments]
        return Cost(attention=_attention_of({**dict(zip(names, args, strict=False)), **kwargs}, func.name()))
    if of_flops is not None:
        return Cost(products=float(of_flops(*args, **kwargs, out_val=result)))
    if not makes and not schema_of(func).is_mutable:
        return Cost()
    read = [x for x in tree_leaves([list(args), dict(kwargs)]) if isinstance(x, Tensor)]
    written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return Cost(moved=sum(map(_bytes, read)) + sum(map(_bytes, written)))


def _attention_of(given: Mapping[str, Any], name: str) -> float:
    """Operations of a kernel of torch's (whose own formula knows no heads that share keys, 2.11)."""
    query, key, value = given["query"], given["key"], given["value"]
    seen = query.shape[2] * key.shape[2] * (0.5 if given.get("is_causal") else 1.0)
    found = 2.0 * math.prod(query.shape[:2]) * seen * (query.shape[3] + value.shape[3])
    return found * (_BACKWARD if "backward" in name else 1.0)


def _bytes(x: torch.Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
