"""Keeps which experts each row goes to: the backward pass does not decide it again.

Before: under checkpointing the router runs a second time in the backward pass, and where two of its 16-bit logits tie, or are fused otherwise,
may send a row to another expert; the gradient is then that of another routing. After: what a ``topk`` gave whose indices are the keys of
a loop over experts is kept, which is k indices and k numbers a row. What led to it is made again as before.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from mst_fx.context import JointContext
from mst_fx.graph.spelling import CASTS, COPIES, RESHAPES, operation
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.options import Options
from mst_fx.torch_api.joint import always_save

_LOOP = torch.ops.mst_fx.experts_loop.default
_SAME_NUMBERS = RESHAPES | CASTS | COPIES | {"squeeze", "unsqueeze"}


def is_wanted(options: Options, gm: fx.GraphModule) -> bool:
    """Whether there are experts in a loop."""
    return any(graph.find_nodes(op="call_function", target=_LOOP) for graph in graphs_of(gm))


def run(context: JointContext) -> bool:
    """Marks what is kept; whether there was any."""
    loops = context.graph.find_nodes(op="call_function", target=_LOOP)
    for loop in loops:
        source = loop.args[2]
        while operation(source) in _SAME_NUMBERS:
            source = source.args[0]
        if source.target is operator.getitem:  # a choice's indices, and the numbers that were chosen
            for member in (source.args[0], *source.args[0].users):
                always_save(member)
        else:
            always_save(source)
    return bool(loops)
