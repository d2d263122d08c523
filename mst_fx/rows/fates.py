"""What becomes of the wide result of a product: whether others narrow it, reduce it, mix it with other rows, or give it out."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import deque
from collections.abc import Collection

from torch import fx

from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.spelling import CONVOLUTIONS, operation
from mst_fx.graph.subgraphs import is_function
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.weights import ROW_PRODUCTS, is_attention, is_part, numel_of, weight_product, width_in

NEAR = 64  # nodes that are looked at where a narrow value could come back to a wide one


@dataclasses.dataclass(frozen=True)
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
    is_output: bool
    narrows: bool | None
    is_reduced: bool
    mixes: bool

    @property
    def kind(self) -> str:
        """ "mlp", "vocab", or "": it is the start of neither."""
        if self.mixes or self.narrows is False:
            return ""
        return "mlp" if self.narrows and not self.is_reduced else "vocab"


def fate_of(analysis: RowAnalysis, product: fx.Node, experts: Collection[fx.Node] = ()) -> Fate:
    """Follows the wide result of a product to all that reads it.

    Args:
        experts: products with weights that were picked, which a product with a weight is too.
    """
    cone = _Cone(analysis, product, experts)
    cone.follow()
    wide, narrow = cone.wide, cone.narrow
    ways = [_comes_back(analysis, node, wide) for node in narrow]
    blockers = cone.writes + [node for node in wide - {product} if not analysis.states[node].rowwise]
    blockers += [blocker for _, blocker in ways if blocker is not None]
    lost = [node for node in narrow if not analysis.states[node].rowwise]
    order = {node: index for index, node in enumerate(analysis.graph.nodes)}
    return Fate(
        blockers=sorted(blockers or lost, key=order.__getitem__),
        is_output=cone.is_output,
        narrows=all(cone.narrowing) if cone.narrowing else None,
        is_reduced=not all(comes_back for comes_back, _ in ways),
        mixes=_mixes(analysis, product, wide | narrow),
    )


class _Cone:
    """All that is made of the wide result of a product, as far as no product with a weight takes it.

    Attributes:
        wide: the result, and what is made of it that is about as wide.
        narrow: what is made of that and is narrower, or a sum over rows; nobody looks behind it.
        writes: those that write to a wide value in place.
        narrowing: of each product with a weight that takes a wide value, whether it narrows it.
        is_output: a wide value is an output of the graph.
    """

    def __init__(self, analysis: RowAnalysis, product: fx.Node, experts: Collection[fx.Node]) -> None:
        self.analysis, self.experts = analysis, experts
        self.least = (width_in(product) or 1) * hint(analysis.rows) // 4
        self.wide, self.narrow = {product}, set[fx.Node]()
        self.writes: list[fx.Node] = []
        self.narrowing: list[bool] = []
        self.is_output = False
        self._queue = deque([product])

    def follow(self) -> None:
        while self._queue:
            source = self._queue.popleft()
            for user in source.users:
                if user.op == "output":
                    self.is_output = True
                elif user not in self.wide and user not in self.narrow:
                    self._read(source, user)

    def _read(self, source: fx.Node, user: fx.Node) -> None:
        if user in self.experts or weight_product(self.analysis, user) is not None:
            taken = [numel_of(operand) for operand in user.all_input_nodes if operand in self.wide]
            self.narrowing.append(numel_of(user) < max(taken))
        elif user.target is operator.setitem:
            self._put(source, user)
        elif not tensors_of(user):
            pass
        elif numel_of(user) < self.least or self.analysis.states[user].summed:
            self.narrow.add(user)
        else:
            self._add(user)

    def _put(self, value: fx.Node, setitem: fx.Node) -> None:
        """A wide value goes on in what it is put into; where something is put into it, it is written to."""
        into = setitem.args[0]
        assert isinstance(into, fx.Node)
        if into is value:
            self.writes.append(setitem)
        elif into not in self.wide:
            self._add(into)

    def _add(self, node: fx.Node) -> None:
        self.wide.add(node)
        self._queue.append(node)


def _mixes(analysis: RowAnalysis, product: fx.Node, cone: set[fx.Node]) -> bool:
    """Whether parts of a product's result, or all of it, meet other rows in a product."""
    parts: set[fx.Node] = set()
    for node in analysis.graph.nodes:
        if node in cone and node is not product:
            if is_part(node) or any(operand in parts for operand in node.all_input_nodes):
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
    while queue and len(seen) < NEAR:
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


def _meets_rows(analysis: RowAnalysis, node: fx.Node, cone: set[fx.Node], parts: set[fx.Node]) -> bool:
    """Whether a node multiplies values of rows with each other, of which one is a part or comes from elsewhere.

    So scores, states and the like are made; also by an outer product and a sum. A value that meets itself as a whole
    does not count: an MLP with a Gram matrix inside is one that mixes tokens.
    """
    operands = [n for n in node.all_input_nodes if tensors_of(n) and not analysis.states[n].constant]
    inside = [n for n in operands if n in cone]
    if len(operands) < 2 or not inside:
        return False
    if is_function(node):  # a loss of logits and labels gives no rows as attention does
        operands = [n for n in operands if any(x.is_floating_point() for x in tensors_of(n))]
        if len(operands) < 2 or 4 * numel_of(node) < min(map(numel_of, inside)):
            return False
    is_product = operation(node) in ROW_PRODUCTS or is_attention(node) or _is_outer(node, operands)
    return is_product and (any(n in parts for n in inside) or len(inside) < len(operands))


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
    return is_broadcast and numel_of(node) > max(map(numel_of, operands))
