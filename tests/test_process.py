"""What mst leaves behind in a process: other compilations keep their settings, and what is over is freed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import SMALL_CHUNKS, PlainMLP, ToyLM, compile_mst, gradients, token_batch, worst_error

_BAR = 1e-9
_DONATION = "donated_buffer"


class _Donating(nn.Module):
    """Saves a tensor that no input, output or gradient is an alias of: a donated buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (self.linear(x).sin() @ self.linear.weight).exp().sum()
        return found


class _Small(nn.Module):
    """An MLP that is chunked, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = PlainMLP(8, 24)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.mlp(x.sin()).exp().mean(),)


def _thrice(model: nn.Module, run: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Tensor]:
    run(**batch)[0].backward()  # code that is compiled in a pass that keeps its graph would donate nothing
    model.zero_grad(set_to_none=True)
    loss = run(**batch)[0]
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
    return gradients(model)


@pytest.mark.parametrize(
    ("inner", "setting"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_donated_buffers_are_others_business(inner: str, setting: bool) -> None:
    config = torch._functorch.config
    with config.patch({_DONATION: setting}):
        model, batch = _Small(), {"x": torch.randn(1, 40, 8, dtype=torch.float64)}
        truth = _thrice(model, model, batch)
        compiled = compile_mst(model, {**SMALL_CHUNKS, "inner": inner})
        other = _Donating()
        plain = torch.compile(other, backend=inner)
        x = torch.randn(4, 8, dtype=torch.float64)
        plain(x).backward()
        for _ in range(2):
            assert worst_error(_thrice(model, compiled, batch), truth) <= _BAR
            assert config.donated_buffer is setting
            if setting:  # torch's own limit, which is only there where buffers are donated
                with pytest.raises(RuntimeError, match=_DONATION):
                    plain(x).backward(retain_graph=True)
            else:
                plain(x).backward(retain_graph=True)
