"""What the chunking passes say of products that widen rows and that no loop took: why they were left alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import fx

from mst_fx.chunk_rows import ChunkSize, mlp_chunk_size, vocab_chunk_size
from mst_fx.context import PassContext
from mst_fx.declared import is_declared
from mst_fx.errors import Cause
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.names import common_path, module_path, target_name
from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.spelling import (
    ATTENTION_KERNELS,
    GROUPED_PRODUCTS,
    PRODUCTS,
    is_of_library,
    is_of_mst,
    operation,
)
from mst_fx.graph.subgraphs import is_function
from mst_fx.graph.values import is_plain, tensor_value, tensors_of
from mst_fx.report import Refused
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.counts import products_of_unknown_rows
from mst_fx.rows.experts import products_of_experts
from mst_fx.rows.refusals import Place, place_of, unproved_products
from mst_fx.rows.region import RegionFinder


def refuse_experts(context: PassContext, found: Iterable[tuple[list[fx.Node], bool]]) -> None:
    """Notes expert matmuls: products with a slice, picked by routing, of a stack of weights.

    Args:
        found: what :func:`expert_products` found in all analyses, and whether the first product is row-wise. Stacks
            of which a loop took a product are none: there each slice has rows of its own.
    """
    nodes = set(context.graph.nodes)
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
    for node in products_of_unknown_rows(context.graph):
        source, out = tensor_value(node.all_input_nodes[0]), tensor_value(node)
        name = module_path(node) or node.name
        if source is None or out is None or out.shape[-1] <= source.shape[-1] or name in names:
            continue
        names.add(name)
        reason = f"{node.name} ({target_name(node)}) has as many rows as its data say"
        context.refuse("mlp", name, reason, Cause.UNKNOWN_ROWS)


def refuse_transformed(context: PassContext) -> None:
    """Notes matmuls that widen rows inside of ``torch.vmap``, ``torch.func.grad`` and the like."""
    graph, names = context.graph, set()
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
        if not is_of_library(node) or is_of_mst(node) or operation(node) in GROUPED_PRODUCTS:
            continue  # experts' products are refused as such
        fakes = [tensor_value(operand) for operand in node.all_input_nodes[:1]]
        out = tensor_value(node)
        if state.rowwise or out is None or not fakes or fakes[0] is None:
            continue
        # A declared one may have been found to change the number of rows.
        if not (
            state.holds_rows
            or (
                is_declared(node.target)
                and state.cause is Cause.UNPROVED
                and analysis.states[node.all_input_nodes[0]].holds_rows
            )
        ):
            continue
        if out.ndim == fakes[0].ndim and hint(out.shape[-1]) > hint(fakes[0].shape[-1]):
            name = module_path(node) or node.name
            context.refuse("mlp", name, f"{node.name} ({state.reason})", Cause.OPAQUE)


def refuse_functions(context: PassContext, analysis: RowAnalysis) -> None:
    """Notes ``torch.autograd.Function``s that widen rows themselves, and are not proved."""
    for node in filter(is_function, analysis.graph.nodes):
        state, operands = analysis.states[node], [n for n in node.all_input_nodes if tensors_of(n)]
        of_rows = [n for n in operands if analysis.states[n].holds_rows]
        if state.rowwise or not of_rows:
            continue
        source, out = tensors_of(of_rows[0])[0], tensors_of(node)[0]
        if out.ndim == source.ndim and hint(out.shape[-1]) > hint(source.shape[-1]):
            context.refuse("mlp", module_path(node) or node.name, f"{node.name} {state.reason}", state.cause)


def refuse_sharded(context: PassContext, kind: str) -> None:
    """Notes products that widen rows by a weight that is no plain tensor, such as a DTensor (tensor parallelism).

    Their rows are no plain tensors either, so that no analysis sees them.
    """
    names = set()
    for node in context.graph.nodes:
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
            chunk_size = mlp_chunk_size(rows, width, fake.device.type, context.options.chunk_rows)
        else:
            chunk_size = vocab_chunk_size(
                rows, width, wide, fake.device.type, context.options.vocab_chunk_rows
            )
        name = common_path(map(module_path, (node, *ends))) or module_path(node) or node.name
        if chunk_size.chunks > 1 and name not in names:
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
        is_short = _chunk_size_at(context, analysis, place).chunks < 2
        if is_short and isinstance(analysis.rows, int) and place.cause is not Cause.BREAK:
            continue  # nothing to gain, but where a break hides what comes of it
        region = RegionFinder(analysis).grow(node) if analysis.states[node].rowwise else None
        name = region.name if region is not None else module_path(node) or node.name
        kept = sum(hint(x.numel()) * x.element_size() for x in tensors_of(node) if x.requires_grad)
        if not any(r.name == name for r in context.report.refusals):
            found[Refused(kind, name, place.reason, place.cause, 0 if is_short else kept)] = None
    return list(found)


def _chunk_size_at(context: PassContext, analysis: RowAnalysis, place: Place) -> ChunkSize:
    """The chunks that a place would have."""
    rows, options = hint(analysis.rows), context.options
    source, out = tensor_value(place.node.all_input_nodes[0]), tensor_value(place.node)
    assert source is not None and out is not None
    width, device = hint(source.shape[-1]), out.device.type
    if place.kind == "mlp":
        return mlp_chunk_size(rows, width, device, options.chunk_rows)
    return vocab_chunk_size(rows, width, hint(out.shape[-1]), device, options.vocab_chunk_rows)
