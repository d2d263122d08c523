"""Writes into a joint graph what goes to the host's memory in the forward pass and comes back in the backward pass
(:mod:`mst_fx.ops.offload`)."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.ops.offload import dense_order
from mst_fx.plan.choices import Choice
from mst_fx.plan.groups import groups_of
from mst_fx.plan.joint_graph import JointGraph, is_attention, source_of, tensor_of
from mst_fx.plan.layers import Begin, arriving
from mst_fx.torch_api.joint import always_save, is_forward_only

mst = torch.ops.mst_fx


@dataclasses.dataclass(frozen=True)
class _Sent:
    """Values of one layer.

    Attributes:
        kept: what is sent.
        orders: of each, its dimensions by decreasing stride.
        hosts: what holds them there.
    """

    kept: list[fx.Node]
    orders: list[list[int]]
    hosts: list[fx.Node]

    @property
    def flat_orders(self) -> list[int]:
        return [d for order in self.orders for d in order]

    def only(self, nodes: Collection[fx.Node]) -> _Sent:
        """Some of them."""
        found = [each for each in zip(self.kept, self.orders, self.hosts, strict=True) if each[0] in nodes]
        return _Sent(
            [kept for kept, _, _ in found], [order for _, order, _ in found], [h for _, _, h in found]
        )

    @staticmethod
    def all_of(parts: Sequence[_Sent]) -> _Sent:
        """Those of several layers."""
        return _Sent(
            [kept for part in parts for kept in part.kept],
            [order for part in parts for order in part.orders],
            [host for part in parts for host in part.hosts],
        )


_NOTHING = _Sent([], [], [])


@dataclasses.dataclass(frozen=True)
class _Station:
    """Where values come back.

    Attributes:
        begin: where, in the backward pass.
        own: what is read from there on.
    """

    begin: Begin
    own: _Sent


@dataclasses.dataclass(frozen=True)
class Back:
    """What came back, and where."""

    node: fx.Node
    begin: Begin


def send(joint: JointGraph, chosen: Sequence[Choice], begins: Mapping[int, Begin]) -> Mapping[fx.Node, Back]:
    """Sends what the layers keep on the host, and brings it back; the backward pass reads what came back.

    Args:
        begins: of the layers that have a backward pass, by number.

    Returns:
        What came back, by what was sent.
    """
    sending = [index for index, choice in enumerate(chosen) if choice.sent]
    if not sending:
        return {}
    _forward_first(joint)
    sent = _stashed(joint, {index: chosen[index].sent for index in sending})
    settled = _settled(joint, chosen, sending[-1], sent[sending[-1]])
    stations = _all_stations(joint, chosen, begins, sent)
    fetched: dict[fx.Node, Back] = {}
    started: list[fx.Node] = []
    for station, after in itertools.zip_longest(stations, stations[1:]):
        ahead = after.own if after is not None else _NOTHING
        if station.own.kept or ahead.kept:
            call, results = _bring(joint, station, ahead, [settled, *started])
            started = [] if station.own.kept else [call]
            for node, result in zip(station.own.kept, results, strict=True):
                fetched[node] = Back(result, station.begin)
    for node, back in fetched.items():
        for user in [user for user in node.users if user in joint.backward]:
            user.replace_input_with(node, back.node)
    return fetched


def _settled(joint: JointGraph, chosen: Sequence[Choice], index: int, last: _Sent) -> fx.Node:
    """The end of the last copy, which has the next layer's forward pass to end in."""
    following = [choice.layer.start for choice in chosen[index + 2 :]]
    end = following[0] if following else next(out for out in joint.outputs if tensor_of(out) is not None)
    with _after_last(joint, [end, *last.hosts]):
        found = joint.call(mst.settle.default, last.hosts, last.kept, end)
    _is_forward(found)
    return found


def _all_stations(
    joint: JointGraph, chosen: Sequence[Choice], begins: Mapping[int, Begin], sent: Mapping[int, _Sent]
) -> list[_Station]:
    """Those of all layers, in order of the backward pass, from the one on in which the first copy is started."""
    groups = groups_of(chosen)
    last = next(number for number, group in enumerate(groups) if max(sent) in group)
    assert last + 1 < len(groups), "the backward pass of the last layer comes at once"
    return [
        station
        for group in reversed(groups[: last + 2])
        if any(chosen[index].layer.readers for index in group)
        for station in _stations(
            joint, [(chosen[i], sent.get(i, _NOTHING)) for i in group], begins[group[-1]]
        )
    ]


def _stations(joint: JointGraph, group: Sequence[tuple[Choice, _Sent]], begin: Begin) -> list[_Station]:
    """Where what a group of layers has sent comes back: at the beginning of its backward pass; of a layer alone, what is not read before
    attention's results are, where these are: until then the next layer's need not come."""
    if len(group) > 1:
        return [_Station(begin, _Sent.all_of([sent for _, sent in group]))]
    [(choice, sent)] = group
    first = _first_readers(choice)
    order = {user: index for index, (user, _) in enumerate(choice.layer.readers)}
    of_attention = [first[node] for node in sent.kept if is_attention(source_of(node)) and node in first]
    if not of_attention:
        return [_Station(begin, sent)]
    middle = min(of_attention, key=order.__getitem__)
    behind = {node for node in sent.kept if node in first and order[first[node]] >= order[middle]}
    behind.discard(choice.layer.start)  # has readers of its own
    gradients = arriving(joint, middle)
    if middle is begin.first or not gradients or len(behind) == len(sent.kept):
        return [_Station(begin, sent)]
    return [
        _Station(begin, sent.only(set(sent.kept) - behind)),
        _Station(Begin(middle, gradients[0]), sent.only(behind)),
    ]


def _first_readers(choice: Choice) -> dict[fx.Node, fx.Node]:
    """Of each value that a layer's backward pass reads, or makes others of, the first node for which it does."""
    again = set(choice.again)
    found: dict[fx.Node, fx.Node] = {}
    for user, read in choice.layer.readers:
        waiting = [read]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found[node] = user
                waiting += node.all_input_nodes if node in again else ()
    return found


def _bring(
    joint: JointGraph, station: _Station, ahead: _Sent, waits: list[fx.Node]
) -> tuple[fx.Node, list[fx.Node]]:
    """The call at a station, and what it gives.

    Args:
        ahead: what the next station is going to give.
        waits: what must be there before, beside a gradient.
    """
    waits, own = [station.begin.after, *waits], station.own
    ahead_args: tuple[Any, ...] = (ahead.hosts, ahead.flat_orders)
    with joint.graph.inserting_before(station.begin.first):
        if own.kept:
            call = joint.call(mst.fetch.default, own.hosts, own.flat_orders, waits, *ahead_args)
        else:
            call = joint.call(mst.start_fetch.default, waits, *ahead_args)
    results = _results(joint, call) if own.kept else []
    joint.add_backward(call, *results)
    return call, results


def _forward_first(joint: JointGraph) -> None:
    """Moves what only gradients read, and autograd traced among them, before the first node that depends on one."""
    nodes = [node for node in joint.graph.nodes if node.op == "call_function"]
    first = next(node for node in nodes if node in joint.backward)
    for node in nodes[nodes.index(first) :]:
        if node not in joint.backward:
            first.prepend(node)


def _stashed(joint: JointGraph, sent: Mapping[int, Sequence[fx.Node]]) -> dict[int, _Sent]:
    """What layers send, in order: each waits for the copies of the one before."""
    found: dict[int, _Sent] = {}
    before = _NOTHING
    for index, kept in sent.items():
        new = _Sent(list(kept), [dense_order(_value(node)) for node in kept], [])
        with _after_last(joint, [*kept, *before.hosts]):
            call = joint.call(mst.stash.default, new.kept, new.flat_orders, before.hosts, before.kept)
            new.hosts.extend(_results(joint, call))
        for node in (call, *new.hosts):
            _is_forward(node)
        before = found[index] = new
    return found


def _after_last(joint: JointGraph, nodes: Sequence[fx.Node]) -> Any:
    """Where nodes can be put that read all of some."""
    wanted = set(nodes)
    return joint.graph.inserting_after(next(n for n in reversed(joint.graph.nodes) if n in wanted))


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
