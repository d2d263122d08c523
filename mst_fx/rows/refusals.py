"""Places that look like bulges and are left alone: what becomes of the wide result of a product, and why no loop.

A product that widens rows is

- **the start of an MLP**, if products with weights take its result and all of them narrow it;
- **a vocabulary head**, if no such product takes it: it ends in reductions over its width, or leaves the graph;
- **no place** otherwise, and not worth a word: a residual stream that other products widen again, a rank that goes back
  to the width it came from, a projection into a mixer (attention, a state space), of which parts meet other rows.

Nothing here goes by names of models or modules; what an operator does is known from shapes and from the analysis.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator

import torch
from torch import fx

from mst_fx.errors import Cause
from mst_fx.graph.names import target_name
from mst_fx.graph.sizes import expression, hint, is_known
from mst_fx.graph.spelling import CONVOLUTIONS, EMBEDDINGS, MATMULS, PERMUTES, RESHAPES, SPLITS, operation
from mst_fx.graph.values import tensor_value
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.fates import NEAR, Fate, fate_of
from mst_fx.rows.weights import is_part, numel_of, weight_product, width_in

_MOVES = PERMUTES | RESHAPES | SPLITS | {"contiguous", "getitem"}


@dataclasses.dataclass(frozen=True)
class Place:
    """A product that looked like the start of a bulge.

    Attributes:
        node: the product.
        kind: "mlp" or "vocab".
        reason, cause: why it was left alone.
    """

    node: fx.Node
    kind: str
    reason: str
    cause: Cause


def place_of(analysis: RowAnalysis, product: fx.Node, ending: str = "") -> Place | None:
    """The place that a product is the start of, if it is left alone; None if it is none.

    Args:
        product: it widens rows, and lies in no region.
        ending: what to say of a value that leaves the graph; "": that it is an output.
    """
    width, state = width_in(product), analysis.states[product]
    if width is None or _is_low_rank(analysis, product):
        return None
    fate = fate_of(analysis, product)
    if not fate.kind:
        return None
    if not state.rowwise:
        is_behind = operation(product) in CONVOLUTIONS
        reason = "multiplies channels that stand before the rows" if is_behind else state.reason
        return Place(product, fate.kind, f"{product.name} ({target_name(product)}) {reason}", state.cause)
    if fate.blockers:
        blocker = fate.blockers[0]
        if _is_of_mixer(analysis, fate, product, width):
            return None
        reason, cause = analysis.states[blocker].reason, analysis.states[blocker].cause
        if analysis.states[blocker].summed:
            reason, cause = "sums over rows, and the inside needs the sum", Cause.UNPROVED
        return Place(product, fate.kind, _said_of(blocker, reason), cause)
    if fate.is_output and ending:
        kind = "vocab" if fate.kind == "vocab" and _is_vocabulary(analysis, product, width) else "mlp"
        return Place(product, kind, f"the wide result leaves the graph, {ending}", Cause.BREAK)
    if fate.is_output:
        return Place(product, fate.kind, "the wide result is an output of the graph", Cause.IS_OUTPUT)
    if fate.narrows is None and fate.is_reduced:
        reason = "what a loop around it would read, or give, takes as much as it would save"
        return Place(product, fate.kind, reason, Cause.NO_SAVING)
    return None


def _is_vocabulary(analysis: RowAnalysis, product: fx.Node, width: int) -> bool:
    """Whether a result of which no reader is known is as wide as a table of embeddings has rows.

    Where a graph has no table, only how much wider it is than what went in tells a head from an MLP's first half.
    """
    out = tensor_value(product)
    tables = [
        tensor_value(n)
        for node in analysis.graph.nodes
        if operation(node) in EMBEDDINGS
        for n in node.all_input_nodes
    ]
    sizes = {hint(x.shape[0]) for x in tables if x is not None and x.ndim == 2 and x.is_floating_point()}
    if out is None:
        return False
    return hint(out.shape[-1]) in sizes if sizes else hint(out.shape[-1]) > 5 * width


def unproved_products(analysis: RowAnalysis) -> Iterator[fx.Node]:
    """Products with a weight that widen the rows of an analysis and are not row-wise."""
    for node in analysis.graph.nodes:
        state = analysis.states[node]
        if state.rowwise or state.constant or node.op not in ("call_function", "call_method"):
            continue
        operands = weight_product(analysis, node)
        if operands is None:
            continue
        source, out = tensor_value(operands[0]), tensor_value(node)
        if source is None or out is None or not all(is_known(s) for s in (*source.shape, *out.shape)):
            continue
        if not analysis.states[operands[0]].holds_rows and operation(node) not in CONVOLUTIONS:
            continue  # rows of another number, or of a width that Dynamo keeps dynamic
        if out.numel() > source.numel() and _count(analysis, out):
            yield node


def _count(analysis: RowAnalysis, out: torch.Tensor) -> bool:
    """Whether a product's result, or that of a 1x1 convolution, has the rows of the analysis."""
    rows = expression(analysis.rows)
    per_row = expression(out.shape[-1]), expression(out.shape[1]) if out.ndim > 2 else None
    total = expression(out.numel())
    return any(size is not None and total == rows * size for size in per_row)


def _is_low_rank(analysis: RowAnalysis, product: fx.Node) -> bool:
    """Whether all that a product widens was narrowed before, from rows at least as wide as its result."""
    narrowing = _products_before(analysis, product)
    if not narrowing:
        return False
    for node in narrowing:
        source = max((n for n in node.all_input_nodes if not analysis.states[n].constant), key=numel_of)
        if numel_of(source) < numel_of(product):
            return False
        before = _products_before(analysis, node) or []
        if any(
            numel_of(n) == numel_of(source) and _widens(n) for n in before
        ):  # an MLP's second one, no rank
            return False
    return True


def _products_before(analysis: RowAnalysis, product: fx.Node) -> list[fx.Node] | None:
    """The products with weights that the rows of a product come from; None if some come from elsewhere."""
    found, queue, seen = [], deque([product]), {product}
    while queue and len(seen) < NEAR:
        sources = [n for n in queue.popleft().all_input_nodes if not analysis.states[n].constant]
        for node in sources:
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                return None
            if weight_product(analysis, node) is not None:
                found.append(node)
            else:
                queue.append(node)
    return found if not queue else None


def _widens(product: fx.Node) -> bool:
    return numel_of(product) > max(numel_of(n) for n in product.all_input_nodes[:1])


def _is_split_up(analysis: RowAnalysis, product: fx.Node, blocker: fx.Node, width: int) -> bool:
    """Whether what mixes tokens takes the result in parts, none of them wider than what went into the product.

    Then the product is the common one of several projections into a mixer, and its width is no bulge's.
    """
    moved = {product, *_moved(product), blocker, *_moved(blocker)}
    if not any(map(is_part, moved)):
        return False
    readers = list(_computing(blocker))
    taken = [n for reader in readers for n in reader.all_input_nodes if not analysis.states[n].constant]
    return bool(taken) and all(numel_of(operand) <= width * hint(analysis.rows) for operand in taken)


def _is_of_mixer(analysis: RowAnalysis, fate: Fate, product: fx.Node, width: int) -> bool:
    """Whether what mixes tokens is a mixer's, and the product a projection into it."""
    blocker = fate.blockers[0]
    if fate.narrows is None and _is_multiplied(analysis, blocker):
        return True
    is_head = fate.narrows is None and fate.is_reduced
    return not (fate.is_output or is_head) and _is_split_up(analysis, product, blocker, width)


def _is_multiplied(analysis: RowAnalysis, blocker: fx.Node) -> bool:
    """Whether a value is multiplied with other rows: a mixer's (of a block of a sequence, say), and no logits."""
    return any(
        operation(reader) in MATMULS and not any(analysis.states[x].constant for x in reader.all_input_nodes)
        for reader in _computing(blocker)
    )


def _moved(node: fx.Node) -> set[fx.Node]:
    """A node and the values that are made of it by moving it only."""
    found, queue = {node}, deque([node])
    while queue:
        for user in queue.popleft().users:
            if user not in found and _is_move(user):
                found.add(user)
                queue.append(user)
    return found


def _computing(node: fx.Node) -> Iterator[fx.Node]:
    """The readers of a value, behind all that only moves it; the node itself if it computes."""
    if not _is_move(node):
        yield node
        return
    for moved in sorted(_moved(node), key=list(node.graph.nodes).index):
        yield from (user for user in moved.users if user.op != "output" and not _is_move(user))


def _is_move(node: fx.Node) -> bool:
    return operation(node) in _MOVES


def _said_of(blocker: fx.Node, reason: str) -> str:
    text = f"{blocker.name} ({target_name(blocker)}) {reason}"
    reader = next(_computing(blocker), blocker)
    return text if reader is blocker else f"{text}, for {reader.name} ({target_name(reader)})"
