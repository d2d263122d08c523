"""Starts an exchange as soon as what it sends is there, and waits for it where it is needed: what lies in between hides it.

Before (autograd's order; each wait stands behind its exchange)::

    q = mm(h, wq); k = mm(h, wk); v = mm(h, wv); …; sent = all_to_all(q); q = wait(sent); attention(q, …)
    dx = mm(g, wo); dwo = mm(g.T, x); sent = all_to_all(dx); dx = wait(sent); attention_backward(dx, …)

After::

    q = mm(h, wq); sent = all_to_all(q); k = mm(h, wk); v = mm(h, wv); …; q = wait(sent); attention(q, …)
    dx = mm(g, wo); sent = all_to_all(dx); dwo = mm(g.T, x); dx = wait(sent); attention_backward(dx, …)

The same calls on the same numbers, collectives among themselves in the order in which they were: nothing else moves than what neither
feeds an exchange nor reads it. Gathers of parameters, which wait for no product, stay where they are: they would hold memory.

Each pass is ordered by itself. A wait that nobody reads is kept by torch's partitioner in either pass that can make what it waits for
(behind the first call that reads an arriving gradient: 2.13), and so would be an exchange more in the backward pass of those ranks that can.

Left alone: what stands behind a call that draws random numbers or writes to an operand is not moved before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import fx

from mst_fx.context import JointContext
from mst_fx.options import Options
from mst_fx.plan.joint_graph import (
    backward_of,
    has_weight,
    is_exchange,
    is_light,
    is_under_way,
    is_wait,
    may_run_again,
)


def is_wanted(options: Options, gm: fx.GraphModule) -> bool:
    return options.group is not None


def run(context: JointContext) -> bool:
    """Orders the calls of a joint graph; whether there is an exchange among them."""
    nodes = list(context.graph.nodes)
    if not any(map(is_under_way, nodes)):
        return False
    output = nodes.pop()
    backward = backward_of(nodes)
    start = next(
        (at for at, node in enumerate(nodes) if node.op == "call_function" and node in backward), len(nodes)
    )
    order = [*_ordered(nodes[:start]), *_ordered(nodes[start:]), output]
    for before, node in itertools.pairwise(order):
        if before.next is not node:
            before.append(node)
    return True


def _ordered(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return _started_early(_waited_for_where_read(nodes))


def _started_early(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Each exchange behind the last call of weight that it needs; what stood between them comes behind it."""
    order: list[fx.Node] = []
    for node in nodes:
        order.append(node)
        if is_under_way(node):
            needed, others = _behind_last(order)
            if any(map(has_weight, others)):
                order[-len(needed) - len(others) :] = [*needed, *others]
    return order


def _behind_last(order: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Of what stands in front of the last node, up to the second call of weight that it needs, or one that nothing may pass: what it
    needs, with itself, and the others. (The first is the product that it sends; a weight's gradient of the same operands may stand before it.)
    """
    start = order[-1]
    wanted = {start, *start.all_input_nodes}
    needed, others = [start], []
    products = 0
    for node in reversed(order[:-1]):
        products += node in wanted and has_weight(node)
        if _stays(node) or products == 2:
            break
        if node in wanted:
            wanted |= {*node.all_input_nodes}
            needed.append(node)
        else:
            others.append(node)
    return (needed[::-1], others[::-1]) if products else ([], [])


def _waited_for_where_read(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Each wait, and what only arranges what has come, in front of what reads it first."""
    arriving: set[fx.Node] = set()
    for node in nodes:
        if is_wait(node) or (
            is_light(node) and not _stays(node) and not arriving.isdisjoint(node.all_input_nodes)
        ):
            arriving.add(node)
    order: list[fx.Node] = []
    waiting: dict[fx.Node, None] = {}
    for node in nodes:
        if node in arriving:
            waiting[node] = None
            continue
        order += _taken(waiting, node)
        order.append(node)
    return [*order, *waiting]


def _taken(waiting: dict[fx.Node, None], reader: fx.Node) -> list[fx.Node]:
    """Those that a node reads, with those that they read, no longer waiting, in their order."""
    wanted: set[fx.Node] = set()
    stack = [each for each in reader.all_input_nodes if each in waiting]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += [each for each in node.all_input_nodes if each in waiting]
    found = [node for node in waiting if node in wanted]
    for node in found:
        del waiting[node]
    return found


def _stays(node: fx.Node) -> bool:
    """Whether nothing is moved past a node."""
    return node.op != "call_function" or is_exchange(node) or not may_run_again(node)
