"""All rows given to every expert, ``[E·n, H]`` and ``[E, n, H]``, with the rows first: as the proof knows them (Llama4).

Before::

    slots = (rows.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(E, -1, H)
    gate, up = bmm(slots, gate_up).chunk(2, dim=-1)                                     # [E, n, I]
    out = bmm(up * silu(gate), down).view(-1, H).reshape(E, -1, H).sum(0)

After::

    slots = rows.unsqueeze(1).expand(-1, E, -1) * scores.unsqueeze(-1)                  # [n, E, H]
    gate, up = einsum("nek,ekm->nem", slots, gate_up).chunk(2, dim=-1)
    out = einsum("nek,ekm->nem", up * silu(gate), down).sum(1)

Left alone: what is made of such rows by anything but pointwise functions, cuts of the last dimension and products with a matrix for each
expert, before it is added up over the experts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import PROVENANCE, add_call, copy_provenance, eliminate_dead_code, replace_with
from mst_fx.graph.modes import Context, contexts, in_context, outside_transforms
from mst_fx.graph.sizes import is_same
from mst_fx.graph.spelling import CUTS, FLOAT_CASTS, SIZED_VIEWS, argument, operation
from mst_fx.graph.values import tensor_value
from mst_fx.graph.writes import writes_in_place

aten = torch.ops.aten


def run(context: PassContext) -> None:
    """Puts the rows first in what all experts make of all rows."""
    graph = context.graph
    if not any(operation(node) == "repeat" for node in outside_transforms(graph)):
        return
    modes = contexts(graph)
    for node in outside_transforms(graph):
        sizes = _summed_sizes(node)
        if sizes is None:
            continue
        with context.at("mlp", node), graph.inserting_before(node), in_context(modes[node]):
            unmerged = _RowsFirst(*sizes, modes[node], modes)
            found = unmerged.of(node.args[0])
            if found is not None and unmerged.has_repeat:
                rest = {key: value for key, value in node.kwargs.items() if key != "dim"}
                replace_with(node, add_call(graph, torch.sum, found, 1, **rest))
    eliminate_dead_code(graph)


def _summed_sizes(node: fx.Node) -> tuple[int, Any] | None:
    """``E, n`` of a sum over the first dimension of ``[E, n, …]``; None: it is no such thing."""
    source = node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if operation(node) != "sum" or fake is None or fake.ndim < 3 or argument(node, "keepdim"):
        return None
    is_first = argument(node, "dim") in (0, -fake.ndim, [0], (0,), [-fake.ndim], (-fake.ndim,))
    experts = fake.shape[0]
    return (experts, fake.shape[1]) if is_first and isinstance(experts, int) and experts > 1 else None


class _RowsFirst:
    """Makes of values ``[E, n, …]``, or ``[E·n, …]`` in that order, the same as ``[n, E, …]``, at the graph's insertion point.

    Attributes:
        has_repeat: rows were repeated for each expert on the way.
    """

    def __init__(self, experts: int, rows: Any, mode: Context, modes: dict[fx.Node, Context]) -> None:
        self._experts, self._rows = experts, rows
        self._mode, self._modes = mode, modes
        self._known: dict[fx.Node, Any] = {}
        self.has_repeat = False

    def of(self, node: Any) -> fx.Node | None:
        """None: nobody knows how."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            found = self._made(node) if self._modes.get(node) == self._mode else None
            if found is not None and not found.meta.keys() & set(PROVENANCE):
                copy_provenance(node, found)
            self._known[node] = found
        return self._known[node]

    def _made(self, node: fx.Node) -> fx.Node | None:
        name = operation(node)
        if not name or writes_in_place(node) or argument(node, "out") is not None:
            return None
        if name == "repeat":
            return self._of_repeat(node)
        if name in SIZED_VIEWS:
            return self._of_view(node)
        if name == "transpose":
            return self._of_transpose(node)
        if name == "bmm":
            return self._of_product(node)
        if name in CUTS or node.target is operator.getitem:
            return self._of_cut(node)
        return self._of_pointwise(node) if _is_pointwise(name) else None

    def _lies(self, value: Any) -> int:
        """How many dimensions stand for experts and rows: 2 or, merged, 1; 0: they do not come first."""
        fake = tensor_value(value) if isinstance(value, fx.Node) else None
        if fake is None or not fake.ndim:
            return 0
        if fake.ndim > 1 and _same(fake.shape[:2], (self._experts, self._rows)):
            return 2
        return int(_same(fake.shape[:1], (self._experts * self._rows,)))

    def _of_repeat(self, node: fx.Node) -> fx.Node | None:
        source, *times = node.args
        fake = tensor_value(source) if isinstance(source, fx.Node) else None
        times = list(times[0]) if len(times) == 1 and isinstance(times[0], (list, tuple)) else times
        if fake is None or node.kwargs or times != [self._experts, *[1] * (fake.ndim - 1)]:
            return None
        if not _same(fake.shape[:1], (self._rows,)):
            return None
        self.has_repeat = True
        wide = add_call(node.graph, torch.unsqueeze, source, 1)
        return add_call(node.graph, "expand", wide, -1, self._experts, *[-1] * (fake.ndim - 1))

    def _of_view(self, node: fx.Node) -> fx.Node | None:
        """Between the two, or of ``[E, n]`` as ``[E·n, 1]``."""
        source: Any = node.args[0]
        before, after = self._lies(source), self._lies(node)
        fakes = [tensor_value(source), tensor_value(node)]
        if not before or not after or fakes[0] is None or fakes[1] is None:
            return None
        rest, own = fakes[0].shape[before:], fakes[1].shape[after:]
        if _same(rest, own):
            return self.of(source)
        if not rest and _same(own, (1,)):
            found = self.of(source)
            return None if found is None else add_call(node.graph, torch.unsqueeze, found, -1)
        return None

    def _of_transpose(self, node: fx.Node) -> fx.Node | None:
        """Of ``[n, E, …]``."""
        source: Any = node.args[0]
        fake = tensor_value(source)
        dims = {argument(node, "dim0"), argument(node, "dim1")}
        if self._lies(node) != 2 or fake is None or dims not in ({0, 1}, {-fake.ndim, 1 - fake.ndim}):
            return None
        return source  # type: ignore[no-any-return]

    def _of_product(self, node: fx.Node) -> fx.Node | None:
        if len(node.args) != 2 or node.kwargs or self._lies(node.args[0]) != 2:
            return None
        left = self.of(node.args[0])
        return (
            None if left is None else add_call(node.graph, torch.einsum, "nek,ekm->nem", left, node.args[1])
        )

    def _of_cut(self, node: fx.Node) -> fx.Node | None:
        """``chunk``, ``split`` of the last dimension, and a part of what they give."""
        given: Any = node.args[0]
        source = self.of(given)
        if source is None:
            return None
        if node.target is operator.getitem:
            is_part = operation(given) in CUTS and isinstance(node.args[1], int)
            return add_call(node.graph, operator.getitem, source, node.args[1]) if is_part else None
        fake = tensor_value(given)
        last = () if fake is None else (-1, fake.ndim - 1)
        sizes = node.args[1] if len(node.args) > 1 else None
        if argument(node, "dim") not in last or sizes is None or node.kwargs.keys() - {"dim"}:
            return None
        return add_call(node.graph, operation(node), source, sizes, -1)

    def _of_pointwise(self, node: fx.Node) -> fx.Node | None:
        lies, fake = self._lies(node), tensor_value(node)
        if not lies or fake is None or any(isinstance(x, fx.Node) for x in node.kwargs.values()):
            return None
        args = []
        for arg in node.args:
            if isinstance(arg, fx.Node) and not self._is_alike(arg, fake.ndim - lies):
                arg = self.of(arg) if self._lies(arg) == lies else None
                if arg is None:
                    return None
            args.append(arg)
        target: Any = node.target
        return add_call(node.graph, target, *args, **node.kwargs)

    def _is_alike(self, arg: fx.Node, ndim: int) -> bool:
        """Whether an operand is the same for all experts and rows, by its number of dimensions."""
        fake = tensor_value(arg)
        return fake is not None and fake.ndim <= ndim


def _is_pointwise(name: str) -> bool:
    packet = getattr(aten, name, None)
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet is not None else []
    return name in FLOAT_CASTS - {"type", "type_as"} or any(
        torch.Tag.pointwise in each.tags for each in overloads
    )


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(is_same, left, right))
