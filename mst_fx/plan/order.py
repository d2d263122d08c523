"""The order of what is behind attention's backward pass in a joint graph: it holds fewest tensors of all rows at once.

Autograd's order, of the gradients of value, key and query each: the gradient of its weight, and that of the rows, which is held until the
three are added; the rows that the weights' gradients read are held all that time, and the query's gradient, the largest, longest. Here:
all weights' gradients, and then the rows', the largest operands first. The same calls on the same numbers: the same bits.

The products of the rows' gradients read their operands through gates (:mod:`mst_fx.ops.gate`) on the last weight's gradient. Without them
Inductor makes one kernel of the norm made again, which weights' gradients read, and of its backward pass, which comes
last: all is alive then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from mst_fx.plan.joint_graph import (
    JointGraph,
    aten,
    bytes_of,
    is_attention_backward,
    is_cheap,
    source_of,
    storage_of,
)

_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def weights_first(joint: JointGraph) -> None:
    """Puts the calls behind each backward pass of attention, up to the next loop, attention or copy, in that order."""
    nodes = list(joint.graph.nodes)
    results = {storage_of(node) for node in joint.gradients if node is not None}
    for place, node in enumerate(nodes):
        if is_attention_backward(node):
            behind = list(itertools.takewhile(_is_between, nodes[place + 1 :]))
            end = nodes[place + 1 + len(behind)]
            products = _products_of(node, behind)
            of_weights = [each for each in products if each in results]
            of_rows = [each for each in products if each not in results]
            for each in _with_operands([*of_weights, *of_rows], behind):
                end.prepend(each)
            if of_weights:
                for each in of_rows:
                    _wait(joint, each, products[each], of_weights[-1])


def _is_between(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target in _PRODUCTS or is_cheap(node) or source_of(node) is not node
    )


def _wait(joint: JointGraph, product: fx.Node, operand: fx.Node, after: fx.Node) -> None:
    """Lets a product read an operand when another node is there, not before."""
    with joint.graph.inserting_before(product):
        gate = joint.gate(operand, after, like=operand)
    product.replace_input_with(operand, gate)


def _products_of(call: fx.Node, behind: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The products of what comes from a call by way of cheap calls alone, and which operand that is; the largest first."""
    of_call = {call}
    found: dict[fx.Node, fx.Node] = {}
    for node in behind:
        read = [each for each in node.all_input_nodes if each in of_call]
        if read and node.target in _PRODUCTS:
            found[node] = read[0]
        elif read and node.target is not torch.ops.mst_fx.gate.default:  # which only waits for it
            of_call.add(node)
    return dict(sorted(found.items(), key=lambda each: -bytes_of(storage_of(each[1]))))


def _with_operands(first: Sequence[fx.Node], behind: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """All the nodes, some of them first, each behind what it needs; the others in their order."""
    missing = dict.fromkeys(behind)
    for last in (*first, *behind):
        waiting = [last]
        while waiting:
            node = waiting[-1]
            before = [each for each in node.all_input_nodes if each in missing and node in missing]
            waiting += reversed(before)
            if not before:
                waiting.pop()
                if node in missing:
                    del missing[node]
                    yield node
