"""What training loops do: checkpointing, autocast, dynamic shapes, accumulation, scaling, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mst_fx
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import (
    ToyLM,
    check_parity,
    compile_mst,
    gradients,
    kinds,
    loss_of,
    relative_error,
    step,
    token_batch,
    worst_error,
)
from tests.models import ACCEPTED, OTHERS, inputs_of
from tests.operators import operators

_BAR = 1e-5
LLAMA = ACCEPTED["llama"]
INDUCTOR = {"chunk_rows": 16, "vocab_chunk_rows": 20}
ONE_LAYER = {"num_hidden_layers": 1}


def _check_retained(model: nn.Module, compiled: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Three backward passes through one graph give eager's gradients."""

    def thrice(run: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = run(**inputs).loss
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return gradients(model)

    truth = thrice(model)
    assert worst_error(thrice(compiled), truth) <= _BAR


@pytest.mark.slow
def test_inductor() -> None:
    """A layer of Gemma's with a window. Llama's is below, with dynamic lengths; GPT-2's, checkpointed."""
    entry = ACCEPTED["gemma2"]
    model, inputs = entry.build(**ONE_LAYER, sliding_window=16), inputs_of(entry, 3, 35)
    compiled = compile_mst(model, INDUCTOR)
    loss, grads = step(model, model, inputs)
    found_loss, found = step(model, compiled, inputs)
    assert relative_error(found_loss, loss) <= _BAR
    assert worst_error(found, grads) <= _BAR
    _check_retained(model, compiled, inputs)


@pytest.mark.slow
def test_inductor_with_checkpointing_and_a_mode() -> None:
    entry = ACCEPTED["gpt2"]
    model = entry.build(n_layer=1)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    options = {**INDUCTOR, "inductor": {"max_autotune": False}}
    report = check_parity(model, inputs_of(entry, 3, 35), _BAR, _BAR, options)
    assert kinds(report)["mlp"] == kinds(report)["vocab"] == 1


def _checkpointed() -> nn.Module:
    model = LLAMA.build()
    model.config.use_cache = False  # type: ignore[union-attr]  # the warning would break the graph
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


@pytest.mark.shares_compiled
def test_checkpointing() -> None:
    model, inputs = _checkpointed(), inputs_of(LLAMA, 3, 35)
    assert kinds(check_parity(model, inputs, _BAR, _BAR)) == {"mlp": 2, "vocab": 1}


@pytest.mark.shares_compiled
def test_checkpointed_layers_keep_their_inputs() -> None:
    """No loop runs again in the backward pass: what a layer starts from was saved.

    Recomputed, the loops of all layers run before the first gradient, and all their values are alive.
    """
    loss = loss_of(compile_mst(_checkpointed())(**inputs_of(LLAMA, 3, 35)))
    calls = [name for name, _ in operators(loss.backward) if name.startswith("mst_fx::loop")]
    assert calls.count("mst_fx::loop_backward") == 2
    assert calls.count("mst_fx::loop") == 0


def test_checkpointing_with_changing_lengths() -> None:
    """HF's checkpointing breaks the graph at the embedding: the head's rows are an argument of its graph."""
    model = LLAMA.build(**ONE_LAYER)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    compiled, reports = compile_mst(model), []
    for length in (35, 48, 61):
        inputs = inputs_of(LLAMA, 3, length)
        loss, grads = step(model, model, inputs)
        with mst_fx.watch() as report:
            found_loss, found = step(model, compiled, inputs)
        reports.append(kinds(report))
        assert relative_error(found_loss, loss) <= _BAR
        assert worst_error(found, grads) <= _BAR
        logits = compiled(**inputs).logits
        assert type(logits) is DeferredLogits and logits.shape == (3, length, 384)
        assert relative_error(logits + 0, model(**inputs).logits) <= _BAR
    assert reports == [{"mlp": 1, "vocab": 1}, {"mlp": 1, "vocab": 1}, {}]


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dynamic_sequence_lengths(inner: str) -> None:
    """Every length is right, and none after the second compiles anew."""
    is_toy = inner == "aot_eager"
    model = ToyLM(layers=1) if is_toy else LLAMA.build(**ONE_LAYER)
    compiled = compile_mst(model, {**INDUCTOR, "inner": inner}, dynamic=True)
    graphs = []
    for length in (35, 48, 61, 128, 33):
        inputs = token_batch(3, length) if is_toy else inputs_of(LLAMA, 3, length)
        loss, grads = step(model, model, inputs)
        found_loss, found = step(model, compiled, inputs)
        assert relative_error(found_loss, loss) <= _BAR
        assert worst_error(found, grads) <= _BAR
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


def _autocast_outside(model: nn.Module) -> Callable[..., Any]:
    compiled = compile_mst(model)

    def run(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(**inputs)

    return run


def _autocast_inside(model: nn.Module) -> Callable[..., Any]:
    def run(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    return compile_mst(run)  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [_autocast_outside, _autocast_inside])
def test_autocast(wrap: Callable[[nn.Module], Callable[..., Any]]) -> None:
    """As near to the truth as eager under autocast is: both round to bfloat16, in another order."""
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    truth_loss, truth = step(model, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager_loss, eager = step(model, model, inputs)
    with mst_fx.watch() as report:
        found_loss, found = step(model, wrap(model), inputs)
    assert kinds(report) == {"mlp": 1, "vocab": 1}
    assert worst_error(found, truth) <= 1.1 * worst_error(eager, truth)
    assert worst_error(found, truth) > 1e-4  # autocast was on
    bar = max(1.1 * relative_error(eager_loss, truth_loss), 1e-5)
    assert relative_error(found_loss, truth_loss) <= bar


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flat": lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
    "smoothed": lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1
    ),
    "sum": lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"),
    "shifted": lambda logits, labels: F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
    "nll": lambda logits, labels: F.nll_loss(logits.log_softmax(-1).flatten(0, 1), labels.flatten()),
    "probabilities": lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), F.one_hot(labels.flatten(), 96).float()
    ),
}


@pytest.mark.parametrize("name", _LOSSES)
def test_losses_inside_of_an_autocast_region(name: str) -> None:
    """Logits are bfloat16 there, and losses float32: the region decides the types of what the passes make."""
    torch.manual_seed(0)
    head = nn.Linear(16, 96)
    x, labels = torch.randn(3, 20, 16, requires_grad=True), torch.randint(0, 96, (3, 20))

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _LOSSES[name](head(x), labels)

    def results(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = run(x)
        assert found.dtype == torch.float32
        return [found.detach(), *torch.autograd.grad(found, [x, head.weight, head.bias])]

    truth_loss = _LOSSES[name](head(x), labels)
    truth = [truth_loss.detach(), *torch.autograd.grad(truth_loss, [x, head.weight, head.bias])]
    eager = results(loss)
    with mst_fx.watch() as report:
        found = results(compile_mst(loss))
    assert kinds(report) == {"vocab": 1}
    for e, f, t in zip(eager, found, truth, strict=True):
        assert relative_error(f, t) <= 1.1 * relative_error(e, t) + 1e-6


@pytest.mark.shares_compiled
def test_train_eval_train() -> None:
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    compiled = compile_mst(model)
    loss, grads = step(model, model, inputs)
    assert worst_error(step(model, compiled, inputs)[1], grads) <= _BAR
    model.eval()
    with torch.no_grad(), mst_fx.watch() as report:
        eager, found = model(**inputs), compiled(**inputs)
    assert {r.gradient for r in report.rewrites} == {"none"}  # loops go forward only
    assert kinds(report) == {"mlp": 1, "vocab": 1}
    assert type(found.logits) is DeferredLogits  # prediction_loss_only reads none
    assert relative_error(found.logits, eager.logits) <= _BAR
    assert relative_error(found.loss, eager.loss) <= _BAR
    model.train()
    again_loss, again = step(model, compiled, inputs)
    assert relative_error(again_loss, loss) <= _BAR
    assert worst_error(again, grads) <= _BAR


@pytest.mark.slow
def test_accumulation_over_micro_batches() -> None:
    model = ToyLM(layers=1)
    batches = [token_batch(2, 35 + extra) for extra in (0, 0, 1)]

    def accumulate(run: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            (loss_of(run(**batch)) / len(batches)).backward()
        return gradients(model)

    truth = accumulate(model)
    assert worst_error(accumulate(compile_mst(model)), truth) <= 1e-10


@pytest.mark.shares_compiled
def test_retain_graph() -> None:
    model = LLAMA.build(**ONE_LAYER)
    _check_retained(model, compile_mst(model), inputs_of(LLAMA, 3, 35))


@pytest.mark.shares_compiled
def test_loss_scaling() -> None:
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    _, truth = step(model, model, inputs, scale=2.0**16)
    _, found = step(model, compile_mst(model), inputs, scale=2.0**16)
    assert worst_error(found, truth) <= _BAR


@pytest.mark.shares_compiled
def test_all_labels_ignored() -> None:
    """The mean of nothing is NaN and its gradient is 0, as in eager."""
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    inputs["labels"][:] = -100
    loss, grads = step(model, model, inputs)
    found_loss, found = step(model, compile_mst(model), inputs)
    assert loss.isnan() and found_loss.isnan()
    assert all(not grad.isnan().any() for grad in grads.values())
    assert worst_error(found, grads) == 0


@pytest.mark.shares_compiled
def test_first_chunks_ignored() -> None:
    inputs = inputs_of(LLAMA, 3, 35)
    inputs["labels"].flatten()[:45] = -100
    check_parity(LLAMA.build(**ONE_LAYER), inputs, _BAR, _BAR)


def test_one_token() -> None:
    inputs = inputs_of(LLAMA, 3, 1)
    check_parity(LLAMA.build(**ONE_LAYER), inputs, _BAR, _BAR)


def test_checkpointing_under_autocast() -> None:
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    _, truth = step(model, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, eager = step(model, model, inputs)
        _, found = step(model, compile_mst(model), inputs)
    assert worst_error(found, truth) <= 1.1 * worst_error(eager, truth)


@pytest.mark.shares_compiled
def test_hooks_see_one_gradient_a_step() -> None:
    """DDP's reducer needs every parameter to be ready exactly once."""
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    seen: dict[str, int] = {}

    def count(name: str) -> Callable[[Any], None]:
        def hook(_: Any) -> None:
            seen[name] = seen.get(name, 0) + 1

        return hook

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    compile_mst(model)(**inputs).loss.backward()
    assert set(seen) == {name for name, _ in model.named_parameters()}
    assert set(seen.values()) == {1}


@pytest.mark.shares_compiled
def test_autograd_grad() -> None:
    model, inputs = LLAMA.build(**ONE_LAYER), inputs_of(LLAMA, 3, 35)
    parameters = dict(model.named_parameters())
    truth = torch.autograd.grad(model(**inputs).loss, list(parameters.values()))
    found = torch.autograd.grad(compile_mst(model)(**inputs).loss, list(parameters.values()))
    assert max(relative_error(f, t) for f, t in zip(found, truth, strict=True)) <= _BAR


def test_writes_in_place_inside_of_checkpointed_layers() -> None:
    """They have no readers, and must not go as dead code (a router's ``scatter_``, an ``x[i] = y``)."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.zeros_like(x).scatter_(-1, x.detach().topk(4, -1).indices, 1.0)
            mask = torch.zeros_like(x)
            mask.scatter_(-1, x.detach().topk(4, -1).indices, 1.0)
            places = torch.zeros_like(x)
            places[..., ::2] = 2.0
            return x + self.down(torch.relu(self.up(x))) * mask + places * chosen

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.head = nn.Linear(16, 96)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
            return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    model = Model().double()
    batch = {
        "x": torch.randn(2, 33, 16, dtype=torch.float64),
        "labels": torch.randint(96, (2, 33)),
    }
    assert kinds(check_parity(model, batch, 1e-10, 1e-9))["vocab"] == 1


@pytest.mark.slow
def test_checkpointed_experts() -> None:
    entry = OTHERS["deepseek_v3"]
    model = entry.build(**ONE_LAYER, first_k_dense_replace=0)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    check_parity(model, inputs_of(entry, 2, 41), _BAR, _BAR)
