"""The loop ops of experts: a body run over chunks of *sorted slots*, so that each weight's gradient is written once.

A row has ``per`` slots (slot ``s`` is of row ``s // per``), each with a key: the number of its matrix. Sorted by key, the slots of one
expert lie side by side, and a chunk holds whole experts, or a part of one that has more slots than a chunk::

    for chunk of sorted slots:  out[rows of chunk] += body(row_inputs[rows of chunk], slot_inputs[chunk], keys[chunk], shared)

``mst_fx::experts_loop(row_inputs, slot_inputs, key, shared, body_key, per, experts, chunk_slots, backward_slots) -> out[N, ...]``
    saves its inputs only; its derivative is
``mst_fx::experts_loop_backward(row_inputs, slot_inputs, key, shared, tangent, needs, body_key, per, experts, chunk_slots) -> gradients``
    which makes the inside of each chunk again.

``row_inputs`` are ``[N, ...]``, ``slot_inputs`` have ``N·per`` elements of what a slot has, in any leading dimensions (``[N, per]``, ``[N·per]``), as
has ``key``; all keys are in ``[0, experts)``. What each row gets is summed in float32 for 16-bit types, and rounded once. How many slots an
expert has comes to the host once a pass, which is all that the host waits for.

The gradient of a stack ``[E, K, N]`` is written expert by expert: in its own type, without a temporary of its size. Only of an expert
that does not fit into a chunk the parts are added up, in float32. Experts without slots get zeros.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mst_fx.bodies.body import Body, TensorMeta, body_of
from mst_fx.bodies.gradient import Term
from mst_fx.graph.grouped import outer_into
from mst_fx.graph.sizes import sum_dtype
from mst_fx.ops import chunks
from mst_fx.ops.chunks import ByGroups, Sum, plain_mode
from mst_fx.ops.loop import add_term, as_traced, weight_sum
from mst_fx.ops.row_sums import add_rows


@dataclasses.dataclass(frozen=True)
class _Part:
    """A chunk of sorted slots.

    Attributes:
        slots, origins, keys: of each place: the slot, the row that it is of, its key.
        ends: where the slots of each expert end in the chunk, as int32.
        bounds: the first place of each expert of the chunk, and the one behind its last.
    """

    chunk: ByGroups
    slots: Tensor
    origins: Tensor
    keys: Tensor
    ends: Tensor
    bounds: list[tuple[int, int]]


class _Slots:
    """Slots in the order of their keys, cut into chunks.

    Args:
        most: slots a chunk, at most.
    """

    def __init__(self, key: Tensor, per: int, experts: int, most: int) -> None:
        self._keys, self._order = torch.sort(key.reshape(-1), stable=True)
        numbers = torch.arange(experts, device=key.device, dtype=key.dtype)
        ends = torch.searchsorted(self._keys, numbers, right=True)
        self._ends, self._per = ends.to(torch.int32), per
        self._host_ends: list[int] = ends.tolist()
        self.chunks = list(chunks.by_groups(self._host_ends, most))

    @property
    def empty(self) -> list[int]:
        """The experts without slots."""
        pairs = itertools.pairwise([0, *self._host_ends])
        return [expert for expert, (start, end) in enumerate(pairs) if start == end]

    def parts(self) -> Iterator[_Part]:
        for chunk in self.chunks:
            place, slots = slice(chunk.start, chunk.end), self._order[chunk.start : chunk.end]
            stops = [
                min(end, chunk.end) - chunk.start for end in self._host_ends[chunk.first : chunk.last + 1]
            ]
            ends = (self._ends - chunk.start).clamp_(0, chunk.size)
            bounds = list(itertools.pairwise([0, *stops]))
            yield _Part(chunk, slots, slots // self._per, self._keys[place], ends, bounds)


class _StackGradient:
    """The gradient of a stack of matrices, written expert by expert."""

    def __init__(self, meta: TensorMeta, empty: Sequence[int]) -> None:
        self._result = torch.empty(meta.shape, dtype=meta.dtype, device=meta.device)
        self._empty = empty
        self._split: Sum | None = None

    def add(self, part: _Part, terms: Sequence[Term], values: Sequence[Tensor]) -> None:
        """Writes the sum of ``left.t() @ right`` of each expert's slots in a chunk."""
        chunk = part.chunk
        place = self._result[chunk.first : chunk.last + 1]
        for index, term in enumerate(terms):
            left, right = values[term.left], values[term.right]
            if chunk.is_part:
                self._split = self._split or self._started(left, right)
                self._split.add_product(left.t(), right)
                continue
            written = torch.empty_like(place) if index else place
            outer_into(written, left, right, part.bounds, part.ends[chunk.first : chunk.last + 1])
            if index:
                place.add_(written)
        if self._split is not None and chunk.is_last_part:
            place[0].copy_(self._split.result())
            self._split = None

    def _started(self, left: Tensor, right: Tensor) -> Sum:
        shape = (left.shape[1], right.shape[1])
        wide = torch.empty(shape, dtype=sum_dtype(self._result.dtype), device=self._result.device)
        return Sum(wide, self._result.dtype)

    def result(self) -> Tensor:
        if self._empty:
            self._result.index_fill_(0, torch.tensor(self._empty, device=self._result.device), 0)
        return self._result


class _SharedGradient:
    """The gradient of what all slots share: a table, a weight of a norm."""

    def __init__(self, total: Sum) -> None:
        self._total = total

    def add(self, part: _Part, terms: Sequence[Term], values: Sequence[Tensor]) -> None:
        for term in terms:
            add_term(self._total, term, values)

    def result(self) -> Tensor:
        return self._total.result()


class _RowGradient:
    """The gradient of rows, or of slots: what all slots give, added up where they are of one row.

    Args:
        places: how many rows or slots there are, and of what.
    """

    def __init__(self, like: Tensor, places: Sequence[int], is_by_row: bool) -> None:
        self._like, self._is_by_row = like, is_by_row
        dtype = sum_dtype(like.dtype) if is_by_row else like.dtype
        self._total = torch.zeros(places, dtype=dtype, device=like.device)

    def add(self, part: _Part, found: Tensor) -> None:
        if self._is_by_row:
            add_rows(self._total, part.origins, found)
        else:
            self._total.index_copy_(0, part.slots, found)

    def result(self) -> Tensor:
        return self._total.to(self._like.dtype).reshape(self._like.shape)


def with_keys(body: Body, needs: Sequence[bool]) -> list[bool]:
    """Which inputs of a body need a gradient, by which of a loop's do: neither keys, nor where they end, have one."""
    by_row = len(body.row_metas) - 1
    return [*needs[:by_row], False, *needs[by_row:], False]


def _inputs(
    part: _Part, row_inputs: Sequence[Tensor], by_slot: Sequence[Tensor], shared: Sequence[Tensor]
) -> list[Any]:
    """What a body takes for a chunk."""
    picked = [*(x[part.origins] for x in row_inputs), *(x[part.slots] for x in by_slot)]
    return [part.chunk.size, *picked, part.keys, *shared, part.ends]


def _by_slot(body: Body, row_inputs: Sequence[Tensor], slot_inputs: Sequence[Tensor]) -> list[Tensor]:
    """``[N, per, ...]`` → ``[N·per, ...]``."""
    metas = body.row_metas[len(row_inputs) : -1]
    return [x.reshape(-1, *meta.shape) for x, meta in zip(slot_inputs, metas, strict=True)]


@torch.library.custom_op(
    "mst_fx::experts_loop",
    mutates_args=(),
    schema=(
        "(Tensor[] row_inputs, Tensor[] slot_inputs, Tensor key, Tensor[] shared, str body_key, int per, int experts, int chunk_slots, "
        "int backward_slots) -> Tensor"
    ),
)
def experts_loop(
    row_inputs: list[Tensor],
    slot_inputs: list[Tensor],
    key: Tensor,
    shared: list[Tensor],
    body_key: str,
    per: int,
    experts: int,
    chunk_slots: int,
    backward_slots: int,
) -> Tensor:
    body = body_of(body_key)
    (meta,) = body.outputs
    with plain_mode():
        out = torch.zeros((key.numel() // per, *meta.shape), dtype=sum_dtype(meta.dtype), device=meta.device)
        if key.numel():
            of = _Slots(key, per, experts, chunk_slots)
            run = body.compiled_forward(chunks.sizes(of.chunks)).run
            by_slot, traced = _by_slot(body, row_inputs, slot_inputs), as_traced(shared, body.shared[:-1])
            for part in of.parts():
                (found,) = run(_inputs(part, row_inputs, by_slot, traced))
                add_rows(out, part.origins, found)
                del found
        return out.to(meta.dtype)


@experts_loop.register_fake
def _(
    row_inputs: list[Tensor],
    slot_inputs: list[Tensor],
    key: Tensor,
    shared: list[Tensor],
    body_key: str,
    per: int,
    experts: int,
    chunk_slots: int,
    backward_slots: int,
) -> Tensor:
    (meta,) = body_of(body_key).outputs
    count = row_inputs[0].shape[0] if row_inputs else key.numel() // per
    return torch.empty((count, *meta.shape), dtype=meta.dtype, device=meta.device)


@torch.library.custom_op(
    "mst_fx::experts_loop_backward",
    mutates_args=(),
    schema=(
        "(Tensor[] row_inputs, Tensor[] slot_inputs, Tensor key, Tensor[] shared, Tensor tangent, bool[] needs, str body_key, int per, "
        "int experts, int chunk_slots) -> Tensor[]"
    ),
)
def experts_loop_backward(
    row_inputs: list[Tensor],
    slot_inputs: list[Tensor],
    key: Tensor,
    shared: list[Tensor],
    tangent: Tensor,
    needs: list[bool],
    body_key: str,
    per: int,
    experts: int,
    chunk_slots: int,
) -> list[Tensor]:
    body = body_of(body_key)
    with plain_mode():
        if not key.numel():
            return [
                torch.zeros_like(x) for x in itertools.compress([*row_inputs, *slot_inputs, *shared], needs)
            ]
        of = _Slots(key, per, experts, chunk_slots)
        compiled = body.compiled_backward(chunks.sizes(of.chunks), with_keys(body, needs), [True])
        assert compiled.positions is not None
        first, terms = compiled.positions.first, compiled.positions.terms
        by_slot, traced = _by_slot(body, row_inputs, slot_inputs), as_traced(shared, body.shared[:-1])
        given = [(x, x.shape, True) for x in row_inputs]
        given += [(x, flat.shape, False) for x, flat in zip(slot_inputs, by_slot, strict=True)]
        of_rows = [_RowGradient(*each) for each in itertools.compress(given, needs)]
        wanted = itertools.compress(range(len(shared)), needs[len(given) :])
        of_shared = [_of_shared(body, index, those, of) for index, those in zip(wanted, terms, strict=True)]
        for part in of.parts():
            values = compiled.run([*_inputs(part, row_inputs, by_slot, traced), tangent[part.origins]])
            for total, those in zip(of_shared, terms, strict=True):
                total.add(part, those, values)
            for index, gradient in enumerate(of_rows):
                gradient.add(part, values[first + index])
            del values
        return [gradient.result() for gradient in (*of_rows, *of_shared)]


def _of_shared(
    body: Body, index: int, terms: Sequence[Term], slots: _Slots
) -> _StackGradient | _SharedGradient:
    if terms and all(term.grouped for term in terms):
        return _StackGradient(body.shared[index], slots.empty)
    return _SharedGradient(weight_sum(body, index))


@experts_loop_backward.register_fake
def _(
    row_inputs: list[Tensor],
    slot_inputs: list[Tensor],
    key: Tensor,
    shared: list[Tensor],
    tangent: Tensor,
    needs: list[bool],
    body_key: str,
    per: int,
    experts: int,
    chunk_slots: int,
) -> list[Tensor]:
    inputs = [*row_inputs, *slot_inputs, *shared]
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    row_inputs, slot_inputs, key, shared, ctx.body_key, ctx.per, ctx.experts, _, ctx.chunk_slots = inputs
    # Where nobody compiled the graph, its autograd graph has its body alive.
    ctx.body = body_of(ctx.body_key)
    ctx.counts = (len(row_inputs), len(slot_inputs))
    ctx.save_for_backward(*row_inputs, *slot_inputs, key, *shared)


def _backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
    saved, (rows, slots) = list(ctx.saved_tensors), ctx.counts
    key = saved.pop(rows + slots)
    by_row, by_slot, shared = saved[:rows], saved[rows : rows + slots], saved[rows + slots :]
    needs = [bool(need) for index in (0, 1, 3) for need in ctx.needs_input_grad[index]]
    found = iter(
        experts_loop_backward(
            by_row, by_slot, key, shared, tangent, needs, ctx.body_key, ctx.per, ctx.experts, ctx.chunk_slots
        )
    )
    filled = [next(found) if need else None for need in needs]
    return filled[:rows], filled[rows : rows + slots], None, filled[rows + slots :], *[None] * 5


experts_loop.register_autograd(_backward, setup_context=_setup)
