"""Averages the gradients of parameters over ranks while the backward pass runs.

Before: the backward pass returns each rank's own; whoever averages them starts when the last one is there. After::

    dw = mm(g.T, x); …; sent = all_reduce(dw, "avg"); dh = loop_backward(…); …; return wait(sent)

An average starts in front of the next loop, whose products hide it; what is made behind the last loop is averaged at the end. Not beside
attention: there it took longer than alone. A block of its kernels runs for milliseconds at long sequences; until those of NCCL's have
found a place on both ranks, the first of them turn in theirs (two H200s, 131,072 tokens: 938 ms of 25, attention 2.5 % slower).

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
    is_nccl = group.is_nccl  # which divides while it sums
    behind = _next_loop(joint)
    sent: dict[fx.Node, fx.Node] = {}
    for gradient in (joint.gradients[at] for at in context.parameters):
        if gradient is not None and gradient not in sent:
            how = "avg" if is_nccl else "sum"
            sent[gradient] = start_reduction(gradient, how, behind[gradient], group.name)
    # (gloo's are waited for at once: see :mod:`mst_fx.passes.overlap`.)
    means = {
        gradient: wait_for(started, output if is_nccl else started.next) for gradient, started in sent.items()
    }
    joint.add_backward(*sent.values(), *means.values())
    if not is_nccl:
        means = {gradient: _divided(joint, total, output, group.ranks) for gradient, total in means.items()}
    for at in context.parameters:
        gradient = joint.gradients[at]
        if gradient is not None:
            results[first + at] = means[gradient]
    output.args = (results,)
    return bool(means)


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
