"""What of a layer may be kept for its backward pass, and what is made again then.

The fewest bytes keep a layer's start alone: a checkpoint. From there on the call is kept that saves most operations a byte (attention
first, at long sequences by far), then the next, until only norms, rotations and casts are made again, and at last only casts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Collection, Mapping

from torch import fx

from mst_fx.graph.spelling import operation
from mst_fx.plan.costs import Cost, cost_of, cost_of_call, plus
from mst_fx.plan.joint_graph import (
    bytes_of,
    is_attention,
    is_cheap,
    is_read_whole,
    is_under_way,
    is_view,
    may_run_again,
    source_of,
    storage_of,
    storages,
    tensor_of,
)
from mst_fx.plan.layers import Layer
from mst_fx.torch_api.joint import must_recompute, must_send

# Of the bytes of a layer's first rows: smaller tensors are not worth a copy to the host, nor a call of their own.
_SMALL = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A layer, with what of it is kept.

    Attributes:
        layer: which.
        kept: what is kept beside the layer's start.
        again: what is made again, in order.
        bytes: of ``kept`` and the start, by storage.
        cost: of ``again``, and of the start if that is made again.
        sent: what of that goes to the host's memory, in order.
        keeps_start: False: the start is made again too (:mod:`mst_fx.plan.groups`).
    """

    layer: Layer
    kept: frozenset[fx.Node]
    again: tuple[fx.Node, ...]
    bytes: int
    cost: Cost
    sent: tuple[fx.Node, ...] = ()
    keeps_start: bool = True

    def without_start(self) -> Choice:
        """The same that makes its start again, from the layer before, of which as much is taken to be kept."""
        assert self.keeps_start and not self.sent
        size = sum(map(bytes_of, storages(node for node in self.layer.nodes if node in self.kept)))
        cost = plus([self.cost, cost_of(self.onward)])
        return dataclasses.replace(self, bytes=size, cost=cost, keeps_start=False)

    @functools.cached_property
    def onward(self) -> tuple[fx.Node, ...]:
        """What makes the next layer's start of this one's and of what is kept, in order."""
        end = self.layer.end
        assert end is not None
        inside = {*self.layer.nodes, end} - self.kept
        found: set[fx.Node] = set()
        waiting = [end]
        while waiting:
            node = waiting.pop()
            if node in inside and node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return tuple(node for node in (*self.layer.nodes, end) if node in found)

    def on_host(self) -> Choice:
        """The same that sends all that it keeps, but what is small."""
        return dataclasses.replace(self, sent=tuple(self._large))

    def as_asked(self) -> Choice:
        """The same that sends what a policy of the user's sends in any case (``MUST_CPU_OFFLOAD``)."""
        asked = tuple(node for node in self._large if must_send(source_of(node)))
        return dataclasses.replace(self, sent=asked)

    @property
    def _large(self) -> list[fx.Node]:
        start = [self.layer.start] if self.keeps_start else []
        kept = [*start, *(node for node in self.layer.nodes if node in self.kept)]
        return [node for node in kept if bytes_of(node) > _SMALL * bytes_of(self.layer.start)]

    @property
    def host_bytes(self) -> int:
        return sum(map(bytes_of, self.sent))

    @property
    def device_bytes(self) -> int:
        return self.bytes - self.host_bytes

    def of_copies(self, copies: Mapping[fx.Node, fx.Node]) -> Choice:
        """The same of a copy of the graph."""
        kept, again, sent = (
            tuple(copies[node] for node in nodes) for nodes in (self.kept, self.again, self.sent)
        )
        layer = self.layer.of_copies(copies)
        return dataclasses.replace(self, layer=layer, kept=frozenset(kept), again=again, sent=sent)

    def __str__(self) -> str:
        """What is made again, in words."""
        made = collections.Counter(
            "attention" if is_attention(node) else operation(node).rpartition("::")[2]
            for node in self.again
            if cost_of([node]).flops > 0
        )
        parts = [name if count == 1 else f"{count} {name}" for name, count in made.items()]
        text = " + ".join(parts) if parts else "norms" if any(map(_is_made, self.again)) else "nothing"
        if not self.keeps_start:
            text = "start" if text == "nothing" else f"start + {text}"
        return f"{text}, MLP un-chunked" if self.layer.unchunked else text


def _is_made(node: fx.Node) -> bool:
    return is_read_whole(node) and not is_view(node)


def choices_of(layer: Layer, wanted: Collection[fx.Node] = ()) -> list[Choice]:
    """What may be kept of a layer, the least first; each keeps more bytes than the one before, and makes less again. What a policy
    of the user's makes again in any case (``MUST_RECOMPUTE``) is in none.

    Args:
        wanted: what is kept in any case.
    """
    inside = _Inside(layer)
    found = [inside.keeping(set(wanted))]
    while True:
        now = found[-1]
        dear = dict.fromkeys(source_of(node) for node in now.again if not is_cheap(node))
        calls = [call for call in dear if not must_recompute(call)]
        more = [inside.keeping({*wanted, *map(source_of, now.kept), call}) for call in calls]
        better = [each for each in more if each.bytes > now.bytes and each.cost.flops < now.cost.flops]
        if not better:
            break
        found.append(
            max(better, key=lambda each: (now.cost.flops - each.cost.flops) / (each.bytes - now.bytes))
        )
    most = inside.keeping({*wanted, *map(source_of, found[-1].kept), *_operands(layer)})
    return [*found, most] if most.bytes > found[-1].bytes else found


def _operands(layer: Layer) -> set[fx.Node]:
    """What products, loops and attention read backward, and what is small: the rest is casts and factors of fused kernels."""
    small = _SMALL * bytes_of(layer.start)
    return {
        node
        for user, node in layer.readers
        if tensor_of(node) is not None
        and not must_recompute(source_of(node))
        and (not is_cheap(user) or bytes_of(node) <= small)
    }


def keeping(layer: Layer, wanted: Collection[fx.Node]) -> Choice:
    """A layer of which some calls, or some results of them, are kept: of a view its memory is, and the view made again."""
    return _Inside(layer).keeping(wanted)


class _Inside:
    """A layer, and what every choice asks of its nodes: a layer has some hundred choices to look at.

    Attributes:
        values: the nodes whose results can be kept.
        lasting: those that are kept where they can be, for they may not run again.
        costs: of each node by itself.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.values = {
            node
            for node in layer.nodes
            if tensor_of(node) is not None and not is_view(node) and not is_under_way(node)
        }
        self.lasting = {node for node in layer.nodes if not may_run_again(node)}
        self.costs = {node: cost_of_call(node) for node in layer.nodes}

    def keeping(self, wanted: Collection[fx.Node]) -> Choice:
        """As the function of this name."""
        wanted = {*wanted, *map(storage_of, wanted)}
        kept: dict[fx.Node, None] = {}
        again: set[fx.Node] = set()
        waiting = [node for _, node in self.layer.readers]
        while waiting:
            node = waiting.pop()
            if node not in self.costs or node in again or node in kept:
                continue
            is_kept = node in wanted or source_of(node) in wanted or node in self.lasting
            if is_kept and node in self.values:  # of several results each by itself
                kept[node] = None
            else:
                again.add(node)
                waiting += node.all_input_nodes
        size = sum(map(bytes_of, storages([self.layer.start, *kept])))
        in_order = tuple(node for node in self.layer.nodes if node in again)
        cost = plus(self.costs[node] for node in in_order)
        return Choice(self.layer, frozenset(kept), in_order, size, cost)
