"""Layers that are traced once: the graphs of their two passes, and what tells whether a layer may be one.

- ``torch._functorch.aot_autograd.aot_function``: forward and backward pass of a function as one ATen graph, which is what its ``partition_fn``
  is given. ``aot_export_joint_simple``, which gives such a graph too, takes operators apart that compiled programs keep (SiLU's gradient in 16 bits is then
  rounded at each of its steps); of a function without gradients it gives the one graph.
- ``torch._inductor.compile_fx._recursive_joint_graph_passes``, ``torch._functorch.compile_utils.fx_graph_cse``: what Inductor and its
  partitioner do with such a graph before they cut it in two.

Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple, aot_function
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.compilers import nop
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_joint_graph_passes
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode


def both_passes(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], mode: FakeTensorMode, has_backward: bool
) -> fx.GraphModule:
    """The ATen graph of ``(*inputs, *tangents)`` → ``(*outputs, *gradients)``, with None for inputs that get no gradient.

    Args:
        inputs: fakes of ``mode``.
        has_backward: without, of ``inputs`` → ``outputs``.

    Raises:
        RuntimeError: if the function writes to an input, or gives what shares memory with one, or with another result.
    """
    table = dict(select_decomp_table())
    if not has_backward:
        with tracing(TracingContext(mode)):
            found = aot_export_joint_simple(function, tuple(inputs), trace_joint=False, decompositions=table)
        assert isinstance(found, fx.GraphModule)
        return found
    joint: list[fx.GraphModule] = []
    counts: list[int] = []

    def counted(*operands: torch.Tensor) -> Any:
        found = function(*operands)
        counts.append(len(found))
        return found

    def take(gm: fx.GraphModule, *_: Any, **__: Any) -> Any:
        joint.append(gm)
        raise _Traced

    with tracing(TracingContext(mode)), contextlib.suppress(_Traced):
        aot_function(counted, nop, partition_fn=take, decompositions=table)(*inputs)
    # What it writes, and what is shown by its results, is a result of its own.
    results: Any = joint[0].graph.output_node().args[0] if joint else ()
    if len(results) != counts[0] + len(inputs):
        raise RuntimeError("it writes to what it is given, or gives what shares memory")
    return joint[0]


class _Traced(BaseException):
    """The graph of both passes is there: it need not be cut in two."""


def simplified(gm: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """What Inductor's own passes make of a graph of both passes before it is cut in two; the module is changed."""
    own = {"joint_custom_pre_pass": None, "joint_custom_post_pass": None}
    with tracing(TracingContext(mode)), V.set_fake_mode(mode), inductor_config.patch(own):
        return _recursive_joint_graph_passes(gm)


def prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """The same with equal calls made once, as the partitioner does."""
    return fx.GraphModule(gm, fx_graph_cse(gm.graph))


def has_joint_passes(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor, with these config patches, has passes over joint graphs that are none of its own."""
    with inductor_config.patch(dict(patches)):
        return bool(inductor_config.joint_custom_pre_pass or inductor_config.joint_custom_post_pass)


def part(
    gm: fx.GraphModule, outputs: Sequence[fx.Node], inputs: Collection[int] | None = None
) -> fx.GraphModule:
    """A graph that gives only some values of another one.

    Args:
        inputs: which of the inputs it has, by number, and no other one does it read; None: all.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
    set_outputs(graph.output(()), [copies[node] for node in outputs])
    graph.eliminate_dead_code()
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        if inputs is not None and index not in inputs:
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(gm, graph)


def inputs_read(gm: fx.GraphModule, outputs: Sequence[fx.Node]) -> tuple[int, ...]:
    """The inputs of a graph, by number, that some of its values are made of."""
    read, waiting = set(outputs), list(outputs)
    while waiting:
        following = set(waiting.pop().all_input_nodes) - read
        read |= following
        waiting += following
    return tuple(i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in read)


def set_outputs(output: fx.Node, given: Sequence[fx.Node]) -> None:
    """What a graph gives, whose strides Inductor has to keep."""
    output.args = (tuple(given),)
    output.meta["user_visible_output_idxs"] = list(range(len(given)))
    output.meta["original_output_strides"] = [node.meta["val"].stride() for node in given]


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor shows the memory of another one. ``Tensor._is_view``: public names tell a storage, and not whose it was first."""
    return tensor._is_view()


@functools.cache
def is_random(target: Any) -> bool:
    """Whether an operator draws random numbers, or may run any other: a higher-order one."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
