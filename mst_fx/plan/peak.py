"""How many bytes of a step are alive when, from its joint graph: what a plan promises.

A walk over the graph in its order. A value that only fused operators read is never made (its operands live until
they run instead); an input of the graph is not counted. Loops and attention have scratch beside them while they run. What the allocator
rounds, and what Inductor orders otherwise, is not seen: a meter knows.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.body import Body, body_of
from mst_fx.graph.sizes import hint, sum_dtype
from mst_fx.graph.spelling import argument, operation
from mst_fx.ops.embedding import scratch_bytes
from mst_fx.ops.experts import with_keys
from mst_fx.plan.inside import made_a_row, made_backward_a_row
from mst_fx.plan.joint_graph import (
    JointGraph,
    bytes_of,
    is_attention_backward,
    is_fused,
    is_of_host,
    is_transfer,
    is_view,
    source_of,
    storage_of,
    tensor_of,
)
from mst_fx.torch_api.attention import heads_at_once
from mst_fx.torch_api.overwriting import dead_operands
from mst_fx.torch_api.tensors import tree_leaves

_FORWARD_LOOPS = ("mst_fx::loop", "mst_fx::loop_list")
_EXPERTS, _EXPERTS_BACKWARD = "mst_fx::experts_loop", "mst_fx::experts_loop_backward"
_LOOP_BACKWARD, _LOOP_WITH_GRADIENT = "mst_fx::loop_backward", "mst_fx::loop_with_grad"


@dataclasses.dataclass(frozen=True)
class Held:
    """The memory of one value.

    Attributes:
        node: what makes it, or is one of the results of what makes it.
        bytes: sizes by hint.
        first, last: the calls, counted in the order in which they run, while which it is held.
    """

    node: fx.Node
    bytes: int
    first: int
    last: int


def calls_of(joint: JointGraph) -> list[fx.Node]:
    """The calls of both passes in the order in which they run: what no gradient is needed for, and then the rest."""
    calls = [node for node in joint.graph.nodes if node.op == "call_function"]
    return [n for n in calls if n not in joint.backward] + [n for n in calls if n in joint.backward]


def held_by(joint: JointGraph) -> list[Held]:
    """The memory that a step makes, inputs and scratch excepted; gradients are held to its end. (Other results are as long as the
    caller holds them: of a loss nothing to speak of, of logits that are deferred the last rows.)"""
    calls = calls_of(joint)
    place = {node: index for index, node in enumerate(calls)}
    end = len(calls) - 1
    written = _written_over(joint, place)

    def memory_of(node: fx.Node) -> fx.Node:
        owner = storage_of(node)
        return memory_of(written[owner]) if owner in written else owner

    leaving = {memory_of(n) for n in joint.gradients if n is not None}
    last: dict[fx.Node, int] = {}
    for node in reversed(calls):
        readers = [user for user in node.users if user.op != "output"]
        last[node] = max((_read_at(user, node, place, last, joint) for user in readers), default=place[node])
    until: dict[fx.Node, int] = collections.defaultdict(int)  # of memory
    for node in calls:
        owner = memory_of(node)
        until[owner] = max(until[owner], end if owner in leaving else last[node])
    started = {host: place[call] for call in filter(is_transfer, calls) for host in argument(call, "ahead")}
    return [
        Held(node, bytes_of(node), _made_at(node, place, started), until[node])
        for node in calls
        if bytes_of(node) and _is_made(node, joint) and node not in written
    ]


def _written_over(joint: JointGraph, place: dict[fx.Node, int]) -> dict[fx.Node, fx.Node]:
    """The results of backward passes that Inductor has written over an operand (:mod:`mst_fx.torch_api.overwriting`), and which."""
    found: dict[fx.Node, fx.Node] = {}
    for target in (torch.ops.mst_fx.attention_backward.default, torch.ops.mst_fx.loop_backward.default):
        for node in joint.graph.find_nodes(op="call_function", target=target):
            dead = dead_operands(node, place, lambda base: base not in place or base not in joint.backward)
            found |= {user: dead[user.args[1]] for user in node.users if user.args[1] in dead}  # type: ignore[index]
    return found


def _made_at(node: fx.Node, place: dict[fx.Node, int], started: dict[fx.Node, int]) -> int:
    """When there is memory for a value: what comes back from the host has it from the start of its copy on."""
    source = source_of(node)
    if is_transfer(source) and source is not node:
        host = argument(source, "hosts")[node.args[1]]
        return started.get(host, place[source])
    return place[source]


def curve_of(joint: JointGraph, held: Sequence[Held] | None = None) -> list[int]:
    """The bytes, beside the inputs, that are alive while each call runs (:func:`calls_of`), its scratch included.

    Args:
        held: as of :func:`held_by`, where that is known.
    """
    calls = calls_of(joint)
    changes = [0] * (len(calls) + 1)
    for each in held_by(joint) if held is None else held:
        changes[each.first] += each.bytes
        changes[each.last + 1] -= each.bytes
    alive = itertools.accumulate(changes[:-1])
    return [now + scratch_of(node) for now, node in zip(alive, calls, strict=True)]


def peak_of(joint: JointGraph) -> int:
    """The bytes, beside the inputs, that are alive at the highest moment of a step, sizes by hint."""
    return max(curve_of(joint), default=0)


def scratch_of(node: fx.Node) -> int:
    """Bytes that a call takes beside operands and results while it runs."""
    name = operation(node)
    if name in (*_FORWARD_LOOPS, _LOOP_BACKWARD, _LOOP_WITH_GRADIENT):
        return _scratch_of_loop(node, name)
    if name in (_EXPERTS, _EXPERTS_BACKWARD):
        return _scratch_of_experts(node, name)
    if is_attention_backward(node):
        return _scratch_of_attention(node)
    if name == "mst_fx::embedding_backward":
        return _scratch_of_embedding(node)
    return 0


def _scratch_of_embedding(node: fx.Node) -> int:
    tangent, made = tensor_of(argument(node, "tangent")), tensor_of(node)
    assert tangent is not None and made is not None
    vocabulary, width = map(hint, made.shape)
    return scratch_bytes(hint(tangent.numel()) // width, vocabulary, width, made.dtype)


def _scratch_of_attention(node: fx.Node) -> int:
    """What cuDNN's and FlashAttention's backward kernels take for the heads of one call: the gradient of the queries in float32, a sum a
    query, and where several heads share keys and values, gradients of these for each head. Results of several calls are
    there beside where they go, and sums over calls in float32."""
    query, key, value = (tensor_of(argument(node, name)) for name in ("query", "key", "value"))
    assert query is not None and key is not None and value is not None
    batch, heads, queries, width = map(hint, query.shape)
    groups, keys, widths = hint(key.shape[1]), hint(key.shape[2]), width + hint(value.shape[3])
    size, each = key.element_size(), heads // groups
    at_once = heads_at_once(batch, heads, queries, groups)
    found = batch * at_once * queries * (width + 1) * 4
    if min(each, at_once) > 1:
        found += batch * at_once * keys * widths * size
    if at_once == heads:
        return found
    shared = batch * max(1, at_once // each) * keys * widths
    return found + batch * at_once * queries * width * size + shared * (size if at_once >= each else size + 4)


def _scratch_of_loop(node: fx.Node, name: str) -> int:
    key, chunk = argument(node, "body_key"), argument(node, "chunk_rows")
    assert isinstance(key, str) and isinstance(chunk, int)
    run = body_of(key)
    if name in _FORWARD_LOOPS:
        return chunk * made_a_row(run)
    # Of logits gradients are written in their place.
    is_backward = name == _LOOP_BACKWARD
    inside = chunk * (made_backward_a_row(run, argument(node, "needs")) if is_backward else made_a_row(run))
    sums, results, largest = _sums_of_weights(node, run)
    # The sums are there beside the inside of a chunk; at the end each is rounded and goes.
    return max(inside, largest) + sums - results


def _scratch_of_experts(node: fx.Node, name: str) -> int:
    """The inside of a chunk of slots, and what rows are summed up in: in float32 for 16-bit types."""
    run, slots = body_of(str(argument(node, "body_key"))), argument(node, "chunk_slots")
    assert isinstance(slots, int)
    if name == _EXPERTS:
        out = tensor_of(node)
        assert out is not None
        return slots * made_a_row(run) + _wide_bytes(out)
    needs: Any = argument(node, "needs")
    summed = itertools.compress(tree_leaves(node.args[0]), needs)
    inside = slots * made_backward_a_row(run, with_keys(run, needs), dims=3)
    return inside + sum(_wide_bytes(tensor_of(x)) for x in summed if isinstance(x, fx.Node))


def _wide_bytes(summed: Any) -> int:
    """Bytes of the sum that a tensor is rounded from; 0 if it is that sum itself."""
    wide = sum_dtype(summed.dtype)
    return hint(summed.numel()) * wide.itemsize if wide != summed.dtype else 0


def _sums_of_weights(node: fx.Node, run: Body) -> tuple[int, int, int]:
    """Bytes of the accumulators of a loop's weights, of what they are rounded to, and of the largest that is not there already."""
    needs: Any = argument(node, "needs")
    sums = results = largest = 0
    needed = itertools.compress(enumerate(tree_leaves(node.args[1])), needs[len(run.row_metas) :])
    for index, operand in needed:
        assert isinstance(operand, fx.Node)
        rounded, wide = bytes_of(operand), run.accumulator_dtype(index)
        value: Any = tensor_of(operand)
        sums += hint(value.numel()) * wide.itemsize
        results += rounded
        if wide != value.dtype:
            largest = max(largest, rounded)
    return sums, results, largest


def _is_made(node: fx.Node, joint: JointGraph) -> bool:
    """Whether a call makes memory of its own: no view, and none that is fused into all that read it."""
    if is_view(node) or tensor_of(node) is None or is_of_host(node):
        return False
    if not is_fused(node):
        return True
    return _is_saved(node, joint)


def _is_saved(node: fx.Node, joint: JointGraph) -> bool:
    """Whether the backward pass finds a value where the forward pass has put it. (Constants are filled in where they are read.)"""
    return node not in joint.backward and _is_read_backward(node, joint) and bool(node.all_input_nodes)


def _is_read_backward(node: fx.Node, joint: JointGraph) -> bool:
    """Whether the backward pass reads a value, or a view of it."""
    return any(
        user in joint.backward or (is_view(user) and _is_read_backward(user, joint)) for user in node.users
    )


def _read_at(
    user: fx.Node, node: fx.Node, place: dict[fx.Node, int], last: dict[fx.Node, int], joint: JointGraph
) -> int:
    """When a node is read for the last time by one of its users, or by what shows its memory or computes it there. A value that the
    backward pass finds has been made, though all that read it are fused: then its operands are done with."""
    lives_on = user.args[0] is node if is_view(user) else is_fused(user) and not _is_saved(user, joint)
    return last[user] if lives_on else place[user]  # a gate shows its first operand
