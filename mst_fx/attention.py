"""Attention with a mask that is never made: a loop over chunks of queries.

``mst_fx::mask_reach(keys, queries, masks, …) -> reaches``
    once a step: for each mask and each chunk of queries, the keys in reach (:func:`mst_fx.masks.reach`), as
    CPU tensors. All masks of a graph travel in one copy: one synchronisation a step.
``mst_fx::attention(query, key, value, keys, queries, reach, known, …) -> output``
    builds the mask of a chunk from the vectors, runs ``scaled_dot_product_attention`` on the keys in reach,
    and saves its inputs only; its derivative is
``mst_fx::attention_backward(…) -> (dquery, dkey, dvalue)``
    which recomputes each chunk. Memory is O(chunk x reach), and compute follows what the mask lets through.

``query`` is ``[B, H, Q, D]``, ``key`` and ``value`` are ``[B, H or fewer, K, D]`` (grouped heads are expanded a
chunk at a time). A mask that turns out causal or all true when the step runs takes torch's own kernel for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_fx.compiler import outside_of_kernels
from mst_fx.graph import SIXTEEN_BITS, sum_dtype
from mst_fx.masks import BLIND, CAUSAL, FULL, WHOLE, Mask, Vectors, allowed, parse, reach


@torch.library.custom_op(
    "mst_fx::mask_reach",
    mutates_args=(),
    schema="(Tensor[] keys, Tensor[] queries, str[] masks, SymInt q, SymInt k, int chunk, bool[] finite) -> Tensor",
)
def mask_reach(
    keys: list[Tensor],
    queries: list[Tensor],
    masks: list[str],
    q: int,
    k: int,
    chunk: int,
    finite: list[bool],
) -> Tensor:
    """int64 ``[masks, 1 + chunks, 3]`` on the CPU."""
    vectors = Vectors(keys, queries)
    found = [reach(parse(m), vectors, q, k, chunk, f) for m, f in zip(masks, finite, strict=True)]
    return torch.stack(found).cpu()


@mask_reach.register_fake
def _(
    keys: list[Tensor],
    queries: list[Tensor],
    masks: list[str],
    q: Any,
    k: Any,
    chunk: int,
    finite: list[bool],
) -> Tensor:
    chunks = (q + chunk - 1) // chunk
    return torch.empty((len(masks), 1 + chunks, 3), dtype=torch.int64, device="cpu")


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor[] keys, Tensor[] queries, Tensor? reach, int[] known,"
    " str mask, int which, int chunk, float scale, float softcap, float fill"
)


def takes_groups(query: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel takes grouped heads as they are; otherwise torch makes all S² scores.

    The flash kernels do (torch/nn/attention, ``SDPBackend``): on CUDA for 16-bit types and up to 256
    features a head, on CPUs for all; the memory-efficient kernel does not.
    """
    if query.shape[3] != value.shape[3]:
        return False
    if query.device.type == "cpu":
        return True
    return query.dtype in SIXTEEN_BITS and query.shape[3] <= 256 and query.shape[3] % 8 == 0


class _Form:
    """What one call does: read from the reach tensor, or known since the graph was compiled."""

    def __init__(
        self, found: Tensor | None, known: Sequence[int], which: int, queries: int, chunk: int
    ) -> None:
        numbers = list(known) if found is None else found[which].flatten().tolist()
        self.form = numbers[0]
        rows = [tuple(numbers[i : i + 3]) for i in range(3, len(numbers), 3)]
        self.chunks = [
            (start, min(start + chunk, queries), first, last, kind)
            for start, (first, last, kind) in zip(range(0, queries, chunk), rows, strict=True)
        ]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    plain: bool = False,
) -> Tensor:
    """Attention of one chunk, or of all with torch's own form of the mask.

    Args:
        mask: Boolean (True: may see) or added to the scores; ``[b, 1, c, n]``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask, as in Gemma 2; 0: not.
        plain: by matmul and softmax. Fused kernels give wrong gradients for a query of which all scores
            are masked by a finite number: the logarithm of its sum drowns in that number.
    """
    groups = query.shape[1] // key.shape[1]
    if softcap == 0.0 and mask is None and (groups == 1 or takes_groups(query, value)):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if softcap == 0.0 and mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    if softcap == 0.0 and not plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = ~mask if mask is not None and mask.dtype == torch.bool else None
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=sum_dtype(scores.dtype)).to(query.dtype)
    if hidden is not None:  # a query that sees no key: 0, as of fused kernels
        weights = weights.masked_fill(hidden, 0.0)
    return torch.matmul(weights, value)


def _chunk_mask(
    mask: Mask, vectors: Vectors, place: tuple[int, int, int, int, int], query: Tensor, fill: float
) -> Tensor | None:
    start, end, first, last, kind = place
    if kind == WHOLE:
        return None
    found = allowed(mask, vectors, start, end, first, last, query.device)
    found = found.expand(-1, end - start, last - first)[:, None]
    if fill == 0.0:
        return found
    return torch.zeros((), dtype=query.dtype, device=query.device).where(found, fill)


def _is_native(form: _Form, softcap: float) -> bool:
    return form.form in (CAUSAL, FULL) and softcap == 0.0


def _output(query: Tensor, value: Tensor) -> Tensor:
    """``[B, H, Q, D]`` in memory order ``[B, Q, H, D]``, as flash kernels give it: no copy before the projection."""
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


@torch.library.custom_op("mst_fx::attention", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: list[Tensor],
    queries: list[Tensor],
    reach: Tensor | None,
    known: list[int],
    mask: str,
    which: int,
    chunk: int,
    scale: float,
    softcap: float,
    fill: float,
) -> Tensor:
    form = _Form(reach, known, which, query.shape[2], chunk)
    out = _output(query, value)
    with torch._C._DisableAutocast():
        if _is_native(form, softcap):
            return out.copy_(_attend(query, key, value, scale=scale, causal=form.form == CAUSAL))
        formula, vectors = parse(mask), Vectors(keys, queries)
        for place in form.chunks:
            start, end, first, last, kind = place
            if first >= last:
                out[:, :, start:end] = 0
                continue
            chunk_mask = _chunk_mask(formula, vectors, place, query, fill)
            q, k, v = query[:, :, start:end], key[:, :, first:last], value[:, :, first:last]
            plain = kind == BLIND
            out[:, :, start:end] = _attend(q, k, v, chunk_mask, scale=scale, softcap=softcap, plain=plain)
    return out


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _output(query, value)


@torch.library.custom_op(
    "mst_fx::attention_backward", mutates_args=(), schema=f"(Tensor tangent, {_SCHEMA}) -> Tensor[]"
)
def attention_backward(
    tangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: list[Tensor],
    queries: list[Tensor],
    reach: Tensor | None,
    known: list[int],
    mask: str,
    which: int,
    chunk: int,
    scale: float,
    softcap: float,
    fill: float,
) -> list[Tensor]:
    form = _Form(reach, known, which, query.shape[2], chunk)
    with outside_of_kernels(), torch._C._DisableAutocast():
        if _is_native(form, softcap):
            q, k, v = _leaves(query, key, value)
            out = _attend(q, k, v, scale=scale, causal=form.form == CAUSAL)
            return [grad.contiguous() for grad in torch.autograd.grad(out, (q, k, v), tangent)]
        formula, vectors = parse(mask), Vectors(keys, queries)
        grad_query = query.new_empty(query.shape)
        # Every chunk adds to the keys it reaches: in float32, so that many chunks lose nothing.
        sums = [torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device) for x in (key, value)]
        for place in form.chunks:
            start, end, first, last, kind = place
            if first >= last:
                grad_query[:, :, start:end] = 0
                continue
            chunk_mask = _chunk_mask(formula, vectors, place, query, fill)
            q, k, v = _leaves(query[:, :, start:end], key[:, :, first:last], value[:, :, first:last])
            plain = kind == BLIND
            out = _attend(q, k, v, chunk_mask, scale=scale, softcap=softcap, plain=plain)
            found = torch.autograd.grad(out, (q, k, v), tangent[:, :, start:end])
            grad_query[:, :, start:end] = found[0]
            for total, grad in zip(sums, found[1:], strict=True):
                total[:, :, first:last] += grad
            del out, found, q, k, v, chunk_mask
        return [grad_query, *(total.to(x.dtype) for total, x in zip(sums, (key, value), strict=True))]


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)


@attention_backward.register_fake
def _(tangent: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (query, key, value)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, keys, queries, reach, *ctx.rest = inputs
    ctx.counts = (len(keys), len(queries), reach is not None)
    ctx.save_for_backward(query, key, value, *keys, *queries, *([reach] if reach is not None else []))


def _backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
    query, key, value, *vectors = ctx.saved_tensors
    keys, queries, has_reach = ctx.counts
    found = vectors[-1] if has_reach else None
    parts = (query, key, value, vectors[:keys], vectors[keys : keys + queries], found)
    grads = attention_backward(tangent, *parts, *ctx.rest)
    known, *others = ctx.rest
    # torch takes a list of ints for one value, but an empty one for a list of tensors.
    return (*grads, [None] * keys, [None] * queries, None, None if known else [], *[None] * len(others))


attention.register_autograd(_backward, setup_context=_setup)
