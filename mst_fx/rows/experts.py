"""Products of rows with the weights of their experts: stacks of matrices of which routing picks a slice for each row."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from torch import fx

from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import CONVOLUTIONS, GROUPED_PRODUCTS, PADS, operation
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.fates import NEAR, fate_of
from mst_fx.rows.weights import ROW_PRODUCTS, is_part, numel_of, weight_product


def expert_products(analysis: RowAnalysis) -> list[list[fx.Node]]:
    """Products of rows with a stack of weight matrices (3-D) that routing picks, outside of any region.

    Each row meets a slice whole: rows were picked or repeated, or slices were, or offsets say which. A stack that
    multiplies the parts of each row (block-diagonal weights) is none. Nor are those that start no bulge: what other
    experts' products feed, what attention takes, what gives no more than the rows had before they were picked.

    Returns:
        For each stack the products with it: those that routing decides about first.
    """
    found = [stack for stack in _stack_products(analysis) if _routed(analysis, stack)]
    known = {product for stack in found for product, _ in stack}
    starts = [stack for stack in found if _is_start(analysis, stack, known)]
    return [list(dict.fromkeys([*_routed(analysis, stack), *dict(stack)])) for stack in starts]


def products_of_experts(analysis: RowAnalysis) -> set[fx.Node]:
    """All products with stacks of which some slices are experts' for sure; the others are by a loop over slices."""
    found = [stack for stack in _stack_products(analysis) if _routed(analysis, stack)]
    return {product for stack in found for product, _ in stack}


def _is_start(analysis: RowAnalysis, stack: list[tuple[fx.Node, fx.Node]], experts: set[fx.Node]) -> bool:
    """Whether the products with a stack give something wide, of which something else than attention is made.

    Args:
        experts: the products with all stacks.
    """
    sizes = [numel_of(product) for product, _ in stack]
    for product in _routed(analysis, stack):
        weights = dict(stack)[product]
        way = _way_back(analysis, product, weights)
        if _is_fed(analysis, way, experts) or fate_of(analysis, product, experts).mixes:
            return False
        if all(sizes) and _is_picked(way) and _are_rows(way[-1], weights) and sum(sizes) <= numel_of(way[-1]):
            return False
    return True


def _is_fed(analysis: RowAnalysis, way: list[fx.Node], experts: set[fx.Node]) -> bool:
    """Whether the rows of a product are what experts gave, not yet added up or to anything else."""
    node = way[0] if way else None
    for _ in range(NEAR):
        if node is None or node in experts:
            break
        values = _values(node)
        source = max(values, key=numel_of, default=None)
        is_narrower = source is not None and numel_of(source) > numel_of(node) and not is_part(node)
        is_sum = operation(node) == "add" and len(values) > 1
        if is_narrower or is_sum or weight_product(analysis, node) is not None:
            return False
        node = source
    return node in experts


def _are_rows(source: fx.Node, weights: fx.Node) -> bool:
    """Whether a value is rows that a slice of a stack takes whole."""
    fake, stack = tensor_value(source), tensor_value(weights)
    return fake is not None and stack is not None and fake.shape[-1] in stack.shape[-2:]


def _stack_products(analysis: RowAnalysis) -> Iterator[list[tuple[fx.Node, fx.Node]]]:
    """The products with each stack of matrices, and what of the stack each multiplies."""
    for stack in analysis.graph.nodes:
        fake = tensor_value(stack)
        if not analysis.states[stack].constant or stack.op not in ("placeholder", "get_attr"):
            continue
        if fake is None or fake.ndim != 3 or not fake.is_floating_point():
            continue
        found = []
        queue, seen = deque([stack]), {stack}
        while queue:
            source = queue.popleft()
            for user in source.users:
                if user in seen or user.op == "output":
                    continue
                seen.add(user)
                if operation(user) in GROUPED_PRODUCTS | ROW_PRODUCTS:
                    found.append((user, source))
                elif _values(user) == [source]:
                    queue.append(user)
        yield found


def _routed(analysis: RowAnalysis, products: list[tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
    """Of products with a stack those that routing decides about, and that are in no region."""
    return [
        product
        for product, weights in products
        if not (analysis.states[product].rowwise and analysis.states[weights].constant)
        and (operation(product) in GROUPED_PRODUCTS or _is_routed(analysis, product, weights))
    ]


def _values(node: fx.Node) -> list[fx.Node]:
    """The operands that hold numbers, not indices or masks."""
    return [n for n in node.all_input_nodes if any(x.is_floating_point() for x in tensors_of(n))]


def _is_routed(analysis: RowAnalysis, product: fx.Node, weights: fx.Node) -> bool:
    """Whether slices of a stack, or the rows they meet, were picked or repeated by nodes that multiply nothing."""
    if not analysis.states[weights].constant:
        return True
    way = _way_back(analysis, product, weights)
    return _is_picked(way) and _is_whole(analysis, way[-1], weights)


def _way_back(analysis: RowAnalysis, product: fx.Node, weights: fx.Node) -> list[fx.Node]:
    """The values that the rows of a product are made of, last first, to one that is row-wise or itself a product's."""
    sources = [n for n in _values(product) if n is not weights and not analysis.states[n].constant]
    way = [max(sources, key=numel_of)] if sources else []
    while way:
        node = way[-1]
        is_end = analysis.states[node].rowwise or operation(node) in CONVOLUTIONS
        if is_end or weight_product(analysis, node) is not None or not _values(node):
            break
        way.append(max(_values(node), key=numel_of))
    return way


def _is_picked(way: list[fx.Node]) -> bool:
    """Whether values on the way from a product back to its rows were picked by others, or repeated."""
    return any(_is_repeat(node, source) or _picks(node, source) for node, source in itertools.pairwise(way))


def _is_repeat(node: fx.Node, source: fx.Node) -> bool:
    before, after = numel_of(source), numel_of(node)
    return before < after and (before == 0 or after % before == 0) and operation(node) not in PADS


def _picks(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is taken from one other, by indices or a mask."""
    return _values(node) == [source] and any(n is not source and tensors_of(n) for n in node.all_input_nodes)


def _is_whole(analysis: RowAnalysis, source: fx.Node, weights: fx.Node) -> bool:
    """Whether a slice of a stack is as high or as wide as a row; slices that each take a part of it are not."""
    fake, stack = tensor_value(source), tensor_value(weights)
    state = analysis.states[source]
    if fake is None or stack is None:
        return True
    if operation(source) in CONVOLUTIONS:
        return fake.shape[1] in stack.shape[-2:]
    if not (state.rowwise and state.holds_rows):
        return True  # nobody knows how wide its rows are
    return numel_of(source) // max(1, hint(analysis.rows)) in map(hint, stack.shape[-2:])
