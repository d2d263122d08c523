"""Models whose attention is written out, for what is read of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention as ``attend(self, q, k, v, padding)`` writes it, of queries, keys and values ``[B, H, S, D]``; gives a loss.

    Args:
        heads, width: H and H · D.
    """

    def __init__(self, attend: Callable[..., Tensor], heads: int, width: int) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.slopes = nn.Parameter(torch.rand(heads) + 0.1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        batch, size, _ = x.shape
        q, k, v = (y.view(batch, size, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = self.attend(self, q, k, v, padding)
        loss: Tensor = (self.out(out.transpose(1, 2).reshape(batch, size, -1)) * x.detach().roll(1, 1)).sum()
        return loss
