"""Attention on a device without kernels (``meta``, or fakes of a CPU) as torch runs it on a GPU.

``scaled_dot_product_attention`` asks for its kernel in C++, by the device. :class:`GpuAttention` answers as CUDA does:
FlashAttention for 16-bit operands without a mask, the memory-efficient kernel with one, or with 32 bits, and the formula where neither can.

``aten._scaled_dot_product_flash_attention`` and ``_efficient_attention``: the public function calls one of them by the device alone.
Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_WIDEST = 256  # heads of FlashAttention
_ALIGNED = 8  # elements


class GpuAttention(TorchFunctionMode):
    """Inside of the block attention calls a GPU's kernels; they are not run, but give fakes or meta tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = _by_kernel(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The result [B, H, Q, D] of the kernel that CUDA would choose; None for the formula."""
    if query.ndim != 4:
        return None
    width = query.shape[-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and is_half and width <= _WIDEST and value.shape[-1] == width:
        operands = [_padded(x) for x in (query, key, value)]
        scale = width**-0.5 if scale is None else scale
        found = aten._scaled_dot_product_flash_attention(*operands, dropout_p, is_causal, False, scale=scale)[
            0
        ]
        return found[..., :width] if found.shape[-1] != width else found  # type: ignore[no-any-return]
    if query.shape[1] != key.shape[1] or query.dtype == torch.float64 or width % _ALIGNED:
        return None
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _padded(x: Tensor) -> Tensor:
    more = -x.shape[-1] % _ALIGNED
    return F.pad(x, (0, more)) if more else x


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as what is added to scores, [B, H, Q, K] by strides of 0."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, float("-inf"))
    return mask.expand(*query.shape[:3], key.shape[2])
