"""A region's way into a loop, and into the report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from torch import fx

from mst_fx.bodies.body import Body
from mst_fx.bodies.insert import needs_gradient, replace_region, scalar_with_gradient
from mst_fx.bodies.trace import body_text, trace_body
from mst_fx.chunk_rows import ChunkSize
from mst_fx.context import PassContext
from mst_fx.errors import Refusal
from mst_fx.graph.changing import changes
from mst_fx.report import Fit, Rewrite
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.region import Region, RegionFinder

log = logging.getLogger("mst_fx")


def chunk_regions(
    context: PassContext,
    analysis: RowAnalysis,
    regions: list[Region],
    kind: str,
    chunk_sizes: list[ChunkSize],
    are_deferred: Sequence[bool] = (),
) -> set[fx.Node]:
    """Replaces regions by loops; those that cannot be are refused.

    Args:
        are_deferred: for each region whether logits inside of it are an output to be deferred.

    Returns:
        The seeds of the regions that were replaced.
    """
    fitting = _fitting(context, analysis, chunk_sizes)
    replaced = set()
    are_deferred = are_deferred or [False] * len(regions)
    for region, chunk_size, is_deferred, fits in zip(
        regions, chunk_sizes, are_deferred, fitting, strict=True
    ):
        region = _current(analysis, region)
        if fits:
            context.report.fits.append(Fit(kind, region.name, chunk_size.rows, chunk_size.chunk_rows))
            continue
        try:
            body = None
            with context.place(kind, region.name):
                body, needs, gradient_of = _prepared(context, analysis, region)
            if body is None:
                continue
            _chunk(context, analysis, region, kind, chunk_size, is_deferred, body, needs, gradient_of)
        except Refusal as refusal:
            context.refuse(kind, region.name, str(refusal), refusal.cause)
            continue
        replaced.add(region.seed)
    return replaced


def _fitting(context: PassContext, analysis: RowAnalysis, chunk_sizes: list[ChunkSize]) -> list[bool]:
    """Which places fit in one chunk; where the number of rows changes, all or none, so that they need one guard."""
    bounds = context.shared.bounds
    most = [size.chunk_rows for size in chunk_sizes]
    if not most or not changes(analysis.rows):
        return [bounds.fits(analysis.rows, chunk_rows) for chunk_rows in most]
    return [bounds.fits(analysis.rows, min(most))] * len(most)


def _prepared(
    context: PassContext, analysis: RowAnalysis, region: Region
) -> tuple[Body, list[bool], int | None]:
    """A region's body, which inputs get gradients, and the output whose gradients the forward loop computes."""
    body = trace_body(analysis, region, context.config, context.shared.bodies)
    needs = body.gets_gradient(needs_gradient(region))
    gradient_of = scalar_with_gradient(region, body, needs) if any(needs) and context.is_top else None
    return body, needs, gradient_of


def _chunk(
    context: PassContext,
    analysis: RowAnalysis,
    region: Region,
    kind: str,
    chunk_size: ChunkSize,
    is_deferred: bool,
    body: Body,
    needs: list[bool],
    gradient_of: int | None,
) -> None:
    is_convex = RegionFinder(analysis).is_convex(region)
    if not is_convex:
        raise Refusal("another rewrite would make a cycle through it")
    if (
        is_deferred and body.may_be_nonlinear
    ):  # loss and logits each run its backward, on a part of the tangent
        what = "a torch.autograd.Function" if body.formulas else "an operator that was declared row-wise"
        raise Refusal(f"{what}, whose backward need not be linear, comes before logits to be deferred")
    before = tuple(node.format_node() or node.name for node in region.nodes)
    known = set(context.gm.graph.nodes)
    new = replace_region(analysis, region, body, chunk_size, gradient_of, needs)
    after = tuple(n.format_node() or n.name for n in context.gm.graph.nodes if n not in known)
    for old, node in new.items():
        analysis.replaced(old, node)
    gradient = "none" if not any(needs) else "recompute" if gradient_of is None else "forward"
    report_loop(context, kind, region.name, chunk_size, body, gradient, before, after, is_deferred)


def report_loop(
    context: PassContext,
    kind: str,
    name: str,
    chunk_size: ChunkSize,
    body: Body,
    gradient: str,
    before: tuple[str, ...],
    after: tuple[str, ...],
    is_deferred: bool = False,
    slots: int = 1,
) -> None:
    """Puts a loop, and the text of its body, into the report.

    Args:
        slots: how many of what the body runs on a row has.
    """
    inside = body.inside_bytes_a_row * slots
    context.rewrote(
        Rewrite(
            kind=kind,
            name=name,
            rows=chunk_size.rows,
            chunk_rows=chunk_size.chunk_rows,
            chunks=chunk_size.chunks,
            intermediate_bytes=inside * chunk_size.rows,
            chunk_bytes=inside * -(-chunk_size.rows // chunk_size.chunks),
            gradient=gradient,
            deferred=is_deferred,
            body=body.key,
            why=chunk_size.why,
            before=before,
            after=after,
        )
    )
    if body.key not in context.report.bodies:
        context.report.bodies[body.key] = body_text(body)


def _current(analysis: RowAnalysis, region: Region) -> Region:
    """The region with inputs that an earlier rewrite replaced exchanged for their replacements."""
    inputs = tuple(dataclasses.replace(i, node=analysis.current(i.node)) for i in region.inputs)
    return dataclasses.replace(region, inputs=inputs)
