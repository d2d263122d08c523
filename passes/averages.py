"""Averages the gradients of parameters over ranks while the backward pass runs.

Before: the backward pass returns each rank's own; whoever averages them starts when the last one is there. After::

    dw = mm(g.T, x); …; sent = all_reduce(dw, "avg"); dh = loop_backward(…); …; return wait(sent)

An average starts in front of the next loop, whose products hide it; behind the last loop right behind the last exchange, which the products
of queries, keys and values hide; what is made later is averaged at the end. Not beside attention: there it took longer than alone. A block of
its kernels runs for milliseconds at long sequences; until those of NCCL's have found a place on both ranks, the first of them turn in theirs
(two H200s, 131,072 tokens: 938 ms of 25, attention 2.5 % slower). Which parameter's comes next is the same on all ranks. Over other ranks than
those that exchange (copies of the model beside groups of ranks) all are started at the end: of collectives of two groups torch asks that one is
waited for before the other starts (``torch.distributed.new_group``).

An embedding's gradient, the last one, is made of the rows of all ranks where they are fewer than its own::

    rows = all_gather(dh / ranks); dw = embedding_backward(rows, all ids)      # instead of all_reduce(embedding_backward(dh, ids), "avg")

Averaged is what a graph returns for a parameter. Gradients of its other inputs stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any

import torch
from torch import fx

from mst_fx.context import JointContext
from mst_fx.errors import GroupError, OptionError
from mst_fx.graph.names import module_path
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import is_parameter, is_plain, value
from mst_fx.group import Group
from mst_fx.options import Options
from mst_fx.plan.joint_graph import JointGraph, aten, is_under_way, tensor_of
from mst_fx.process import Said
from mst_fx.torch_api.collectives import start_gather, start_reduction, wait_for
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
    last = _last_exchange(joint)
    whole = _of_all_rows(joint, context, group)
    sent = _started(joint, context, [*last, *(rows for rows, _ in whole.values())], whole)
    means = {at: wait_for(started, output) for at, started in sent.items()}
    joint.add_backward(*sent.values(), *means.values())
    if not group.is_nccl:  # which divides while it sums
        with joint.graph.inserting_before(output):
            means = {at: joint.call(aten.div.Tensor, total, group.ranks) for at, total in means.items()}
        joint.add_backward(*means.values())
    means |= {at: mean for at, (_, mean) in whole.items()}
    for at, mean in means.items():
        results[first + at] = mean
    output.args = (results,)
    for at in whole:
        own = joint.gradients[at]
        if own is not None and not own.users:
            context.graph.erase_node(own)
    return bool(means)


def _is_hidden(context: JointContext) -> bool:
    """Whether averages may be under way among exchanges."""
    return context.are_alike and context.options.group in (None, context.options.averaged_over)


def _started(
    joint: JointGraph, context: JointContext, sends: list[fx.Node], whole: Container[int]
) -> dict[int, fx.Node]:
    """The averages that are started, by the input whose gradient each is of.

    All ranks start them in one order, that of the parameters from the last to the first, which is about that in which gradients are made: ranks
    with other batches, or rows, may make them in another. A graph that is not like those of the other ranks may have its exchanges elsewhere
    among them, too: it starts all behind the last exchange.

    Args:
        sends: what is sent behind which averages may start.
        whole: the inputs whose gradients need none.
    """
    group = context.options.averaged_over
    assert group is not None
    how = "avg" if group.is_nccl else "sum"
    place = {node: at for at, node in enumerate(joint.graph.nodes)}
    output = joint.graph.output_node()
    next_start, behind = _starts(joint, sends) if _is_hidden(context) else ({}, {})
    sent: dict[int, fx.Node] = {}
    before: fx.Node | None = None
    for at in reversed(context.parameters):
        gradient = joint.gradients[at]
        if gradient is not None and at not in whole:
            ready = next_start.get(gradient, output)
            before = ready if before is None else max(before, ready, key=place.__getitem__)
            if before in behind:
                # Of a checkpointed layer some is made again in front of a loop, by exchanges that an average which starts before them would hold up.
                with joint.graph.inserting_before(before):
                    gradient = joint.gate(gradient, behind[before], like=gradient)
            sent[at] = start_reduction(gradient, how, before, group.name)
    return sent


def _starts(joint: JointGraph, sends: list[fx.Node]) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """For each node the next one behind it in front of which averages may start; and for these what is there by then, if anything is."""
    found: dict[fx.Node, fx.Node] = {}
    behind: dict[fx.Node, fx.Node] = {}
    start = joint.graph.output_node()
    for node in reversed(joint.graph.nodes):
        found[node] = start
        if node in sends:
            start = node.next
            behind[start] = node.args[0]  # type: ignore[assignment]
        elif node in joint.backward and operation(node).startswith(_LOOPS):
            start = node
            rows = [each for each in tree_leaves(node.args[0]) if isinstance(each, fx.Node)]
            if rows:
                behind[start] = rows[0]
    return found, behind


def _last_exchange(joint: JointGraph) -> list[fx.Node]:
    return [node for node in joint.graph.nodes if node in joint.backward and is_under_way(node)][-1:]


def _of_all_rows(
    joint: JointGraph, context: JointContext, group: Group
) -> dict[int, tuple[fx.Node, fx.Node]]:
    """By input, of embeddings whose gradients are made of all ranks' rows: the rows under way, and the mean."""
    found: dict[int, tuple[fx.Node, fx.Node]] = {}
    if context.options.group == group and context.are_alike:
        for at in context.parameters:
            gradient = joint.gradients[at]
            if gradient is not None and _has_fewer_rows(gradient, group):
                found[at] = _gathered(joint, gradient, group)
    return found


def _gathered(joint: JointGraph, gradient: fx.Node, group: Group) -> tuple[fx.Node, fx.Node]:
    """What is sent for an embedding's gradient, and the mean that is made of it."""
    tangent, ids, vocabulary, padding = gradient.args
    assert isinstance(tangent, fx.Node) and isinstance(ids, fx.Node)
    (all_ids,) = ids.all_input_nodes
    with joint.graph.inserting_before(gradient):
        mine = joint.call(aten.div.Tensor, tangent, group.ranks)
        flat = joint.call(aten.reshape.default, mine, [-1, _shape(tangent)[-1]])
        sent = start_gather(flat, group.ranks, gradient, group.name)
        rows = wait_for(sent, gradient)
        mean = joint.call(gradient.target, rows, _by_ranks(joint, all_ids, group), vocabulary, padding)
    joint.add_backward(mine, flat, sent, rows, mean)
    return sent, mean


def _has_fewer_rows(gradient: fx.Node, group: Group) -> bool:
    """Whether a gradient is that of an embedding of this rank's share of one batch, which each rank has as large a share of, and the batch has fewer
    tokens than the vocabulary."""
    if operation(gradient) != "mst_fx::embedding_backward":
        return False
    _, ids, vocabulary, _ = gradient.args
    if not isinstance(ids, fx.Node) or ids.target is not aten.slice.Tensor or len(ids.args) != 4:
        return False
    whole, dim, first, last = ids.args
    sizes = _shape(whole)
    if len(sizes) != 2 or dim != 1 or sizes[1] % group.ranks:
        return False
    rows = sizes[1] // group.ranks
    is_share = (first, last) == (group.me * rows, (group.me + 1) * rows)
    return is_share and isinstance(vocabulary, int) and sizes.numel() <= vocabulary


def _by_ranks(joint: JointGraph, ids: fx.Node, group: Group) -> fx.Node:
    """``[B, S]`` → ``[B · S]``: those of the first rank's rows, then the second's."""
    sequences, tokens = _shape(ids)
    of_ranks = joint.call(aten.view.default, ids, [sequences, group.ranks, tokens // group.ranks])
    return joint.call(aten.reshape.default, joint.call(aten.permute.default, of_ranks, [1, 0, 2]), [-1])


def _shape(node: Any) -> torch.Size:
    found = tensor_of(node)
    assert found is not None
    return found.shape
