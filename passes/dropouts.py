"""Dropouts in a form that a region can hold, while regions are looked for.

Before::

    d = dropout(x, p)

After (:mod:`mst_fx.ops.dropout`), so that a region that holds ``d`` reads the keys of its rows::

    keys = row_keys(sizes); d = dropout_rows(x, keys, p)

What no loop has taken is put back. Left alone: dropouts in place, and those of which no input has the sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import dropout_probability
from mst_fx.graph.values import is_plain, tensor_value, value
from mst_fx.ops.dropout import dropout_rows, row_keys


@dataclasses.dataclass(frozen=True)
class _Seeded:
    """A dropout that was exchanged: what it was, and what stands there now."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    op: str
    meta: dict[str, Any]
    new: fx.Node


class SeededDropouts:
    """The dropouts of a graph in their seeded form.

    Args:
        graph: is changed; :meth:`restore` gives back what no loop has taken.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._sizes: dict[Any, fx.Node | None] = {}
        nodes = outside_transforms(graph)
        self._seeded = [found for node in nodes if (found := self._exchange(node)) is not None]

    def _exchange(self, node: fx.Node) -> _Seeded | None:
        p = dropout_probability(node)
        x = node.args[0] if node.args else None
        if p is None or not 0 < p < 1 or not isinstance(x, fx.Node) or _is_in_place(node):
            return None
        out = tensor_value(node)
        if (
            out is None
            or out.ndim < 2
            or not is_plain(out)
            or not out.is_floating_point()
            or isinstance(out.shape[-1], torch.SymInt)
        ):
            return None
        sizes = [self._size(size) for size in out.shape[:-1]]
        if any(size is None for size in sizes):
            return None
        # A node without operands that are tensors would have a real value.
        with self._graph.inserting_before(node), fake_mode_of([out]) or contextlib.nullcontext():
            keys = add_call(self._graph, row_keys, sizes, out.device)
            new = add_call(self._graph, dropout_rows, x, keys, p)
        new.meta = {**node.meta, **new.meta}
        seeded = _Seeded(node.args, dict(node.kwargs), node.target, node.op, dict(node.meta), new)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)
        return seeded

    def _size(self, size: Any) -> Any:
        """A size as an int, or as a node made of the graph's inputs alone, which no region computes; None if
        no input has it."""
        if not isinstance(size, torch.SymInt):
            return size
        wanted = expression(size)
        if wanted not in self._sizes:
            self._sizes[wanted] = self._input_with(wanted)
        return self._sizes[wanted]

    def _input_with(self, wanted: Any) -> fx.Node | None:
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        for node in self._graph.find_nodes(op="placeholder"):
            found = value(node)
            if isinstance(found, torch.SymInt) and expression(found) == wanted:
                return node
            for dim, other in enumerate(found.shape if isinstance(found, Tensor) else ()):
                if isinstance(other, torch.SymInt) and expression(other) == wanted:
                    with self._graph.inserting_before(first):
                        return add_call(self._graph, "size", node, dim)
        return None

    def restore(self) -> None:
        """Puts every dropout back that is not inside of a loop."""
        for seeded in reversed(self._seeded):
            new = seeded.new
            if new not in self._graph.nodes:
                continue
            x, keys = new.args[:2]
            with self._graph.inserting_before(new):
                old = self._graph.create_node(seeded.op, seeded.target, (x, *seeded.args[1:]), seeded.kwargs)
            old.meta = seeded.meta
            new.replace_all_uses_with(old)
            self._graph.erase_node(new)
            self._graph.erase_node(keys)  # type: ignore[arg-type]
        for node in self._sizes.values():
            if node is not None and node.op != "placeholder" and not node.users:
                self._graph.erase_node(node)


def _is_in_place(node: fx.Node) -> bool:
    """F.dropout(x, p, training, inplace)."""
    return bool(node.kwargs.get("inplace")) or (
        node.target is F.dropout and len(node.args) > 3 and bool(node.args[3])
    )
