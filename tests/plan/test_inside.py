"""What a plan says of one chunk of a body, against what its compiled backward pass takes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mst_fx.bodies.body import Body, CompiledBody
from mst_fx.plan.inside import made_a_row, made_backward_a_row
from tests.helpers import compile_mst
from tools.meters.cpu import measure_cpu

_HIDDEN, _WIDE, _ROWS = 128, 512, 512


class _Gated(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(_HIDDEN)
        self.gate, self.up = (nn.Linear(_HIDDEN, _WIDE, bias=bias) for _ in range(2))
        self.down = nn.Linear(_WIDE, _HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class _OfOneProduct(nn.Module):
    """Gate and up are parts of one product, as in Phi-3."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(_HIDDEN, 2 * _WIDE, bias=False)
        self.down = nn.Linear(_WIDE, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(up * F.silu(gate))  # type: ignore[no-any-return]


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_HIDDEN, _WIDE, bias=False), nn.Linear(_WIDE, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # type: ignore[no-any-return]


def _body_of(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[Body, CompiledBody, list[bool], list[bool]]:
    """The one body of a module's backward pass, compiled, which inputs need gradients, and which outputs have some."""
    found: list[Any] = []
    compiled_backward = Body.compiled_backward

    def noted(body: Body, chunks: Any, needs: Sequence[bool], tangents: Sequence[bool]) -> CompiledBody:
        compiled = compiled_backward(body, chunks, needs, tangents)
        found.append((body, compiled, list(needs), list(tangents)))
        return compiled

    monkeypatch.setattr(Body, "compiled_backward", noted)
    x = torch.randn(1, 2 * _ROWS, _HIDDEN, requires_grad=True)
    compile_mst(module, {"chunk_rows": _ROWS})(x).sum().backward()
    ((body, *how),) = found
    return body, *how


def _peak(body: Body, compiled: CompiledBody, tangents: Sequence[bool]) -> int:
    def given() -> list[Any]:
        outputs = [meta for meta, has in zip(body.outputs, tangents, strict=True) if has]
        rows = [torch.randn(_ROWS, *meta.shape) for meta in body.row_metas]
        gradients = [torch.randn(_ROWS, *meta.shape) for meta in outputs]
        return [_ROWS, *rows, *(torch.randn(meta.shape) for meta in body.shared), *gradients]

    with torch.no_grad():
        compiled.run(given())
        once_more = given()
        with measure_cpu() as measured:
            compiled.run(once_more)
    return measured.peak_bytes


@pytest.mark.parametrize(
    ("module", "least"),
    # What sums up the gradient of a bias is a kernel of its own on a CPU.
    [(_Gated(), 0.9), (_OfOneProduct(), 0.9), (_Plain(), 0.9), (_Gated(bias=True), 0.5)],
    ids=["gated", "of one product", "plain", "with biases"],
)
def test_a_chunk_takes_what_is_said(module: nn.Module, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    body, compiled, needs, tangents = _body_of(module, monkeypatch)
    said, found = _ROWS * made_backward_a_row(body, needs), _peak(body, compiled, tangents)
    assert least * said <= found <= 1.01 * said, f"{found / said:.3f}"
    if least > 0.5:  # and not what is made with a gradient for each
        assert said < 2 * _ROWS * made_a_row(body)
