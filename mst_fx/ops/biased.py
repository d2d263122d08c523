"""Attention with a bias that is never made: what is added to a score is a formula of its positions.

``mst_fx::biased_attention(query, key, value, of_keys, of_distances, …) -> output, sums``
    a loop over chunks of queries as that of :mod:`mst_fx.ops.attention`. To the score of query q and key k it adds::

        of_keys[b, h, k]                    a number for each key: ALiBi as Bloom and MPT write it
        of_distances[b, h, k - q + Q - 1]   a number for each distance: ALiBi, T5's table, and whatever is made of k - q alone

    ``of_keys`` is ``[B or 1, H or 1, K]``, ``of_distances`` ``[B or 1, H or 1, Q + K - 1]``. How distances become biases (a table, a
    slope a head) is in the graph still, for Q + K - 1 distances instead of Q x K: so is the gradient of that table.
``mst_fx::biased_attention_backward(tangent, output, sums, …) -> dquery, dkey, dvalue, d_of_keys, d_of_distances``
    recomputes each chunk. The gradients of the biases are summed in float32 at least; empty where nobody wants them.

``hiding`` says what becomes of a score that the mask hides with a finite number, which shows where a query sees no key, and all count
alike: "adds" the number to score and bias; "instead of the bias"; "instead of the score"; "at least" that number, once it was added.
Half of a gradient is lost where a score is equal to it (``torch.max``). If ``fill`` is 0 they do not count at all; "by a bias" then says
that a bias may hide keys by a number, and the scores of a chunk are written out: for a query of which all are that low fused kernels give
wrong gradients.

``sums`` are those of :mod:`mst_fx.ops.attention`, where no bias is left and a kernel runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_fx.graph.sizes import sum_dtype
from mst_fx.masks.formula import AT_LEAST, BY_BIAS, NO_BIAS, NO_SCORE
from mst_fx.masks.reach import BLIND, CAUSAL, HEADER, WHOLE
from mst_fx.ops.attention import Call, as_promised, outputs
from mst_fx.ops.chunks import Reaching, Rows, Window, by_reach
from mst_fx.torch_api.attention import Kernel, Weighted, empty_output
from mst_fx.torch_api.modes import outside_of_kernels, without_autocast


@dataclasses.dataclass(frozen=True)
class _Biased(Call):
    """The operands of one call: those of attention, two biases, and how scores are hidden."""

    of_keys: Tensor | None
    of_distances: Tensor | None
    hiding: str

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        of_keys: Tensor | None,
        of_distances: Tensor | None,
        *rest: Any,
    ) -> _Biased:
        *plain, hiding = rest
        return _Biased(query, key, value, *plain, None, None, of_keys, of_distances, hiding)  # type: ignore[call-arg]

    @property
    def has_bias(self) -> bool:
        return self.of_keys is not None or self.of_distances is not None

    @functools.cached_property
    def kernel(self) -> Kernel | None:
        if not self.has_bias:
            return super().kernel
        bias = self.of_keys
        is_plain = self._is_native and self.hiding != BY_BIAS and self.of_distances is None
        if not is_plain or bias is None or not Weighted.takes(self.query, self.key, self.value, bias):
            return None
        return Weighted(bias, self._table[0][0] == CAUSAL, self.scale)

    @property
    def most_scores(self) -> int:
        """A kernel of few heads does not fill a GPU: 64 queries of a head are one of its blocks. Below S² of 8,192 tokens."""
        return 2**26 - 1 if self.query.is_cuda else 2**24

    def of_heads(self, many: slice, few: slice) -> dict[str, Any]:
        biases = {"of_keys": self.of_keys, "of_distances": self.of_distances}
        return super().of_heads(many, few) | {name: _heads_of(bias, many) for name, bias in biases.items()}

    def chunks(self) -> Iterator[Reaching]:
        size, keys = self.query.shape[2], self.key.shape[2]
        count = -(-size // self.chunk)
        return by_reach(size, self.chunk, self._table[HEADER:] or [[0, keys, WHOLE]] * count)

    def distances(self, chunk: Reaching) -> Reaching:
        """The chunk with, for a window, the places in ``of_distances`` that it reads."""
        window = chunk.window
        first = window.first - chunk.end + self.query.shape[2]
        last = first + window.last - window.first + chunk.size - 1
        return dataclasses.replace(chunk, window=Window(first, last, window.kind))

    def biases(self, chunk: Reaching) -> tuple[Tensor | None, Tensor | None]:
        """What a chunk reads of both."""
        return _part(self.of_keys, chunk.window), _part(self.of_distances, self.distances(chunk).window)

    def attend_biased(
        self, chunk: Reaching, operands: list[Tensor], of_keys: Tensor | None, of_distances: Tensor | None
    ) -> Tensor:
        """The output of one chunk, ``[B, H, end - start, D]``."""
        query, key, value = operands
        if of_keys is None and of_distances is None and chunk.window.kind != BLIND:
            return self.attend(chunk, query, key, value)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        bias = None if of_keys is None else of_keys[:, :, None]
        if of_distances is not None:
            keys = chunk.window.last - chunk.window.first
            by_distance = of_distances.unfold(2, keys, 1).flip(2)
            bias = by_distance if bias is None else bias + by_distance
        allowed = self.allowed(chunk)
        is_fused = (
            not self.softcap and chunk.window.kind != BLIND and self.hiding != BY_BIAS and bias is not None
        )
        if is_fused and bias.dtype == query.dtype:  # type: ignore[union-attr]
            hidden = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))  # type: ignore[union-attr]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=hidden, scale=self.scale)
        # With a wider bias scores are as wide: eager attention rounds them once, behind the bias, or (in a kernel) never.
        wide = query.dtype if bias is None else torch.promote_types(query.dtype, bias.dtype)
        scores = torch.matmul(query.to(wide), key.to(wide).transpose(2, 3)) * self.scale
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = self._weights(scores, bias, allowed).to(query.dtype)
        return torch.matmul(weights, value)

    def _weights(self, scores: Tensor, bias: Tensor | None, allowed: Tensor | None) -> Tensor:
        """The softmax of scores with their bias, of those that are allowed."""
        fill = self.fill or torch.finfo(scores.dtype).min
        if bias is not None:
            is_instead = allowed is not None and self.hiding == NO_BIAS
            scores = scores + (bias.masked_fill(~allowed, 0.0) if is_instead else bias)  # type: ignore[operator]
        if allowed is not None and self.hiding == BY_BIAS:
            blind = ~allowed.any(-1, keepdim=True)  # of minus infinity alone there is no softmax
            scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(blind, 0.0)
        elif allowed is not None and (self.fill == 0.0 or self.hiding == NO_SCORE):
            scores = scores.masked_fill(~allowed, fill)
        elif allowed is not None:
            scores = scores + torch.zeros((), dtype=scores.dtype, device=scores.device).where(allowed, fill)
        if allowed is not None and self.hiding == AT_LEAST:
            scores = torch.max(scores, scores.new_full((), fill))
        weights = torch.softmax(scores, -1, dtype=sum_dtype(scores.dtype))
        # A query that sees no key: 0, as of fused kernels.
        return weights.masked_fill(~allowed, 0.0) if allowed is not None and self.fill == 0.0 else weights


def _heads_of(bias: Tensor | None, heads: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[1] == 1 else bias[:, heads]


def _part(bias: Tensor | None, window: Window) -> Tensor | None:
    return None if bias is None else bias[:, :, window.first : window.last]


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? of_keys, Tensor? of_distances, Tensor[] keys, Tensor[] queries,"
    " Tensor? tables, Tensor? starts, int[] known, str mask, int which, int chunk, float scale, float softcap,"
    " float fill, str hiding"
)


@torch.library.custom_op(
    "mst_fx::biased_attention", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)"
)
def biased_attention(*args: Any) -> tuple[Tensor, Tensor]:
    call = _Biased.of(*args)
    with without_autocast():
        if call.kernel is not None:
            out, sums = call.kernel.forward(call.query, call.key, call.value)
            return as_promised(out), sums.contiguous()
        out, sums = outputs(call.query, call.value)
        for heads, _, part in call.by_heads():
            assert isinstance(part, _Biased)
            result = Rows(out[:, heads], dim=2)
            for chunk in part.chunks():
                if chunk.window.is_empty:
                    result.put_nothing(chunk)
                else:
                    operands = list(part.operands(chunk))
                    result.put(chunk, part.attend_biased(chunk, operands, *part.biases(chunk)))
    return out, sums


@biased_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return outputs(query, value)


@torch.library.custom_op(
    "mst_fx::biased_attention_backward",
    mutates_args=(),
    schema=f"(Tensor tangent, Tensor out, Tensor sums, bool[] wanted, {_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def biased_attention_backward(
    tangent: Tensor, out: Tensor, sums: Tensor, wanted: list[bool], *args: Any
) -> tuple[Tensor, ...]:
    call = _Biased.of(*args)
    operands = (call.query, call.key, call.value)
    biases = [x if want else None for x, want in zip((call.of_keys, call.of_distances), wanted, strict=True)]
    with outside_of_kernels(), without_autocast():
        # The kernel gives the bias no gradient; chunks need nothing of what it gave.
        if call.kernel is not None and not any(x is not None for x in biases):
            with torch.no_grad():
                found = call.kernel.backward(tangent, *operands, out, sums)
            return (*map(as_promised, found), *(call.query.new_empty(0) for _ in biases))
        grad_query = empty_output(call.query)
        keys, values = (empty_output(x, dtype=sum_dtype(x.dtype)).zero_() for x in operands[1:])
        sums_of = [None if x is None else x.new_zeros(x.shape, dtype=sum_dtype(x.dtype)) for x in biases]
        for heads, few, part in call.by_heads():
            assert isinstance(part, _Biased)
            totals = [keys[:, few], values[:, few], *(_heads_of(x, heads) for x in sums_of)]
            _add_gradients(part, tangent[:, heads], grad_query[:, heads], totals)
        results = [keys.to(call.key.dtype), values.to(call.value.dtype)]
        given = (call.of_keys, call.of_distances)
        results += [
            call.query.new_empty(0) if total is None else total.to(x.dtype)  # type: ignore[union-attr]
            for total, x in zip(sums_of, given, strict=True)
        ]
        return grad_query, *results


def _add_gradients(call: _Biased, tangent: Tensor, grad_query: Tensor, totals: list[Tensor | None]) -> None:
    """Writes the gradient of the query, and adds to those of key, value and, where they are wanted, of the biases."""
    result = Rows(grad_query, dim=2)
    for chunk in call.chunks():
        if chunk.window.is_empty:
            result.put_nothing(chunk)
            continue
        operands = [x.detach().requires_grad_() for x in call.operands(chunk)]
        biases = [
            x if x is None else x.detach().requires_grad_(total is not None)
            for x, total in zip(call.biases(chunk), totals[2:], strict=True)
        ]
        places = [chunk, chunk, chunk, call.distances(chunk)]
        leaves = [*operands[1:], *biases]
        asked = [
            (x, t, p)
            for x, t, p in zip(leaves, totals, places, strict=True)
            if x is not None and t is not None
        ]
        out = call.attend_biased(chunk, operands, biases[0], biases[1])
        part = tangent[:, :, chunk.start : chunk.end]
        grads = torch.autograd.grad(out, [operands[0], *(x for x, _, _ in asked)], part)
        result.put(chunk, grads[0])
        for grad, (_, total, place) in zip(grads[1:], asked, strict=True):
            window = place.window
            total.narrow(2, window.first, window.last - window.first).add_(grad)
        del operands, biases, leaves, asked, out, grads


@biased_attention_backward.register_fake
def _(
    tangent: Tensor,
    out: Tensor,
    sums: Tensor,
    wanted: list[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_keys: Tensor | None,
    of_distances: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    biases = (of_keys, of_distances)
    grads = [
        query.new_empty(0) if x is None or not want else x.new_empty(x.shape)
        for x, want in zip(biases, wanted, strict=True)
    ]
    return (*map(empty_output, (query, key, value)), *grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, of_keys, of_distances, keys, queries, tables, starts, *ctx.rest = inputs
    ctx.counts = (len(keys), len(queries))
    ctx.save_for_backward(*output, query, key, value, of_keys, of_distances, tables, starts, *keys, *queries)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, tangent: Tensor, _: Any) -> tuple[Any, ...]:
    out, sums, query, key, value, of_keys, of_distances, tables, starts, *vectors = ctx.saved_tensors
    keys, queries = ctx.counts
    wanted = list(ctx.needs_input_grad[3:5])
    biases = (of_keys, of_distances)
    parts = (query, key, value, *biases, vectors[:keys], vectors[keys : keys + queries], tables, starts)
    *grads, first, second = biased_attention_backward(tangent, out, sums, wanted, *parts, *ctx.rest)
    of_biases = [grad if want else None for grad, want in zip((first, second), wanted, strict=True)]
    known, *others = ctx.rest
    # torch takes a list of ints for one value, but an empty one for a list of tensors.
    nothing: list[Any] = [None if known else [], *[None] * len(others)]
    return (*grads, *of_biases, [None] * keys, [None] * queries, None, None, *nothing)


biased_attention.register_autograd(_backward, setup_context=_setup)
