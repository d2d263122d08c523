"""How a loop goes over its rows, and where the results of its chunks go.

Chunks: :func:`equal` ones, those of a mask :func:`by_reach`, whose shared inputs have a window, and those :func:`by_offsets`, which end
where a group of rows ends. Results: :class:`Rows` are put into their place, a :class:`Sum` is what all chunks add up to, a
:class:`WindowSum` one of which each chunk reaches a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mst_fx.torch_api.modes import without_autocast

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of what chunks share: ``first <= k < last``; ``kind`` as in :class:`mst_fx.masks.reach.Reach`."""

    first: int
    last: int
    kind: int

    @property
    def is_empty(self) -> bool:
        return self.first >= self.last


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows ``start <= row < end``, all of one ``group``."""

    start: int
    end: int
    group: int = 0

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class ByGroups(Chunk):
    """A chunk of whole groups, ``first <= group <= last``, or a part of one.

    Attributes:
        is_part: the group has more chunks.
        is_last_part: this is the last of them.
    """

    first: int = dataclasses.field(kw_only=True)
    last: int = dataclasses.field(kw_only=True)
    is_part: bool = False
    is_last_part: bool = False


@dataclasses.dataclass(frozen=True)
class Reaching(Chunk):
    """A chunk that reads a part of what chunks share."""

    window: Window = dataclasses.field(kw_only=True)


def equal(rows: int, most: int) -> Iterator[Chunk]:
    """The fewest chunks of at most ``most`` rows, of near-equal size."""
    return _equal(0, rows, most, 0)


def _equal(start: int, stop: int, most: int, group: int) -> Iterator[Chunk]:
    count = -(-(stop - start) // most)
    small, larger = divmod(stop - start, count) if count else (0, 0)
    for index in range(count):
        end = start + small + (index < larger)
        yield Chunk(start, end, group)
        start = end


def sizes(chunks: Iterable[Chunk]) -> set[int]:
    """The numbers of rows that chunks have."""
    return {chunk.size for chunk in chunks}


def by_reach(rows: int, size: int, windows: Sequence[Sequence[int]]) -> Iterator[Reaching]:
    """Chunks of ``size`` rows, the last one of what is left.

    Args:
        windows: of each chunk ``(first, last, kind)``: the table of a reach, behind its header.
    """
    for start, window in zip(range(0, rows, size), windows, strict=True):
        yield Reaching(start, min(start + size, rows), window=Window(*window))


def by_offsets(offsets: Sequence[int], most: int) -> Iterator[Chunk]:
    """Equal chunks of each group; of an empty one none.

    Args:
        offsets: where each group starts, and where the last one ends.
    """
    for group, (start, stop) in enumerate(itertools.pairwise(offsets)):
        yield from _equal(start, stop, most, group)


def by_groups(ends: Sequence[int], most: int) -> Iterator[ByGroups]:
    """Chunks of as many whole groups as have ``most`` rows, and equal parts of a group that has more.

    Args:
        ends: where each group ends. Those without rows lie in the chunk of others, or in none.
    """
    start, first, end, last = 0, 0, 0, -1
    for group, stop in enumerate(ends):
        if stop - start > most and end > start:
            yield ByGroups(start, end, first=first, last=last)
            start, first = end, group
        if stop - start > most:
            parts = list(_equal(start, stop, most, group))
            for part in parts:
                yield ByGroups(
                    part.start,
                    part.end,
                    first=group,
                    last=group,
                    is_part=True,
                    is_last_part=part is parts[-1],
                )
            start, first = stop, group + 1
        end, last = stop, group
    if end > start:
        yield ByGroups(start, end, first=first, last=last)


class Rows:
    """A result that has rows.

    Args:
        result: what the chunks fill.
        dim: where the rows lie.
        rank: how many dimensions from there on make up the rows.
    """

    def __init__(self, result: Tensor, dim: int = 0, rank: int = 1) -> None:
        self._result, self._dim = result, dim
        self._flat = result.flatten(dim, dim + rank - 1)

    def _place(self, chunk: Chunk) -> Tensor:
        return self._flat.narrow(self._dim, chunk.start, chunk.size)

    def put(self, chunk: Chunk, found: Tensor) -> None:
        self._place(chunk).copy_(found)

    def put_nothing(self, chunk: Chunk) -> None:
        """Zeros, where a chunk sees nothing."""
        self._place(chunk).zero_()

    def result(self) -> Tensor:
        return self._result


class Sum:
    """A sum over chunks; the first one is written over what the accumulator holds.

    Args:
        accumulator: of the type to sum in.
        dtype: of the result.
    """

    def __init__(self, accumulator: Tensor, dtype: torch.dtype) -> None:
        self._accumulator: Tensor | None = accumulator
        self._dtype, self._is_empty = dtype, True

    def _started(self) -> tuple[Tensor, bool]:
        """The accumulator, and whether it holds nothing yet."""
        assert self._accumulator is not None
        is_first, self._is_empty = self._is_empty, False
        return self._accumulator, is_first

    def add(self, found: Tensor) -> None:
        accumulator, is_first = self._started()
        accumulator.copy_(found) if is_first else accumulator.add_(found)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right``, in place: no temporary of the accumulator's size."""
        accumulator, is_first = self._started()
        if left.dtype != accumulator.dtype and not accumulator.is_cuda:
            # No mixed-type product on a CPU; rounding the product would lose what float32 is for.
            left, right = left.to(accumulator.dtype), right.to(accumulator.dtype)
        beta = 0 if is_first else 1
        if left.dtype == accumulator.dtype:
            torch.addmm(accumulator, left, right, beta=beta, out=accumulator)
        else:
            aten.addmm.dtype_out(accumulator, left, right, accumulator.dtype, beta=beta, out=accumulator)

    def result(self) -> Tensor:
        """The sum, rounded to its type; zeros of no chunks. The accumulator is given up."""
        assert self._accumulator is not None
        accumulator, self._accumulator = self._accumulator, None
        return (accumulator.zero_() if self._is_empty else accumulator).to(self._dtype)


class WindowSum:
    """A sum over chunks of which each adds to the part that its window shows, in float32 where that is wider.

    Args:
        accumulator: of the type to sum in; it is filled with zeros.
        dtype: of the result.
        dim: along which the windows lie.
    """

    def __init__(self, accumulator: Tensor, dtype: torch.dtype, dim: int) -> None:
        self._accumulator, self._dtype, self._dim = accumulator.zero_(), dtype, dim

    def add(self, chunk: Reaching, found: Tensor) -> None:
        window = chunk.window
        self._accumulator.narrow(self._dim, window.first, window.last - window.first).add_(found)

    def result(self, over: Tensor | None = None) -> Tensor:
        """The sum, rounded to its type; written over a tensor of that type if one is given."""
        return self._accumulator.to(self._dtype) if over is None else over.copy_(self._accumulator)


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Bodies are traced with all casts and modes in them: nothing ambient may act twice."""
    with torch.no_grad(), without_autocast():
        yield
