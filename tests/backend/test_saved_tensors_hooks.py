"""Users' hooks on saved tensors (activation offloading): they see real tensors, all of them, and no fake."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mst_fx
from tests.helpers import SMALL_CHUNKS, ToyLM, compile_mst, gradients, kinds, step, token_batch, worst_error
from tests.models import ACCEPTED, inputs_of

_BAR = 1e-9


class _Log:
    """What hooks saw."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0

    def seen(self, tensor: Tensor) -> None:
        assert not isinstance(tensor, FakeTensor), "a hook saw a fake tensor"
        self.packed += 1

    def hooks(self, way: str) -> contextlib.AbstractContextManager[Any]:
        if way == "save_on_cpu":
            return save_on_cpu()
        return saved_tensors_hooks(*self._pairs()[way])

    def _pairs(self) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]]:
        kept: dict[int, Tensor] = {}

        def to_numpy(tensor: Tensor) -> Any:
            self.seen(tensor)
            return tensor.detach().numpy().copy()

        def by_address(tensor: Tensor) -> Any:
            self.seen(tensor)
            key = tensor.untyped_storage().data_ptr() * 1000 + self.packed
            kept[key] = tensor.detach().clone()
            return key

        def by_sum(tensor: Tensor) -> Any:
            self.seen(tensor)
            return float(tensor.detach().double().sum().item()), tensor.detach().clone()

        def count(tensor: Tensor) -> Tensor:
            self.unpacked += 1
            return tensor

        return {
            "numpy": (to_numpy, lambda array: count(torch.from_numpy(array))),
            "address": (by_address, lambda key: count(kept[key])),
            "item": (by_sum, lambda pair: count(pair[1])),
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "scope"),
    [("numpy", "forward"), ("address", "both"), ("item", "forward"), ("save_on_cpu", "both")],
)
def test_hooks_in_the_step_that_compiles_and_in_later_ones(way: str, scope: str) -> None:
    model, log = ToyLM(layers=1), _Log()
    compiled = compile_mst(model)
    with mst_fx.watch() as report:
        for length in (48, 61):  # the last one compiles anew, under hooks that are there already
            batch = token_batch(1, length)
            truth = step(model, model, batch)[1]
            model.zero_grad()
            with log.hooks(way):
                loss = compiled(**batch)[0]
                if scope == "both":
                    loss.backward()
            if scope == "forward":
                loss.backward()
            assert worst_error(gradients(model), truth) <= _BAR
    assert not report.refusals and kinds(report)["vocab"] >= 1 and kinds(report)["mlp"] >= 1
    assert way == "save_on_cpu" or (log.packed >= 6 <= log.unpacked), "what loops save goes by the hooks"


@pytest.mark.slow
def test_hooks_only_in_a_later_step() -> None:
    model, batch, log = ToyLM(layers=1), token_batch(2, 33), _Log()
    truth, compiled = step(model, model, batch)[1], compile_mst(model)
    assert worst_error(step(model, compiled, batch)[1], truth) <= _BAR
    with log.hooks("address"):
        assert worst_error(step(model, compiled, batch)[1], truth) <= _BAR
    assert log.packed >= 3


@pytest.mark.slow
def test_hooks_and_the_graph_as_it_was_rewritten() -> None:
    """No AOTAutograd that packs for the loops: they save what they save themselves."""
    model, batch, log = ToyLM(), token_batch(1, 48), _Log()
    truth = step(model, model, batch)[1]
    with mst_fx.watch() as report, log.hooks("numpy"):
        found = step(model, compile_mst(model, {**SMALL_CHUNKS, "inner": "eager"}), batch)[1]
    assert worst_error(found, truth) <= _BAR and kinds(report) == {"mlp": 2, "vocab": 1} and log.packed >= 6


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_logits_are_computed_under_hooks(where: str) -> None:
    model, batch, log = ToyLM(layers=1), token_batch(1, 48), _Log()
    compiled = compile_mst(model)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        with log.hooks("address"):
            loss, logits = run(**batch)
            if where == "inside":
                loss = loss + logits.square().mean() + logits[:, -1].sin().sum()
        if where == "outside":
            loss = loss + logits.square().mean()
        before = log.packed
        loss.backward()
        assert log.packed == before
        found.append(gradients(model))
    assert worst_error(found[1], found[0]) <= _BAR


def test_attention_in_chunks_under_hooks() -> None:
    entry, log = ACCEPTED["gemma2"], _Log()
    model, batch = entry.build(sliding_window=16).double(), inputs_of(entry, 1, 40)
    truth = step(model, model, batch)[1]
    with mst_fx.watch() as report, log.hooks("numpy"):
        compiled = compile_mst(model, {**SMALL_CHUNKS, "attention_chunk_rows": 16})
        found = step(model, compiled, batch)[1]
    assert worst_error(found, truth) <= 3e-6 and kinds(report) == {"attention": 2, "mlp": 2, "vocab": 1}


@pytest.mark.slow
@pytest.mark.parametrize("is_outside", [True, False])
def test_a_checkpoint_with_hooks_of_its_own(is_outside: bool) -> None:
    """The non-reentrant checkpoint is made of such hooks."""
    model, batch, log = ToyLM(layers=1), token_batch(1, 48), _Log()
    truth = step(model, model, batch)[1]

    def run(**batch: Tensor) -> Any:
        return checkpoint(compiled if is_outside else model, use_reentrant=False, **batch)  # type: ignore[arg-type]

    compiled = compile_mst(model if is_outside else run)
    with log.hooks("numpy"):
        found = step(model, run if is_outside else compiled, batch)[1]
    assert worst_error(found, truth) <= _BAR


@pytest.mark.slow
def test_disabled_hooks() -> None:
    """Where somebody disabled hooks, we push none either: that would raise."""
    model, batch = ToyLM(layers=1), token_batch(1, 48)
    compiled = compile_mst(model)
    with disable_saved_tensors_hooks("no hooks here"):
        loss, logits = compiled(**batch)
        (loss + logits.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
