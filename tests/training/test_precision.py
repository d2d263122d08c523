"""bfloat16: chunking adds at most a tenth to the error that eager has against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import compile_mst, relative_error

_ROWS, _WIDTH, _INNER, _VOCAB = 2048, 64, 256, 512


def _step(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((_INNER, _WIDTH), (_WIDTH, _INNER), (_VOCAB, _WIDTH))
    drawn = [torch.randn(s, generator=generator).div(s[1] ** 0.5).bfloat16().to(dtype) for s in shapes]
    x = torch.randn(1, _ROWS, _WIDTH, generator=generator).bfloat16().to(dtype)
    leaves = [t.requires_grad_() for t in (x, *drawn)]
    labels = torch.randint(0, _VOCAB, (_ROWS,), generator=generator)
    loss = run(*leaves, labels)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _model(x: Tensor, up: Tensor, down: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    h = x + F.linear(F.silu(F.linear(x, up)), down)
    return F.cross_entropy(F.linear(h, head).float().view(-1, _VOCAB), labels)


def _double(x: Tensor, up: Tensor, down: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    h = x + F.linear(F.silu(F.linear(x, up)), down)
    return F.cross_entropy(F.linear(h, head).view(-1, _VOCAB), labels)


@pytest.mark.parametrize("chunks", [2, 8, 64])
def test_error_against_float64(chunks: int) -> None:
    truth = _step(_double, torch.float64)
    eager = _step(_model, torch.bfloat16)
    rows = _ROWS // chunks
    options = {"inner": "aot_eager", "chunk_rows": rows, "vocab_chunk_rows": rows}
    found = _step(compile_mst(_model, options), torch.bfloat16)
    for name, f, e, t in zip(("loss", "x", "up", "down", "head"), found, eager, truth, strict=True):
        bar = 1.1 * relative_error(e, t) + (1e-6 if name == "loss" else 0)
        assert relative_error(f, t) <= bar, name


def test_an_accumulator_in_bfloat16_would_fail() -> None:
    truth = _step(_double, torch.float64)
    eager = _step(_model, torch.bfloat16)
    options = {"inner": "aot_eager", "chunk_rows": 32, "vocab_chunk_rows": 32, "accumulate": "weight"}
    found = _step(compile_mst(_model, options), torch.bfloat16)
    assert (
        max(
            relative_error(f, t) / relative_error(e, t)
            for f, e, t in zip(found[2:], eager[2:], truth[2:], strict=True)
        )
        > 1.1
    )
