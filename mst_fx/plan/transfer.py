"""Writes into a joint graph what goes to the host's memory in the forward pass and comes back in the backward pass
(:mod:`mst_fx.ops.offload`)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.ops.offload import dense_order
from mst_fx.plan.choices import Choice
from mst_fx.plan.joint_graph import JointGraph, tensor_of
from mst_fx.plan.layers import Layer
from mst_fx.torch_api.fakes import fake_mode_of
from mst_fx.torch_api.joint import always_save, is_backward_only, is_forward_only
from mst_fx.torch_api.tensors import tree_leaves

mst = torch.ops.mst_fx


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where the backward pass of a layer begins.

    Attributes:
        first: its first node: what it reads of the forward pass is there before.
        after: a gradient that is there by then, and not much earlier.
    """

    first: fx.Node
    after: fx.Node

    @staticmethod
    def of(joint: JointGraph, layer: Layer) -> Begin:
        users = {user for user, _ in layer.readers}
        starts = {user for user in layer.start.users if user in joint.backward}
        first = next(node for node in joint.graph.nodes if node in users or node in starts)
        arriving = [n for n in first.all_input_nodes if n in joint.backward and tensor_of(n) is not None]
        return Begin(first, arriving[0])


@dataclasses.dataclass
class _Stash:
    """What one layer sends.

    Attributes:
        kept: what is sent.
        orders: their dimensions by decreasing stride, one behind the other.
        hosts: what holds them there.
    """

    kept: list[fx.Node]
    orders: list[int]
    hosts: list[fx.Node]


def send(joint: JointGraph, chosen: Sequence[Choice]) -> Mapping[fx.Node, fx.Node]:
    """Sends what the layers keep on the host, and brings it back; the backward pass reads what came back.

    Returns:
        What came back, by what was sent.
    """
    sending = [index for index, choice in enumerate(chosen) if choice.sent]
    if not sending:
        return {}
    assert sending[-1] + 1 < len(chosen), "the backward pass of the last layer comes at once"
    _forward_first(joint)
    stashes = _stashes(joint, {index: chosen[index].sent for index in sending})
    last = stashes[sending[-1]]
    # The last copy has the next layer's forward pass to end in.
    following = [choice.layer.start for choice in chosen[sending[-1] + 2 :]]
    end = following[0] if following else next(out for out in joint.outputs if tensor_of(out) is not None)
    with _after_last(joint, [end, *last.hosts]):
        settled = _call(joint, mst.settle.default, (last.hosts, last.kept, end))
    _is_forward(settled)

    fetched: dict[fx.Node, fx.Node] = {}
    started: list[fx.Node] = []
    for index in reversed(range(sending[-1] + 2)):
        own, ahead = stashes.get(index), stashes.get(index - 1)
        if chosen[index].layer.readers and (own or ahead):
            begin = Begin.of(joint, chosen[index].layer)
            call, results = _bring(joint, begin, own, ahead, [begin.after, settled, *started])
            started = [] if own else [call]
            fetched |= zip(own.kept if own else (), results, strict=True)
    for node, result in fetched.items():
        for user in [user for user in node.users if user in joint.backward]:
            user.replace_input_with(node, result)
    return fetched


def _bring(
    joint: JointGraph, begin: Begin, own: _Stash | None, ahead: _Stash | None, waits: list[fx.Node]
) -> tuple[fx.Node, list[fx.Node]]:
    """The call with which the backward pass of a layer begins, and what it gives.

    Args:
        own: what the layer has on the host, if anything.
        ahead: what the next layer of the backward pass has there.
        waits: what must be there before.
    """
    ahead_args: tuple[Any, ...] = (ahead.hosts, ahead.orders) if ahead else ([], [])
    with joint.graph.inserting_before(begin.first):
        if own:
            call = _call(joint, mst.fetch.default, (own.hosts, own.orders, waits, *ahead_args))
        else:
            call = _call(joint, mst.start_fetch.default, (waits, *ahead_args))
    results = _results(joint, call) if own else []
    for node in (call, *results):
        is_backward_only(node)
        joint.backward.add(node)
    return call, results


def _forward_first(joint: JointGraph) -> None:
    """Moves what only gradients read, and autograd traced among them, before the first node that depends on one."""
    nodes = [node for node in joint.graph.nodes if node.op == "call_function"]
    first = next(node for node in nodes if node in joint.backward)
    for node in nodes[nodes.index(first) :]:
        if node not in joint.backward:
            first.prepend(node)


def _stashes(joint: JointGraph, sent: Mapping[int, Sequence[fx.Node]]) -> dict[int, _Stash]:
    """One a layer, in order: each waits for the copies of the one before."""
    found: dict[int, _Stash] = {}
    before = _Stash([], [], [])
    for index, kept in sent.items():
        orders = [dense_order(_value(node)) for node in kept]
        flat = [d for order in orders for d in order]
        with _after_last(joint, [*kept, *before.hosts]):
            call = _call(joint, mst.stash.default, (list(kept), flat, before.hosts, before.kept))
            hosts = _results(joint, call)
        for node in (call, *hosts):
            _is_forward(node)
        before = found[index] = _Stash(list(kept), flat, hosts)
    return found


def _after_last(joint: JointGraph, nodes: Sequence[fx.Node]) -> Any:
    """Where nodes can be put that read all of some."""
    wanted = set(nodes)
    return joint.graph.inserting_after(next(n for n in reversed(joint.graph.nodes) if n in wanted))


def _call(joint: JointGraph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = joint.graph.call_function(target, args)
    values: Any = fx.map_arg(args, _value)
    mode = fake_mode_of(tree_leaves(values))
    assert mode is not None
    with mode:
        node.meta["val"] = target(*values)
    return node


def _results(joint: JointGraph, call: fx.Node) -> list[fx.Node]:
    found = []
    at = call
    for index, value in enumerate(call.meta["val"]):
        with joint.graph.inserting_after(at):
            at = joint.graph.call_function(operator.getitem, (call, index))
        at.meta["val"] = value
        found.append(at)
    return found


def _value(node: fx.Node) -> torch.Tensor:
    found = tensor_of(node)
    assert found is not None
    return found


def _is_forward(node: fx.Node) -> None:
    always_save(node)
    is_forward_only(node)
