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
    is_under_way,
    is_wait,
    may_run_again,
    readers_of,
    source_of,
    tensor_of,
)
from mst_fx.plan.layers import Begin
from mst_fx.plan.recompute import Again
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
    outs = [node for node in context.graph.nodes if _is_read_by_attention(node, backward)]
    found = [moved for moved in (_moved(out, backward, group.name) for out in outs) if moved.may_go(backward)]
    if not found:
        return False
    joint = JointGraph(context.graph)
    read = joint.read_backward()
    for moved in found:
        _move_again(joint, moved, [each for each in read if each[1] in moved.come])
    return True


def _is_read_by_attention(node: fx.Node, backward: Collection[fx.Node]) -> bool:
    """Whether a value is what attention gave, and its backward pass reads: it is kept."""
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
    come: set[fx.Node] = dataclasses.field(default_factory=set)
    mixed: set[fx.Node] = dataclasses.field(default_factory=set)

    def may_go(self, backward: Collection[fx.Node]) -> bool:
        """Whether the backward pass reads something that has come, nothing of it would be kept nonetheless, and no checkpoint makes it again."""
        tags = (tag in node.meta for node in (source_of(self.out), *self.come) for tag in CHECKPOINT_TAGS)
        is_mixed = _is_read(self.mixed, backward)
        return _is_read(self.come, backward) and not is_mixed and not any(tags)


def _is_read(nodes: Iterable[fx.Node], backward: Collection[fx.Node]) -> bool:
    return any(user in backward for node in nodes for user in node.users)


def _moved(out: fx.Node, backward: Collection[fx.Node], group: str) -> _Moved:
    found = _Moved(out)
    node, reached = out, _forward_readers(out, backward)
    while reached:
        node = node.next
        if node not in reached:
            continue
        reached.remove(node)
        operands = {operand for operand in node.all_input_nodes if operand.op != "placeholder"}
        has_come = not found.come.isdisjoint(operands)
        if operands <= {out} | found.sent.keys() | found.come and _is_exchanged(node, group):
            if has_come or is_wait(node):
                found.come.add(node)
            else:
                found.sent[node] = None
        elif is_cheap(node) and (has_come or not found.mixed.isdisjoint(operands)):
            found.mixed.add(node)
        else:
            continue
        reached |= _forward_readers(node, backward)
    return found


def _forward_readers(node: fx.Node, backward: Collection[fx.Node]) -> set[fx.Node]:
    return {user for user in node.users if user.op == "call_function" and user not in backward}


def _is_exchanged(node: fx.Node, group: str) -> bool:
    """Whether a call is of an exchange with the group, or cheap, and gives the same a second time."""
    is_sent = operation(node) == "_c10d_functional::all_to_all_single" and node.args[-1] == group
    return (is_sent or is_wait(node) or is_cheap(node)) and may_run_again(node)


def _move_again(joint: JointGraph, moved: _Moved, readers: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Exchanges what attention gave for those that read it in the backward pass, as soon as the call of weight in front of them can run."""
    first, _ = readers[0]
    beside = first.prev
    while beside in joint.backward and not has_weight(beside):
        beside = beside.prev
    beside = beside if beside in joint.backward else first
    arrived = next(x for x in beside.all_input_nodes if x in joint.backward and tensor_of(x) is not None)
    again = Again(joint, [moved.out], [*moved.sent, *moved.come], Begin(beside, arrived))
    for sent in filter(is_under_way, moved.sent):
        again.made(sent, beside)
    for user, node in readers:
        user.replace_input_with(node, again.made(node, first))
