"""Dropout inside of a loop: which elements are dropped is a function of a key, the row and the column.

A random number generator gives each call the next numbers of its stream, so that a chunk's would depend on
the chunks before it, and those of the recomputation on how large *its* chunks are. Here the generator of the
device draws a key for each row, in the graph, once a call of a dropout (``torch.manual_seed`` rules it, and
activation checkpointing keeps it); an element is then dropped or kept by a hash of its row's key and of its
column. Inductor fuses that hash into the kernel that reads the mask, which is stored nowhere.

The numbers are not those that eager draws from the same seed, as under Inductor, whose are others too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
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

_BITS = 32
_MASK = 2**_BITS - 1


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits, one to one: ``lowbias32`` of github.com/skeeto/hash-prospector.

    Without its last step, which mixes the high half into the low one: where it counts the high bits decide.

    Args:
        x: int64, from 0 to 2^32 - 1. No product leaves 63 bits, where C++ would have no answer; so the
            second factor stands there less 2^32, which changes nothing in the lower half.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**_BITS)):
        x = ((x ^ torch.bitwise_right_shift(x, shift)) * factor) & _MASK
    return x


def row_keys(sizes: Sequence[int], device: torch.device) -> Tensor:
    """A key for each row of a tensor, drawn from the device's generator: int64, of shape ``sizes``, below 2^62.

    The high word is odd, so that the columns of a row are hashed from numbers that are all different.
    """
    return torch.randint(0, 2**62, sizes, device=device) | 2**_BITS


def dropout_rows(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)`` on any subset of the rows of a tensor.

    Few operations: what takes more than 30 (``realize_opcount_threshold``) and is read twice Inductor keeps
    as a buffer, here of 8 bytes an element.

    Args:
        x: ``[..., W]``, of any floating type.
        keys: int64 ``[...]``, of :func:`row_keys`.
        p: the probability of a zero; above 0 and below 1.
    """
    columns, keys = torch.arange(x.shape[-1], device=x.device), keys.unsqueeze(-1)
    bits = mixed((columns * torch.bitwise_right_shift(keys, _BITS) + (keys & _MASK)) & _MASK)
    return x * (bits >= round(p * 2**_BITS)) * (1 / (1 - p))


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
    """The dropouts of a graph in their seeded form, while regions are looked for.

    Before: ``d = dropout(x, p)``. After: ``keys = row_keys(sizes); d = dropout_rows(x, keys, p)``, so that a
    region that holds ``d`` reads the keys of its rows.

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
