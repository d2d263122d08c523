"""The estimate of a step's memory against a meter: operators are known by their names, not by parts of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mst_fx.graph.spelling import operation
from tests.helpers import EAGER_BODIES, PlainMLP, report_of
from tools.meters.cpu import measure_cpu

ROWS, WIDTH, INNER = 512, 32, 1024
_KEPT = 0.1  # of one wide tensor: what is kept between forward and backward is known to that
_PEAK = 0.3  # of the peak: a kernel's scratch, gradients of weights before they are added, and when one is freed are not


class _Conv1D(nn.Module):
    """GPT2's linear, with a weight [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.02)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return found.view(*x.shape[:-1], self.bias.numel())


class _Addmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = _Conv1D(WIDTH, INNER), _Conv1D(INNER, WIDTH)

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class _NewGelu(_Addmm):
    """GPT2's own gelu, of eight nodes."""

    def activation(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class _Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(INNER, WIDTH) * 0.02) for _ in range(2))


class _Einsum(_Weights):
    def forward(self, x: Tensor) -> Tensor:
        wide = F.silu(torch.einsum("bsh,ih->bsi", x, self.up))
        return torch.einsum("bsi,ih->bsh", wide, self.down)


class _Baddbmm(_Weights):
    def forward(self, x: Tensor) -> Tensor:
        wide = torch.baddbmm(x.new_zeros(1, 1, 1), x, self.up.t()[None]).relu()
        return torch.bmm(wide, self.down[None])


class _Expand(_Weights):
    """Nothing wide is needed in the backward pass: views, sums, a product with a number."""

    def forward(self, x: Tensor) -> Tensor:
        wide = (x @ self.up.t())[:, :, None].expand(-1, -1, 2, -1).mul(3)
        return wide.sum((2, 3)) - wide.mean()


class _Exp(_Weights):
    """Results are needed, operands are not."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up.t()).exp().sigmoid().tanh() @ self.down


def _linear() -> nn.Module:
    return PlainMLP(WIDTH, INNER)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [_linear, _Addmm, _NewGelu, _Einsum, _Baddbmm, _Expand, _Exp])
def test_what_is_kept_and_the_peak(make: Callable[[], nn.Module]) -> None:
    loss, x = _Loss(make()), torch.randn(1, ROWS, WIDTH)
    loss(x).backward()  # gradients of weights are not estimated: they are there
    with measure_cpu() as kept:
        found = loss(x)
    del found
    with measure_cpu() as step:
        loss(x).backward()
    memory = report_of(loss, EAGER_BODIES, x).memory_before
    assert abs(memory.kept - kept.timeline[-1][1]) <= _KEPT * ROWS * INNER * 4
    assert abs(memory.peak - step.peak_bytes) <= _PEAK * step.peak_bytes


def test_names_are_exact() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {
        "add": graph.call_function(torch.ops.aten.add_.Tensor, (x, x)),
        "addmm": graph.call_function(torch.ops.aten.addmm.default, (x, x, x)),
        "mul": graph.call_method("mul_", (x, 2)),
        "expand": graph.call_method("expand", (x, 2)),
        "mst_fx::loop_with_grad": graph.call_function(torch.ops.mst_fx.loop_with_grad.default, ()),
        "enter": graph.call_method("__enter__", (x,)),
    }
    assert {name: operation(node) for name, node in nodes.items()} == {name: name for name in nodes}
