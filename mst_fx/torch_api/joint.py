"""The joint graph of AOTAutograd: forward and backward pass, before the partitioner cuts it in two.

Inductor: ``config.joint_custom_post_pass``, a ``CustomGraphPass``, whose ``uuid`` is in the keys of its caches; it runs after
pattern matching, and after random operators have become functional. ``aot_eager``: ``functorch.config.joint_custom_pass``, which
is in no key, and needs none there. Tried with torch 2.11.0 and 2.13.0. From 2.13 on Inductor takes a list of
passes too; to be right with 2.11, a pass that the user has set himself is called from ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

Change = Callable[[fx.Graph], None]


class _JointPass(CustomGraphPass):
    def __init__(self, change: Change, key: str, before: Any) -> None:
        passes = before if isinstance(before, (list, tuple)) else [before]
        self._change, self._key, self._before = change, key, [each for each in passes if each is not None]

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self._before:
            user_pass(graph)
        self._change(graph)

    def uuid(self) -> Any:
        others = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self._before]
        return None if None in others else (self._key, tuple(others))  # None: nothing is cached


@contextlib.contextmanager
def changed_joint_graphs(change: Change, key: str, inner: str, is_cacheable: bool = False) -> Iterator[None]:
    """The joint graphs that are traced inside of the block are changed, in place.

    Inductor calls the pass with graphs of inference too (:func:`has_backward`).

    Args:
        key: tells what ``change`` does from what others would do.
        inner: the compiler, "inductor" or "aot_eager"; "eager" has no joint graph.
        is_cacheable: ``change`` does the same to the same graph whenever it runs. A plan does not: a graph from AOTAutograd's cache
            would be as it was planned for the memory that there was then, and nobody would be told.
    """
    if inner == "inductor":
        before = inductor_config.joint_custom_post_pass
        cache = (
            contextlib.nullcontext() if is_cacheable else functorch_config.patch(enable_autograd_cache=False)
        )
        with (
            cache,
            inductor_config.patch(joint_custom_post_pass=_JointPass(change, key, before)),
        ):
            yield
    elif inner == "aot_eager":
        others: Any = functorch_config.joint_custom_pass

        def change_module(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
            gm = others(gm, inputs) if callable(others) else gm
            change(gm.graph)
            gm.recompile()
            return gm

        with functorch_config.patch(joint_custom_pass=change_module):
            yield
    else:
        yield


def has_backward(graph: fx.Graph) -> bool:
    """Whether a graph is of a forward and a backward pass, by what AOTAutograd calls the arriving gradients."""
    return any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder"))


def way_back(graph: fx.Graph) -> Callable[[], None]:
    """What makes a graph again, in place, what it is now. (A list of its nodes, which is a hundredth of the work of a copy.)"""
    known = [
        (node, (node.op, node.target, node.args, node.kwargs, node.name, node.type), dict(node.meta))
        for node in graph.nodes
    ]

    def go() -> None:
        for node in reversed(graph.nodes):
            graph.erase_node(node)
        new: dict[fx.Node, fx.Node] = {}
        for old, (op, target, args, kwargs, name, kind), meta in known:
            here = fx.node.map_arg((args, kwargs), new.__getitem__)
            new[old] = graph.create_node(op, target, *here, name, kind)
            new[old].meta = meta

    return go


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a joint graph, to try something on."""
    new = fx.Graph()
    output = new.output(new.graph_copy(graph, {}))
    output.meta = dict(graph.output_node().meta)
    return new


# What checkpointing leaves on a node: whether it is made again, and in which region.
CHECKPOINT_TAGS = ("recompute", "ac_graph_id")


def must_save(node: fx.Node) -> bool:
    """Whether a selective policy of the user's keeps a node's results, on the device or on the host."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE or must_send(node)


def must_send(node: fx.Node) -> bool:
    """Whether a selective policy of the user's keeps a node's results on the host."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_CPU_OFFLOAD


def must_recompute(node: fx.Node) -> bool:
    """Whether a selective policy of the user's makes a node's results again."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE


def always_save(node: fx.Node) -> None:
    """Tells the partitioner that a node is not made again in the backward pass."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def is_backward_only(node: fx.Node) -> None:
    """Tells the partitioner that a node is of the backward pass."""
    node.meta["partitioner_tag"] = "is_backward"


def is_of_pass_of(node: fx.Node, other: fx.Node) -> None:
    """Tells the partitioner that a node is of the pass, forward or backward, that another one is of."""
    if "partitioner_tag" in other.meta:
        node.meta["partitioner_tag"] = other.meta["partitioner_tag"]


def is_forward_only(node: fx.Node) -> None:
    """Tells the partitioner that a node is of the forward pass."""
    node.meta["partitioner_tag"] = "is_forward"
