"""The loop ops: a body run over chunks of rows, with weight gradients summed in place.

These ops stand in rewritten graphs (``torch.library``, opaque to Inductor and AOTAutograd):

``mst_fx::loop(row_inputs, shared, body_key, chunk_rows, backward_rows, lead) -> output``
    for bodies with one output, ``mst_fx::loop_list(...) -> outputs`` for others. It saves its inputs
    only; its derivative is
``mst_fx::loop_backward(row_inputs, shared, tangents, has_tangent, needs, body_key, chunk_rows) -> gradients``
    which recomputes the inside of each chunk, with ``backward_rows`` a chunk;
``mst_fx::loop_with_grad(row_inputs, shared, needs, output, body_key, chunk_rows, lead, port) -> outputs + gradients``
    computes the gradients of one scalar output in the forward loop (3 matmuls instead of 4);
    its derivative scales them by the scalar's tangent, with ``mst_fx::scaled``. With a ``port`` of 0 or
    more it has one more output, by which further gradients of ``row_inputs[port]`` come in
    (:mod:`mst_fx.ops.port`); ``mst_fx::add_port_gradient`` adds them.

``row_inputs`` are tensors whose leading dimensions make up the ``N`` rows (``[B, S, ...]`` or ``[N, ...]``),
``shared`` are read whole by every chunk, ``body_key`` names a :class:`~mst_fx.bodies.body.Body`. Output
``i`` has the leading dimensions of ``row_inputs[lead[i]]``, or ``N`` where ``lead[i]`` is -1; sums over rows
have none.

That ``loop`` gives one tensor, of its final shape, is no matter of taste. Between two checkpointed
layers AOTAutograd's partitioner saves the last value of the first one, but never a view, nor a member
of a list (``solve_min_cut`` in torch/_functorch/partitioners.py). It would recompute the loop instead,
for that the layers before it, and so hold the values of all layers at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mst_fx.bodies.body import Body, CompiledBody, OutputMeta, TensorMeta, body_of
from mst_fx.bodies.gradient import GradientPositions, Term
from mst_fx.graph.sizes import sum_dtype
from mst_fx.ops import chunks
from mst_fx.ops.chunks import Chunk, Rows, Sum, plain_mode
from mst_fx.ops.port import add_port_gradient, new_port
from mst_fx.ops.scaled import scaled


def _chunk_inputs(flat: Sequence[Tensor], shared: Sequence[Tensor], chunk: Chunk, *more: Tensor) -> list[Any]:
    return [chunk.size, *(_of_chunk(row_input, chunk) for row_input in flat), *shared, *more]


def _of_chunk(flat: Tensor, chunk: Chunk) -> Tensor:
    # Rows may come with any strides; a chunk of contiguous rows is contiguous without a copy.
    return flat[chunk.start : chunk.end].contiguous()


def as_traced(shared: Sequence[Tensor], metas: Sequence[TensorMeta]) -> list[Tensor]:
    """Compiled bodies take the strides they were traced with."""
    return [
        tensor
        if tensor.stride() == meta.stride
        else torch.empty_strided(meta.shape, meta.stride, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
        for tensor, meta in zip(shared, metas, strict=True)
    ]


def _rank(tensor: Tensor, meta: TensorMeta | OutputMeta) -> int:
    """How many leading dimensions of a tensor make up the rows."""
    return tensor.ndim - len(meta.shape)


def _flat(row_inputs: Sequence[Tensor], metas: Sequence[TensorMeta]) -> list[Tensor]:
    """``[B, S, ...]`` → ``[N, ...]``."""
    return [x.flatten(0, _rank(x, meta) - 1) for x, meta in zip(row_inputs, metas, strict=True)]


def _count(row_inputs: Sequence[Tensor], body: Body) -> Any:
    return math.prod(row_inputs[0].shape[: _rank(row_inputs[0], body.row_metas[0])])


def _output_shapes(body: Body, row_inputs: Sequence[Tensor], lead: Sequence[int]) -> list[Sequence[Any]]:
    shapes: list[Sequence[Any]] = []
    for meta, like in zip(body.outputs, lead, strict=True):
        if meta.is_sum:
            shapes.append(meta.shape)
        elif like < 0:
            shapes.append((_count(row_inputs, body), *meta.shape))
        else:
            lead_sizes = row_inputs[like].shape[: _rank(row_inputs[like], body.row_metas[like])]
            shapes.append((*lead_sizes, *meta.shape))
    return shapes


class _Outputs:
    """Collects the outputs of chunks: rows into place, sums added up."""

    def __init__(self, metas: Sequence[OutputMeta], shapes: Sequence[Sequence[int]]) -> None:
        self._results = [_output(meta, shape) for meta, shape in zip(metas, shapes, strict=True)]

    def put(self, chunk: Chunk, values: Sequence[Tensor]) -> None:
        for result, found in zip(self._results, values, strict=True):
            result.add(found) if isinstance(result, Sum) else result.put(chunk, found)

    def result(self) -> list[Tensor]:
        return [result.result() for result in self._results]


def _output(meta: OutputMeta, shape: Sequence[int]) -> Rows | Sum:
    if meta.is_sum:
        return Sum(torch.empty(shape, dtype=sum_dtype(meta.dtype), device=meta.device), meta.dtype)
    result = torch.empty(shape, dtype=meta.dtype, device=meta.device)
    return Rows(result, rank=_rank(result, meta))


class _Gradients:
    """Row gradients, put into place, and one accumulator a weight.

    Args:
        over: the place of each row gradient that is written over what the loop reads: a tangent.
    """

    def __init__(
        self,
        body: Body,
        needs: Sequence[bool],
        row_inputs: Sequence[Tensor],
        over: Mapping[int, Tensor] | None = None,
    ) -> None:
        over = over or {}
        own = [each for each in zip(row_inputs, body.row_metas, needs, strict=False) if each[2]]
        self._row_grads = [
            Rows(over[index] if index in over else x.new_empty(x.shape), rank=_rank(x, meta))
            for index, (x, meta, _) in enumerate(own)
        ]
        self._order = sorted(range(len(own)), key=lambda index: index in over)
        weights = [i for i, need in enumerate(needs[len(body.row_metas) :]) if need]
        self._sums = [weight_sum(body, index) for index in weights]

    def put(self, chunk: Chunk, positions: GradientPositions, values: Sequence[Tensor]) -> None:
        # What is written over a tangent comes last: values may be rows of the tangent.
        for total, terms in zip(self._sums, positions.terms, strict=True):
            for term in terms:
                add_term(total, term, values)
        for index in self._order:
            self._row_grads[index].put(chunk, values[positions.first + index])

    def result(self) -> list[Tensor]:
        # Each accumulator is freed before the next one is rounded.
        return [*(result.result() for result in self._row_grads), *(total.result() for total in self._sums)]


def weight_sum(body: Body, index: int) -> Sum:
    meta = body.shared[index]
    return Sum(torch.empty(meta.shape, dtype=body.accumulator_dtype(index), device=meta.device), meta.dtype)


def add_term(total: Sum, term: Term, values: Sequence[Tensor]) -> None:
    if term.value >= 0:
        found = values[term.value]
        total.add(found.mT if term.transposed else found)
        return
    left, right = values[term.left], values[term.right]
    left = left.t() if term.left_transposed else left
    right = right.t() if term.right_transposed else right
    total.add_product(left, right)


def _run_with_gradients(
    compiled: CompiledBody,
    body: Body,
    needs: Sequence[bool],
    row_inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    chunk_rows: int,
    outputs: _Outputs,
    tangent_order: Sequence[tuple[bool, Tensor]] = (),
    over: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    assert compiled.positions is not None
    gradients = _Gradients(body, needs, row_inputs, over)
    flat, shared = _flat(row_inputs, body.row_metas), as_traced(shared, body.shared)
    for chunk in chunks.equal(_count(row_inputs, body), chunk_rows):
        tangents = [tangent if whole else _of_chunk(tangent, chunk) for whole, tangent in tangent_order]
        values = compiled.run(_chunk_inputs(flat, shared, chunk, *tangents))
        outputs.put(chunk, values[: compiled.positions.first])
        gradients.put(chunk, compiled.positions, values)
        del values, tangents  # before the next chunk makes its own
    return [*outputs.result(), *gradients.result()]


def gradient_fakes(
    row_inputs: Sequence[Tensor], shared: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    inputs = [*row_inputs, *shared]
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]


def _output_fakes(body: Body, row_inputs: Sequence[Tensor], lead: Sequence[int]) -> list[Tensor]:
    shapes = _output_shapes(body, row_inputs, lead)
    return [
        torch.empty(shape, dtype=meta.dtype, device=meta.device)
        for meta, shape in zip(body.outputs, shapes, strict=True)
    ]


_LOOP_SCHEMA = (
    "(Tensor[] row_inputs, Tensor[] shared, str body_key, int chunk_rows, int backward_rows, int[] lead)"
)


@torch.library.custom_op(
    "mst_fx::loop_list",
    mutates_args=(),
    schema=_LOOP_SCHEMA + " -> Tensor[]",
)
def loop_list(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    body_key: str,
    chunk_rows: int,
    backward_rows: int,
    lead: list[int],
) -> list[Tensor]:
    found = body_of(body_key)
    count = _count(row_inputs, found)
    with plain_mode():
        outputs = _Outputs(found.outputs, _output_shapes(found, row_inputs, lead))
        if count:
            run = found.compiled_forward(chunks.sizes(chunks.equal(count, chunk_rows))).run
            flat, traced = _flat(row_inputs, found.row_metas), as_traced(shared, found.shared)
            for chunk in chunks.equal(count, chunk_rows):
                outputs.put(chunk, run(_chunk_inputs(flat, traced, chunk)))
        return outputs.result()


@loop_list.register_fake
def _loop_fakes(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    body_key: str,
    chunk_rows: int,
    backward_rows: int,
    lead: list[int],
) -> list[Tensor]:
    return _output_fakes(body_of(body_key), row_inputs, lead)


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


def gradients_of(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    tangents: list[Tensor],
    has_tangent: list[bool],
    needs: list[bool],
    body_key: str,
    chunk_rows: int,
    over: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """What ``loop_backward`` gives.

    Args:
        over: which row gradients, by number, are written over a tangent, and the tangent.
    """
    found = body_of(body_key)
    with plain_mode():
        count = _count(row_inputs, found)
        if not count:
            return _Gradients(found, needs, row_inputs, over).result()
        compiled = found.compiled_backward(chunks.sizes(chunks.equal(count, chunk_rows)), needs, has_tangent)
        present = [meta for meta, has in zip(found.outputs, has_tangent, strict=True) if has]
        order = [
            (True, tangent) if meta.is_sum else (False, tangent.flatten(0, _rank(tangent, meta) - 1))
            for meta, tangent in zip(present, tangents, strict=True)
        ]
        none = _Outputs((), ())
        return _run_with_gradients(compiled, found, needs, row_inputs, shared, chunk_rows, none, order, over)


BACKWARD_SCHEMA = "Tensor[] row_inputs, Tensor[] shared, Tensor[] tangents, bool[] has_tangent, bool[] needs, str body_key, int chunk_rows"


@torch.library.custom_op("mst_fx::loop_backward", mutates_args=(), schema=f"({BACKWARD_SCHEMA}) -> Tensor[]")
def loop_backward(*args: Any) -> list[Tensor]:
    return gradients_of(*args)


@loop_backward.register_fake
def _(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    tangents: list[Tensor],
    has_tangent: list[bool],
    needs: list[bool],
    body_key: str,
    chunk_rows: int,
) -> list[Tensor]:
    return gradient_fakes(row_inputs, shared, needs)


@torch.library.custom_op(
    "mst_fx::loop_with_grad",
    mutates_args=(),
    schema=(
        "(Tensor[] row_inputs, Tensor[] shared, bool[] needs, int output, str body_key, int chunk_rows, int[] lead, "
        "int port) -> Tensor[]"
    ),
)
def loop_with_grad(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    needs: list[bool],
    output: int,
    body_key: str,
    chunk_rows: int,
    lead: list[int],
    port: int,
) -> list[Tensor]:
    found = body_of(body_key)
    ports = [] if port < 0 else [new_port()]
    with plain_mode():
        outputs = _Outputs(found.outputs, _output_shapes(found, row_inputs, lead))
        count = _count(row_inputs, found)
        if not count:
            return [*outputs.result(), *_Gradients(found, needs, row_inputs).result(), *ports]
        compiled = found.compiled_with_grad(chunks.sizes(chunks.equal(count, chunk_rows)), needs, output)
        return [*_run_with_gradients(compiled, found, needs, row_inputs, shared, chunk_rows, outputs), *ports]


@loop_with_grad.register_fake
def _(
    row_inputs: list[Tensor],
    shared: list[Tensor],
    needs: list[bool],
    output: int,
    body_key: str,
    chunk_rows: int,
    lead: list[int],
    port: int,
) -> list[Tensor]:
    ports = [] if port < 0 else [new_port()]
    return [
        *_output_fakes(body_of(body_key), row_inputs, lead),
        *gradient_fakes(row_inputs, shared, needs),
        *ports,
    ]


def whole(
    body: Body,
    lead: Sequence[int],
    needs: Sequence[bool],
    has_tangent: Sequence[bool],
    row_inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``loop_list`` gives, and ``loop_backward`` for it, of all rows at once: for who traces it.

    ``shared`` has the strides with which the body was traced.
    """
    flat = [x.contiguous() for x in _flat(row_inputs, body.row_metas)]
    present = [meta for meta, has in zip(body.outputs, has_tangent, strict=True) if has]
    given = [
        tangent if meta.is_sum else tangent.flatten(0, _rank(tangent, meta) - 1).contiguous()
        for meta, tangent in zip(present, tangents, strict=True)
    ]
    count = _count(row_inputs, body)
    outputs, gradients = body.with_gradients(needs, has_tangent, count, [*flat, *shared], given)
    shapes = _output_shapes(body, row_inputs, lead)
    needed = [x.shape for x, need in zip([*row_inputs, *shared], needs, strict=True) if need]
    return (
        [found.reshape(shape).contiguous() for found, shape in zip(outputs, shapes, strict=True)],
        [found.reshape(shape).contiguous() for found, shape in zip(gradients, needed, strict=True)],
    )


def _setup_loop(ctx: Any, inputs: tuple[Any, ...], output: Tensor | list[Tensor]) -> None:
    row_inputs, shared, ctx.body_key, _, ctx.chunk_rows, _ = inputs
    # Where nobody compiled the graph, its autograd graph has its body alive.
    ctx.body = body_of(ctx.body_key)
    ctx.n_row_inputs = len(row_inputs)
    ctx.save_for_backward(*row_inputs, *shared)
    ctx.set_materialize_grads(False)


def _backward_loop_list(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    row_inputs, shared = saved[: ctx.n_row_inputs], saved[ctx.n_row_inputs :]
    needs = [bool(need) for needs in ctx.needs_input_grad[:2] for need in needs]
    has_tangent = [grad is not None for grad in grads]
    tangents = [grad for grad in grads if grad is not None]
    if not tangents:
        return (None,) * 6
    found = iter(
        loop_backward(row_inputs, shared, tangents, has_tangent, needs, ctx.body_key, ctx.chunk_rows)
    )
    filled = [next(found) if need else None for need in needs]
    return filled[: ctx.n_row_inputs], filled[ctx.n_row_inputs :], None, None, None, None


def _setup_loop_with_grad(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    row_inputs, _, ctx.needs, ctx.output, body_key, _, _, ctx.port = inputs
    ctx.n_row_inputs = len(row_inputs)
    first = len(body_of(body_key).outputs)
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
            gradient = add_port_gradient(gradient, tangent, port_tangent)
        elif gradient is not None:
            gradient = None if tangent is None else scaled(gradient, tangent)
        filled.append(gradient)
    return filled[: ctx.n_row_inputs], filled[ctx.n_row_inputs :], None, None, None, None, None, None


def _backward_loop(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    return _backward_loop_list(ctx, [grad])


loop_list.register_autograd(_backward_loop_list, setup_context=_setup_loop)
loop.register_autograd(_backward_loop, setup_context=_setup_loop)
loop_with_grad.register_autograd(_backward_loop_with_grad, setup_context=_setup_loop_with_grad)
