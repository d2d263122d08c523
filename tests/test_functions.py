"""``torch.autograd.Function`` inside of an MLP: chunked if both its graphs are row-wise, with its own backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

import mst_fx
from mst_fx.errors import Cause
from tests.direct import check, results, rewritten, worst
from tests.helpers import ToyLM, check_parity, kinds, token_batch


class _Gelu(Function):
    """Bloom's: the gradient of an approximation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return (0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)) * g


class _Rounded(Function):
    """Straight through: the backward is not the derivative, and nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class _Clipped(Function):
    """Gives its input; its backward is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01) * 3


class _Linear(Function):
    """The one of torch's tutorial, on rows in two dimensions; the weight's gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.reshape(-1, x.shape[-1]).mm(weight.t()).view(*x.shape[:-1], -1) + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = 2 * g.reshape(-1, g.shape[-1])
        return g @ weight, rows.t().mm(x.reshape(-1, x.shape[-1])), g.sum((0, 1))


class _Einsum(Function):
    """A gain per channel, and a weight whose gradient is an einsum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, gain)
        return F.linear(x, weight) * gain

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, weight, gain = ctx.saved_tensors
        weighted = g * gain
        of_gain = (g * F.linear(x, weight)).flatten(0, 1).sum(0)
        return weighted @ weight, torch.einsum("bso,bsi->oi", weighted, x), of_gain


class _Two(Function):
    """Two results, one of them saved; a keyword of Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        wide = torch.exp(-x * x)
        ctx.save_for_backward(x, wide)
        ctx.factor = factor
        return wide, torch.sin(x) * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        x, wide = ctx.saved_tensors
        return g * wide * x + h * ctx.factor, None


class _Marked(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True)
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(scale)
        return x / scale, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return g / scale + h


class _MLP(nn.Module):
    def __init__(self, apply: Any, wide: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 32))
        self.fn = apply
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.fn(self, x))


def _two(m: _MLP, x: Tensor) -> Tensor:
    first, second = _Two.apply(m.up(x), 0.7)
    return first + 2 * second


def _one_of_two(m: _MLP, x: Tensor) -> Tensor:
    return _Two.apply(m.up(x), 0.7)[1]  # type: ignore[no-any-return]


def _marked(m: _MLP, x: Tensor) -> Tensor:
    scaled, scale = _Marked.apply(m.up(x))
    return torch.sin(scaled) * scale


PROVED = {
    "gelu": lambda m, x: _Gelu.apply(m.up(x)),
    "straight through": lambda m, x: _Rounded.apply(F.gelu(m.up(x))),
    "clipped": lambda m, x: F.gelu(_Clipped.apply(m.up(x))),
    "linear": lambda m, x: F.gelu(_Linear.apply(x, m.up.weight, m.up.bias)),
    "einsum": lambda m, x: F.gelu(_Einsum.apply(x, m.up.weight, m.gain)),
    "two results": _two,
    "one of two results": _one_of_two,
    "marked": _marked,
    "twice": lambda m, x: _Gelu.apply(_Rounded.apply(m.up(x)) + _Gelu.apply(m.up(x))),
    "rounded weight": lambda m, x: F.gelu(F.linear(x, _Rounded.apply(m.up.weight))),
}


def _rows(batch: int, length: int) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, length, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", PROVED)
def test_own_backward(name: str) -> None:
    torch.manual_seed(0)
    report = check(_MLP(PROVED[name]), [_rows(2, 13)], 1e-10)
    assert kinds(report) == {"mlp": 1}, report
    assert not report.refusals
