"""Experts' way into a loop over sorted slots, and into the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from mst_fx.bodies.body import Body
from mst_fx.bodies.trace_slots import trace_slots
from mst_fx.chunk_rows import ChunkSize, mlp_chunk_size
from mst_fx.chunking import report_loop
from mst_fx.context import PassContext
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import add_call, copy_provenance, eliminate_dead_code
from mst_fx.graph.modes import contexts
from mst_fx.graph.sizes import hint
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.graph.values import tensor_value
from mst_fx.report import Fit, Rewrite
from mst_fx.rows.frames import Read, has_stacks
from mst_fx.rows.slots import SlotRegion, SlotRegionFinder, name_of


def chunk_experts(context: PassContext) -> None:
    """Replaces what experts make of their slots by loops; notes why where that cannot be."""
    if not has_stacks(context.graph):
        return
    modes = contexts(context.graph)
    finder = SlotRegionFinder(context.graph, modes)
    for products, region in list(finder.regions())[::-1]:  # a loop may read what another one gives
        name = name_of(products)
        if isinstance(region, Refusal):
            context.refuse("mlp", name, str(region), region.cause)
            continue
        chunk_size = _chunk_size(context, region)
        if context.shared.bounds.fits(region.rows, chunk_size.chunk_rows):
            context.report.fits.append(Fit("mlp", name, chunk_size.rows, chunk_size.chunk_rows))
            continue
        with context.place("mlp", name):
            body = trace_slots(region, modes, context.config, context.shared.bodies)
            _replace(context, region, body, chunk_size)

    left_out: dict[str, str] = {}
    for product, reason in finder.left_out():
        left_out.setdefault(name_of([product]), reason)
    for name, reason in left_out.items():
        context.refuse("mlp", name, reason, Cause.EXPERTS)


def with_rows_of_rank(rewrites: Sequence[Rewrite], gm: fx.GraphModule) -> list[Rewrite]:
    """What was said of experts before tokens were cut (:mod:`mst_fx.passes.experts`), of one rank's rows.

    Args:
        gm: as it was cut; of a body whose loops have several numbers of rows, what was said stays.
    """
    found: dict[str, set[int]] = {}
    for graph in graphs_of(gm):
        for node in graph.find_nodes(op="call_function", target=torch.ops.mst_fx.experts_loop.default):
            fake = tensor_value(node)
            assert fake is not None
            found.setdefault(str(node.args[4]), set()).add(hint(fake.shape[0]))
    return [
        _of_rank(each, next(iter(found[each.body]))) if len(found.get(each.body, ())) == 1 else each
        for each in rewrites
    ]


def _of_rank(rewrite: Rewrite, rows: int) -> Rewrite:
    inside, chunks = rewrite.intermediate_bytes // rewrite.rows, -(-rows // rewrite.chunk_rows)
    return dataclasses.replace(
        rewrite,
        rows=rows,
        chunks=chunks,
        intermediate_bytes=inside * rows,
        chunk_bytes=inside * -(-rows // chunks),
    )


def _chunk_size(context: PassContext, region: SlotRegion) -> ChunkSize:
    """As many slots as the rows of an MLP's chunk have: how many an expert has does not depend on it."""
    (source, *_) = region.reading(Read.ROW) or [region.combine]
    fake = tensor_value(source)
    assert fake is not None
    width = hint(fake.shape[-1])
    return mlp_chunk_size(hint(region.rows), width, fake.device.type, context.options.chunk_rows)


def _replace(context: PassContext, region: SlotRegion, body: Body, chunk_size: ChunkSize) -> None:
    """Before: ``rows[perm // k] → products → … → sum(1)``. After: ``rows → mst_fx.experts_loop``."""
    graph = context.graph
    rows, slots, shared = (region.reading(how) for how in (Read.ROW, Read.SLOT, Read.SHARED))
    before = tuple(node.format_node() or node.name for node in (*region.nodes, region.combine))
    known = set(graph.nodes)
    with graph.inserting_before(region.combine):
        loop = add_call(
            graph, torch.ops.mst_fx.experts_loop.default, rows, slots, region.key, shared, body.key, region.per,
            region.experts, chunk_size.chunk_rows * region.per, chunk_size.backward_rows * region.per,
        )  # fmt: skip
    was, fake = tensor_value(region.combine), tensor_value(loop)
    assert was is not None and fake is not None
    if (str(was.shape), was.dtype) != (str(fake.shape), fake.dtype):
        graph.erase_node(loop)
        raise Refusal(
            f"{region.combine.name} gives {tuple(was.shape)} of {was.dtype}, and no sum of slots",
            Cause.EXPERTS,
        )
    copy_provenance(next(iter(region.products)), loop)
    region.combine.replace_all_uses_with(loop)
    inside = {region.combine, *region.nodes, *region.same}
    for node in [node for node in reversed(graph.nodes) if node in inside]:
        graph.erase_node(node)
    eliminate_dead_code(graph)
    after = tuple(n.format_node() or n.name for n in graph.nodes if n not in known)
    fakes = [tensor_value(node) for node in (*rows, *slots, *shared)]
    has_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in fakes)
    gradient = "recompute" if has_gradient else "none"
    chunk_size = dataclasses.replace(
        chunk_size, why=f"{chunk_size.why}; {region.per} slots a row, sorted by expert"
    )
    report_loop(context, "mlp", region.name, chunk_size, body, gradient, before, after, slots=region.per)
