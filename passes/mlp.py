"""MLP loops.

Before (any spelling; ``x`` is ``[B, S, H]``, the inside ``[B, S, I]``)::

    n = norm(x); g = linear(n, gate); u = linear(n, up); d = linear(silu(g) * u, down); y = x + d

After::

    y = mst_fx.loop([x], [norm_weight, gate, up, down], body, chunk_rows, backward_rows, lead)

A region is any convex set of row-wise nodes around a widening matmul whose inside is wider than what
goes in and what comes out, with another matmul behind the wide result, or rows that go on: nothing here
knows a model, an activation or a norm.

Experts of a mixture, whose rows are picked and grouped by expert, become loops over chunks of slots (:mod:`mst_fx.chunking_experts`), before.

Not supported, and refused: operators without a row-wise rule inside (those of other libraries that nobody declared, tensors written
in place), experts whose groups are not proved.
Dropout inside is seeded (:mod:`mst_fx.passes.dropouts`).
"""

from __future__ import annotations

from torch import fx

from mst_fx.chunk_rows import mlp_chunk_size
from mst_fx.chunking import chunk_regions
from mst_fx.chunking_experts import chunk_experts
from mst_fx.context import PassContext
from mst_fx.graph.sizes import hint
from mst_fx.refusing import (
    left_alone,
    refuse_experts,
    refuse_functions,
    refuse_opaque,
    refuse_sharded,
    refuse_transformed,
    refuse_unknown_rows,
)
from mst_fx.rows.experts import expert_products
from mst_fx.rows.refusals import unproved_products
from mst_fx.rows.region import seeds


def run(context: PassContext) -> None:
    """Rewrites every MLP of a graph, and all experts."""
    if context.options.group is None:  # else they are there: passes/experts
        chunk_experts(context)
    experts: list[tuple[list[fx.Node], bool]] = []
    widening: set[fx.Node] = set()
    for analysis in context.analyses():
        widening.update(seeds(analysis), unproved_products(analysis))
        regions, others = context.bulges(analysis, "mlp")
        rows, chosen = hint(analysis.rows), context.options.chunk_rows
        chunk_sizes = [mlp_chunk_size(rows, region.width, region.device, chosen) for region in regions]
        experts += (
            (products, analysis.states[products[0]].rowwise) for products in expert_products(analysis)
        )
        refuse_opaque(context, analysis)
        refuse_functions(context, analysis)
        context.refuse_all(left_alone(context, analysis, others, "mlp"))
        chunk_regions(context, analysis, regions, "mlp", chunk_sizes)
    context.is_narrow = widening.isdisjoint(context.graph.nodes)
    refuse_experts(context, experts)
    refuse_unknown_rows(context)
    refuse_transformed(context)
    refuse_sharded(context, "mlp")
