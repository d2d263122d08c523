"""Casts that follow the end of an autocast region move into it, next to what they cast.

accelerate's mixed precision casts a model's outputs to float32 behind its autocast region; logits and what is made of
them have to lie in one. A cast is the same in and out of autocast. Left alone: casts behind a write in place or a change
of the grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.modes import EXIT_AUTOCAST, SET_GRAD_ENABLED

_CASTS = ("float", "double", "half", "bfloat16", "to", "type")


def run(context: PassContext) -> bool:
    """Moves the casts of the program."""
    has_moved = False
    for node in list(context.graph.nodes):
        operands = node.all_input_nodes
        if node.op == "call_method" and node.target in _CASTS and len(operands) == 1:
            between = list(_between(operands[0], node))
            ends = any(other.target is EXIT_AUTOCAST for other in between)
            if ends and not any(map(_is_barrier, between)):
                operands[0].append(node)
                has_moved = True
    return has_moved


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while (first := first.next) is not last:
        yield first


def _is_barrier(node: fx.Node) -> bool:
    return node.target is SET_GRAD_ENABLED or writes_in_place(node)
