"""Values that Inductor must put into buffers.

Inductor computes a pointwise value again in every kernel that reads it. The sines and cosines of rotary
embeddings are ``[1, S, D]`` and are read for each head of each layer: Llama3-8B computes them 2 x 32 x 8 times
as often as there are, in float32, with reduction of large arguments. On an H200 at 32K tokens that is 10 ms
of a checkpointed step of eight layers. An opaque op behind them makes them a buffer.

Before::

    cos = emb.cos()                          # read for each head of each layer

After::

    cos = mst_fx.buffer(emb.cos())           # :mod:`mst_fx.ops.buffer`

Left alone: values that need a gradient, that somebody writes to, or that are read less than ``_LEAST_READS`` times.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import WAVES, operation
from mst_fx.graph.values import tensor_value
from mst_fx.graph.writes import writes_in_place

# A value that is read for so many times its elements is worth a buffer.
_LEAST_READS = 8


def matches(context: PassContext) -> bool:
    return bool(_found(context.graph))


def run(context: PassContext) -> bool:
    """Puts the sines and cosines of the program's own graph into buffers."""
    return buffer_waves(context.graph)


def buffer_waves(graph: fx.Graph) -> bool:
    """Puts the sines and cosines of a graph into buffers that are small beside what reads them, and have no gradient."""
    found = _found(graph)
    for node in found:
        with graph.inserting_after(node):
            new = add_call(graph, torch.ops.mst_fx.buffer.default, node)
        node.replace_all_uses_with(new, delete_user_cb=functools.partial(operator.is_not, new))
    return bool(found)


def _found(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in outside_transforms(graph) if _is_worth_a_buffer(node)]


def _is_worth_a_buffer(node: fx.Node) -> bool:
    fake = tensor_value(node)
    if operation(node) not in WAVES or writes_in_place(node) or fake is None or fake.requires_grad:
        return False
    return _reads(node, hint(fake.numel())) >= _LEAST_READS and not any(map(writes_in_place, node.users))


def _reads(node: fx.Node, size: int) -> float:
    """How many times its elements are read at once by what it is broadcast to."""
    most, waiting, seen = 0.0, [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            fake = tensor_value(user)
            elements = hint(fake.numel()) if fake is not None else size * _LEAST_READS  # a checkpointed layer
            if elements <= size:
                waiting.append(user)
            most = max(most, elements / max(size, 1))
    return most
