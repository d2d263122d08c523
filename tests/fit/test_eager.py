"""The eager program, walked through on tensors without memory, against real steps of it."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mst_fx.fit.eager import eager_step, recomputing_contexts
from mst_fx.torch_api.gpu_attention import GpuAttention
from tools.meters.cpu import measure_cpu


class _Blocks(nn.Module):
    """MLPs with norms and a head: no attention, which has other kernels on a CPU."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            for _ in range(3)
        )
        self.head = nn.Linear(64, 500)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            x = x + y
        logits = self.head(x).float()
        return types.SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_is_that_of_a_real_step(checkpointed: bool) -> None:
    model = _Blocks(checkpointed)
    inputs = {"x": torch.randn(4000, 64), "labels": torch.randint(500, (4000,))}
    with measure_cpu() as measured:
        model(**inputs).loss.backward()
    with torch.device("meta"):
        meta = _Blocks(checkpointed)
    found = eager_step(meta, {name: x.to("meta") for name, x in inputs.items()})
    assert found.peak == pytest.approx(measured.peak_bytes, rel=0.01)
    assert all(p.grad is None for p in meta.parameters())


def test_operations_are_counted() -> None:
    with torch.device("meta"):
        model, x, labels = _Blocks(False), torch.empty(4000, 64), torch.zeros(4000, dtype=torch.long)
    cost = eager_step(model, {"x": x, "labels": labels}).cost
    per_row = 3 * 2 * 2 * 64 * 256 + 2 * 64 * 500
    assert cost.products == 4000 * 3 * per_row  # backward two for each
    assert cost.attention == 0 and cost.moved > 4000 * 500 * 4 * 2


class _Attention(nn.Module):
    """Four heads, of which two share keys."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        heads = [y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in (self.queries(x), x[..., :32])]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[1], is_causal=True, enable_gqa=True)
        return types.SimpleNamespace(loss=out.float().sum())


def test_operations_of_attention_are_counted() -> None:
    """Of both passes, of half of the pairs."""
    with torch.device("meta"):
        model, x = _Attention(), torch.empty(1, 96, 64, dtype=torch.bfloat16, requires_grad=True)
    assert eager_step(model, {"x": x}).cost.attention == 3.5 * 0.5 * 2 * 4 * 96 * 96 * (16 + 16)


@pytest.mark.parametrize(
    ("dtype", "masked", "heads", "kernel"),
    [
        (torch.bfloat16, False, 2, "FlashAttention"),
        (torch.bfloat16, True, 4, "EfficientAttention"),
        (torch.float32, False, 4, "EfficientAttention"),
        (torch.float64, False, 4, ""),
        (torch.float32, False, 2, ""),  # the formula, which repeats keys
    ],
)
def test_attention_takes_the_kernel_of_a_gpu(
    dtype: torch.dtype, masked: bool, heads: int, kernel: str
) -> None:
    query = torch.empty(2, 4, 96, 20, dtype=dtype, device="meta", requires_grad=True)[..., :16]
    key, value = (torch.empty(2, heads, 96, 16, dtype=dtype, device="meta", requires_grad=True) for _ in "kv")
    mask = torch.ones(96, 96, dtype=torch.bool, device="meta") if masked else None
    with GpuAttention():
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=not masked, enable_gqa=heads < 4
        )
    assert out.shape == (2, 4, 96, 16) and out.dtype == dtype
    name = type(out.grad_fn).__name__
    assert kernel in name if kernel else "DotProduct" not in name


def test_what_is_made_again_attends_by_the_same_kernel() -> None:
    x = torch.empty(1, 4, 96, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).sin()

    with GpuAttention():
        out = checkpoint(attend, x, use_reentrant=False, context_fn=recomputing_contexts)
    out.sum().backward()  # torch says so if other tensors are saved the second time
    assert x.grad is not None
