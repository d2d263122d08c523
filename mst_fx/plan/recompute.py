"""Writes into a joint graph what is made again: clones of forward nodes, behind gates (:mod:`mst_fx.ops.gate`).

No tags, and no partitioner of ours: what the backward pass then reads of the forward pass is what is kept, and nothing else. (The tags
of ``torch.utils.checkpoint`` say an order, which rests on the partitioner and on Inductor's scheduler; these are operands.)
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from torch import fx

from mst_fx.plan.choices import Choice
from mst_fx.plan.groups import groups_of
from mst_fx.plan.joint_graph import (
    JointGraph,
    is_attention_backward,
    is_cheap,
    is_exchange,
    source_of,
    tensor_of,
)
from mst_fx.plan.layers import Begin, begins_of
from mst_fx.plan.order import weights_first
from mst_fx.plan.transfer import send
from mst_fx.torch_api.joint import CHECKPOINT_TAGS, always_save, copied


def make_again(joint: JointGraph, chosen: Sequence[Choice], is_planned: bool = True) -> None:
    """Replaces what the backward pass reads of each layer, and does not find kept, by clones; what is kept on the host goes there
    and back (:mod:`mst_fx.plan.transfer`).

    The tags of checkpointing go from the whole graph: the plan decides.

    Args:
        chosen: in order of the layers.
        is_planned: whether calls behind attention are put in an order too; checkpointing without a plan leaves them in autograd's.
    """
    for node in joint.graph.nodes:
        for tag in CHECKPOINT_TAGS:
            node.meta.pop(tag, None)
    for node in joint.reads_written:
        always_save(node)
    begins = begins_of(joint, [choice.layer for choice in chosen])
    fetched = send(joint, chosen, begins)
    there = {node: back.node for node, back in fetched.items()}
    groups = [group for group in groups_of(chosen) if len(group) > 1]
    # What a group keeps comes where its starts are made again, before its other layers' backward passes begin. What these make waits for
    # them: made of the same operands, it would be one with what the starts were made of, and held from there on.
    of_groups = {node for group in groups for index in group for node in chosen[index].sent}
    come = {node: back.begin for node, back in fetched.items() if node not in of_groups}
    for group in groups:
        there |= _starts_again(joint, [chosen[index] for index in group], begins[group[-1]], there)

    def again_of(choice: Choice, begin: Begin, begins: Mapping[fx.Node, Begin]) -> Again:
        return Again(joint, _kept(choice), choice.again, begin, there, begins)

    for index, choice in enumerate(chosen):
        if choice.again:
            before, behind = _in_two(joint, choice)
            again_of(choice, begins[index], come).run(before)
            if behind:
                user = behind[0][0]
                again_of(choice, Begin(user, _result_before(user)), {}).run(behind)
    joint.graph.eliminate_dead_code()
    if is_planned:
        weights_first(joint)


def on_trial(
    graph: fx.Graph, chosen: Sequence[Choice], is_planned: bool = True
) -> tuple[JointGraph, dict[fx.Node, fx.Node]]:
    """A copy of a joint graph whose layers take these choices (:func:`make_again`), and what each node of the graph is there."""
    trial = JointGraph(copied(graph))
    copies = dict(zip(graph.nodes, trial.graph.nodes, strict=True))
    make_again(trial, [choice.of_copies(copies) for choice in chosen], is_planned)
    return trial, copies


def _starts_again(
    joint: JointGraph, group: Sequence[Choice], begin: Begin, there: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Makes the starts of a group's layers again, where the backward pass of the last of them begins; the backward pass reads these.

    Args:
        there: what stands in the backward pass for what is kept.

    Returns:
        What stands for the starts.
    """
    found: dict[fx.Node, fx.Node] = {}
    for before, choice in itertools.pairwise(group):
        again = Again(joint, _kept(before), before.onward, begin, there)
        if before.layer.start in found:  # comes of the group's first start, which waits
            again.gates[before.layer.start] = found[before.layer.start]
        found[choice.layer.start] = again.made(choice.layer.start, begin.first)
    for start, new in found.items():
        for user in [user for user in start.users if user in joint.backward]:
            user.replace_input_with(start, new)
    return found


def _kept(choice: Choice) -> set[fx.Node]:
    return {choice.layer.start, *choice.kept}


Readers = list[tuple[fx.Node, fx.Node]]


def _in_two(joint: JointGraph, choice: Choice) -> tuple[Readers, Readers]:
    """What is read of a layer up to attention's backward pass, and what is cheap and read behind it: made a second time there, it is
    not held while attention has its scratch, which is where a layer's backward pass takes most."""
    again, readers = set(choice.again), [each for each in choice.layer.readers if each[1] in choice.again]
    users = {user for user, _ in choice.layer.readers}
    order = {node: index for index, node in enumerate(node for node in joint.graph.nodes if node in users)}
    last = max((order[user] for user in users if is_attention_backward(user)), default=len(order))
    is_behind = [order[user] > last and _is_all_cheap(node, again) for user, node in readers]
    behind = sorted(itertools.compress(readers, is_behind), key=lambda each: order[each[0]])
    return [each for each, moves in zip(readers, is_behind, strict=True) if not moves], behind


def _is_all_cheap(node: fx.Node, again: set[fx.Node]) -> bool:
    """Whether a value is made of what is kept by cheap calls alone."""
    waiting, seen = [node], {node}
    while waiting:
        last = waiting.pop()
        if not is_cheap(last):
            return False
        new = [n for n in last.all_input_nodes if n in again and n not in seen]
        seen.update(new)
        waiting += new
    return True


def _result_before(user: fx.Node) -> fx.Node:
    """A result of the last attention backward before a node."""
    node = user.prev
    while tensor_of(node) is None or not is_attention_backward(source_of(node)):
        node = node.prev
    return node


class Again:
    """Calls of the forward pass, made again from a place in the backward pass on."""

    def __init__(
        self,
        joint: JointGraph,
        kept: Collection[fx.Node],
        again: Collection[fx.Node],
        begin: Begin,
        there: Mapping[fx.Node, fx.Node] | None = None,
        begins: Mapping[fx.Node, Begin] | None = None,
    ) -> None:
        """
        Args:
            kept: what they read of the forward pass, and is kept: through gates, not before the place.
            again: what may be made.
            begin: the place.
            there: what stands in the backward pass for what is kept, where that is not read itself.
            begins: the place of what is not there before.
        """
        self.joint, self.kept, self.again = joint, set(kept), set(again)
        self.begin, self.there, self.begins = begin, there or {}, begins or {}
        self.clones: dict[fx.Node, fx.Node] = {}
        self.gates: dict[fx.Node, fx.Node] = {}

    def run(self, readers: Readers) -> None:
        for user, node in readers:
            user.replace_input_with(node, self.made(node, user))

    def made(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """A node, made again before another one. (Layers are deep: no recursion over their nodes.)"""
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [n for n in last.all_input_nodes if n in self.again and n not in self.clones]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if last not in self.clones:
                self.clones[last] = self._copy(last, before)
        return self.clones[node]

    def _copy(self, node: fx.Node, before: fx.Node) -> fx.Node:
        operands: Mapping[fx.Node, fx.Node] = {n: self._operand(n, node) for n in node.all_input_nodes}
        with self.joint.graph.inserting_before(before):
            new = self.joint.graph.node_copy(node, lambda n: operands[n])
        new.meta = dict(node.meta)
        self.joint.add_backward(new)
        return new

    def _operand(self, node: fx.Node, user: fx.Node) -> fx.Node:
        if node in self.clones:
            return self.clones[node]
        is_kept = node in self.kept
        is_part = is_exchange(user)  # of a weight, which is not gathered before
        if not is_kept and not is_part:
            return node  # of no layer: a weight, what all layers read
        if node not in self.gates:
            kept = self.there.get(node, node)
            begin = self.begins.get(node, self.begin)
            # All at the start: each holds the gradient that it waits for.
            with self.joint.graph.inserting_before(begin.first):
                self.gates[node] = self.joint.gate(kept, begin.after, like=node)
        return self.gates[node]
