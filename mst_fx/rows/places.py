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
import itertools
import operator
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Cause
from mst_fx.graph.names import target_name
from mst_fx.graph.sizes import expression, hint, is_known
from mst_fx.graph.spelling import (
    ATTENTION,
    CONVOLUTIONS,
    EMBEDDINGS,
    GROUPED_PRODUCTS,
    MATRIX_PRODUCTS,
    PADS,
    PERMUTES,
    RESHAPES,
    SPLITS,
    is_of_library,
    multiplied,
    operation,
)
from mst_fx.graph.subgraphs import is_function
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.rows.analysis import RowAnalysis

_NEAR = 64  # nodes that are looked at where a narrow value could come back to a wide one

# Of two operands, all of which may hold rows.
_PRODUCTS = MATRIX_PRODUCTS | ATTENTION
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


@dataclasses.dataclass
class Fate:
    """What becomes of the wide result of a product, as far as no product with a weight takes it.

    Attributes:
        blockers: its readers that are not row-wise, in graph order; sums too that come back to it.
        is_output: it is an output of the graph.
        narrows: whether each product with a weight that takes it narrows it; None: there is none.
        is_reduced: something narrow is made of it without a product, for good: a loss, a largest, a sum.
        mixes: parts of it meet other rows in a product, as in attention and state spaces.
    """

    blockers: list[fx.Node]
    is_output: bool = False
    narrows: bool | None = None
    is_reduced: bool = False
    mixes: bool = False

    @property
    def kind(self) -> str:
        """ "mlp", "vocab", or "": it is the start of neither."""
        if self.mixes or self.narrows is False:
            return ""
        return "mlp" if self.narrows and not self.is_reduced else "vocab"


def place_of(analysis: RowAnalysis, product: fx.Node, ending: str = "") -> Place | None:
    """The place that a product is the start of, if it is left alone; None if it is none.

    Args:
        product: it widens rows, and lies in no region.
        ending: what to say of a value that leaves the graph; "": that it is an output.
    """
    width, state = _width_in(product), analysis.states[product]
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
        is_head = fate.narrows is None and fate.is_reduced
        if not (fate.is_output or is_head) and _is_split_up(analysis, product, blocker, width):
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
        operands = _weight_product(analysis, node)
        if operands is None:
            continue
        source, out = tensor_value(operands[0]), tensor_value(node)
        if source is None or out is None or not all(is_known(s) for s in (*source.shape, *out.shape)):
            continue
        if not analysis.states[operands[0]].rows and operation(node) not in CONVOLUTIONS:
            continue  # rows of another number, or of a width that Dynamo keeps dynamic
        if out.numel() > source.numel() and _count(analysis, out):
            yield node


def _count(analysis: RowAnalysis, out: torch.Tensor) -> bool:
    """Whether a product's result, or that of a 1x1 convolution, has the rows of the analysis."""
    rows = expression(analysis.rows)
    per_row = expression(out.shape[-1]), expression(out.shape[1]) if out.ndim > 2 else None
    total = expression(out.numel())
    return any(size is not None and total == rows * size for size in per_row)


def convolution_rows(graph: fx.Graph) -> Iterator[Any]:
    """The numbers of rows of convolutions with a kernel of 1, whose rows lie behind the channels."""
    for node in graph.nodes:
        fake = tensor_value(node)
        weights = [n for n in node.all_input_nodes if isinstance(tensor_value(n), torch.nn.Parameter)]
        is_linear = operation(node) in CONVOLUTIONS and fake is not None and bool(weights)
        if is_linear and fake is not None and fake.ndim > 2 and _is_by_row(node, weights[0]):
            count: Any = fake.shape[0]
            for size in fake.shape[2:]:
                count = count * size
            if is_known(count):
                yield count


def fate_of(analysis: RowAnalysis, product: fx.Node, experts: Collection[fx.Node] = ()) -> Fate:
    """Follows the wide result of a product to all that reads it.

    Args:
        experts: products with weights that were picked, which a product with a weight is too.
    """
    least = (_width_in(product) or 1) * hint(analysis.rows) // 4
    fate = Fate([])
    wide, narrow = {product}, set[fx.Node]()
    queue = deque([product])
    while queue:
        source = queue.popleft()
        for user in source.users:
            if user.op == "output":
                fate.is_output = True
            elif user in wide or user in narrow:
                continue
            elif user in experts or _weight_product(analysis, user) is not None:
                narrowing = _size(user) < max(_size(n) for n in user.all_input_nodes if n in wide)
                fate.narrows = narrowing and fate.narrows is not False
            elif not tensors_of(user):
                if user.target is operator.setitem and user.args[0] is source:
                    fate.blockers.append(user)
                elif (
                    user.target is operator.setitem and user.args[0] not in wide
                ):  # it goes on in what it is put into
                    wide.add(user.args[0])  # type: ignore[arg-type]
                    queue.append(user.args[0])  # type: ignore[arg-type]
            elif _size(user) < least or analysis.states[user].summed:
                narrow.add(user)
            else:
                wide.add(user)
                queue.append(user)
    fate.mixes = _mixes(analysis, product, wide | narrow)
    fate.blockers += [node for node in wide - {product} if not analysis.states[node].rowwise]
    ways = [_comes_back(analysis, node, wide) for node in narrow]
    fate.blockers += [blocker for _, blocker in ways if blocker is not None]
    fate.is_reduced = not all(comes_back for comes_back, _ in ways)
    lost = [node for node in narrow if not analysis.states[node].rowwise]
    order = {node: index for index, node in enumerate(analysis.graph.nodes)}
    fate.blockers = sorted(fate.blockers or lost, key=order.__getitem__)
    return fate


def _mixes(analysis: RowAnalysis, product: fx.Node, cone: set[fx.Node]) -> bool:
    """Whether parts of a product's result, or all of it, meet other rows in a product."""
    parts: set[fx.Node] = set()
    for node in analysis.graph.nodes:
        if node in cone and node is not product:
            if _is_part(node) or any(operand in parts for operand in node.all_input_nodes):
                parts.add(node)
            if _meets_rows(analysis, node, cone, parts):
                return True
            if operation(node) in CONVOLUTIONS and any(operand in parts for operand in node.all_input_nodes):
                return True  # a part of it goes through a convolution over the rows, as in state spaces
    return False


def _comes_back(analysis: RowAnalysis, node: fx.Node, wide: set[fx.Node]) -> tuple[bool, fx.Node | None]:
    """Whether a narrow value comes back into the wide inside, and the node on the way that is not row-wise, or a sum.

    So does the mean over all rows that an inside is divided by, and the one-hot form of the largest of each row.
    """
    comes_back = False
    queue, seen = deque([(node, _stands_in(analysis, node))]), {node}
    while queue and len(seen) < _NEAR:
        source, blocker = queue.popleft()
        for user in source.users:
            comes_back |= user in wide
            if user in wide and blocker is not None:
                return True, blocker
            if user not in seen and user not in wide:
                seen.add(user)
                queue.append((user, blocker or _stands_in(analysis, user)))
    return comes_back, None


def _stands_in(analysis: RowAnalysis, node: fx.Node) -> fx.Node | None:
    is_in_the_way = bool(tensors_of(node)) and (
        not analysis.states[node].rowwise or analysis.states[node].summed
    )
    return node if is_in_the_way else None


def _weight_product(analysis: RowAnalysis, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The rows and the weight of a product with a constant matrix, or of a convolution with a kernel of 1."""
    if node.op not in ("call_function", "call_method"):
        return None
    is_convolution = operation(node) in CONVOLUTIONS
    if not is_convolution and operation(node) not in _PRODUCTS and not analysis.states[node].matmuls:
        return None
    operands = multiplied(node)
    weights = [n for n in operands if analysis.states[n].constant and tensor_value(n).ndim >= 2]  # type: ignore[union-attr]
    others = [n for n in operands if not analysis.states[n].constant]
    if not weights or not others:
        return None
    if operation(node) in ATTENTION and others != operands[:1]:
        return None  # queries meet keys or values of rows
    if is_convolution and not _is_by_row(node, weights[0]):
        return None
    return others[0], weights[0]


def _is_by_row(convolution: fx.Node, weight: fx.Node) -> bool:
    """Whether a convolution has a kernel of 1 and one group: a linear on channels."""
    fake, kernel = tensor_value(convolution.all_input_nodes[0]), tensor_value(weight)
    assert kernel is not None
    return (
        fake is not None
        and fake.ndim == kernel.ndim
        and kernel.shape[1] == fake.shape[1]
        and all(size == 1 for size in kernel.shape[2:])
    )


def _size(node: fx.Node) -> int:
    """The number of elements of a value; 0 where data decide it."""
    fakes = tensors_of(node)
    return sum(hint(x.numel()) if is_known(x.numel()) else 0 for x in fakes)


def _width_in(product: fx.Node) -> int | None:
    """Elements a row that go into a product: the dimension its weight contracts."""
    for node in multiplied(product):
        fake, out = tensor_value(node), tensor_value(product)
        if fake is None or out is None or fake.ndim < 2:
            continue
        dim = 1 if operation(product) in CONVOLUTIONS else -1
        return hint(fake.shape[dim]) if is_known(fake.shape[dim]) else None
    return None


def _is_part(node: fx.Node) -> bool:
    """Whether a value is a part of a larger one: a slice, or a member of a split; not elements picked by tensors."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    picks = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    is_picked = any(isinstance(part, (fx.Node, list)) and not _is_number(part) for part in picks)
    return not is_picked and _size(node) < _size(node.args[0])


def _is_number(part: Any) -> bool:
    """Whether a part of an index is a size or another number of the graph."""
    return isinstance(part, fx.Node) and tensor_value(part) is None


def _meets_rows(analysis: RowAnalysis, node: fx.Node, cone: set[fx.Node], parts: set[fx.Node]) -> bool:
    """Whether a node multiplies values of rows with each other, of which one is a part or comes from elsewhere.

    So scores, states and the like are made; also by an outer product and a sum. A value that meets itself as a whole
    does not count: an MLP with a Gram matrix inside is one that mixes tokens.
    """
    rows = [n for n in node.all_input_nodes if tensors_of(n) and not analysis.states[n].constant]
    inside = [n for n in rows if n in cone]
    if len(rows) < 2 or not inside:
        return False
    if is_function(node):  # a loss of logits and labels gives no rows as attention does
        rows = [n for n in rows if any(x.is_floating_point() for x in tensors_of(n))]
        if len(rows) < 2 or 4 * _size(node) < min(map(_size, inside)):
            return False
    is_product = operation(node) in _PRODUCTS or _is_attention(node) or _is_outer(node, rows)
    return is_product and (any(n in parts for n in inside) or len(inside) < len(rows))


def _is_outer(node: fx.Node, operands: list[fx.Node]) -> bool:
    """Whether values are broadcast against each other, to more than any of them."""
    out, fakes = tensor_value(node), [tensor_value(operand) for operand in operands]
    if (
        out is None
        or not all(is_known(x.numel()) for x in fakes if x is not None)
        or not is_known(out.numel())
    ):
        return False
    shapes = [tuple(map(hint, x.shape)) for x in fakes if x is not None]
    dims = itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    is_broadcast = [max(sizes) for sizes in dims] == [hint(size) for size in reversed(out.shape)]
    return is_broadcast and _size(node) > max(map(_size, operands))


def _is_attention(node: fx.Node) -> bool:
    """Higher-order operators (flex attention, scans) and operators of libraries on several values of rows."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) or is_of_library(node)


def _is_low_rank(analysis: RowAnalysis, product: fx.Node) -> bool:
    """Whether all that a product widens was narrowed before, from rows at least as wide as its result."""
    narrowing = _products_before(analysis, product)
    if not narrowing:
        return False
    for node in narrowing:
        source = max((n for n in node.all_input_nodes if not analysis.states[n].constant), key=_size)
        if _size(source) < _size(product):
            return False
        before = _products_before(analysis, node) or []
        if any(_size(n) == _size(source) and _widens(n) for n in before):  # an MLP's second one, no rank
            return False
    return True


def _products_before(analysis: RowAnalysis, product: fx.Node) -> list[fx.Node] | None:
    """The products with weights that the rows of a product come from; None if some come from elsewhere."""
    found, queue, seen = [], deque([product]), {product}
    while queue and len(seen) < _NEAR:
        sources = [n for n in queue.popleft().all_input_nodes if not analysis.states[n].constant]
        for node in sources:
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                return None
            if _weight_product(analysis, node) is not None:
                found.append(node)
            else:
                queue.append(node)
    return found if not queue else None


def _widens(product: fx.Node) -> bool:
    return _size(product) > max(_size(n) for n in product.all_input_nodes[:1])


def _is_split_up(analysis: RowAnalysis, product: fx.Node, blocker: fx.Node, width: int) -> bool:
    """Whether what mixes tokens takes the result in parts, none of them wider than what went into the product.

    Then the product is the common one of several projections into a mixer, and its width is no bulge's.
    """
    moved = {product, *_moved(product), blocker, *_moved(blocker)}
    if not any(map(_is_part, moved)):
        return False
    readers = list(_computing(blocker))
    taken = [n for reader in readers for n in reader.all_input_nodes if not analysis.states[n].constant]
    return bool(taken) and all(_size(operand) <= width * hint(analysis.rows) for operand in taken)


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
    sizes = [_size(product) for product, _ in stack]
    for product in _routed(analysis, stack):
        weights = dict(stack)[product]
        way = _way_back(analysis, product, weights)
        if _is_fed(analysis, way, experts) or fate_of(analysis, product, experts).mixes:
            return False
        if all(sizes) and _is_picked(way) and _are_rows(way[-1], weights) and sum(sizes) <= _size(way[-1]):
            return False
    return True


def _is_fed(analysis: RowAnalysis, way: list[fx.Node], experts: set[fx.Node]) -> bool:
    """Whether the rows of a product are what experts gave, not yet added up or to anything else."""
    node = way[0] if way else None
    for _ in range(_NEAR):
        if node is None or node in experts:
            break
        values = _values(node)
        source = max(values, key=_size, default=None)
        is_narrower = source is not None and _size(source) > _size(node) and not _is_part(node)
        is_sum = operation(node) == "add" and len(values) > 1
        if is_narrower or is_sum or _weight_product(analysis, node) is not None:
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
                if operation(user) in GROUPED_PRODUCTS | _PRODUCTS:
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
    rows = [n for n in _values(product) if n is not weights and not analysis.states[n].constant]
    way = [max(rows, key=_size)] if rows else []
    while way:
        node = way[-1]
        is_end = analysis.states[node].rowwise or operation(node) in CONVOLUTIONS
        if is_end or _weight_product(analysis, node) is not None or not _values(node):
            break
        way.append(max(_values(node), key=_size))
    return way


def _is_picked(way: list[fx.Node]) -> bool:
    """Whether values on the way from a product back to its rows were picked by others, or repeated."""
    return any(_is_repeat(node, source) or _picks(node, source) for node, source in itertools.pairwise(way))


def _is_repeat(node: fx.Node, source: fx.Node) -> bool:
    before, after = _size(source), _size(node)
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
    if not (state.rowwise and state.rows):
        return True  # nobody knows how wide its rows are
    return _size(source) // max(1, hint(analysis.rows)) in map(hint, stack.shape[-2:])
