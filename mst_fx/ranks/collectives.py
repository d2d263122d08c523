"""Rows and heads on their way between the ranks of a group, with their gradients.

``mst_fx::rows_to_heads(parts, …) -> parts``
    before attention. Of queries, or of keys and values, each rank has all heads of its rows, ``[B, H, S/P, D]``, and gets all rows of
    its heads, ``[B, H/P, S, D]``: tensors of as many heads in one exchange.
``mst_fx::heads_to_rows(x, …) -> x``
    behind it, the other way round.
``mst_fx::gather_rows(x, …) -> x``
    the rows of all ranks, ``[.., B·S, ..]``.
``mst_fx::sum_over_ranks(x, group) -> x``
    of partial sums over rows.

Each derivative is the true one of a program that runs on all ranks and adds up what each returns: so the *mean* of the ranks'
gradients of a parameter is its gradient in one process, whatever is replicated and whatever is cut.

None of them is an operator when a graph is compiled: they are composite, taken apart into ``_c10d_functional`` operators when
AOTAutograd traces, so that Inductor sees each collective, and keeps them in order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_fx.ranks.shares import firsts_of
from mst_fx.torch_api.collectives import all_gather, all_reduce, all_to_all

_LIBRARY = torch.library.Library("mst_fx", "FRAGMENT")


def _composite(schema: str, function: Callable[..., Any]) -> None:
    _LIBRARY.define(schema)
    _LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")


# Exchanges. The order in a buffer: by rank, then [rows, B, heads of each part · D]. All rows of some heads arrive as they lie in memory, and
# nothing is copied; what attention's kernels give, [B, S, H, D] in memory, is sent as it lies where there is one sequence.


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """What is exchanged with whom: of tensors over the ranks the first head and the number of heads, and the rows, that each has."""

    firsts: list[int]
    heads: list[int]
    rows_of: list[int]
    me: int
    group: str

    @property
    def is_disjoint(self) -> bool:
        """Whether no head goes to two ranks."""
        return self.firsts == firsts_of(self.heads)

    @property
    def is_even(self) -> bool:
        """Whether all ranks have as many heads, each its own."""
        return self.is_disjoint and len(set(self.heads)) == 1

    def _sizes(self, batch: int, width: int) -> tuple[list[int], list[int]]:
        """For each rank the elements of its rows with this rank's heads, and of this rank's rows with its heads, ``width`` wide."""
        my_rows, my_heads = self.rows_of[self.me], self.heads[self.me]
        of_rows = [rows * batch * my_heads * width for rows in self.rows_of]
        of_heads = [my_rows * batch * heads * width for heads in self.heads]
        return of_rows, of_heads

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All heads of this rank's rows → all rows of its heads, of each."""
        batch, features = tensors[0].shape[0], [x.shape[3] for x in tensors]
        if self.is_even:
            of_ranks = [x.unflatten(1, (-1, self.heads[0])).permute(1, 3, 0, 2, 4) for x in tensors]
            flat = _side_by_side(of_ranks).reshape(-1)
        else:
            pieces = [
                _by_rows([x.narrow(1, first, heads) for x in tensors])
                for first, heads in zip(self.firsts, self.heads, strict=True)
            ]
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
        got = all_to_all(flat, *self._sizes(batch, sum(features)), self.group)
        found = _apart(got.view(sum(self.rows_of), batch, -1), self.heads[self.me], features)
        return [x.permute(1, 2, 0, 3) for x in found]

    def to_rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All rows of this rank's heads → all heads of its rows; what several ranks have of a head is added up."""
        batch, features = tensors[0].shape[0], [x.shape[3] for x in tensors]
        rows = self.rows_of[self.me]
        sends, sizes = self._sizes(batch, sum(features))
        got = all_to_all(_by_rows(tensors).reshape(-1), sizes, sends, self.group)
        if self.is_even:
            of_ranks = _apart(got.view(len(sizes), rows, batch, -1), self.heads[0], features)
            joined = [x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in of_ranks]
        else:
            found = [
                _apart(piece.view(rows, batch, -1), heads, features)
                for piece, heads in zip(got.split(sizes), self.heads, strict=True)
            ]
            joined = [self._joined(list(pieces)) for pieces in zip(*found, strict=True)]
        return [x.permute(1, 2, 0, 3) for x in joined]

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, 2) if self.is_disjoint else _added(pieces, self.firsts, self.heads)


def _by_rows(tensors: Sequence[Tensor]) -> Tensor:
    """``[B, h, rows, D]`` of each → ``[rows, B, h · D of all]``."""
    return _side_by_side([x.permute(2, 0, 1, 3) for x in tensors])


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """``[…, h, D]`` of each → ``[…, h · D of all]``; one stays what it is: it is flattened as a whole."""
    return tensors[0] if len(tensors) == 1 else torch.cat([x.flatten(-2) for x in tensors], -1)


def _apart(x: Tensor, heads: int, features: list[int]) -> list[Tensor]:
    """``[…, h · D of all]`` → ``[…, h, D]`` of each."""
    parts = [x] if len(features) == 1 else x.split([heads * each for each in features], -1)
    return [part.unflatten(-1, (heads, -1)) for part in parts]


def _added(pieces: list[Tensor], firsts: list[int], counts: list[int]) -> Tensor:
    """``[rows, B, h, D]``: heads of which some come from several ranks, side by side."""
    of_heads = []
    for head in range(max(first + count for first, count in zip(firsts, counts, strict=True))):
        found = [
            x.narrow(2, head - first, 1)
            for x, first, count in zip(pieces, firsts, counts, strict=True)
            if first <= head < first + count
        ]
        of_heads.append(functools.reduce(torch.add, found))
    return torch.cat(of_heads, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.to_heads(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.exchange.to_rows(grads)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_rows([x])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.exchange.to_heads([grad])[0]


def _rows_to_heads(
    parts: list[Tensor], firsts: list[int], heads: list[int], rows_of: list[int], me: int, group: str
) -> list[Tensor]:
    exchange = _Exchange(firsts, heads, rows_of, me, group)
    return list(_ToHeads.apply(exchange, *parts))  # type: ignore[no-untyped-call]


def _heads_to_rows(x: Tensor, heads: list[int], rows_of: list[int], me: int, group: str) -> Tensor:
    exchange = _Exchange(firsts_of(heads), heads, rows_of, me, group)
    return _ToRows.apply(exchange, x)  # type: ignore[no-untyped-call, no-any-return]


def _repeat_heads(x: Tensor, repeats: list[int]) -> Tensor:
    """``[B, h, S, D]`` → ``[B, sum(repeats), S, D]``: each head so often."""
    return torch.cat([head.expand(-1, n, -1, -1) for head, n in zip(x.split(1, 1), repeats, strict=True)], 1)


# Rows of all ranks, and sums over them


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, batch: int, rows_of: list[int], me: int, group: str) -> Tensor:
        ctx.rest = dim, batch, rows_of, me, group
        found = x.unflatten(dim, (batch, rows_of[me]))
        found = F.pad(found, [0, 0] * (found.ndim - 2 - dim) + [0, max(rows_of) - rows_of[me]])
        got = all_gather(found.contiguous(), len(rows_of), group).split(found.shape[0])
        whole = torch.cat(
            [piece.narrow(dim + 1, 0, n) for piece, n in zip(got, rows_of, strict=True)], dim + 1
        )
        return whole.flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dim, batch, rows_of, me, group = ctx.rest
        pieces = grad.unflatten(dim, (batch, sum(rows_of))).split(rows_of, dim + 1)
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        size = pieces[me].numel()
        got = all_to_all(flat, [size] * len(rows_of), [piece.numel() for piece in pieces], group)
        mine = got.view(len(rows_of), *pieces[me].shape).sum(0)
        return mine.flatten(dim, dim + 1), None, None, None, None, None


def _gather_rows(x: Tensor, dim: int, batch: int, rows_of: list[int], me: int, group: str) -> Tensor:
    if x.dtype == torch.bool:  # no back end of torch's gathers those
        return _gather_rows(x.to(torch.uint8), dim, batch, rows_of, me, group).to(torch.bool)
    return _Gather.apply(x, dim, batch, rows_of, me, group)  # type: ignore[no-untyped-call, no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad.contiguous(), ctx.group), None


def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    return _Sum.apply(x.contiguous(), group)  # type: ignore[no-untyped-call, no-any-return]


_composite(
    "rows_to_heads(Tensor[] parts, int[] firsts, int[] heads, int[] rows_of, int me, str group) -> Tensor[]",
    _rows_to_heads,
)
_composite("heads_to_rows(Tensor x, int[] heads, int[] rows_of, int me, str group) -> Tensor", _heads_to_rows)
_composite("repeat_heads(Tensor x, int[] repeats) -> Tensor", _repeat_heads)
_composite(
    "gather_rows(Tensor x, int dim, int batch, int[] rows_of, int me, str group) -> Tensor", _gather_rows
)
_composite("sum_over_ranks(Tensor x, str group) -> Tensor", _sum_over_ranks)
