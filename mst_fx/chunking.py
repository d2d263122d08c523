"""What the chunking passes share: the bulges of a graph, and a bulge's way into a loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from mst_fx.bodies.body import Body, BodyConfig
from mst_fx.bodies.insert import needs_gradient, replace_region, scalar_with_gradient
from mst_fx.bodies.trace import body_text, trace_body
from mst_fx.chunk_rows import Plan, plan_mlp, plan_vocab
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.changing import Bounds, changes
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.names import common_path, module_path, target_name
from mst_fx.graph.sizes import expression, hint, is_known
from mst_fx.graph.spelling import ATTENTION_KERNELS, PRODUCTS, is_of_library, is_of_mst, operation
from mst_fx.graph.subgraphs import is_function
from mst_fx.graph.values import is_plain, tensor_value, tensors_of
from mst_fx.options import Options
from mst_fx.passes.canonical import CLONE_OF
from mst_fx.report import Fit, Refused, Report, Rewrite
from mst_fx.rows.analysis import RowAnalysis, State
from mst_fx.rows.counts import products_of_unknown_rows, row_counts
from mst_fx.rows.experts import products_of_experts
from mst_fx.rows.refusals import Place, place_of, unproved_products
from mst_fx.rows.region import Region, RegionFinder, seeds
from mst_fx.rows.weights import convolution_rows

log = logging.getLogger("mst_fx")

# The meta key of the matmul at which logits start that are deferred without a loss in the graph.
LOGITS_START = "mst_logits_start"


@dataclasses.dataclass
class Shared:
    """What the passes over the graphs of one capture know in common.

    Attributes:
        nodes: the analysis' results by the content of a node, for each number of rows.
        bodies: bodies by the structure of their region.
        bounds: which places fit in one chunk.
    """

    nodes: dict[str, dict[Any, State]] = dataclasses.field(default_factory=dict)
    bodies: dict[str, Body] = dataclasses.field(default_factory=dict)
    bounds: Bounds = dataclasses.field(default_factory=Bounds)


@dataclasses.dataclass
class PassContext:
    """One pass over one graph.

    Attributes:
        gm: a copy that the pass may change; of scope "graph" it has the sub-graphs in common with the original.
        is_top: the graph is the program's, not the body of a ``tag_activation_checkpoint``.
        config: how bodies are compiled.
        report: where rewrites and refusals go.
        deferred: logits outputs that a loop's loss consumed and that must be deferred.
        ending: where the graph ends, in words; "" at the end of the program's function.
        is_narrow: an earlier pass has found that nothing in the graph widens rows by a product any more.
    """

    gm: fx.GraphModule
    options: Options
    config: BodyConfig
    is_top: bool
    shared: Shared
    report: Report = dataclasses.field(default_factory=Report)
    deferred: list[fx.Node] = dataclasses.field(default_factory=list)
    ending: str = ""
    is_narrow: bool = False

    def analyses(self) -> Iterator[RowAnalysis]:
        """One for each number of rows in the graph."""
        counts = row_counts(self.gm.graph)
        for rows in convolution_rows(self.gm.graph):
            if hint(rows) > 1 and not any(expression(rows) == expression(count) for count in counts):
                counts.append(rows)
        for rows in counts:
            known = self.shared.nodes.setdefault(str(rows), {})
            yield RowAnalysis(self.gm, rows, known)

    def bulges(
        self, analysis: RowAnalysis, kind: str, free: Collection[fx.Node] = ()
    ) -> tuple[list[Region], list[fx.Node]]:
        """The bulges of a kind, last first, and the seeds of regions that are none of any kind.

        Args:
            free: values whose use as an output of the graph does not count.
        """
        finder = RegionFinder(analysis, free)
        regions, others = [], []
        for seed in seeds(analysis):
            region = None
            with self.place("graph", module_path(seed) or seed.name):
                region = finder.grow(seed)
            if region is None:
                if not analysis.states[seed].rowwise:  # a fault of ours
                    others.append(seed)
                continue
            found = finder.kind_of(region)
            if found == "mlp" and kind == "vocab" and _is_cut_out(region):
                found = kind
            if found:
                finder.take(region)
            else:
                others.append(seed)
            if found == kind:
                regions.append(region)
        return regions, others

    @contextlib.contextmanager
    def place(self, kind: str, name: str) -> Iterator[None]:
        """One place of several: a refusal or an exception of ours costs this place, not the pass.

        What runs inside must leave the graph as it was when it fails.

        Raises:
            Exception: any, with ``strict=True``.
        """
        try:
            yield
        except Refusal as refusal:
            self.refuse(kind, name, str(refusal), refusal.cause)
        except Exception as error:
            if self.options.strict:
                raise
            text = f"{type(error).__name__}: {error}"
            log.warning("mst-fx left %s %s as it was: %s", kind, name, text)
            log.debug("the defect", exc_info=True)
            self.refuse(kind, name, text, Cause.DEFECT)

    def refuse_all(self, refusals: Iterable[Refused]) -> None:
        """Notes refusals.

        Raises:
            Refusal: with ``strict=True``.
        """
        for refused in refusals:
            if self.options.strict:
                raise Refusal(f"{refused.kind} {refused.name}: {refused.reason}", refused.cause)
            self.report.refusals.append(refused)

    def refuse(self, kind: str, name: str, reason: str, cause: Cause = Cause.UNPROVED) -> None:
        """Notes a refusal.

        Raises:
            Refusal: with ``strict=True``.
        """
        self.refuse_all([Refused(kind, name, reason, cause)])


def _is_cut_out(region: Region) -> bool:
    """Whether a region is a head of rows that were cut out of others, which no pass has seen before."""
    return not region.is_multiplied and any(CLONE_OF in node.meta for node in region.nodes)


def chunk_regions(
    context: PassContext,
    analysis: RowAnalysis,
    regions: list[Region],
    kind: str,
    plans: list[Plan],
    deferred: Sequence[bool] = (),
) -> set[fx.Node]:
    """Replaces regions by loops; those that cannot be are refused.

    Args:
        deferred: for each region whether logits inside of it are an output to be deferred.

    Returns:
        The seeds of the regions that were replaced.
    """
    fitting = _fitting(context, analysis, plans)
    replaced = set()
    deferred = deferred or [False] * len(regions)
    for region, plan, defers, fits in zip(regions, plans, deferred, fitting, strict=True):
        region = _current(analysis, region)
        if fits:
            context.report.fits.append(Fit(kind, region.name, plan.rows, plan.chunk_rows))
            continue
        try:
            body = None
            with context.place(kind, region.name):
                body, needs, gradient_of = _prepared(context, analysis, region)
            if body is None:
                continue
            _chunk(context, analysis, region, kind, plan, defers, body, needs, gradient_of)
        except Refusal as refusal:
            context.refuse(kind, region.name, str(refusal), refusal.cause)
            continue
        replaced.add(region.seed)
    return replaced


def _fitting(context: PassContext, analysis: RowAnalysis, plans: list[Plan]) -> list[bool]:
    """Which places fit in one chunk; where the number of rows changes, all or none, so that they need one guard."""
    bounds = context.shared.bounds
    if not plans or not changes(analysis.rows):
        return [bounds.fits(analysis.rows, plan.chunk_rows) for plan in plans]
    return [bounds.fits(analysis.rows, min(plan.chunk_rows for plan in plans))] * len(plans)


def _prepared(
    context: PassContext, analysis: RowAnalysis, region: Region
) -> tuple[Body, list[bool], int | None]:
    """A region's body, which inputs get gradients, and the output whose gradients the forward loop computes."""
    body = trace_body(analysis, region, context.config, context.shared.bodies)
    needs = body.reached_by(needs_gradient(region))
    gradient_of = scalar_with_gradient(region, body, needs) if any(needs) and context.is_top else None
    return body, needs, gradient_of


def _chunk(
    context: PassContext,
    analysis: RowAnalysis,
    region: Region,
    kind: str,
    plan: Plan,
    defers: bool,
    body: Body,
    needs: list[bool],
    gradient_of: int | None,
) -> None:
    is_convex = RegionFinder(analysis).is_convex(region)
    if not is_convex:
        raise Refusal("another rewrite would make a cycle through it")
    if defers and body.formulas:  # loss and deferred logits each run its backward, on a part of the tangent
        raise Refusal(
            "a torch.autograd.Function, whose backward need not be linear, comes before logits to be deferred"
        )
    before = tuple(node.format_node() or node.name for node in region.nodes)
    known = set(context.gm.graph.nodes)
    new = replace_region(analysis, region, body, plan, gradient_of, needs)
    after = tuple(n.format_node() or n.name for n in context.gm.graph.nodes if n not in known)
    for old, node in new.items():
        analysis.replaced(old, node)
    inside = body.inside_bytes_a_row
    gradient = "none" if not any(needs) else "recompute" if gradient_of is None else "forward"
    context.report.rewrites.append(
        Rewrite(
            kind=kind,
            name=region.name,
            rows=plan.rows,
            chunk_rows=plan.chunk_rows,
            chunks=plan.chunks,
            intermediate_bytes=inside * plan.rows,
            chunk_bytes=inside * -(-plan.rows // plan.chunks),
            gradient=gradient,
            deferred=defers,
            body=body.key,
            why=plan.why,
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


def rows_of(analysis: RowAnalysis) -> int:
    return hint(analysis.rows)


def refuse_experts(context: PassContext, found: Iterable[tuple[list[fx.Node], bool]]) -> None:
    """Notes expert matmuls: products with a slice, picked by routing, of a stack of weights.

    Args:
        found: what :func:`expert_products` found in all analyses, and whether the first product is row-wise. Stacks
            of which a loop took a product are none: there each slice has rows of its own.
    """
    nodes = set(context.gm.graph.nodes)
    names = {r.name for r in context.report.refusals if r.cause is Cause.EXPERTS}
    seen: set[fx.Node] = set()
    for products, is_rowwise in found:
        first = min(products, key=lambda node: node.name)
        name = module_path(first) or first.name
        if not nodes.issuperset(products) or not seen.isdisjoint(products) or name in names:
            continue
        seen.update(products)
        names.add(name)
        node, why = (
            products[0],
            "which are picked for each" if is_rowwise else "and the routing is not proved row-wise",
        )
        reason = f"{node.name} ({target_name(node)}) multiplies rows with the weights of their experts, {why}"
        context.refuse("mlp", name, reason, Cause.EXPERTS)


def refuse_unknown_rows(context: PassContext) -> None:
    """Notes matmuls that widen rows of which nobody knows how many there will be."""
    names = set()
    for node in products_of_unknown_rows(context.gm.graph):
        source, out = tensor_value(node.all_input_nodes[0]), tensor_value(node)
        name = module_path(node) or node.name
        if source is None or out is None or out.shape[-1] <= source.shape[-1] or name in names:
            continue
        names.add(name)
        reason = f"{node.name} ({target_name(node)}) has as many rows as its data say"
        context.refuse("mlp", name, reason, Cause.UNKNOWN_ROWS)


def refuse_transformed(context: PassContext) -> None:
    """Notes matmuls that widen rows inside of ``torch.vmap``, ``torch.func.grad`` and the like."""
    graph, names = context.gm.graph, set()
    outside = set(outside_transforms(graph))
    for node in (node for node in graph.nodes if node not in outside):
        out, name = tensor_value(node), module_path(node) or node.name
        source = tensor_value(node.all_input_nodes[0]) if node.all_input_nodes else None
        if operation(node) not in PRODUCTS or out is None or source is None or not out.ndim or name in names:
            continue
        if source.ndim and hint(out.shape[-1]) > hint(source.shape[-1]):
            names.add(name)
            reason = f"{node.name} ({target_name(node)}) lies inside of a torch.func transform"
            kind = "mlp" if _narrows_again(node) else "vocab"
            context.refuse(kind, name, reason, Cause.NOT_PLAIN)


def _narrows_again(product: fx.Node) -> bool:
    """Whether another product takes what a product gives, or attention does: no loss of it, then, is its only reader."""
    wide = tensor_value(product)
    assert wide is not None
    seen, queue = {product}, deque([product])
    while queue:
        for user in queue.popleft().users:
            fake = tensor_value(user)
            if user in seen or user.op == "output":
                continue
            if operation(user) in PRODUCTS | ATTENTION_KERNELS:
                return True
            seen.add(user)
            # Of something narrow, such as a row's loss, whatever comes after is another's affair.
            if fake is None or 2 * hint(fake.numel()) >= hint(wide.numel()):
                queue.append(user)
    return False


def refuse_opaque(context: PassContext, analysis: RowAnalysis) -> None:
    """Notes operators of other libraries that widen rows, such as linears with quantised weights."""
    for node, state in analysis.states.items():
        if not is_of_library(node) or is_of_mst(node):
            continue
        fakes = [tensor_value(operand) for operand in node.all_input_nodes[:1]]
        out = tensor_value(node)
        if state.rowwise or not state.rows or out is None or not fakes or fakes[0] is None:
            continue
        if out.ndim == fakes[0].ndim and hint(out.shape[-1]) > hint(fakes[0].shape[-1]):
            name = module_path(node) or node.name
            context.refuse("mlp", name, f"{node.name} ({state.reason})", Cause.OPAQUE)


def refuse_functions(context: PassContext, analysis: RowAnalysis) -> None:
    """Notes ``torch.autograd.Function``s that widen rows themselves, and are not proved."""
    for node in filter(is_function, analysis.graph.nodes):
        state, operands = analysis.states[node], [n for n in node.all_input_nodes if tensors_of(n)]
        if state.rowwise or not operands or not analysis.states[operands[0]].rows:
            continue
        source, out = tensors_of(operands[0])[0], tensors_of(node)[0]
        if out.ndim == source.ndim and hint(out.shape[-1]) > hint(source.shape[-1]):
            context.refuse("mlp", module_path(node) or node.name, f"{node.name} {state.reason}", state.cause)


def refuse_sharded(context: PassContext, kind: str) -> None:
    """Notes products that widen rows by a weight that is no plain tensor, such as a DTensor (tensor parallelism).

    Their rows are no plain tensors either, so that no analysis sees them.
    """
    names = set()
    for node in context.gm.graph.nodes:
        found = _unplain_product(node)
        if found is None:
            continue
        source, weight = found
        ends = _next_products(node)
        if ends is None or kind != ("mlp" if ends else "vocab"):
            continue
        fake, width = tensor_value(node), hint(tensor_value(source).shape[-1])  # type: ignore[union-attr]
        assert fake is not None
        wide, rows = hint(fake.shape[-1]), hint(fake.numel()) // max(1, hint(fake.shape[-1]))
        if kind == "mlp":
            plan = plan_mlp(rows, width, fake.device.type, context.options.chunk_rows)
        else:
            plan = plan_vocab(rows, width, wide, fake.device.type, context.options.vocab_chunk_rows)
        name = common_path(map(module_path, (node, *ends))) or module_path(node) or node.name
        if plan.chunks > 1 and name not in names:
            names.add(name)
            what = type(tensor_value(weight)).__name__
            reason = f"the weight of {node.name} ({target_name(node)}) is a {what}, not a plain tensor"
            context.refuse(kind, name, reason, Cause.NOT_PLAIN)


def _unplain_product(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The rows and the matrix of a product that widens rows by a matrix that is no plain tensor."""
    if operation(node) not in PRODUCTS:
        return None
    matrices = [n for n in node.all_input_nodes if (x := tensor_value(n)) is not None and x.ndim >= 2]
    out = tensor_value(node)
    if len(matrices) != 2 or out is None or out.ndim < 2:
        return None
    source, weight = (tensor_value(n) for n in matrices)
    if source is None or weight is None or weight.ndim != 2 or is_plain(weight):
        return None
    if not all(map(is_known, (*out.shape, source.shape[-1]))):
        return None
    return (matrices[0], matrices[1]) if hint(out.shape[-1]) > hint(source.shape[-1]) else None


def _next_products(node: fx.Node) -> list[fx.Node] | None:
    """The products that read what a product gives, or a function of it; None if attention does."""
    found, seen, queue = [], {node}, deque([node])
    while queue:
        for user in queue.popleft().users:
            if user in seen:
                continue
            seen.add(user)
            is_product = operation(user) in PRODUCTS
            scores = is_product and all(len(x.shape) > 2 for n in user.all_input_nodes for x in tensors_of(n))
            if scores or operation(user) in ATTENTION_KERNELS:
                return None
            if is_product:
                found.append(user)
            else:
                queue.append(user)
    return found


def left_alone(
    context: PassContext, analysis: RowAnalysis, others: list[fx.Node], kind: str
) -> list[Refused]:
    """Why products that look like the start of a bulge of a kind are in no region.

    Args:
        others: the seeds of regions that are no bulges.
    """
    found: dict[Refused, None] = {}
    experts = products_of_experts(analysis)
    for node in (*others, *unproved_products(analysis)):
        if node in experts:
            continue  # refused as that
        place = place_of(analysis, node, context.ending if context.is_top else "")
        if place is None or place.kind != kind:
            continue
        is_short = _plan_of(context, analysis, place).chunks < 2
        if is_short and isinstance(analysis.rows, int) and place.cause is not Cause.BREAK:
            continue  # nothing to gain, but where a break hides what comes of it
        region = RegionFinder(analysis).grow(node) if analysis.states[node].rowwise else None
        name = region.name if region is not None else module_path(node) or node.name
        kept = sum(hint(x.numel()) * x.element_size() for x in tensors_of(node) if x.requires_grad)
        if not any(r.name == name for r in context.report.refusals):
            found[Refused(kind, name, place.reason, place.cause, 0 if is_short else kept)] = None
    return list(found)


def _plan_of(context: PassContext, analysis: RowAnalysis, place: Place) -> Plan:
    """The plan that a place would have."""
    rows, options = rows_of(analysis), context.options
    source, out = tensor_value(place.node.all_input_nodes[0]), tensor_value(place.node)
    assert source is not None and out is not None
    width, device = hint(source.shape[-1]), out.device.type
    if place.kind == "mlp":
        return plan_mlp(rows, width, device, options.chunk_rows)
    return plan_vocab(rows, width, hint(out.shape[-1]), device, options.vocab_chunk_rows)
