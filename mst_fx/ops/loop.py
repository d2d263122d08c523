"""The loop ops: a body run over chunks of rows, with weight gradients summed in place.

These ops stand in rewritten graphs (``torch.library``, opaque to Inductor and AOTAutograd):

``mst_fx::loop(rows, shared, body, chunk_rows, backward_rows, lead) -> output``
    for bodies with one output, ``mst_fx::loop_list(...) -> outputs`` for others. It saves its inputs
    only; its derivative is
``mst_fx::loop_backward(rows, shared, tangents, has_tangent, needs, body, chunk_rows) -> gradients``
    which recomputes the inside of each chunk, with ``backward_rows`` a chunk;
``mst_fx::loop_with_grad(rows, shared, needs, output, body, chunk_rows, lead, port) -> outputs + gradients``
    computes the gradients of one scalar output in the forward loop (3 matmuls instead of 4);
    its derivative scales them by the scalar's tangent, with ``mst_fx::scaled``. With a ``port`` of 0 or
    more it has one more output, by which further gradients of ``rows[port]`` come in
    (:mod:`mst_fx.ops.port`); ``mst_fx::joined`` adds them.

``rows`` are tensors whose leading dimensions make up the ``N`` rows (``[B, S, ...]`` or ``[N, ...]``),
``shared`` are read whole by every chunk, ``body`` is the key of a :class:`~mst_fx.bodies.body.Body`. Output
``i`` has the leading dimensions of ``rows[lead[i]]``, or ``N`` where ``lead[i]`` is -1; sums over rows
have none.

That ``loop`` gives one tensor, of its final shape, is no matter of taste. Between two checkpointed
layers AOTAutograd's partitioner saves the last value of the first one, but never a view, nor a member
of a list (``solve_min_cut`` in torch/_functorch/partitioners.py). It would recompute the loop instead,
for that the layers before it, and so hold the values of all layers at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mst_fx.bodies.body import Body, CompiledBody, OutputMeta, TensorMeta
from mst_fx.bodies.body import body as body_of
from mst_fx.bodies.gradient import GradientPlan, Term
from mst_fx.graph.sizes import sum_dtype
from mst_fx.ops.port import new_port, pick_up
from mst_fx.ops.scaled import product
from mst_fx.torch_api.modes import without_autocast

aten = torch.ops.aten


def chunk_bounds(rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Splits rows into the fewest chunks of at most ``chunk_rows``, of near-equal size."""
    chunks = -(-rows // chunk_rows)
    small, larger = divmod(rows, chunks) if chunks else (0, 0)
    start = 0
    for index in range(chunks):
        end = start + small + (index < larger)
        yield start, end
        start = end


def _chunk_sizes(rows: int, chunk_rows: int) -> set[int]:
    return {end - start for start, end in chunk_bounds(rows, chunk_rows)}


@contextlib.contextmanager
def _plain_mode() -> Iterator[None]:
    """Bodies are traced with all casts and modes in them: nothing ambient may act twice."""
    with torch.no_grad(), without_autocast():
        yield


def _chunk_inputs(
    rows: Sequence[Tensor], shared: Sequence[Tensor], start: int, end: int, *more: Tensor
) -> list[Any]:
    # Rows may come with any strides; a chunk of contiguous rows is contiguous without a copy.
    chunk = [row[start:end].contiguous() for row in rows]
    return [end - start, *chunk, *shared, *more]


def _as_traced(shared: Sequence[Tensor], metas: Sequence[TensorMeta]) -> list[Tensor]:
    """Compiled bodies take the strides they were traced with."""
    return [
        tensor
        if tensor.stride() == meta.stride
        else torch.empty_strided(meta.shape, meta.stride, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
        for tensor, meta in zip(shared, metas, strict=True)
    ]


def _rank(row: Tensor, meta: TensorMeta | OutputMeta) -> int:
    """How many leading dimensions of a tensor make up the rows."""
    return row.ndim - len(meta.shape)


def _flat(rows: Sequence[Tensor], metas: Sequence[TensorMeta]) -> list[Tensor]:
    """``[B, S, ...]`` → ``[N, ...]``."""
    return [row.flatten(0, _rank(row, meta) - 1) for row, meta in zip(rows, metas, strict=True)]


def _count(rows: Sequence[Tensor], body: Body) -> Any:
    return math.prod(rows[0].shape[: _rank(rows[0], body.rows[0])])


def _output_shapes(body: Body, rows: Sequence[Tensor], lead: Sequence[int]) -> list[Sequence[Any]]:
    shapes: list[Sequence[Any]] = []
    for meta, like in zip(body.outputs, lead, strict=True):
        if meta.is_sum:
            shapes.append(meta.shape)
        elif like < 0:
            shapes.append((_count(rows, body), *meta.shape))
        else:
            shapes.append((*rows[like].shape[: _rank(rows[like], body.rows[like])], *meta.shape))
    return shapes


class _Outputs:
    """Collects the outputs of chunks: rows into place, sums added up."""

    def __init__(self, metas: Sequence[OutputMeta], shapes: Sequence[Sequence[int]]) -> None:
        self._metas = metas
        self._tensors = [
            torch.zeros(shape, dtype=sum_dtype(meta.dtype), device=meta.device)
            if meta.is_sum
            else torch.empty(shape, dtype=meta.dtype, device=meta.device)
            for meta, shape in zip(metas, shapes, strict=True)
        ]
        self._flat = [
            tensor if meta.is_sum else tensor.flatten(0, _rank(tensor, meta) - 1)
            for meta, tensor in zip(metas, self._tensors, strict=True)
        ]

    def put(self, values: Sequence[Tensor], start: int, end: int) -> None:
        for tensor, meta, found in zip(self._flat, self._metas, values, strict=True):
            if meta.is_sum:
                tensor.add_(found)
            else:
                tensor[start:end].copy_(found)

    def result(self) -> list[Tensor]:
        return [t.to(meta.dtype) for t, meta in zip(self._tensors, self._metas, strict=True)]


class _Gradients:
    """Row gradients, put into place, and one accumulator a weight."""

    def __init__(self, body: Body, needs: Sequence[bool], rows: Sequence[Tensor]) -> None:
        differentiated = [(x, meta) for x, meta, need in zip(rows, body.rows, needs, strict=False) if need]
        self._row_grads = [x.new_empty(x.shape) for x, _ in differentiated]
        self._flat = _flat(self._row_grads, [meta for _, meta in differentiated])
        needed = [i for i, need in enumerate(needs[len(body.rows) :]) if need]
        self._dtypes = [body.shared[i].dtype for i in needed]
        # The first chunk writes what the others add to; without rows there is none.
        new = torch.empty if _count(rows, body) else torch.zeros
        self._sums = [
            new(body.shared[i].shape, dtype=body.accumulator_dtype(i), device=body.shared[i].device)
            for i in needed
        ]

    def put(self, plan: GradientPlan, values: Sequence[Tensor], start: int, end: int) -> None:
        row_grads = values[plan.first : plan.first + len(self._flat)]
        for tensor, found in zip(self._flat, row_grads, strict=True):
            tensor[start:end].copy_(found)
        for accumulator, terms in zip(self._sums, plan.terms, strict=True):
            for index, term in enumerate(terms):
                _add_term(accumulator, term, values, is_first=start == 0 and index == 0)

    def result(self) -> list[Tensor]:
        sums: list[Tensor] = []
        while self._sums:  # an accumulator is freed before the next one is rounded
            sums.append(self._sums.pop(0).to(self._dtypes[len(sums)]))
        return [*self._row_grads, *sums]


def _add_term(accumulator: Tensor, term: Term, values: Sequence[Tensor], is_first: bool) -> None:
    """Adds a term to an accumulator; the first one is written over what it holds."""
    if term.value >= 0:
        found = values[term.value]
        found = found.t() if term.transposed else found
        accumulator.copy_(found) if is_first else accumulator.add_(found)
        return
    left, right = values[term.left], values[term.right]
    left = left.t() if term.left_transposed else left
    right = right.t() if term.right_transposed else right
    if left.dtype != accumulator.dtype and not accumulator.is_cuda:
        # No mixed-type product on a CPU; rounding the product would lose what float32 is for.
        left, right = left.to(accumulator.dtype), right.to(accumulator.dtype)
    beta = 0 if is_first else 1
    if left.dtype == accumulator.dtype:
        torch.addmm(accumulator, left, right, beta=beta, out=accumulator)
    else:
        aten.addmm.dtype_out(accumulator, left, right, accumulator.dtype, beta=beta, out=accumulator)


def _run_with_gradients(
    compiled: CompiledBody,
    body: Body,
    needs: Sequence[bool],
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    chunk_rows: int,
    outputs: _Outputs,
    tangent_order: Sequence[tuple[bool, Tensor]] = (),
) -> list[Tensor]:
    assert compiled.plan is not None
    gradients = _Gradients(body, needs, rows)
    flat, shared = _flat(rows, body.rows), _as_traced(shared, body.shared)
    for start, end in chunk_bounds(_count(rows, body), chunk_rows):
        tangents = [t if whole else t[start:end].contiguous() for whole, t in tangent_order]
        values = compiled.run(_chunk_inputs(flat, shared, start, end, *tangents))
        outputs.put(values[: compiled.plan.first], start, end)
        gradients.put(compiled.plan, values, start, end)
        del values, tangents  # before the next chunk makes its own
    return [*outputs.result(), *gradients.result()]


def _gradient_fakes(rows: Sequence[Tensor], shared: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    inputs = [*rows, *shared]
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]


def _output_fakes(body: Body, rows: Sequence[Tensor], lead: Sequence[int]) -> list[Tensor]:
    shapes = _output_shapes(body, rows, lead)
    return [
        torch.empty(shape, dtype=meta.dtype, device=meta.device)
        for meta, shape in zip(body.outputs, shapes, strict=True)
    ]


_LOOP_SCHEMA = "(Tensor[] rows, Tensor[] shared, str body, int chunk_rows, int backward_rows, int[] lead)"


@torch.library.custom_op(
    "mst_fx::loop_list",
    mutates_args=(),
    schema=_LOOP_SCHEMA + " -> Tensor[]",
)
def loop_list(
    rows: list[Tensor],
    shared: list[Tensor],
    body: str,
    chunk_rows: int,
    backward_rows: int,
    lead: list[int],
) -> list[Tensor]:
    found = body_of(body)
    count = _count(rows, found)
    with _plain_mode():
        outputs = _Outputs(found.outputs, _output_shapes(found, rows, lead))
        if count:
            run = found.compiled_forward(_chunk_sizes(count, chunk_rows)).run
            flat, traced = _flat(rows, found.rows), _as_traced(shared, found.shared)
            for start, end in chunk_bounds(count, chunk_rows):
                outputs.put(run(_chunk_inputs(flat, traced, start, end)), start, end)
        return outputs.result()


@loop_list.register_fake
def _loop_fakes(
    rows: list[Tensor],
    shared: list[Tensor],
    body: str,
    chunk_rows: int,
    backward_rows: int,
    lead: list[int],
) -> list[Tensor]:
    return _output_fakes(body_of(body), rows, lead)


@torch.library.custom_op(
    "mst_fx::loop",
    mutates_args=(),
    schema=_LOOP_SCHEMA + " -> Tensor",
)
def loop(*args: Any) -> Tensor:
    (output,) = loop_list(*args)
    return output


@loop.register_fake
def _(*args: Any) -> Tensor:
    (output,) = _loop_fakes(*args)
    return output


@torch.library.custom_op(
    "mst_fx::loop_backward",
    mutates_args=(),
    schema=(
        "(Tensor[] rows, Tensor[] shared, Tensor[] tangents, bool[] has_tangent, bool[] needs, "
        "str body, int chunk_rows) -> Tensor[]"
    ),
)
def loop_backward(
    rows: list[Tensor],
    shared: list[Tensor],
    tangents: list[Tensor],
    has_tangent: list[bool],
    needs: list[bool],
    body: str,
    chunk_rows: int,
) -> list[Tensor]:
    found = body_of(body)
    with _plain_mode():
        count = _count(rows, found)
        if not count:
            return _Gradients(found, needs, rows).result()
        compiled = found.compiled_backward(_chunk_sizes(count, chunk_rows), needs, has_tangent)
        present = [meta for meta, has in zip(found.outputs, has_tangent, strict=True) if has]
        order = [
            (True, tangent) if meta.is_sum else (False, tangent.flatten(0, _rank(tangent, meta) - 1))
            for meta, tangent in zip(present, tangents, strict=True)
        ]
        return _run_with_gradients(
            compiled, found, needs, rows, shared, chunk_rows, _Outputs((), ()), tangent_order=order
        )


@loop_backward.register_fake
def _(
    rows: list[Tensor],
    shared: list[Tensor],
    tangents: list[Tensor],
    has_tangent: list[bool],
    needs: list[bool],
    body: str,
    chunk_rows: int,
) -> list[Tensor]:
    return _gradient_fakes(rows, shared, needs)


@torch.library.custom_op(
    "mst_fx::scaled", mutates_args=(), schema="(Tensor gradient, Tensor tangent) -> Tensor"
)
def scaled(gradient: Tensor, tangent: Tensor) -> Tensor:
    """``gradient * tangent``, as an op of its own; the tangent is a scalar, float32 where that is wider.

    Inductor would make one kernel of all such products and hold every gradient twice at once. One call
    a gradient holds one twice: the saved one is freed before the next call.
    """
    with _plain_mode():
        return product(gradient, tangent)


@scaled.register_fake
def _(gradient: Tensor, tangent: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


@torch.library.custom_op(
    "mst_fx::joined", mutates_args=(), schema="(Tensor gradient, Tensor? tangent, Tensor port) -> Tensor"
)
def joined(gradient: Tensor, tangent: Tensor | None, port: Tensor) -> Tensor:
    """``gradient * tangent``, plus the gradient that came in by a port, if one did."""
    found = pick_up(port)
    if tangent is None:
        return torch.zeros_like(gradient) if found is None else found.to(gradient.dtype, copy=True)
    with _plain_mode():
        scaled_gradient = product(gradient, tangent)
    return scaled_gradient if found is None else scaled_gradient.add_(found)


@joined.register_fake
def _(gradient: Tensor, tangent: Tensor | None, port: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


@torch.library.custom_op(
    "mst_fx::loop_with_grad",
    mutates_args=(),
    schema=(
        "(Tensor[] rows, Tensor[] shared, bool[] needs, int output, str body, int chunk_rows, int[] lead, "
        "int port) -> Tensor[]"
    ),
)
def loop_with_grad(
    rows: list[Tensor],
    shared: list[Tensor],
    needs: list[bool],
    output: int,
    body: str,
    chunk_rows: int,
    lead: list[int],
    port: int,
) -> list[Tensor]:
    found = body_of(body)
    ports = [] if port < 0 else [new_port()]
    with _plain_mode():
        outputs = _Outputs(found.outputs, _output_shapes(found, rows, lead))
        count = _count(rows, found)
        if not count:
            return [*outputs.result(), *_Gradients(found, needs, rows).result(), *ports]
        compiled = found.compiled_with_grad(_chunk_sizes(count, chunk_rows), needs, output)
        return [*_run_with_gradients(compiled, found, needs, rows, shared, chunk_rows, outputs), *ports]


@loop_with_grad.register_fake
def _(
    rows: list[Tensor],
    shared: list[Tensor],
    needs: list[bool],
    output: int,
    body: str,
    chunk_rows: int,
    lead: list[int],
    port: int,
) -> list[Tensor]:
    ports = [] if port < 0 else [new_port()]
    return [*_output_fakes(body_of(body), rows, lead), *_gradient_fakes(rows, shared, needs), *ports]


def _setup_loop(ctx: Any, inputs: tuple[Any, ...], output: Tensor | list[Tensor]) -> None:
    rows, shared, ctx.body, _, ctx.chunk_rows, _ = inputs
    ctx.kept = body_of(ctx.body)  # where nobody compiled the graph, its autograd graph keeps its body alive
    ctx.rows = len(rows)
    ctx.save_for_backward(*rows, *shared)
    ctx.set_materialize_grads(False)


def _backward_loop_list(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    rows, shared = saved[: ctx.rows], saved[ctx.rows :]
    needs = [bool(need) for needs in ctx.needs_input_grad[:2] for need in needs]
    has_tangent = [grad is not None for grad in grads]
    tangents = [grad for grad in grads if grad is not None]
    if not tangents:
        return (None,) * 6
    found = iter(loop_backward(rows, shared, tangents, has_tangent, needs, ctx.body, ctx.chunk_rows))
    filled = [next(found) if need else None for need in needs]
    return filled[: ctx.rows], filled[ctx.rows :], None, None, None, None


def _setup_loop_with_grad(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    rows, _, ctx.needs, ctx.output, body, _, _, ctx.port = inputs
    ctx.rows = len(rows)
    first = len(body_of(body).outputs)
    ctx.save_for_backward(*output[first : first + sum(ctx.needs)])
    ctx.set_materialize_grads(False)


def _backward_loop_with_grad(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tangent, port_tangent = grads[ctx.output], grads[-1] if ctx.port >= 0 else None
    if tangent is None and port_tangent is None:
        return (None,) * 8
    saved = iter(ctx.saved_tensors)
    filled: list[Tensor | None] = []
    for position, need in enumerate(ctx.needs):
        gradient = next(saved) if need else None
        if gradient is not None and position == ctx.port and port_tangent is not None:
            gradient = joined(gradient, tangent, port_tangent)
        elif gradient is not None:
            gradient = None if tangent is None else scaled(gradient, tangent)
        filled.append(gradient)
    return filled[: ctx.rows], filled[ctx.rows :], None, None, None, None, None, None


def _backward_loop(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    return _backward_loop_list(ctx, [grad])


loop_list.register_autograd(_backward_loop_list, setup_context=_setup_loop)
loop.register_autograd(_backward_loop, setup_context=_setup_loop)
loop_with_grad.register_autograd(_backward_loop_with_grad, setup_context=_setup_loop_with_grad)
