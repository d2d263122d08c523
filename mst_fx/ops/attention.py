"""Attention with a mask that is never made.

``mst_fx::mask_reach(keys, queries, masks, …) -> tables, starts``
    once a step: for each mask the keys in reach of each chunk of queries (:func:`mst_fx.masks.reach.reach_of`), as a
    CPU tensor. All masks of a graph travel in one copy: one synchronisation a step.
``mst_fx::attention(query, key, value, keys, queries, tables, starts, known, …) -> output, sums``
    takes one of torch's kernels where the mask turns out to be causal, all true, or a window within spans
    of tokens (:mod:`mst_fx.torch_api.attention`). Otherwise it is a loop over chunks of queries: builds the mask of a
    chunk from the vectors and runs ``scaled_dot_product_attention`` on the keys in reach. Its derivative is
``mst_fx::attention_backward(tangent, output, sums, …) -> dquery, dkey, dvalue``
    which runs the kernel's backward pass, or recomputes each chunk. Memory is O(chunk x reach), and compute
    follows what the mask lets through.
``mst_fx::attention_backward_over(…, over_tangent, over_key, over_value) -> dquery, dkey, dvalue``
    the same, where the gradient of the query is written over the tangent, those of keys and values over them, as far as they are given a
    second time: then the result is empty. Nobody calls it but :mod:`mst_fx.torch_api.overwriting`.

``query`` is ``[B, H, Q, D]``, ``key`` and ``value`` are ``[B, H or fewer, K, D]`` (a chunk expands grouped heads
for itself), ``sums`` ``[B, H, Q]`` the logarithms of the softmax's sums, which only the kernels make and read.

``sinks`` ``[H]`` (gpt-oss) are one more score for each query of a head, to a key whose value is 0. With p = exp(sink - sums), what a
query gives to it, and ``sums`` of all scores, the sink's among them::

    output = attention without it · (1 - p);    dsink = -Σ p · <tangent, output>

A kernel knows nothing of them: its output is multiplied in place, by a vector a head, and its backward pass is right when it is given
that output and those sums, for it makes its softmax of the sums and subtracts <tangent, output>. dsink is made outside of the operator,
of ``tangent``, ``output`` and ``sums``: in a compiled graph of fused arithmetic and one sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_fx.graph.sizes import sum_dtype
from mst_fx.masks import formula, reach
from mst_fx.masks.reach import BLIND, CAUSAL, FULL, HEADER, SPANS, WHOLE, Vectors
from mst_fx.ops.chunks import Reaching, Rows, Window, WindowSum, by_reach
from mst_fx.torch_api.attention import Dense, Kernel, Spans, empty_output, is_fused
from mst_fx.torch_api.modes import outside_of_kernels, without_autocast

# Spans of one call: the kernels' grids are no larger.
_MOST_SPANS = 65535
# Scores of a chunk that are written out at once, if there are sinks: some 16 bytes each.
_MOST_SCORES = 2**26


@torch.library.custom_op(
    "mst_fx::mask_reach",
    mutates_args=(),
    schema="(Tensor[] keys, Tensor[] queries, str[] masks, SymInt q, SymInt k, int chunk, bool[] finite)"
    " -> (Tensor, Tensor)",
)
def mask_reach(
    keys: list[Tensor],
    queries: list[Tensor],
    masks: list[str],
    q: int,
    k: int,
    chunk: int,
    finite: list[bool],
) -> tuple[Tensor, Tensor]:
    """The table of each mask's reach, int64 ``[masks, HEADER + chunks, 3]`` on the CPU, and its starts, int32
    ``[masks, B·Q + 1]`` on the vectors' device."""
    vectors = Vectors(keys, queries)
    parsed = map(formula.parse, masks)
    found = [reach.reach_of(m, vectors, q, k, chunk, f) for m, f in zip(parsed, finite, strict=True)]
    size = _batch(keys, queries) * q + 1
    starts = [F.pad(one.starts, (0, size - one.starts.numel())) for one in found]
    return torch.stack([one.table for one in found]).cpu(), torch.stack(starts)


def _batch(keys: list[Tensor], queries: list[Tensor]) -> Any:
    return max((x.shape[0] for x in (*keys, *queries)), default=1)


@mask_reach.register_fake
def _(
    keys: list[Tensor],
    queries: list[Tensor],
    masks: list[str],
    q: Any,
    k: Any,
    chunk: int,
    finite: list[bool],
) -> tuple[Tensor, Tensor]:
    height = HEADER + (q + chunk - 1) // chunk
    device = (*keys, *queries)[0].device
    starts = torch.empty((len(masks), _batch(keys, queries) * q + 1), dtype=torch.int32, device=device)
    return torch.empty((len(masks), height, 3), dtype=torch.int64, device="cpu"), starts


@dataclasses.dataclass(frozen=True)
class Call:
    """The operands of one call.

    Attributes:
        keys, queries: the vectors the mask names, ``[B or 1, K]`` and ``[B or 1, Q]``.
        tables, starts: what ``mask_reach`` gave; None where ``known`` says it.
        known: the table of the mask's reach, flat, known since the graph was compiled.
        mask: the formula, as text (:func:`mst_fx.masks.formula.parse`).
        which: the mask's place in ``tables``.
        chunk: queries a chunk.
        scale: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask, as in Gemma 2; 0: not.
        fill: what is added to a masked score; 0: it does not count at all.
        cap: float64, one element: a number that changes from step to step, by which the softcap is multiplied.
        sinks: ``[H]``: one more score, whose value is 0, for all queries of a head.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: list[Tensor]
    queries: list[Tensor]
    tables: Tensor | None
    starts: Tensor | None
    known: list[int]
    mask: str
    which: int
    chunk: int
    scale: float
    softcap: float
    fill: float
    cap: Tensor | None
    sinks: Tensor | None

    @property
    def most_scores(self) -> int | None:
        """How many scores of a chunk of queries are written out at once, if it is more than those of one head; None: none are."""
        return None if self.sinks is None else _MOST_SCORES

    @functools.cached_property
    def _table(self) -> list[list[int]]:
        if self.tables is not None:
            table: list[list[int]] = self.tables[self.which].tolist()
            return table
        return [self.known[i : i + 3] for i in range(0, len(self.known), 3)]

    @property
    def _is_native(self) -> bool:
        """Whether torch's own attention has the form of the mask."""
        return self._table[0][0] in (CAUSAL, FULL) and not self.softcap

    @functools.cached_property
    def kernel(self) -> Kernel | None:
        """What runs all queries at once and makes ``sums``; None: chunks do."""
        (form, left, right), (spans, longest, even) = self._table[:HEADER]
        if self._is_native and is_fused(self.query, self.value):
            return Dense(form == CAUSAL, self.scale)
        if form != SPANS or self.softcap or not Spans.takes(self.query, self.value):
            return None
        batch, size = self.query.shape[0], self.query.shape[2]
        device = self.query.device
        offsets = torch.arange(0, batch * size, size, dtype=torch.int32, device=device)[:, None]
        if even:
            starts = offsets + torch.arange(0, size, longest, dtype=torch.int32, device=device)
        elif self.starts is None:
            return None
        else:
            starts = self.starts[self.which, :spans]
            if _batch(self.keys, self.queries) < batch:
                starts = offsets + starts
        starts = F.pad(starts.flatten(), (0, 1), value=batch * size)
        if starts.numel() > _MOST_SPANS:
            return None
        return Spans(starts, longest, left, right, self.scale)

    def chunks(self) -> Iterator[Reaching]:
        """Chunks of queries, with a window of the keys that they reach."""
        size = self.query.shape[2]
        if self._is_native and self.sinks is None:
            return iter([Reaching(0, size, window=Window(0, self.key.shape[2], WHOLE))])
        return by_reach(size, self.chunk, self._table[HEADER:])

    def operands(self, chunk: Reaching) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = slice(chunk.start, chunk.end), slice(chunk.window.first, chunk.window.last)
        return self.query[:, :, queries], self.key[:, :, keys], self.value[:, :, keys]

    def by_heads(self) -> Iterator[tuple[slice, slice, Call]]:
        """This call; or one after the other those of some heads, where with sinks the scores of a chunk are written out and large.
        Before each the heads of queries, and those of keys and values, that it has."""
        heads, groups = self.query.shape[1], self.key.shape[1]
        each = heads // groups
        scores = self.query.shape[0] * each * min(self.chunk, self.query.shape[2]) * self.key.shape[2]
        most = self.most_scores
        at_once = groups if most is None else max(1, most // max(1, scores))
        if at_once >= groups:
            yield slice(0, heads), slice(0, groups), self
            return
        for first in range(0, groups, at_once):
            few = slice(first, min(first + at_once, groups))
            many = slice(few.start * each, few.stop * each)
            yield many, few, dataclasses.replace(self, **self.of_heads(many, few))

    def of_heads(self, many: slice, few: slice) -> dict[str, Any]:
        """The operands that have heads: those of some heads of queries, and of keys and values."""
        sinks = None if self.sinks is None else self.sinks[many]
        query, key, value = self.query[:, many], self.key[:, few], self.value[:, few]
        return {"query": query, "key": key, "value": value, "sinks": sinks}

    def attend(
        self, chunk: Reaching, query: Tensor, key: Tensor, value: Tensor, sums: Rows | None = None
    ) -> Tensor:
        """The output of one chunk, ``[B, H, end - start, D]``.

        Args:
            sums: where the logarithms of the softmax's sums go, if they are asked for: of scores that are written out.
        """
        mask = self._chunk_mask(chunk)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        # Fused kernels give wrong gradients for a query of which all scores are masked by a finite number:
        # the logarithm of its sum drowns in that number.
        if not self.softcap and self.sinks is None and chunk.window.kind != BLIND:
            is_causal = self._is_native and self._table[0][0] == CAUSAL
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scale
            )
        # Rounded to 16 bits they lose what models with sinks keep (Flint's reach tens); a kernel does not round them either.
        wide = query.dtype if self.sinks is None else sum_dtype(query.dtype)
        scores = torch.matmul(query.to(wide), key.to(wide).transpose(2, 3)) * self.scale
        if self.softcap:
            cap = self.softcap if self.cap is None else self.softcap * self.cap
            scores = torch.tanh(scores / cap) * cap
        hidden = ~mask if mask is not None and mask.dtype == torch.bool else None
        if hidden is not None:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        if self.sinks is not None:
            column = self.sinks[:, None, None].to(sum_dtype(scores.dtype))
            scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], -1)
        if sums is not None:
            sums.put(chunk, torch.logsumexp(scores, -1))
        weights = torch.softmax(scores, -1, dtype=sum_dtype(scores.dtype)).to(query.dtype)
        weights = weights[..., : key.shape[2]]
        if hidden is not None:  # a query that sees no key: 0, as of fused kernels
            weights = weights.masked_fill(hidden, 0.0)
        return torch.matmul(weights, value)

    def _chunk_mask(self, chunk: Reaching) -> Tensor | None:
        """``[b, 1, end - start, last - first]``: Boolean (True: may see), or what is added to the scores."""
        found = self.allowed(chunk)
        if found is None or self.fill == 0.0:
            return found
        return self.query.new_zeros(()).where(found, self.fill)

    def allowed(self, chunk: Reaching) -> Tensor | None:
        """``[b, 1, end - start, last - first]``: True where a query may see a key; None: everywhere."""
        window = chunk.window
        if window.kind == WHOLE:
            return None
        vectors, device = Vectors(self.keys, self.queries), self.query.device
        mask, keys = formula.parse(self.mask), (window.first, window.last)
        found = reach.allowed(mask, vectors, chunk.start, chunk.end, *keys, device)
        return found.expand(-1, chunk.size, window.last - window.first)[:, None]


def as_promised(x: Tensor) -> Tensor:
    """``x``, or a copy of it in the memory order of :func:`empty_output`."""
    return x if x.transpose(1, 2).is_contiguous() else empty_output(x).copy_(x)


def outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return empty_output(query, width=value.shape[3]), query.new_empty(
        query.shape[:3], dtype=sum_dtype(query.dtype)
    )


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor[] keys, Tensor[] queries, Tensor? tables, Tensor? starts,"
    " int[] known, str mask, int which, int chunk, float scale, float softcap, float fill, Tensor? cap,"
    " Tensor? sinks"
)


@torch.library.custom_op("mst_fx::attention", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def attention(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    operands = (call.query, call.key, call.value)
    with without_autocast():
        if call.kernel is not None:
            out, sums = call.kernel.forward(*operands)
            out, sums = as_promised(out), sums.contiguous()
            return out, sums if call.sinks is None else _with_sinks(out, sums, call.sinks)
        out, sums = outputs(call.query, call.value)
        for heads, _, part in call.by_heads():
            _attend_by_chunks(part, out[:, heads], sums[:, heads])
    return out, sums


def _with_sinks(out: Tensor, sums: Tensor, sinks: Tensor) -> Tensor:
    """The sums with the sinks in them; ``out`` becomes, in its place, what it is with them."""
    total = torch.logaddexp(sums, sinks.to(sums.dtype)[:, None])
    out.mul_(torch.exp(sums - total)[..., None])
    return total


def _attend_by_chunks(call: Call, out: Tensor, sums: Tensor) -> None:
    """Fills ``out``, and ``sums`` where there are sinks, whose gradient and backward pass ask for them."""
    result, totals = Rows(out, dim=2), Rows(sums, dim=2) if call.sinks is not None else None
    for chunk in call.chunks():
        if not chunk.window.is_empty:
            result.put(chunk, call.attend(chunk, *call.operands(chunk), totals))
            continue
        result.put_nothing(chunk)
        if totals is not None and call.sinks is not None:
            totals.put(chunk, call.sinks[:, None])


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return outputs(query, value)


_BACKWARD_SCHEMA = f"Tensor tangent, Tensor out, Tensor sums, {_SCHEMA}"


@torch.library.custom_op(
    "mst_fx::attention_backward",
    mutates_args=(),
    schema=f"({_BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    tangent: Tensor, out: Tensor, sums: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    found = _gradients(Call(*args), tangent, out, sums, (None, None, None))
    return as_promised(found[0]), as_promised(found[1]), as_promised(found[2])


def _gradients(
    call: Call, tangent: Tensor, out: Tensor, sums: Tensor, over: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value.

    Args:
        over: what each is written to, where that is not None: the memory of ``tangent``, ``key`` and ``value``.
    """
    query, key, value = call.query, call.key, call.value
    with outside_of_kernels(), without_autocast():
        if call.kernel is not None:
            with torch.no_grad():
                return call.kernel.backward(tangent, query, key, value, out, sums, over)
        parts = list(call.by_heads())
        if len(parts) == 1:
            return _gradients_by_chunks(call, tangent, over)
        grads = [empty_output(x) if y is None else y for x, y in zip((query, key, value), over, strict=True)]
        for heads, few, part in parts:
            where = [grad[:, of] for grad, of in zip(grads, (heads, few, few), strict=True)]
            _gradients_by_chunks(part, tangent[:, heads], where)
        return grads[0], grads[1], grads[2]


def _gradients_by_chunks(
    call: Call, tangent: Tensor, over: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    # A chunk of the tangent is read once: the gradient of its queries may take its place.
    grad_query = Rows(empty_output(call.query) if over[0] is None else over[0], dim=2)
    # Every chunk adds to the keys it reaches: in float32, so that many chunks lose nothing.
    grad_key, grad_value = (
        WindowSum(empty_output(x, dtype=sum_dtype(x.dtype)), x.dtype, dim=2) for x in (call.key, call.value)
    )
    for chunk in call.chunks():
        if chunk.window.is_empty:
            grad_query.put_nothing(chunk)
            continue
        query, key, value = leaves = [x.detach().requires_grad_() for x in call.operands(chunk)]
        part = tangent[:, :, chunk.start : chunk.end]
        grads = torch.autograd.grad(call.attend(chunk, query, key, value), leaves, part)
        grad_query.put(chunk, grads[0])
        grad_key.add(chunk, grads[1])
        grad_value.add(chunk, grads[2])
        del leaves, query, key, value, grads
    return grad_query.result(), grad_key.result(over[1]), grad_value.result(over[2])


@attention_backward.register_fake
def _(
    tangent: Tensor, out: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(query), empty_output(key), empty_output(value)


@torch.library.custom_op(
    "mst_fx::attention_backward_over",
    mutates_args=("over_tangent", "over_key", "over_value"),
    schema=f"({_BACKWARD_SCHEMA}, Tensor(a!)? over_tangent, Tensor(b!)? over_key, Tensor(c!)? over_value)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),  # no eager call has called it so
)
def attention_backward_over(
    tangent: Tensor, out: Tensor, sums: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    over = args[-3:]
    found = _gradients(Call(*args[:-3]), tangent, out, sums, over)
    q, k, v = (as_promised(x) if y is None else _nothing(y) for x, y in zip(found, over, strict=True))
    return q, k, v


@attention_backward_over.register_fake
def _(
    tangent: Tensor, out: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grads = zip((query, key, value), rest[-3:], strict=True)
    q, k, v = (empty_output(x) if over is None else _nothing(over) for x, over in grads)
    return q, k, v


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, keys, queries, tables, starts, *ctx.rest, cap, sinks = inputs
    ctx.counts = (len(keys), len(queries), tables is not None)
    of_reach = [] if tables is None else [tables, starts]
    ctx.save_for_backward(*output, cap, sinks, query, key, value, *keys, *queries, *of_reach)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, tangent: Tensor, _: Any) -> tuple[Any, ...]:
    out, sums, cap, sinks, query, key, value, *vectors = ctx.saved_tensors
    keys, queries, has_tables = ctx.counts
    tables, starts = vectors[-2:] if has_tables else (None, None)
    parts = (query, key, value, vectors[:keys], vectors[keys : keys + queries], tables, starts)
    # First: the gradient of the query may be written over the tangent.
    of_sinks = _sinks_gradient(tangent, out, sums, sinks) if ctx.needs_input_grad[-1] else None
    grads = attention_backward(tangent, out, sums, *parts, *ctx.rest, cap, sinks)
    known, *others = ctx.rest
    # torch takes a list of ints for one value, but an empty one for a list of tensors.
    nothing: list[Any] = [None if known else [], *[None] * len(others)]
    return (*grads, [None] * keys, [None] * queries, None, None, *nothing, None, of_sinks)


def _sinks_gradient(tangent: Tensor, out: Tensor, sums: Tensor, sinks: Tensor) -> Tensor:
    """``[H]``. In a graph this is arithmetic that a compiler fuses: it reads tangent and output once, and makes ``[B, H, Q]``."""
    taken = torch.exp(sinks.to(sums.dtype)[:, None] - sums)
    return -(taken * (tangent.to(sums.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)


attention.register_autograd(_backward, setup_context=_setup)
