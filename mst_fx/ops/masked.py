"""Attention whose scores are changed by tensors that no formula describes, step by step as the program has written it.

``mst_fx::masked_attention(query, key, value, tensors, hows, numbers, chunk, is_fused) -> output``
    a loop over chunks of queries. Of each the scores ``query @ keyᵀ`` are made, and what the program did to them is done in the same
    order and the same types. ``hows`` says what, with a number each; those of the first line take the next one of ``tensors``::

        "add" "subtract" "multiply" "divide"    "show": where(tensor, x, number)    "hide": where(tensor, number, x)    "sink": cat([x, tensor], -1)
        "plus" "times" "over"    "at least": max(x, number)    "tanh"    "softmax": without the sink's column    "float32": x.float(), …

    The tensors are ``[B or 1, H or 1, Q or 1, K or 1]`` or have fewer dimensions; a chunk reads its rows of them. They are there anyway;
    the scores of all heads are not. Nothing is known of what is in them: every chunk reads all keys.
    ``is_fused``: it was torch's fused attention, of one mask, in which a query that sees no key has 0. Query and key may have another
    type than the value, which is that of the output.
``mst_fx::masked_attention_backward(tangent, wanted, …) -> [dquery, dkey, dvalue, those of tensors that are wanted]``
    recomputes each chunk. Where several chunks or heads add to a gradient, it is summed in float32 at least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_fx.graph.sizes import sum_dtype
from mst_fx.masks.formula import AT_LEAST, SINK, SOFTMAX, TAKE_TENSORS
from mst_fx.ops.chunks import Chunk, Rows, equal
from mst_fx.torch_api.attention import empty_output
from mst_fx.torch_api.modes import outside_of_kernels, without_autocast

# Scores that are written out at once, if they are more than those of one chunk of one head of keys; on a GPU four times as many.
_MOST_SCORES = 2**24


@dataclasses.dataclass(frozen=True)
class _Masked:
    """The operands of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    tensors: list[Tensor]
    hows: list[str]
    numbers: list[float]
    chunk: int
    is_fused: bool

    def by_heads(self) -> Iterator[tuple[slice, slice, _Masked]]:
        """The call for some heads after others, where the scores of a chunk are many; and which heads of queries and keys these are."""
        heads, groups = self.query.shape[1], self.key.shape[1]
        each = heads // groups
        scores = self.query.shape[0] * each * min(self.chunk, self.query.shape[2]) * self.key.shape[2]
        most = 4 * _MOST_SCORES if self.query.is_cuda else _MOST_SCORES
        at_once = max(1, most // max(1, scores))
        for first in range(0, groups, at_once):
            few = slice(first, min(first + at_once, groups))
            many = slice(few.start * each, few.stop * each)
            query, key, value = self.query[:, many], self.key[:, few], self.value[:, few]
            tensors = [_of_heads(x, many) for x in self.tensors]
            yield many, few, dataclasses.replace(self, query=query, key=key, value=value, tensors=tensors)

    def chunks(self) -> Iterator[tuple[Chunk, Tensor, list[Tensor]]]:
        """Each chunk, its queries, and what it reads of the tensors."""
        for chunk in equal(self.query.shape[2], self.chunk):
            query = self.query.narrow(2, chunk.start, chunk.size)
            yield chunk, query, [_of_queries(x, chunk) for x in self.tensors]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor]) -> Tensor:
        """The output of one chunk, ``[B, H, end - start, D]``."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        # One that is added may hide all keys of a query by a finite number: of these fused kernels give wrong gradients.
        if self.is_fused and tensors[0].dtype == torch.bool:
            scale = self.numbers[0]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=tensors[0], scale=scale)
        wide = sum_dtype(query.dtype) if self.is_fused else query.dtype
        weights = torch.matmul(query.to(wide), key.to(wide).transpose(2, 3))
        given = iter(tensors)
        for how, number in zip(self.hows, self.numbers, strict=True):
            if how == SOFTMAX:
                weights = self._softmax(weights)[..., : key.shape[2]]
            else:
                weights = _changed(weights, how, number, next(given) if how in TAKE_TENSORS else None)
        return torch.matmul(weights.to(value.dtype), value)

    def _softmax(self, scores: Tensor) -> Tensor:
        if not self.is_fused:
            return torch.softmax(scores, -1)
        blind = (scores == float("-inf")).all(-1, keepdim=True)  # of minus infinity alone there is no softmax
        return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def _changed(x: Tensor, how: str, number: float, tensor: Any) -> Tensor:
    """Scores or weights after one step."""
    match how:
        case "add":
            return x + tensor  # type: ignore[no-any-return]
        case "subtract":
            return x - tensor  # type: ignore[no-any-return]
        case "multiply":
            return x * tensor  # type: ignore[no-any-return]
        case "divide":
            return x / tensor  # type: ignore[no-any-return]
        case "show":
            return x.masked_fill(~tensor, number)
        case "hide":
            return x.masked_fill(tensor, number)
        case "plus":
            return x + number
        case "times":
            return x * number
        case "over":
            return x / number
        case "tanh":
            return torch.tanh(x)
    if how == AT_LEAST:
        return torch.max(x, x.new_full((), number))
    if how == SINK:
        return torch.cat([x, tensor.expand(*x.shape[:3], 1)], -1)
    dtype: torch.dtype = getattr(torch, how)
    return x.to(dtype)


def _of_heads(x: Tensor, heads: slice) -> Tensor:
    """What some heads read of a tensor, or add to its gradient."""
    return x if x.ndim < 3 or x.shape[-3] == 1 else x.narrow(-3, heads.start, heads.stop - heads.start)


def _of_queries(x: Tensor, chunk: Chunk) -> Tensor:
    """What a chunk reads of a tensor, or adds to its gradient."""
    return x if x.ndim < 2 or x.shape[-2] == 1 else x.narrow(-2, chunk.start, chunk.size)


_SCHEMA = "Tensor query, Tensor key, Tensor value, Tensor[] tensors, str[] hows, float[] numbers, int chunk, bool is_fused"


@torch.library.custom_op("mst_fx::masked_attention", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def masked_attention(*args: Any) -> Tensor:
    call = _Masked(*args)
    out = empty_output(call.query, width=call.value.shape[3], dtype=call.value.dtype)
    with without_autocast():
        for heads, _, part in call.by_heads():
            result = Rows(out[:, heads], dim=2)
            for chunk, query, tensors in part.chunks():
                result.put(chunk, part.attend(query, part.key, part.value, tensors))
    return out


@masked_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return empty_output(query, width=value.shape[3], dtype=value.dtype)


@torch.library.custom_op(
    "mst_fx::masked_attention_backward",
    mutates_args=(),
    schema=f"(Tensor tangent, bool[] wanted, {_SCHEMA}) -> Tensor[]",
)
def masked_attention_backward(tangent: Tensor, wanted: list[bool], *args: Any) -> list[Tensor]:
    call = _Masked(*args)
    grad_query = empty_output(call.query)
    keys, values = (empty_output(x, dtype=sum_dtype(x.dtype)).zero_() for x in (call.key, call.value))
    of_tensors = [
        x.new_zeros(x.shape, dtype=_dtype_of_gradient(x, call.query)) if want else None
        for x, want in zip(call.tensors, wanted, strict=True)
    ]
    with outside_of_kernels(), without_autocast():
        for heads, few, part in call.by_heads():
            sums = [None if x is None else _of_heads(x, heads) for x in of_tensors]
            result = Rows(grad_query[:, heads], dim=2)
            _add_gradients(part, tangent[:, heads], result, [keys[:, few], values[:, few]], sums)
    results = [keys.to(call.key.dtype), values.to(call.value.dtype)]
    results += [
        total.to(x.dtype) for x, total in zip(call.tensors, of_tensors, strict=True) if total is not None
    ]
    return [grad_query, *results]


def _dtype_of_gradient(x: Tensor, query: Tensor) -> torch.dtype:
    """The type to sum a gradient in: its own, where each chunk of some heads has its part for itself."""
    return x.dtype if x.shape[-3:-1] == query.shape[1:3] else sum_dtype(x.dtype)


def _add_gradients(
    call: _Masked, tangent: Tensor, grad_query: Rows, shared: list[Tensor], of_tensors: list[Tensor | None]
) -> None:
    """Writes the gradient of the query, and adds to ``shared``, those of key and value, and to those of tensors that are wanted."""
    for chunk, query, tensors in call.chunks():
        leaves = [x.detach().requires_grad_() for x in (query, call.key, call.value)]
        parts = [
            x.detach().requires_grad_(total is not None) for x, total in zip(tensors, of_tensors, strict=True)
        ]
        out = call.attend(leaves[0], leaves[1], leaves[2], parts)
        asked = [
            (x, _of_queries(total, chunk))
            for x, total in zip(parts, of_tensors, strict=True)
            if total is not None
        ]
        part = tangent.narrow(2, chunk.start, chunk.size)
        grads = torch.autograd.grad(out, [*leaves, *(x for x, _ in asked)], part)
        grad_query.put(chunk, grads[0])
        for total, grad in zip([*shared, *(total for _, total in asked)], grads[1:], strict=True):
            total.add_(grad)
        del query, tensors, leaves, parts, asked, out, grads


@masked_attention_backward.register_fake
def _(
    tangent: Tensor,
    wanted: list[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    grads = [x.new_empty(x.shape) for x, want in zip(tensors, wanted, strict=True) if want]
    return [*map(empty_output, (query, key, value)), *grads]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, tensors, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *tensors)


def _backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
    query, key, value, *tensors = ctx.saved_tensors
    wanted = [bool(want) for want in ctx.needs_input_grad[3]]
    grads = masked_attention_backward(tangent, wanted, query, key, value, tensors, *ctx.rest)
    found = iter(grads[3:])
    of_tensors: list[Any] = [next(found) if want else None for want in wanted]
    return (*grads[:3], of_tensors, *[None] * len(ctx.rest))


masked_attention.register_autograd(_backward, setup_context=_setup)
