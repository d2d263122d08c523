"""How many bytes of a step are alive when, from its joint graph: what a plan promises.

A walk over the graph in its order. A value that only fused operators read is never made (its operands live until
they run instead); an input of the graph is not counted. Loops and attention have scratch beside them while they run. What the allocator
rounds, and what Inductor orders otherwise, is not seen: a meter knows.
"""

from __future__ import annotations

import collections
from typing import Any

from torch import fx

from mst_fx.bodies.body import Body, body_of
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import ATTENTION_KERNELS, operation
from mst_fx.plan.joint_graph import JointGraph, bytes_of, is_cheap, is_view, source_of, storage_of, tensor_of
from mst_fx.torch_api.tensors import tree_leaves

_FORWARD_LOOPS = ("mst_fx::loop", "mst_fx::loop_list")
_LOOP_BACKWARD, _LOOP_WITH_GRADIENT = "mst_fx::loop_backward", "mst_fx::loop_with_grad"


def peak_of(joint: JointGraph) -> int:
    """The bytes, beside the inputs, that are alive at the highest moment of a step, sizes by hint."""
    calls = [n for n in _in_two_halves(joint) if n.op == "call_function"]
    place = {node: index for index, node in enumerate(calls)}
    end = len(calls)
    leaving = {storage_of(n) for n in joint.graph.output_node().all_input_nodes}
    last: dict[fx.Node, int] = {}
    for node in reversed(calls):
        last[node] = max((_read_at(user, place, last, end) for user in node.users), default=place[node])
    until: dict[fx.Node, int] = collections.defaultdict(int)  # of memory
    for node in calls:
        owner = storage_of(node)
        until[owner] = max(until[owner], end if owner in leaving else last[node])
    dies: dict[int, int] = collections.Counter()
    alive, peak = 0, 0
    for index, node in enumerate(calls):
        if _is_made(node, joint):
            alive += bytes_of(node)
            dies[until[node]] += bytes_of(node)
        peak = max(peak, alive + scratch_of(node))
        alive -= dies.pop(index, 0)
    return peak


def scratch_of(node: fx.Node) -> int:
    """Bytes that a call takes beside operands and results while it runs."""
    name = operation(node)
    if name in (*_FORWARD_LOOPS, _LOOP_BACKWARD, _LOOP_WITH_GRADIENT):
        return _scratch_of_loop(node, name)
    if name.endswith("_backward") and name.removesuffix("_backward") in ATTENTION_KERNELS:
        query: Any = node.args[3 if name.startswith("mst_fx") else 1]
        return 2 * bytes_of(query)  # its gradient in float32
    return 0


def _scratch_of_loop(node: fx.Node, name: str) -> int:
    (key,) = [arg for arg in node.args if isinstance(arg, str)]
    run = body_of(key)
    chunk = node.args[node.args.index(key) + 1]
    assert isinstance(chunk, int)
    inside = chunk * _made_a_row(run)
    if name in _FORWARD_LOOPS:
        return inside
    sums = 0
    for index, operand in enumerate(tree_leaves(node.args[1])):
        value = tensor_of(operand) if isinstance(operand, fx.Node) else None
        if value is not None and run.accumulator_dtype(index) != value.dtype:
            sums += hint(value.numel()) * run.accumulator_dtype(index).itemsize
    # The values and their gradients; of logits one becomes the other in place.
    return (1 if name == _LOOP_WITH_GRADIENT else 2) * inside + sums


def _made_a_row(run: Body) -> int:
    """Bytes a row of the values inside of a loop's body that are not fused away."""
    nodes = run.forward.graph.nodes
    count = next(node for node in nodes if node.op == "placeholder")
    leaving = set(run.forward.graph.output_node().all_input_nodes)
    inner = [n for n in nodes if n.op == "call_function" and n not in leaving and tensor_of(n) is not None]
    made = [n for n in inner if not is_view(n) and not _is_fused(n)]
    return sum(map(bytes_of, made)) // hint(count.meta["val"])


def _in_two_halves(joint: JointGraph) -> list[fx.Node]:
    """The nodes in the order in which they run: what no gradient is needed for, and then the rest."""
    nodes = list(joint.graph.nodes)
    return [n for n in nodes if n not in joint.backward] + [n for n in nodes if n in joint.backward]


def _is_made(node: fx.Node, joint: JointGraph) -> bool:
    """Whether a call makes memory of its own: no view, and none that is fused into all that read it."""
    if is_view(node) or tensor_of(node) is None:
        return False
    if not _is_fused(node):
        return True
    is_saved = node not in joint.backward and _is_read_backward(node, joint)
    return is_saved and bool(node.all_input_nodes)  # constants are filled in where they are read


def _is_read_backward(node: fx.Node, joint: JointGraph) -> bool:
    """Whether the backward pass reads a value, or a view of it."""
    return any(
        user in joint.backward or (is_view(user) and _is_read_backward(user, joint)) for user in node.users
    )


def _is_fused(node: fx.Node) -> bool:
    """Whether Inductor computes a value where it is read."""
    if not is_cheap(source_of(node)) or source_of(node) is not node:
        return False
    readers = list(node.users)
    while readers:
        user = readers.pop()
        if user.op == "output" or not is_cheap(user):
            return False
        if is_view(user):
            readers += user.users
    return True


def _read_at(user: fx.Node, place: dict[fx.Node, int], last: dict[fx.Node, int], end: int) -> int:
    """When what a node reads is read for the last time by it."""
    if user not in place:
        return end
    return last[user] if is_view(user) or _is_fused(user) else place[user]
