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

from collections.abc import Sequence
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
        self.ends: list[int] = ends.tolist()
        self.chunks = list(chunks.by_groups(self.ends, most))
        self.total = key.numel()

    @property
    def empty(self) -> list[int]:
        """The experts without slots."""
        return [
            expert for expert, end in enumerate(self.ends) if end == (self.ends[expert - 1] if expert else 0)
        ]

    def of(self, chunk: ByGroups) -> tuple[Tensor, Tensor]:
        """The slots of a chunk, and the rows that they are of."""
        slots = self._order[chunk.start : chunk.end]
        return slots, slots // self._per

    def keys(self, chunk: ByGroups) -> Tensor:
        return self._keys[chunk.start : chunk.end]

    def ends_in(self, chunk: ByGroups) -> Tensor:
        """Where the slots of each expert end in a chunk."""
        return (self._ends - chunk.start).clamp_(0, chunk.size)

    def bounds(self, chunk: ByGroups) -> list[tuple[int, int]]:
        """The first place of each expert of a chunk in it, and the one behind its last."""
        ends = [min(end, chunk.end) - chunk.start for end in self.ends[chunk.first : chunk.last + 1]]
        return list(zip([0, *ends], ends, strict=False))


class _StackGradient:
    """The gradient of a stack of matrices, written expert by expert."""

    def __init__(self, meta: TensorMeta, slots: _Slots) -> None:
        self._result = torch.empty(meta.shape, dtype=meta.dtype, device=meta.device)
        self._slots = slots
        self._part: Sum | None = None

    def add(self, chunk: ByGroups, left: Tensor, right: Tensor, is_first: bool) -> None:
        """Adds ``left.t() @ right`` of each expert's slots in a chunk, the first time in place of what is there."""
        if chunk.is_part:
            self._part = self._part or self._started(chunk, left, right)
            self._part.add_product(left.t(), right)
            return
        bounds, ends = self._slots.bounds(chunk), self._slots.ends_in(chunk)[chunk.first : chunk.last + 1]
        place = self._result[chunk.first : chunk.last + 1]
        if is_first:
            outer_into(place, left, right, bounds, ends)
        else:
            more = torch.empty_like(place)
            outer_into(more, left, right, bounds, ends)
            place.add_(more)

    def _started(self, chunk: ByGroups, left: Tensor, right: Tensor) -> Sum:
        shape = (left.shape[1], right.shape[1])
        wide = torch.empty(shape, dtype=sum_dtype(self._result.dtype), device=self._result.device)
        return Sum(wide, self._result.dtype)

    def end(self, chunk: ByGroups) -> None:
        """To be called when all of a chunk was added."""
        if self._part is not None and chunk.is_last_part:
            self._result[chunk.first].copy_(self._part.result())
            self._part = None

    def result(self) -> Tensor:
        if self._slots.empty:
            self._result.index_fill_(0, torch.tensor(self._slots.empty, device=self._result.device), 0)
        return self._result


class _SharedGradient:
    """The gradient of what all slots share: a table, a weight of a norm."""

    def __init__(self, total: Sum) -> None:
        self._total = total

    def add(self, term: Term, values: Sequence[Tensor]) -> None:
        add_term(self._total, term, values)

    def result(self) -> Tensor:
        return self._total.result()


def _inputs(
    slots: _Slots,
    chunk: ByGroups,
    row_inputs: Sequence[Tensor],
    by_slot: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> list[Any]:
    """What a body takes for a chunk."""
    places, origins = slots.of(chunk)
    picked = [*(x[origins] for x in row_inputs), *(x[places] for x in by_slot)]
    return [chunk.size, *picked, slots.keys(chunk), *shared, slots.ends_in(chunk)]


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
            for chunk in of.chunks:
                (found,) = run(_inputs(of, chunk, row_inputs, by_slot, traced))
                out.index_add_(0, of.of(chunk)[1], found.to(out.dtype))
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
        of = _Slots(key, per, experts, chunk_slots)
        gradients = _Gradients(body, of, needs, row_inputs, slot_inputs)
        if key.numel():
            # Neither keys nor their ends have a gradient.
            given = [
                *needs[: len(row_inputs) + len(slot_inputs)],
                False,
                *needs[len(row_inputs) + len(slot_inputs) :],
                False,
            ]
            compiled = body.compiled_backward(chunks.sizes(of.chunks), given, [True])
            by_slot, traced = _by_slot(body, row_inputs, slot_inputs), as_traced(shared, body.shared[:-1])
            assert compiled.positions is not None
            for chunk in of.chunks:
                inputs = _inputs(of, chunk, row_inputs, by_slot, traced)
                inputs.append(tangent[of.of(chunk)[1]])
                values = compiled.run(inputs)
                gradients.add(chunk, compiled.positions.first, compiled.positions.terms, values)
                del values
        return gradients.result()


class _Gradients:
    """The gradients of all inputs that need one, in their order."""

    def __init__(
        self,
        body: Body,
        of: _Slots,
        needs: Sequence[bool],
        row_inputs: Sequence[Tensor],
        slot_inputs: Sequence[Tensor],
    ) -> None:
        self._of, self._count = of, len(row_inputs)
        self._places: list[Tensor] = []
        self._shapes, self._dtypes = [], []
        for index, x in enumerate([*row_inputs, *slot_inputs]):
            if not needs[index]:
                continue
            if index < len(row_inputs):
                self._places.append(torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device))
            else:
                self._places.append(
                    torch.zeros((of.total, *body.row_metas[index].shape), dtype=x.dtype, device=x.device)
                )
            self._shapes.append(x.shape)
            self._dtypes.append(x.dtype)
        self._by_row = sum(needs[: len(row_inputs)])
        shared_needs = needs[len(row_inputs) + len(slot_inputs) :]
        self._wanted = [index for index, need in enumerate(shared_needs) if need]
        self._body = body
        self._shared: list[_StackGradient | _SharedGradient | None] = [None] * len(self._wanted)

    def add(
        self, chunk: ByGroups, first: int, terms: Sequence[Sequence[Term]], values: Sequence[Tensor]
    ) -> None:
        for position, those in enumerate(terms):
            total = self._shared_of(position, those)
            for index, term in enumerate(those):
                if isinstance(total, _StackGradient):
                    total.add(chunk, values[term.left], values[term.right], is_first=not index)
                else:
                    total.add(term, values)
            if isinstance(total, _StackGradient):
                total.end(chunk)
        places, origins = self._of.of(chunk)
        for index, place in enumerate(self._places):
            found = values[first + index]
            if index < self._by_row:
                place.index_add_(0, origins, found.to(place.dtype))
            else:
                place.index_copy_(0, places, found)

    def _shared_of(self, position: int, terms: Sequence[Term]) -> _StackGradient | _SharedGradient:
        found = self._shared[position]
        if found is None:
            index = self._wanted[position]
            if terms and all(term.grouped for term in terms):
                found = _StackGradient(self._body.shared[index], self._of)
            else:
                found = _SharedGradient(weight_sum(self._body, index))
            self._shared[position] = found
        return found

    def result(self) -> list[Tensor]:
        results = [
            place.to(dtype).reshape(shape)
            for place, shape, dtype in zip(self._places, self._shapes, self._dtypes, strict=True)
        ]
        for position, total in enumerate(self._shared):
            meta = self._body.shared[self._wanted[position]]
            results.append(
                total.result()
                if total is not None
                else torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
            )
        return results


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
