"""Vocabulary loops: a projection to V-wide logits with whatever narrows them again.

Before (``h`` is ``[B, S, H]``, the logits ``[B, S, V]``)::

    logits = linear(norm(h), head); loss = cross_entropy(logits.float().view(-1, V), labels)
    return loss, logits

After::

    loop = mst_fx.loop_with_grad([h, labels], [norm_weight, head], ..., port=0)
    loss = loop[0] / (labels != -100).sum()
    return loss, h.detach(), loop[-1]        # the backend puts deferred logits in place of h

``loop[-1]`` is the port by which a gradient of ``h`` from used logits comes in (:mod:`mst_fx.ops.port`).

Any row-wise function of the logits will do whose results are sums over rows or narrow rows:
cross-entropies and what is added to them, log-probabilities, entropies, divergences from given
targets. Means become sums divided by the global count first (:mod:`mst_fx.passes.sum_losses`).

The gradient is computed in the forward loop when it is that of one scalar, and recomputed in the
backward loop when tangents are per row.

Logits that are an output are deferred: computed only if somebody looks, with or without gradients. With
``logits="defer"`` that goes for those without a loss in the graph too (a prompt's, of which the last row is
wanted); no loop is needed there.

Not supported, and refused: logits that are an output and must not be deferred (``logits="keep"``, or no loss
in the graph: then somebody wants them), that cross a graph break, or that other rows look at.
"""

from __future__ import annotations

from torch import fx

from mst_fx.chunk_rows import ChunkSize, vocab_chunk_size
from mst_fx.chunking import chunk_regions
from mst_fx.context import PassContext
from mst_fx.errors import Cause
from mst_fx.graph.changing import changes
from mst_fx.graph.sizes import hint
from mst_fx.graph.values import tensor_value
from mst_fx.refusing import left_alone, refuse_sharded
from mst_fx.report import Refused, Rewrite
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.fold import bytes_a_row
from mst_fx.rows.region import Region, RegionFinder


def matches(context: PassContext) -> bool:
    """Whether there may be a head: not in a layer whose MLP is done, where no equal form has one either."""
    return context.is_top or not context.is_narrow


def run(context: PassContext) -> None:
    """Rewrites every head whose loss is in the graph."""
    free = _deferrable(context)
    refusals: list[Refused] = []
    for analysis in context.analyses():
        regions, others = context.bulges(analysis, "vocab", free)
        chunk_sizes = [_chunk_size(context, analysis, region) for region in regions]
        refusals += left_alone(context, analysis, others, "vocab")
        logits_outputs = [_outputs_of(context, region, free) for region in regions]
        done = chunk_regions(
            context, analysis, regions, "vocab", chunk_sizes, [bool(d) for d in logits_outputs]
        )
        for region, outputs in zip(regions, logits_outputs, strict=True):
            if region.seed in done:
                context.deferred_outputs += outputs
        if context.options.logits == "defer":
            _defer_alone(context, analysis, free)
    if context.is_top:
        refuse_sharded(context, "vocab")
    context.refuse_all(_said_once(context, refusals))


def _said_once(context: PassContext, refusals: list[Refused]) -> list[Refused]:
    """The refusals of places of which nothing else is said."""
    # A head whose rows are one more than those of its loss is no bulge by itself.
    done_for = {rewrite.name for rewrite in context.report.rewrites if rewrite.deferred}
    refusals = [r for r in refusals if not (r.cause in (Cause.IS_OUTPUT, Cause.BREAK) and r.name in done_for)]
    # Parts of a head whose use as a whole has a reason, or is rewritten, have none of their own.
    said = {r.name for r in refusals if r.cause is not Cause.NO_SAVING}
    said |= {r.name for r in context.report.rewrites} | {r.name for r in context.report.refusals}
    return [r for r in refusals if r.cause is not Cause.NO_SAVING or r.name not in said]


def _chunk_size(context: PassContext, analysis: RowAnalysis, region: Region) -> ChunkSize:
    rows, chosen = hint(analysis.rows), context.options.vocab_chunk_rows
    return vocab_chunk_size(rows, region.width, region.wide, region.device, chosen, changes(analysis.rows))


def _deferrable(context: PassContext) -> set[fx.Node]:
    """The logits among the outputs of the graph, if they may be deferred.

    Their rows may be more than the loss reads, which shifts them by one.
    """
    if not context.is_top or context.options.logits == "keep":
        return set()
    outputs = context.graph.output_node().args[0]
    if not isinstance(outputs, (tuple, list)):
        return set()
    candidates = [node for node in outputs if isinstance(node, fx.Node) and tensor_value(node) is not None]
    return {node for analysis in context.analyses() for node in candidates if _is_logits(analysis, node)}


def _defer_alone(context: PassContext, analysis: RowAnalysis, free: set[fx.Node]) -> None:
    """Takes logits that nothing but the output reads out of the graph; they need no loop."""
    rows = hint(analysis.rows)
    for logits in sorted(free - set(context.deferred_outputs), key=lambda node: node.name):
        seed = _head_of(analysis, logits)
        region = RegionFinder(analysis).grow(seed) if seed is not None else None
        if seed is None or region is None:
            continue
        if context.shared.bounds.fits(analysis.rows, _chunk_size(context, analysis, region).chunk_rows):
            continue
        context.starts.append(seed)
        context.deferred_outputs.append(logits)
        nbytes = bytes_a_row(logits, analysis.rows) * rows
        context.rewrote(
            Rewrite(
                "vocab", region.name, rows, rows, 1, nbytes, 0, "none", True, "", "computed on first use only"
            )
        )


def _head_of(analysis: RowAnalysis, logits: fx.Node) -> fx.Node | None:
    """The widening matmul of which logits are a pointwise function, if nobody else reads it."""
    node = logits
    while len(node.users) == 1:
        state = analysis.states[node]
        if not state.rowwise or not state.holds_rows:
            return None
        if state.matmuls:
            return node
        (node,) = [operand for operand, role in state.roles.items() if role == "row"]
    return None


def _is_logits(analysis: RowAnalysis, node: fx.Node) -> bool:
    """Whether a value is a widening matmul's result, or a function of it alone that is as wide as logits are.

    Narrow functions (an argmax, the largest probability) are results of the loop as log-probabilities are:
    deferred, their first use would make the logits.
    """
    nbytes, source = bytes_a_row(node, analysis.rows), node
    while (state := analysis.states[source]).rowwise and state.holds_rows:
        if state.matmuls:
            return any(m.out_bytes > m.in_bytes and nbytes > m.in_bytes for m in state.matmuls)
        sources = [operand for operand, role in state.roles.items() if role == "row"]
        if len(sources) != 1 or tensor_value(sources[0]) is None:  # a member of a tuple cannot leave alone
            return False
        (source,) = sources
    return False


def _outputs_of(context: PassContext, region: Region, free: set[fx.Node]) -> list[fx.Node]:
    """The outputs of the graph that lie inside a region, or whose sliced rows do."""
    inside = set(region.nodes)
    originals = {context.clones[node] for node in region.nodes if node in context.clones}
    leaving = {*region.row_outputs, *region.sums}
    return [node for node in free if (node in inside and node not in leaving) or node in originals]
