"""Dropout inside of a loop: which elements are dropped is a function of a key, the row and the column.

A random number generator gives each call the next numbers of its stream, so that a chunk's would depend on
the chunks before it, and those of the recomputation on how large *its* chunks are. Here a key is drawn
in the graph, once a call of a dropout, from the generator of its device (``torch.manual_seed`` rules it, and
activation checkpointing keeps it); an element is then dropped or kept by a hash of the key and of its own
place among all elements of the un-chunked tensor. Inductor fuses the hash into the kernel that reads the mask,
which is stored nowhere.

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

from mst_fx.fold import dropout_probability, expression
from mst_fx.graph import add_call, fake_mode_of, tensor_value, value

_BITS = 32
_MASK = 2**_BITS - 1
_WEYL = 0x9E3779B9  # 2^32 divided by the golden ratio: the keys of high words lie far apart


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits to 32 bits, one to one: ``lowbias32`` of github.com/skeeto/hash-prospector.

    Args:
        x: int64, from 0 to 2^32 - 1; no product leaves 63 bits, where C++ would have no answer. So the
            second factor stands there less 2^32, which changes nothing in the lower half.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**_BITS)):
        x = ((x ^ torch.bitwise_right_shift(x, shift)) * factor) & _MASK
    return x ^ torch.bitwise_right_shift(x, 16)


def dropout_rows(x: Tensor, key: Tensor, numbers: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)`` on any subset of the rows of a tensor.

    Args:
        x: ``[..., W]``, of any floating type.
        key: int64 ``[2]``, from 0 to 2^32 - 1.
        numbers: int64 ``[...]``: the place of each row among all rows.
        p: the probability of a zero; above 0 and below 1.
    """
    width = x.shape[-1]
    place = numbers.unsqueeze(-1) * width + torch.arange(width, device=x.device)
    high = torch.bitwise_right_shift(place, _BITS)
    bits = mixed(mixed((place & _MASK) ^ key[0]) ^ ((key[1] + high * _WEYL) & _MASK))
    return x * (bits >= round(p * 2**_BITS)) * (1 / (1 - p))


def new_key(device: torch.device) -> Tensor:
    """A key for :func:`dropout_rows`."""
    return torch.randint(0, 2**_BITS, (2,), device=device)


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

    Before: ``d = dropout(x, p)``. After: ``d = dropout_rows(x, key, numbers, p)``, with the key drawn in the
    graph, so that a region that holds ``d`` reads the key whole and the numbers by rows.

    Args:
        graph: is changed; :meth:`restore` gives back what no loop has taken.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._numbers: dict[str, fx.Node | None] = {}
        self._seeded = [found for node in list(graph.nodes) if (found := self._exchange(node)) is not None]

    def _exchange(self, node: fx.Node) -> _Seeded | None:
        p = dropout_probability(node)
        x = node.args[0] if node.args else None
        out = tensor_value(node)
        if p is None or not 0 < p < 1 or not isinstance(x, fx.Node) or out is None or out.ndim < 2:
            return None
        if _is_in_place(node) or not out.is_floating_point() or isinstance(out.shape[-1], torch.SymInt):
            return None
        numbers = self._numbers_of(out)
        if numbers is None:
            return None
        with self._graph.inserting_before(node), _mode_of(out):
            key = add_call(self._graph, new_key, out.device)
            new = add_call(self._graph, dropout_rows, x, key, numbers, p)
        new.meta = {**node.meta, **new.meta}
        seeded = _Seeded(node.args, dict(node.kwargs), node.target, node.op, dict(node.meta), new)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)
        return seeded

    def _numbers_of(self, out: Tensor) -> fx.Node | None:
        """The numbers of the rows of a tensor, made of sizes that are known before anything is computed."""
        leading = out.shape[:-1]
        name = f"{[str(expression(size)) for size in leading]} {out.device}"
        if name not in self._numbers:
            first = next(node for node in self._graph.nodes if node.op != "placeholder")
            with self._graph.inserting_before(first), _mode_of(out):
                sizes = [_size(self._graph, size) for size in leading]
                known = all(size is not None for size in sizes)
                self._numbers[name] = (
                    add_call(self._graph, _row_numbers, sizes, out.device) if known else None
                )
        return self._numbers[name]

    def restore(self) -> None:
        """Puts every dropout back that is not inside of a loop."""
        for seeded in reversed(self._seeded):
            new = seeded.new
            if new not in self._graph.nodes:
                continue
            x, key = new.args[:2]
            with self._graph.inserting_before(new):
                old = self._graph.create_node(seeded.op, seeded.target, (x, *seeded.args[1:]), seeded.kwargs)
            old.meta = seeded.meta
            new.replace_all_uses_with(old)
            self._graph.erase_node(new)
            self._graph.erase_node(key)  # type: ignore[arg-type]
        for node in self._numbers.values():
            if node is not None and not node.users:
                self._graph.erase_node(node)


def _mode_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For nodes without operands, whose values would be real."""
    return fake_mode_of([tensor]) or contextlib.nullcontext()


def _row_numbers(sizes: Sequence[int], device: torch.device) -> Tensor:
    count = 1
    for size in sizes:
        count = count * size
    return torch.arange(count, device=device).view(sizes)


def _is_in_place(node: fx.Node) -> bool:
    """F.dropout(x, p, training, inplace)."""
    return bool(node.kwargs.get("inplace")) or (
        node.target is F.dropout and len(node.args) > 3 and bool(node.args[3])
    )


def _size(graph: fx.Graph, size: Any) -> Any:
    """A size as an int, or as a node made of the graph's inputs; None if no input has it."""
    if not isinstance(size, torch.SymInt):
        return size
    for node in graph.find_nodes(op="placeholder"):
        found = value(node)
        if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
            return node
        shape = found.shape if isinstance(found, Tensor) else ()
        for dim, other in enumerate(shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return add_call(graph, "size", node, dim)
    return None
