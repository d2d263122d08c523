"""One sequence over the ranks of a group: each keeps its share of the tokens.

Before (every rank is given the whole batch)::

    h = embedding(ids, w)                                        # [B, S, E]
    q, k, v = linear(h, …), …; o = attention(q, k, v, mask); h = h + linear(o, …); h = h + mlp(h)
    loss = cross_entropy(linear(h, head), labels, reduction="sum") / count

After::

    h = embedding(ids.narrow(1, first, rows), w)                 # [B, S/P, E]
    (q,) = mst_fx.rows_to_heads([q], …)                          # [B, H/P, S, D]
    k, v = mst_fx.rows_to_heads([k, v], …)
    o = mst_fx.heads_to_rows(attention(q, k, v, mask), …)        # [B, H, S/P, D]
    loss = mst_fx.sum_over_ranks(cross_entropy(linear(h, head), labels.narrow(1, first, rows), …)) / count

The graph was captured with all tokens: positions, masks, the shift of the labels and the count of those that count are those of one
process, on O(S) integers a rank. Each rank returns the same loss, and gradients whose mean over the group is the gradient in one
process. What works on one token alone is proved (:mod:`mst_fx.rows.tokens`); whatever does not has its rows gathered, which costs time
and memory, is in the report, and is as right (:mod:`mst_fx.cutting`). MLPs and the head become loops over this rank's rows.

Left alone: sequences of fewer than two tokens a rank. An error on all ranks: a graph with weights, and without token ids
or rows ``[B, S, E]``.
"""

from __future__ import annotations

from torch import fx

from mst_fx.context import PassContext
from mst_fx.cutting.program import Cutter
from mst_fx.cutting.values import Leaf, Share
from mst_fx.errors import Cause, GroupError
from mst_fx.graph.names import module_path
from mst_fx.graph.sizes import static_sizes
from mst_fx.graph.spelling import EMBEDDINGS, operation
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.group import Group
from mst_fx.report import Rewrite
from mst_fx.rows.counts import row_counts
from mst_fx.rows.tokens import Prover


def matches(context: PassContext) -> bool:
    return context.options.group is not None


def run(context: PassContext) -> bool:
    """Cuts a program among the ranks of a group.

    Raises:
        GroupError: if it has weights, and no token ids or rows at which to cut.
    """
    group = context.options.group
    assert group is not None

    def refuse(node: fx.Node, reason: str) -> None:
        context.refuse("sequence", module_path(node) or node.name, f"{node.name} {reason}", Cause.UNPROVED)

    sizes = {size for graph in graphs_of(context.gm) for size in static_sizes(graph.nodes)}
    cutter = Cutter(context.gm, group, Prover(sizes), refuse)
    cutter.run()
    if not cutter.seeds:
        _check_left(context)
        return False
    output = context.graph.output_node()
    (results,) = output.args
    found = cutter.outputs(results)  # type: ignore[arg-type]
    output.args = (tuple(x.node if isinstance(x, Leaf) else x for x in found),)
    context.shared.cut_outputs = {
        at: x.place for at, x in enumerate(found) if isinstance(x, Leaf) and x.place is not None
    }
    cutter.finish()
    _report(context, cutter, group)
    return True


def _check_left(context: PassContext) -> None:
    """Refuses a graph that was not cut and should have been.

    Raises:
        GroupError: says what it lacks.
    """
    if any(operation(node) in EMBEDDINGS for node in context.graph.nodes):
        return  # of few tokens
    if any(row_counts(graph) for graph in graphs_of(context.gm)):
        where = f" It ends where {context.ending}." if context.ending else ""
        raise GroupError(
            "sequence_parallel: a graph has weights, but no token ids and no rows [B, S, E] at which its sequence could be cut. Is there a "
            f"graph break before it (FSDP2 on each layer makes some; TORCH_LOGS=graph_breaks shows them)?{where}"
        )


def _report(context: PassContext, cutter: Cutter, group: Group) -> None:
    for node, place in cutter.seeds:
        name = module_path(node) or node.name
        context.rewrote(_rewrite("sequence", name, place.count, group, "tokens of each rank, from here on"))
    for name, count in reversed(cutter.sites):
        context.rewrote(
            _rewrite("exchange", name, count, group, "all tokens of some heads, between exchanges")
        )


def _rewrite(kind: str, name: str, rows: int, group: Group, why: str) -> Rewrite:
    most = Share.of(group, rows).rows_of[0]
    return Rewrite(kind, name, rows, most, group.ranks, 0, 0, "none", False, "", why)
