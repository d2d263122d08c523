"""Logits that are outputs leave the program: whoever looks at them first computes them (:mod:`mst_fx.logits`).

Before::

    loss = mst_fx.loop_with_grad([h, labels], ...); logits = linear(norm(h), head); return loss, logits

After, with ``(h, norm_weight, head) -> logits`` for the caller (:mod:`mst_fx.logits.take_out`)::

    return loss, h.detach(), port

Which outputs those are is decided where their loss becomes a loop (:mod:`mst_fx.passes.vocab`), which computes without them.
"""

from __future__ import annotations

from typing import Any

from mst_fx.context import PassContext
from mst_fx.logits.take_out import take_out_logits


def matches(context: PassContext) -> bool:
    return bool(context.shared.deferred_positions)


def run(context: PassContext) -> bool:
    """Takes all logits that are to be deferred out of the program."""
    shared = context.shared
    outputs: Any = context.graph.output_node().args[0]
    shared.outputs = len(outputs)
    shared.taken_logits = take_out_logits(
        context.gm, [outputs[position] for position in shared.deferred_positions], shared.starts, shared.nodes
    )
    return True
