"""What attention gave is kept in one layout: the backward pass exchanges it again where it reads it in the other.

Before: attention's backward pass reads what attention gave, all rows of some heads; the gradient of the weight behind it reads the same
numbers as they came back from the exchange, all heads of some rows. Both are kept::

    out = attention(q, k, v); rows = wait(all_to_all(out)); y = mm(rows, wo)
    dx = mm(g, wo.T); sent = all_to_all(dx); dwo = mm(g.T, rows); attention_backward(wait(sent), out, …)

After: one is, and one exchange more runs beside the product in front of its reader::

    again = all_to_all(gate(out, g)); dx = mm(g, wo.T); sent = all_to_all(dx); dwo = mm(g.T, wait(again)); attention_backward(wait(sent), out, …)

Left alone: layers that are checkpointed, and made again as a whole; graphs with a plan, which decides itself what it keeps; rows that are
mixed with other values before the backward pass reads them (times a gate, say), and would be kept for that; ranks whose graphs differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from torch import fx

from mst_fx.context import JointContext
from mst_fx.graph.spelling import operation
from mst_fx.options import Options
from mst_fx.plan.joint_graph import (
    JointGraph,
    backward_of,
    has_weight,
    is_attention,
    is_attention_backward,
    is_cheap,
    is_wait,
    may_run_again,
    readers_of,
    source_of,
    tensor_of,
)
from mst_fx.torch_api.joint import CHECKPOINT_TAGS


def is_wanted(options: Options, gm: fx.GraphModule) -> bool:
    return options.group is not None and options.memory is None


def run(context: JointContext) -> bool:
    """Changes a joint graph whose exchanges are in order; whether there was anything to change."""
    group = context.options.group
    assert group is not None
    if not context.are_alike:  # the others might not exchange
        return False
    backward = backward_of(context.graph.nodes)
    outs = [node for node in context.graph.nodes if _is_kept_anyway(node, backward)]
    found = [_moved(out, backward, group.name) for out in outs]
    if not any(moved.readers(backward) for moved in found):
        return False
    joint = JointGraph(context.graph)
    for moved in found:
        if readers := moved.readers(backward):
            _move_again(joint, moved, readers)
    return True


def _is_kept_anyway(node: fx.Node, backward: Collection[fx.Node]) -> bool:
    """Whether a value is what attention gave, and its backward pass reads."""
    is_given = node not in backward and tensor_of(node) is not None and is_attention(source_of(node))
    return is_given and any(is_attention_backward(reader) for reader in readers_of(node))


@dataclasses.dataclass
class _Moved:
    """What attention gave, and what its exchange, and cheap calls with inputs of the graph, make of it.

    Attributes:
        sent: calls up to the exchange, in order, as keys.
        come: calls behind it.
        mixed: cheap calls that read these, and others.
    """

    out: fx.Node
    sent: dict[fx.Node, None] = dataclasses.field(default_factory=dict)
    come: dict[fx.Node, None] = dataclasses.field(default_factory=dict)
    mixed: set[fx.Node] = dataclasses.field(default_factory=set)

    def readers(self, backward: Collection[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """Which calls of the backward pass read what has come, and what, in order; none where some of it would be kept nonetheless, or a checkpoint
        makes it again."""
        tags = (tag in node.meta for node in (source_of(self.out), *self.come) for tag in CHECKPOINT_TAGS)
        if any(tags) or any(user in backward for node in self.mixed for user in node.users):
            return []
        return [(user, node) for node in self.come for user in node.users if user in backward]


def _moved(out: fx.Node, backward: Collection[fx.Node], group: str) -> _Moved:
    found = _Moved(out, {out: None})
    node, reached = out, _forward_readers(out, backward)
    while reached:
        node = node.next
        if node not in reached:
            continue
        reached.remove(node)
        operands = _made(node.all_input_nodes)
        has_come = not found.come.keys().isdisjoint(operands)
        if operands <= found.sent.keys() | found.come.keys() and _is_rearranged(node, group):
            (found.come if has_come or is_wait(node) else found.sent)[node] = None
        elif is_cheap(node) and (has_come or not found.mixed.isdisjoint(operands)):
            found.mixed.add(node)
        else:
            continue
        reached |= _forward_readers(node, backward)
    return found


def _made(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Without what is there anyway: the graph's inputs."""
    return {node for node in nodes if node.op != "placeholder"}


def _forward_readers(node: fx.Node, backward: Collection[fx.Node]) -> set[fx.Node]:
    return {user for user in node.users if user.op == "call_function" and user not in backward}


def _is_rearranged(node: fx.Node, group: str) -> bool:
    is_sent = operation(node) == "_c10d_functional::all_to_all_single" and node.args[-1] == group
    return is_sent or is_wait(node) or (is_cheap(node) and may_run_again(node))


def _move_again(joint: JointGraph, moved: _Moved, readers: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Exchanges what attention gave for those that read it in the backward pass, as soon as the call of weight in front of them can run."""
    place = {node: at for at, node in enumerate(joint.graph.nodes)}
    first = min((user for user, _ in readers), key=place.__getitem__)
    beside = first.prev
    while beside in joint.backward and not has_weight(beside):
        beside = beside.prev
    beside = beside if beside in joint.backward else first
    arrived = next(x for x in beside.all_input_nodes if x in joint.backward and tensor_of(x) is not None)
    with joint.graph.inserting_before(beside):
        here = {moved.out: joint.gate(moved.out, arrived, like=moved.out)}
    needed = _needed([node for _, node in readers], moved.out)
    for node in (*moved.sent, *moved.come):
        if node in needed:
            with joint.graph.inserting_before(first if node in moved.come else beside):
                here[node] = joint.graph.node_copy(node, lambda operand: here.get(operand, operand))
            joint.add_backward(here[node])
    for user, node in readers:
        user.replace_input_with(node, here[node])


def _needed(nodes: Sequence[fx.Node], out: fx.Node) -> set[fx.Node]:
    """Some calls, and all between them and what they are made of."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not out and node not in found:
            found.add(node)
            waiting += _made(node.all_input_nodes)
    return found
