"""accelerate's mixed precision: an autocast region around the model, and casts of its outputs behind it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader

import mst_fx
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import SMALL_CHUNKS, gradients, relative_error, step, worst_error
from tests.text import build_llama, token_blocks

_OPTIONS = {"model.compile": SMALL_CHUNKS, "enable": {**SMALL_CHUNKS, "inner": "eager"}}


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def _batches(steps: int) -> DataLoader[Any]:
    return DataLoader(token_blocks(2 * steps, 64), batch_size=2)  # type: ignore[arg-type]


def _train(route: str) -> tuple[list[float], Any, dict[str, Tensor]]:
    """The losses of all steps, and the logits and gradients of the first."""
    torch._dynamo.reset()
    AcceleratorState._reset_state(True)  # precision and backend are fixed for the life of a process
    backend = "inductor" if route == "enable" else "no"
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, dynamo_backend=backend)
    model = build_llama()
    if route == "model.compile":
        model.compile(backend="mst", options=_OPTIONS[route])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, _batches(6))
    losses: list[float] = []
    logits, grads = None, {}
    for batch in loader:
        out = prepared(**batch)
        accelerator.backward(out.loss)
        if not losses:
            logits, grads = out.logits, gradients(model)
            values = logits + 0  # while its weights are what they were
        losses.append(out.loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert logits is not None
    return losses, (type(logits), values.detach()), grads


@functools.cache
def _eager() -> tuple[list[float], Any, dict[str, Tensor]]:
    return _train("eager")


@pytest.mark.parametrize("route", _OPTIONS)
def test_bf16(route: str, caplog: pytest.LogCaptureFixture) -> None:
    """Gradients are as near to float32's as eager's are; logits are those of the autocast region."""
    caplog.set_level("INFO", "mst_fx")
    model = build_llama()
    _, exact = step(model, model, next(iter(_batches(1))))
    losses, (_, logits), grads = _eager()
    with mst_fx.enable(_OPTIONS[route]) if route == "enable" else contextlib.nullcontext():
        found_losses, (kind, found_logits), found = _train(route)
    assert "rewrote 2 mlp, 1 vocab; refused 0" in caplog.text
    assert found_losses == pytest.approx(losses, rel=2e-4)
    assert kind is DeferredLogits and found_logits.dtype == logits.dtype == torch.float32
    assert relative_error(found_logits, logits) <= 3e-3
    assert torch.equal(found_logits, found_logits.bfloat16().float())
    assert worst_error(found, exact) <= 1.1 * worst_error(grads, exact)
