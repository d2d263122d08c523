"""Averages the gradients of parameters over ranks while the backward pass runs.

Before: the backward pass returns each rank's own; whoever averages them starts when the last one is there. After::

    dw = mm(g.T, x); …; sent = all_reduce(dw, "avg"); dh = loop_backward(…); …; return wait(sent)

An average starts in front of the next loop, whose products hide it; what is made behind the last loop is averaged at the end. Not beside
attention: there it took longer than alone. A block of its kernels runs for milliseconds at long sequences; until those of NCCL's have
found a place on both ranks, the first of them turn in theirs (two H200s, 131,072 tokens: 938 ms of 25, attention 2.5 % slower).
Which parameter's comes next is the same on all ranks. Over other ranks than those that exchange (copies of the model beside groups of ranks) all
are started at the end: of collectives of two groups torch asks that one is waited for before the other starts (``torch.distributed.new_group``).

Averaged is what a graph returns for a parameter. Gradients of its other inputs stay what they are.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from mst_fx.context import JointContext
from mst_fx.errors import GroupError, OptionError
from mst_fx.graph.names import module_path
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import is_parameter, is_plain, value
from mst_fx.group import Group
from mst_fx.options import Options
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.process import Said
from mst_fx.torch_api.collectives import start_reduction, wait_for
from mst_fx.torch_api.tensors import tree_leaves

log = logging.getLogger("mst_fx")

_SAID = Said()
_LOOPS = ("mst_fx::loop", "mst_fx::experts")


def is_wanted(options: Options, gm: fx.GraphModule) -> bool:
    """Whether gradients are averaged.

    Raises:
        OptionError: for a parameter of which each rank has a part.
    """
    if options.averaged_over is None:
        return False
    _warn_of_fewer(options.averaged_over, options)
    for node in gm.graph.find_nodes(op="placeholder"):
        if is_parameter(value(node)) and not is_plain(value(node)):
            raise OptionError(
                f"mst option 'average_gradients' with a parameter that is a {type(value(node)).__name__} "
                f"({module_path(node) or node.name}): leave the option out, what shards parameters averages their gradients"
            )
    return True


def _warn_of_fewer(group: Group, options: Options) -> None:
    """Says that other ranks, which may have copies of the model, are left out."""
    ranks = torch.distributed.get_world_size()
    if options.average_gradients is True and group.ranks < ranks and _SAID.is_new(group.name):
        log.warning(
            "mst-fx: average_gradients=True averages over the %d ranks of sequence_parallel, and there are %d: if all have copies of the model, "
            "give it dist.group.WORLD",
            group.ranks,
            ranks,
        )


def run(context: JointContext) -> bool:
    """Puts the averages into a joint graph; whether there are any.

    Raises:
        GroupError: if its gradients are not those of the inputs that the graph was captured with.
    """
    group = context.options.averaged_over
    assert group is not None
    joint = JointGraph(context.graph)
    if len(joint.gradients) != context.inputs:
        raise GroupError(
            f"average_gradients: a graph captured with {context.inputs} inputs has {len(joint.gradients)} gradients"
        )
    output = context.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    first = len(results) - len(joint.gradients)
    sent = _started(joint, context, "avg" if group.is_nccl else "sum", group)
    means = {at: wait_for(started, output) for at, started in sent.items()}
    joint.add_backward(*sent.values(), *means.values())
    if not group.is_nccl:  # which divides while it sums
        means = {at: _divided(joint, total, output, group.ranks) for at, total in means.items()}
    for at, mean in means.items():
        results[first + at] = mean
    output.args = (results,)
    return bool(means)


def _started(joint: JointGraph, context: JointContext, how: str, group: Group) -> dict[int, fx.Node]:
    """The averages that are started, by the input whose gradient each is of.

    All ranks start them in one order, that of the parameters from the last to the first, which is about that in which gradients are made: ranks
    with other batches, or rows, may make them in another. A graph that is not like those of the other ranks may have its exchanges elsewhere
    among them, too: it starts all behind the last exchange.
    """
    is_hidden = context.are_alike and context.options.group in (None, group)
    place = {node: at for at, node in enumerate(joint.graph.nodes)}
    behind, output = _next_loop(joint), joint.graph.output_node()
    sent: dict[int, fx.Node] = {}
    before: fx.Node | None = None
    for at in reversed(context.parameters):
        gradient = joint.gradients[at]
        if gradient is not None:
            ready = behind[gradient] if is_hidden else output
            before = ready if before is None else max(before, ready, key=place.__getitem__)
            sent[at] = start_reduction(_ready(joint, gradient, before), how, before, group.name)
    return sent


def _ready(joint: JointGraph, gradient: fx.Node, loop: fx.Node) -> fx.Node:
    """A gradient behind what a loop reads: of a checkpointed layer that is made again in front of the loop, by exchanges that an average which
    starts before them would hold up."""
    rows = [node for node in tree_leaves(loop.args[0]) if isinstance(node, fx.Node)]
    if loop.op == "output" or not rows:
        return gradient
    with joint.graph.inserting_before(loop):
        return joint.gate(gradient, rows[0], like=gradient)


def _divided(joint: JointGraph, total: fx.Node, before: fx.Node, ranks: int) -> fx.Node:
    with joint.graph.inserting_before(before):
        node = joint.graph.call_function(torch.ops.aten.div.Tensor, (total, ranks))
    node.meta["val"] = total.meta["val"]
    joint.add_backward(node)
    return node


def _next_loop(joint: JointGraph) -> dict[fx.Node, fx.Node]:
    """For each node the next loop of the backward pass behind it; else the output."""
    found: dict[fx.Node, fx.Node] = {}
    last = joint.graph.output_node()
    for node in reversed(joint.graph.nodes):
        found[node] = last
        if node in joint.backward and operation(node).startswith(_LOOPS):
            last = node
    return found
