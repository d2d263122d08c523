"""Outputs of a program that was cut among ranks (:mod:`mst_fx.passes.sequence`), as its caller knows them.

Before::

    return loss, h                             # h [B, S/P, E]; and logits that were taken out, made of other rows

After::

    return loss, mst_fx.gather_rows(h, …)      # [B, S, E]

Logits that were taken out: without gradients the rows that they are made of are gathered, and whoever looks makes all. With gradients
that would cost S·E, held for nobody as a rule: they raise on use, and :func:`mst_fx.gather_rows` makes them, on all ranks at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.cutting.values import Leaf, Share, add_gather
from mst_fx.group import Group
from mst_fx.logits.put_back import RowsOfRank, TakenLogits
from mst_fx.rows.tokens import Tokens


def matches(context: PassContext) -> bool:
    return bool(context.shared.cut_outputs)


def run(context: PassContext) -> bool:
    """Gathers the outputs that are cut."""
    group = context.options.group
    assert group is not None
    shared, output = context.shared, context.graph.output_node()
    results: Any = list(output.args[0])  # type: ignore[arg-type]
    taken = {logits.position: logits for logits in shared.taken_logits}
    wanted = {at: place for at, place in shared.cut_outputs.items() if at not in taken}
    new = []
    for logits in shared.taken_logits:
        place = shared.cut_outputs.get(logits.position)
        rows = _row_outputs(logits) if place is not None and not torch.is_grad_enabled() else None
        if place is not None:
            shape = place.sized(logits.shape, place.count)
            logits = dataclasses.replace(logits, shape=tuple(shape))
            if rows is None:
                logits = dataclasses.replace(logits, of_rank=_of_rank(place, group))
            else:
                wanted |= dict.fromkeys(rows, place)
        new.append(logits)
    with context.graph.inserting_before(output):
        gathered: dict[fx.Node, fx.Node] = {}
        for at, place in sorted(wanted.items()):
            node = results[at]
            if node not in gathered:
                gathered[node] = add_gather(context.graph, Leaf(node, place), group)
            results[at] = gathered[node]
    output.args = (tuple(results),)
    shared.taken_logits = tuple(new)
    return True


def _row_outputs(logits: TakenLogits) -> list[int] | None:
    """The outputs that have the rows that logits are made of; None where they are not made of such alone."""
    if logits.holds_rows is None:
        return None
    origins = [origin for origin, holds in zip(logits.inputs, logits.holds_rows, strict=True) if holds]
    is_known = all(origin.kind == "output" and origin.port < 0 for origin in origins)
    return [int(origin.index) for origin in origins] if is_known else None


def _of_rank(place: Tokens, group: Group) -> RowsOfRank:
    share = Share.of(group, place.count)
    return RowsOfRank(place.dim, place.batch, share.rows_of, share.me, group.name)
