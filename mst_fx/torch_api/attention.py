"""torch's fused attention kernels, with the sums that their backward passes need.

``F.scaled_dot_product_attention`` and ``torch.nn.attention.varlen`` leave those sums to autograd; a custom op
must save them itself, or run the forward kernel twice. The functions behind them are private ATen ops.
Tried with torch 2.11.0 (CUDA 13, H200) and 2.13.0 (CPU):

- ``aten._scaled_dot_product_cudnn_attention``, ``…_flash_attention``, ``…_flash_attention_for_cpu``
- ``aten._scaled_dot_product_efficient_attention``, with a bias and its causal mask at once, which the public function refuses
- ``aten._flash_attention_forward`` and ``_backward`` with cumulative lengths and a window
- ``torch._fused_sdp_choice``: which of them torch would take

On an H200 (bf16, 64K tokens, 32 heads of 128; 8 of keys and values), forward + backward in ms: causal, cuDNN
58 + 166, flash 101 + 276; a window of 4,096, flash 15 + 36, FlexAttention 11 + 30 (after compiling it for each
mask); documents of 4,096, flash 7 + 20, FlexAttention 6 + 17.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from mst_fx.torch_api.tensors import SIXTEEN_BITS

aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]
_Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
# What the gradients of query, key and value are written to: the memory of tangent, key and value, or (None) their own.
_Over = Sequence[Tensor | None]
_OWN: _Over = (None, None, None)

# Queries x heads of one call of a backward kernel. 2^18 keep an H200 busy (64 rows a block of cuDNN's, 132 multiprocessors).
# The results of several calls are copied together: 0.5 ms a layer at 32K tokens.
_BUSY = 2**19


def is_fused(query: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a flash kernel takes these, grouped heads as they are: otherwise torch makes all S² scores
    of grouped heads.

    On CUDA for 16-bit types and up to 256 features a head, on CPUs for all (torch/nn/attention, ``SDPBackend``).

    Args:
        dtype: what the operands are cast to, where that is not theirs: autocast's.
    """
    if query.shape[3] != value.shape[3]:
        return False
    if query.device.type == "cpu":
        return True
    return (dtype or query.dtype) in SIXTEEN_BITS and query.shape[3] <= 256 and query.shape[3] % 8 == 0


def is_fused_with_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether some kernel of torch's takes a mask that is a tensor: otherwise all S² scores are made.

    On CPUs the flash kernel does, if the mask has no gradient; on CUDA the memory-efficient one, without grouped heads.
    """
    if query.device.type == "cpu":
        return is_fused(query, value) and not mask.requires_grad
    is_even = all(x.shape[3] % 8 == 0 for x in (query, value))
    return query.dtype != torch.float64 and is_even and query.shape[1] == key.shape[1]


class Kernel(abc.ABC):
    """A fused kernel with its own backward pass. What it gets has the elements of a row side by side: others read them as if they
    had, on a CPU, or fail."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The output ``[B, H, Q, D]`` and the logarithms of the softmax's sums ``[B, H, Q]``, whichever
        kernel makes them: float32, of float64 float64."""
        return self._forward(*map(_by_rows, (query, key, value)))

    def backward(
        self,
        tangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        over: _Over = _OWN,
    ) -> Gradients:
        """The gradients of query, key and value.

        Args:
            over: ``tangent``, ``key`` and ``value`` themselves, or some of them: their gradient is written over them.
        """
        tangent, query, key, value = map(_by_rows, (tangent, query, key, value))
        return self._backward(tangent, query, key, value, out, sums, over)

    @abc.abstractmethod
    def _forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward`."""

    @abc.abstractmethod
    def _backward(
        self,
        tangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        over: _Over,
    ) -> Gradients:
        """:meth:`backward`."""


@dataclasses.dataclass(frozen=True)
class Dense(Kernel):
    """Each query sees all keys, or those up to its own (``causal``)."""

    causal: bool
    scale: float

    def _forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        operands = query, key, value
        if query.device.type == "cpu":
            cpu = aten._scaled_dot_product_flash_attention_for_cpu
            out, sums = cpu(*operands, 0.0, self.causal, scale=self.scale)
        elif self._by_cudnn(*operands):
            cudnn = aten._scaled_dot_product_cudnn_attention
            out, sums = cudnn(*operands, None, True, 0.0, self.causal, scale=self.scale)[:2]
        else:
            flash = aten._scaled_dot_product_flash_attention
            out, sums = flash(*operands, 0.0, self.causal, scale=self.scale)[:2]
        return out, sums.reshape(query.shape[:3])

    def _backward(
        self,
        tangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        over: _Over,
    ) -> Gradients:
        if query.device.type == "cpu":  # whose kernel shares heads among threads: all at once
            cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = cpu(tangent, query, key, value, out, sums, 0.0, self.causal, scale=self.scale)
            return _written(found, over)
        run = self._cudnn_backward if self._by_cudnn(query, key, value) else self._flash_backward
        return _by_heads(run, tangent, query, key, value, out, sums, over)

    def _by_cudnn(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        is_grouped = query.shape[1] != key.shape[1]
        choice = torch._fused_sdp_choice(
            query, key, value, None, 0.0, self.causal, scale=self.scale, enable_gqa=is_grouped
        )
        return choice == SDPBackend.CUDNN_ATTENTION.value

    def _cudnn_backward(
        self, tangent: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
    ) -> Gradients:
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        found: Gradients = aten._scaled_dot_product_cudnn_attention_backward(
            tangent,
            query,
            key,
            value,
            out,
            sums[..., None].contiguous(),
            seed,
            seed,
            None,
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            self.causal,
            scale=self.scale,
        )
        return found

    def _flash_backward(
        self, tangent: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
    ) -> Gradients:
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        found: Gradients = aten._scaled_dot_product_flash_attention_backward(
            tangent,
            query,
            key,
            value,
            out,
            sums.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            self.causal,
            seed,
            torch.empty(0, dtype=torch.uint64, device=query.device),
            scale=self.scale,
        )
        return found


@dataclasses.dataclass(frozen=True)
class Weighted(Kernel):
    """As :class:`Dense`, with a number added to all scores of a key (ALiBi): torch's memory-efficient kernel reads it for each query anew,
    by a stride of 0.

    Attributes:
        bias: ``[B or 1, H or 1, K]``, of the type of the query; it has no gradient.
    """

    bias: Tensor
    causal: bool
    scale: float

    @staticmethod
    def takes(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> bool:
        is_even = query.shape[3] == value.shape[3] and query.shape[3] % 8 == 0
        has_type = query.dtype in (*SIXTEEN_BITS, torch.float32) and bias.dtype == query.dtype
        return query.is_cuda and is_even and has_type and query.shape[1] == key.shape[1]

    def _forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        efficient = aten._scaled_dot_product_efficient_attention
        bias = self._bias(query, key)
        out, sums = efficient(query, key, value, bias, True, 0.0, self.causal, scale=self.scale)[:2]
        return out, sums[..., : query.shape[2]]

    def _backward(
        self,
        tangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        over: _Over,
    ) -> Gradients:  # all heads at once
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        # The kernel reads whole blocks of 32 queries, and gives those behind the last one infinity.
        blocks = F.pad(sums, (0, -query.shape[2] % 32), value=float("inf"))
        found = aten._scaled_dot_product_efficient_attention_backward(
            *(tangent, query, key, value, self._bias(query, key), out, blocks, seed, seed, 0.0),
            [True, True, True, False],
            self.causal,
            scale=self.scale,
        )
        return _written(found[:3], over)

    def _bias(self, query: Tensor, key: Tensor) -> Tensor:
        """``[B, H, Q, K]``, in memory ``[b, h, K]`` with rows of whole 16 elements, as the kernel wants them."""
        size = key.shape[2]
        rows = F.pad(self.bias, (0, -size % 16))[:, :, None, :size]
        return rows.expand(*query.shape[:3], size)


@dataclasses.dataclass(frozen=True)
class Spans(Kernel):
    """Attention inside of spans of tokens that see none of each other's: packed documents; all of a
    sequence if there is a window only.

    Attributes:
        starts: int32 ``[spans + 1]``, on the device: where each span starts in the B·S tokens; then B·S.
        longest: tokens of the longest span.
        left, right: how many tokens before and after itself a query sees; -1: all of its span.
        scale: of the scores.
    """

    starts: Tensor
    longest: int
    left: int
    right: int
    scale: float

    @staticmethod
    def takes(query: Tensor, value: Tensor) -> bool:
        return query.is_cuda and is_fused(query, value)

    def _forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, size, _ = query.shape
        out, sums, *_ = aten._flash_attention_forward(
            *map(_packed, (query, key, value)),
            self.starts,
            self.starts,
            self.longest,
            self.longest,
            0.0,
            self._is_causal,
            False,
            scale=self.scale,
            window_size_left=self.left,
            window_size_right=self.right,
        )
        return _unpacked(out, batch), sums.view(heads, batch, size).transpose(0, 1)

    def _backward(
        self,
        tangent: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        over: _Over,
    ) -> Gradients:
        return _by_heads(self._flash_backward, tangent, query, key, value, out, sums, over)

    @property
    def _is_causal(self) -> bool:
        return self.left < 0 and self.right == 0

    def _flash_backward(
        self, tangent: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
    ) -> Gradients:
        batch, heads = query.shape[:2]
        grads = aten._flash_attention_backward(
            *map(_packed, (tangent, query, key, value, out)),
            sums.transpose(0, 1).reshape(heads, -1).contiguous(),
            self.starts,
            self.starts,
            self.longest,
            self.longest,
            0.0,
            self._is_causal,
            torch.zeros(2, dtype=torch.uint64, device=query.device),
            torch.empty(0, dtype=torch.uint64, device=query.device),
            scale=self.scale,
            window_size_left=self.left,
            window_size_right=self.right,
        )
        q, k, v = (_unpacked(grad, batch) for grad in grads)
        return q, k, v


def _by_rows(x: Tensor) -> Tensor:
    """An operand, copied where the elements of a row lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _packed(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` → ``[B·S, H, D]``, a view where batch and sequence lie together in memory."""
    return x.transpose(1, 2).flatten(0, 1)


def _unpacked(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def heads_at_once(batch: int, heads: int, queries: int, groups: int) -> int:
    """How many heads of queries one call of a backward kernel takes: all of some of the ``groups`` that share keys and values; one,
    where one keeps a device busy."""
    if batch * queries >= _BUSY // 2:
        return 1
    each = heads // groups
    return each * min(groups, max(1, -(-_BUSY // (batch * queries * each))))


def _by_heads(
    run: _Backward,
    tangent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    over: _Over,
) -> Gradients:
    """Runs a backward kernel on a few heads at a time.

    The kernels hold the query's gradient in float32, and the keys' and values' for each query head: for all
    heads together that is the highest point of a checkpointed layer's backward pass. No call reads heads that an earlier one has
    written over: of keys and values they are written when all query heads that share them are done.
    """
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    at_once = heads_at_once(batch, heads, queries, groups)
    if at_once == heads:
        return _written(run(tangent, query, key, value, out, sums), over)
    grads = [empty_output(x) if y is None else y for x, y in zip((query, key, value), over, strict=True)]
    each = heads // groups
    step = max(1, at_once // each)
    for first in range(0, groups, step):
        few = slice(first, first + step)
        shared: list[Tensor] = []
        for start in range(first * each, min(first + step, groups) * each, at_once):
            many = slice(start, start + at_once)
            wide = [x[:, many] for x in (tangent, query, out, sums)]
            found = run(wide[0], wide[1], key[:, few], value[:, few], wide[2], wide[3])
            grads[0][:, many] = found[0]
            shared = _added(shared, found[1:]) if at_once < each else [*found[1:]]
            del found
        grads[1][:, few], grads[2][:, few] = shared
    return grads[0], grads[1], grads[2]


def _added(sums: list[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """Sums of 16-bit gradients, in float32; ``sums`` are empty at first, and added to in place."""
    if not sums:
        return [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in found]
    return [total.add_(x) for total, x in zip(sums, found, strict=True)]


def _written(found: Gradients, over: _Over) -> Gradients:
    """Gradients where they are to be."""
    q, k, v = (x if y is None else y.copy_(x) for x, y in zip(found, over, strict=True))
    return q, k, v


def empty_output(x: Tensor, *, width: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """``[B, H, S, D]`` in memory order ``[B, S, H, D]``, as flash kernels give it: the projections before and
    after attention need no copy."""
    batch, heads, size, own = x.shape
    shape = (batch, size, heads, own if width is None else width)
    return x.new_empty(shape, dtype=dtype or x.dtype).transpose(1, 2)
