"""Regions: the convex part of a graph around a widening matmul, with the narrowest boundary.

The boundary is a minimum cut (networkx). A tensor costs its bytes a row if its producer and one of
its consumers lie on different sides; that makes every tensor one hyperedge, modelled in the usual
way with two extra nodes. So the norm before an MLP and the residual add after it are absorbed
without being named: ``h = x + attn(x)`` is one H-wide tensor where everything beside it is wider.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable

import networkx as nx
import torch
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from mst_fx.declared import is_declared
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.names import common_path, module_path
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import PRODUCTS, operation
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.rows.analysis import Operand, RowAnalysis
from mst_fx.rows.fates import fate_of
from mst_fx.rows.fold import bytes_a_row

log = logging.getLogger("mst_fx")

# A matmul costs a little, so that it is absorbed where that narrows the boundary, not on a tie:
# the head's region must not swallow the last layer's MLP.
_BYTE = 1024
_MATMUL = 1
_NEARBY = 120  # nodes before and after the seed, in graph order, that a cut looks at: some layers


@dataclasses.dataclass(frozen=True)
class Region:
    """A convex set of row-wise nodes.

    Attributes:
        seed: the widening matmul it was grown from.
        nodes: in graph order.
        inputs: the operands from outside, each with the way it is read.
        row_outputs: nodes whose rows are used outside.
        sums: nodes whose sum over rows is used outside.
        in_bytes, out_bytes, wide_bytes: bytes a row of the row inputs (but for given data, such as soft
            targets), of the row outputs, and of the widest matmul result inside.
        width, wide: elements a row that go into the seed (d_model) and come out of it (I, or V).
        out_width, widest_out: elements a row of the row outputs, and of the widest of them.
        is_multiplied: all that the wide result comes to goes through another product inside, as in an MLP.
    """

    seed: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: tuple[Operand, ...]
    row_outputs: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
    in_bytes: int
    out_bytes: int
    wide_bytes: int
    width: int
    wide: int
    out_width: int
    widest_out: int
    is_multiplied: bool

    @property
    def device(self) -> str:
        """The type of the device, e.g. "cuda"."""
        return tensors_of(self.seed)[0].device.type

    @property
    def name(self) -> str:
        """The module the region computes, e.g. ``model.layers.0.mlp``."""
        products = [node for node in self.nodes if operation(node) in PRODUCTS or is_declared(node.target)]
        paths = list(dict.fromkeys(module_path(node) for node in products if module_path(node)))
        common = common_path(paths)
        apart = {path.rpartition(".")[0] for path in paths} != {common}  # the modules are not one's children
        out = [tensor_value(node) for node in products]
        is_wide = all(x is not None and hint(x.shape[-1]) > self.width for x in out)
        if len(paths) > 1 and is_wide and (apart or not common):  # heads of several models
            return ", ".join(paths)
        return common or module_path(self.seed) or self.seed.name

    @property
    def is_bulge(self) -> bool:
        leaves = bool(self.row_outputs or self.sums)
        # In elements too: logits cast to a narrower type are no bulge.
        return leaves and self.wide_bytes > max(self.in_bytes, self.out_bytes) and self.wide > self.out_width

    @property
    def ends_narrow(self) -> bool:
        """Whether all that leaves is sums and narrow rows, as from a head with its loss.

        Rows that are given, by a trunk without gradients, count for no bytes, and several results of a few elements
        each may take more than the rows; what goes on as rows is as wide as they are.
        """
        are_few = 4 * self.widest_out <= self.width and 4 * self.out_bytes <= self.wide_bytes
        return 4 * self.out_bytes <= self.in_bytes or are_few


def seeds(analysis: RowAnalysis) -> list[fx.Node]:
    """The matmuls that widen rows, last first.

    A later seed may absorb an earlier matmul that narrows its boundary; an earlier one must not
    absorb a later one, or the last MLP would take the head and its loss.
    """
    found = [
        node
        for node, state in analysis.states.items()
        if state.rowwise and any(m.out_bytes > m.in_bytes for m in state.matmuls)
    ]
    return found[::-1]


class RegionFinder:
    """Grows regions from seeds; a node belongs to one region at most.

    Args:
        analysis: of the graph.
        free: values whose use as an output of the graph costs nothing (logits that are deferred).
    """

    def __init__(self, analysis: RowAnalysis, free: Collection[fx.Node] = ()) -> None:
        self.analysis = analysis
        self.free = set(free)
        self.taken: set[fx.Node] = set()
        self.order = {node: index for index, node in enumerate(analysis.graph.nodes)}

    def grow(self, seed: fx.Node) -> Region | None:
        """The region around a seed; None if the seed lies in another region, or cannot be grown.

        An exception of ours, or a size that nobody knows, costs this seed; :func:`frontier` says so.
        """
        if seed in self.taken:
            return None
        try:
            return self._grow(seed)
        except Refusal as refusal:
            reason, cause = str(refusal), refusal.cause
        except Exception as error:
            log.debug("no region could be grown around %s", seed.name, exc_info=True)
            reason, cause = f"could not be analysed: {error!r}", Cause.DEFECT
        self.analysis.refused(seed, reason, cause)
        return None

    def _grow(self, seed: fx.Node) -> Region:
        banned: set[fx.Node] = set()
        while True:
            chosen = self._cut(seed, banned)
            intruder = self._find_detour(seed, chosen)
            if intruder is None:
                break
            banned.add(intruder)
        return self._region(seed, chosen)

    def take(self, region: Region) -> None:
        self.taken.update(region.nodes)

    def _users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if not (user.op == "output" and node in self.free)]

    def _may_absorb(self, node: fx.Node) -> bool:
        return self.analysis.states[node].rowwise and node not in self.taken

    def _neighbourhood(self, seed: fx.Node) -> set[fx.Node]:
        """Row-wise nodes connected with the seed and near it."""
        found, queue = {seed}, deque([seed])
        while queue:
            node = queue.popleft()
            for other in (*node.all_input_nodes, *node.users):
                near = abs(self.order.get(other, -_NEARBY) - self.order[seed]) <= _NEARBY
                if near and other not in found and self._may_absorb(other):
                    found.add(other)
                    queue.append(other)
        return found

    def _cut(self, seed: fx.Node, banned: set[fx.Node]) -> set[fx.Node]:
        """The largest of the minimum cuts around the seed."""
        inside = self._neighbourhood(seed)
        flow = nx.DiGraph()
        source, sink = "source", "sink"
        flow.add_edge(source, seed)  # no capacity: infinite
        for node in inside:
            if node in banned:
                flow.add_edge(node, sink)
            elif node is not seed and self.analysis.states[node].matmuls:
                flow.add_edge(node, sink, capacity=_MATMUL)
        tensors = inside | {
            operand
            for node in inside
            for operand, role in self.analysis.states[node].roles.items()
            if role == "row" or operand in inside
        }
        for tensor in tensors:
            self._add_tensor(flow, tensor, inside, sink)
        # networkx returns the smallest sink side, so the largest source side: ties are absorbed. (By its default, preflow-push, the same in twice the
        # time.)
        _, (chosen, _) = nx.minimum_cut(flow, source, sink, flow_func=boykov_kolmogorov)
        return self._connected(seed, {node for node in chosen if node in inside})

    def _add_tensor(self, flow: nx.DiGraph, tensor: fx.Node, inside: set[fx.Node], sink: str) -> None:
        pins = {node if node in inside else sink for node in (tensor, *self._users(tensor))}
        if len(pins) < 2:
            return
        state = self.analysis.states[tensor]
        if tensor_value(tensor) is None and tensor in inside:
            capacity = {}  # a tuple does not leave a region: its members do
        elif state.summed or (tensor not in inside and _is_given(tensor)):
            capacity = {"capacity": 0}
        else:
            capacity = {"capacity": bytes_a_row(tensor, self.analysis.rows) * _BYTE}
        enter, leave = ("enter", tensor), ("leave", tensor)
        flow.add_edge(enter, leave, **capacity)
        for pin in pins:
            flow.add_edge(pin, enter)
            flow.add_edge(leave, pin)

    def _connected(self, seed: fx.Node, chosen: set[fx.Node]) -> set[fx.Node]:
        found, queue = {seed}, deque([seed])
        while queue:
            node = queue.popleft()
            for other in (*node.all_input_nodes, *node.users):
                if other in chosen and other not in found:
                    found.add(other)
                    queue.append(other)
        return found

    def _find_detour(self, seed: fx.Node, chosen: set[fx.Node]) -> fx.Node | None:
        """A node to leave out because a path from the region comes back to it from outside."""
        back = _detours(chosen, self._users, self.order)
        if not back:
            return None
        ancestors = _closure(seed, lambda node: [n for n in node.all_input_nodes if n in chosen])
        behind = [node for node in back if node not in ancestors]
        if behind:
            return min(behind, key=self.order.__getitem__)
        # The path leaves before the seed and comes back before it: leave out where it starts.
        ahead = [node for node in chosen if node in ancestors and set(self._users(node)) - chosen]
        return min(ahead, key=self.order.__getitem__)

    def _region(self, seed: fx.Node, chosen: set[fx.Node]) -> Region:
        nodes = sorted(chosen, key=self.order.__getitem__)
        inputs: dict[Operand, None] = {}
        for node in nodes:
            for operand, role in self.analysis.states[node].roles.items():
                if operand not in chosen or role == "shared":
                    inputs[Operand(operand, role)] = None
        outs = [node for node in nodes if set(self._users(node)) - chosen]
        sums = tuple(node for node in outs if self.analysis.states[node].summed)
        row_outputs = tuple(node for node in outs if not self.analysis.states[node].summed)
        rows = self.analysis.rows
        widest = max(self.analysis.states[seed].matmuls, key=lambda m: m.out_bytes)
        itemsize = tensors_of(seed)[0].element_size()
        widths = [
            m.out_bytes for node in nodes if node not in outs for m in self.analysis.states[node].matmuls
        ]
        out_widths = [bytes_a_row(node, rows) // tensors_of(node)[0].element_size() for node in row_outputs]
        return Region(
            seed=seed,
            nodes=tuple(nodes),
            inputs=tuple(inputs),
            row_outputs=row_outputs,
            sums=sums,
            in_bytes=sum(
                bytes_a_row(i.node, rows) for i in inputs if i.role == "row" and not _is_given(i.node)
            ),
            out_bytes=sum(bytes_a_row(node, rows) for node in row_outputs),
            wide_bytes=max(widths, default=0),
            width=widest.in_bytes // itemsize,
            wide=widest.out_bytes // itemsize,
            out_width=sum(out_widths),
            widest_out=max(out_widths, default=0),
            is_multiplied=self._is_multiplied(seed, chosen),
        )

    def _is_multiplied(self, seed: fx.Node, chosen: set[fx.Node]) -> bool:
        def is_product(node: fx.Node) -> bool:
            return node is not seed and bool(self.analysis.states[node].matmuls)

        def step(node: fx.Node) -> list[fx.Node]:
            return [] if is_product(node) else [user for user in node.users if user in chosen]

        before = _closure(seed, step)
        leaves = any(set(self._users(n)) - chosen and not is_product(n) for n in before)
        return not leaves and any(map(is_product, before))

    def kind_of(self, region: Region) -> str:
        """ "mlp", "vocab", or "": no loop is worth it."""
        if not region.is_bulge:
            return ""
        if region.is_multiplied:
            return "mlp"
        if region.ends_narrow:
            return "vocab"
        # Narrowed without a product: a gate or a maximum of an MLP, but not logits less their padding.
        if 2 * region.out_width > region.wide:
            return ""
        goes_on = region.out_width <= region.width or fate_of(self.analysis, region.seed).narrows is not None
        if goes_on:
            return "mlp"
        # Several results a row, a top-k: wider than the rows, and still little beside the logits.
        return "vocab" if 4 * region.out_bytes <= region.wide_bytes else ""

    def is_convex(self, region: Region) -> bool:
        """Whether the region still is convex: rewrites of others may have linked nodes outside."""
        order = {node: index for index, node in enumerate(self.analysis.graph.nodes)}
        return not _detours(set(region.nodes), self._users, order)


def _is_given(node: fx.Node) -> bool:
    """Data that exists whoever reads it: soft targets, a teacher's logits, positions."""
    fake = tensor_value(node)
    if fake is None or fake.requires_grad:
        return False
    return node.op in ("placeholder", "get_attr") or torch.is_grad_enabled()


def _closure(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """All nodes that steps lead to, and the start."""
    found, queue = {start}, deque([start])
    while queue:
        for other in step(queue.popleft()):
            if other not in found:
                found.add(other)
                queue.append(other)
    return found


def _detours(
    chosen: set[fx.Node], users: Callable[[fx.Node], Iterable[fx.Node]], order: dict[fx.Node, int]
) -> set[fx.Node]:
    """The nodes of a set at which a path that left the set comes back to it; not those behind them."""
    last = max(order[node] for node in chosen)
    outside = {user for node in chosen for user in users(node)} - chosen

    def step(node: fx.Node) -> list[fx.Node]:
        if node in chosen:
            return []
        return [user for user in users(node) if order.get(user, last + 1) <= last]

    met: set[fx.Node] = set()
    for start in outside:
        if start not in met:
            met |= _closure(start, step)
    return met & chosen
