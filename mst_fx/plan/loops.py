"""Loops over chunks of rows in a joint graph, and what runs inside of them, of all rows at once.

A loop saves its inputs alone, and makes what is inside again, a chunk at a time. Where there is memory to spare that is time lost: its
body is ATen operators, so that these can stand in the joint graph in its place (:mod:`mst_fx.plan.unchunk`), and be kept like others.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.body import body_of
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.spelling import argument, operation
from mst_fx.graph.values import is_plain
from mst_fx.ops.loop import whole
from mst_fx.plan.costs import Cost, cost_of
from mst_fx.plan.joint_graph import JointGraph, tensor_of
from mst_fx.torch_api.autograd import without_saved_tensors_hooks
from mst_fx.torch_api.modes import without_autocast


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A loop of the forward pass, and its gradient.

    Attributes:
        forward: ``mst_fx::loop`` or ``mst_fx::loop_list``.
        backward: its ``mst_fx::loop_backward``.
        results, gradients: the nodes that are one of their results each, and which.
    """

    forward: fx.Node
    backward: fx.Node
    results: tuple[tuple[fx.Node, int], ...]
    gradients: tuple[tuple[fx.Node, int], ...]

    @property
    def operands(self) -> list[fx.Node]:
        """Row inputs, shared inputs, arriving gradients."""
        parts: Any = self.backward.args[:3]
        return [node for part in parts for node in part]

    @property
    def nodes(self) -> list[fx.Node]:
        """What goes when the loop does."""
        pairs = [*self.results, *self.gradients]
        return list(dict.fromkeys([*(node for node, _ in pairs), self.forward, self.backward]))


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """What a loop and its gradient run, as ATen operators on all rows.

    Attributes:
        graph: of the loop's operands.
        backward: the calls that depend on an arriving gradient.
        outputs, gradients: what the loop gives, and what its gradient does.
        again: the cost of what the gradient makes again of the forward pass.
    """

    graph: fx.Graph
    backward: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]
    gradients: tuple[fx.Node, ...]
    again: Cost


def loops_of(joint: JointGraph, left: Collection[fx.Node] = ()) -> list[Loop]:
    """The loops that can be replaced by what they run; all others stay as they are.

    Those of losses, which compute their gradient in the forward pass, have no gradient op and are none of them; nor is one that
    torch made twice, or whose weights have other strides than those with which its body was traced.

    Args:
        left: loops that must stay.
    """
    calls: dict[Any, list[fx.Node]] = {}
    for node in joint.graph.nodes:
        if operation(node) in ("mst_fx::loop", "mst_fx::loop_list", "mst_fx::loop_backward"):
            calls.setdefault(
                (argument(node, "body_key"), tuple(node.args[0]), tuple(node.args[1])), []
            ).append(node)
    found = []
    for nodes in calls.values():
        if len(nodes) == 2 and nodes[0] not in left:
            found.append(_paired(joint, *nodes))
    return [loop for loop in found if loop is not None]


def _paired(joint: JointGraph, forward: fx.Node, backward: fx.Node) -> Loop | None:
    is_backward = operation(backward) == "mst_fx::loop_backward" and backward in joint.backward
    if forward in joint.backward or operation(forward) == "mst_fx::loop_backward" or not is_backward:
        return None
    is_list = operation(forward) == "mst_fx::loop_list"
    if not _are_items([*(forward.users if is_list else ()), *backward.users]):
        return None
    results = _items(forward) if is_list else ((forward, 0),)
    found = Loop(forward, backward, results, _items(backward))
    values = [tensor_of(node) for node in found.operands]
    if not all(value is not None and is_plain(value) for value in values):
        return None
    key = forward.args[2]
    assert isinstance(key, str)
    run = body_of(key)
    shared = values[len(run.row_metas) : len(run.row_metas) + len(run.shared)]
    is_as_traced = all(x.stride() == meta.stride for x, meta in zip(shared, run.shared, strict=True))  # type: ignore[union-attr]
    return found if is_as_traced else None


def _are_items(nodes: Sequence[fx.Node]) -> bool:
    return all(node.target is operator.getitem for node in nodes)


def _items(node: fx.Node) -> tuple[tuple[fx.Node, int], ...]:
    return tuple((user, user.args[1]) for user in node.users)  # type: ignore[misc]


class Insides:
    """What is inside of the loops of one joint graph, traced once for loops of equal bodies and operands."""

    def __init__(self) -> None:
        self._known: dict[str, Inside] = {}

    def of(self, loop: Loop) -> Inside:
        has_tangent, needs, key = loop.backward.args[3:6]
        values = [tensor_of(node) for node in loop.operands]
        metas = [(str(x.shape), str(x.stride()), x.dtype, x.device) for x in values if x is not None]
        signature = repr((key, loop.forward.args[5], has_tangent, needs, metas))
        if signature not in self._known:
            self._known[signature] = _traced(loop, values)
        return self._known[signature]


def _traced(loop: Loop, values: Sequence[Any]) -> Inside:
    lead: Any = loop.forward.args[5]
    rows, shared, _, has_tangent, needs, key = loop.backward.args[:6]
    run, first, last = body_of(key), len(rows), len(rows) + len(shared)  # type: ignore[arg-type]

    def run_whole(*inputs: torch.Tensor) -> list[list[torch.Tensor]]:
        return list(whole(run, lead, needs, has_tangent, inputs[:first], inputs[first:last], inputs[last:]))  # type: ignore[arg-type]

    mode = fake_mode_of(values)
    assert mode is not None
    with mode, without_saved_tensors_hooks(), without_autocast(), torch.enable_grad():
        graph = run.trace(run_whole, *values).graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # nobody differentiates it again
    graph.eliminate_dead_code()
    assert not graph.find_nodes(op="get_attr"), "a body makes a tensor from Python numbers"
    backward = set(graph.find_nodes(op="placeholder")[last:])
    for node in graph.nodes:
        if node.op == "call_function" and not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    results: Any = graph.output_node().args[0]
    outputs, gradients = map(tuple, results)
    again = [n for n in _behind(gradients) if n.op == "call_function" and n not in backward]
    return Inside(graph, frozenset(backward), outputs, gradients, cost_of(again))


def _behind(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """All that some nodes depend on, themselves included."""
    found, waiting = dict.fromkeys(nodes), list(nodes)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found[source] = None
                waiting.append(source)
    return list(found)
