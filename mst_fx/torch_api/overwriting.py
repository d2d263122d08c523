"""Attention's backward pass over the memory of operands that nobody reads again.

Before: ``q, k, v = attention_backward(tangent, out, sums, query, key, value, …)``: three new tensors. After, of a backward graph::

    found = auto_functionalized(attention_backward_over, tangent=tangent, …, over_tangent=tangent, over_key=key, over_value=None)
    q, k, v = found[3], found[4], found[2]

The gradient of the query lies where the tangent was, and those of keys and values where these were, if the backward pass itself has made
them. Left as it is: what is given to the graph (what the forward pass has kept, which a second backward pass reads again, and
tangents from outside), what has another reader behind, shares its memory, or lies in it otherwise than the gradient; and all of
attention that one call of a kernel differentiates, where nothing would be gained.

``auto_functionalized`` gives what a copy of each ``over_…`` would have become. Inductor decides by an analysis of its own
(``fx_passes/reinplace.py``), in the last graph, whether the copy can be left out: were ours wrong, memory would be lost, and not the numbers.
So only Inductor gets such graphs: eager graphs have no pass that leaves copies out.

``torch._higher_order_ops.auto_functionalize``: what AOTAutograd makes of calls of operators that write to their operands; no
public way puts one into a graph. Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mst_fx.torch_api.attention import heads_at_once
from mst_fx.torch_api.symbols import hint_of

aten = torch.ops.aten

# The operands whose memory gradients may take, in the order of the gradients, and whose gradients these are.
OPERANDS = {"tangent": "query", "key": "key", "value": "value"}
_KEPT = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr")  # of what is known of a call
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def write_over_dead_operands(graph: fx.Graph) -> None:
    """Lets the attentions of a backward graph that goes to Inductor write over operands, where they may."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=torch.ops.mst_fx.attention_backward.default):
        dead = dead_operands(node, order, lambda base: base.op != "call_function")
        if dead:
            _write_over(graph, node, dead)


def _write_over(graph: fx.Graph, node: fx.Node, dead: Mapping[str, fx.Node]) -> None:
    over = {f"over_{name}": dead.get(name) for name in OPERANDS}
    with graph.inserting_before(node):
        new = graph.call_function(
            auto_functionalized, (torch.ops.mst_fx.attention_backward_over.default,), _named(node) | over
        )
    new.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    results: Any = node.meta["val"]
    new.meta["val"] = (*results, *(x and x.meta["val"] for x in over.values()))
    for user in list(node.users):
        index: Any = user.args[1]
        written = list(over.values())[index] is not None
        user.args = (new, len(OPERANDS) + index if written else index)
    graph.erase_node(node)


def _named(node: fx.Node) -> dict[str, Any]:
    names = (each.name for each in node.target._schema.arguments)  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def dead_operands(
    node: fx.Node, order: Mapping[fx.Node, int], is_given: Callable[[fx.Node], bool]
) -> dict[str, fx.Node]:
    """Which of :data:`OPERANDS` a call of attention's backward pass may write over, by name.

    Args:
        order: the place of each call of the graph, in the order in which they run.
        is_given: whether a node is none that the backward pass makes.
    """
    given = _named(node)
    query, key = given["query"].meta["val"], given["key"].meta["val"]
    sizes = map(hint_of, (*query.shape[:3], key.shape[1]))
    batch, heads, queries, groups = sizes
    if None in (batch, heads, queries, groups) or heads_at_once(batch, heads, queries, groups) == heads:
        return {}
    return {
        name: given[name]
        for name, of in OPERANDS.items()
        if _takes_its_place(given[of].meta["val"], given[name].meta["val"])
        and _is_dead(node, given[name], order, is_given)
    }


def _takes_its_place(of: torch.Tensor, operand: torch.Tensor) -> bool:
    """Whether a gradient ``[B, H, S, D]``, as it comes out (:func:`mst_fx.torch_api.attention.empty_output`), lies in memory as an
    operand does."""
    _, heads, size, width = operand.shape
    strides = (heads * size * width, width, heads * width, 1)
    pairs = [(of.shape[3], width), *zip(operand.stride(), strides, strict=True)]
    lone = [False, *(_is_known(count == 1) for count in operand.shape)]  # whose stride says nothing
    return of.dtype == operand.dtype and all(
        one or _is_known(a == b) for one, (a, b) in zip(lone, pairs, strict=True)
    )


def _is_known(found: Any) -> bool:
    """Without a guard."""
    return statically_known_true(found)


def _is_dead(
    node: fx.Node, operand: fx.Node, order: Mapping[fx.Node, int], is_given: Callable[[fx.Node], bool]
) -> bool:
    """Whether nobody but a call reads the memory behind one of its operands from there on, and the backward pass has made it for that
    operand alone."""
    base = memory_of(operand)
    if is_given(base) or not _is_made_new(base):
        return False
    if not _is_known(base.meta["val"].numel() == operand.meta["val"].numel()):
        return False
    aliases = set(_aliases(base))
    if sum(x in aliases for x in _leaves(node)) != 1:
        return False
    readers = (user for alias in aliases for user in alias.users if user not in aliases and user is not node)
    return all(user.op == "call_function" and order[user] < order[node] for user in readers)


def _leaves(node: fx.Node) -> Iterator[Any]:
    """The nodes among the arguments of a call, as often as they are there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return iter(found)


def memory_of(node: fx.Node) -> fx.Node:
    """The node that has made the memory behind a view."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _aliases(base: fx.Node) -> Iterator[fx.Node]:
    """A node and all that show its memory."""
    waiting = [base]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [user for user in node.users if _is_view(user)]


def _is_view(node: fx.Node) -> bool:
    """Whether the result of a call shows memory of its first operand, by its schema."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    if not isinstance(node.target, OpOverload):
        return False
    schema = node.target._schema
    may_show = any(result.alias_info is not None for result in schema.returns)
    return may_show or node.target is aten._unsafe_view.default


def _is_made_new(node: fx.Node) -> bool:
    """Whether a call makes memory in any case: a product, an operator of ours, or arithmetic of several tensors. (What copies, casts
    or pads might be left out, and be its operand.)"""
    source: Any = node.args[0] if node.target is operator.getitem else node
    target = source.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    if target in _PRODUCTS or target.namespace == "mst_fx":
        return True
    tensors = [n for n in source.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return torch.Tag.pointwise in target.tags and len(tensors) > 1
