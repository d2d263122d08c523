"""Python numbers that change from step to step: as many graphs as without mst-fx, right at each, and still chunked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.listeners import on_graph
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import (
    SMALL_CHUNKS,
    compile_mst,
    gradients,
    kinds,
    relative_error,
    step,
    worst_error,
)
from tests.operators import widest_operand

WIDTH, INNER, VOCAB, ROWS = 16, 64, 96, 80
HALVES = {**SMALL_CHUNKS, "chunk_rows": 40, "vocab_chunk_rows": 40}


class Net(nn.Module):
    """An MLP and a head, with a function of the inside and a number in each.

    Args:
        inside: of the MLP's inside ``[B, S, I]`` and the number.
        logits: of the logits ``[B·S, V]`` and the number.
    """

    def __init__(self, inside: Any, logits: Any, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = (
            nn.Linear(WIDTH, INNER),
            nn.Linear(INNER, WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )
        self.inside, self.logits = inside, logits
        self.to(dtype)

    def forward(self, x: Tensor, labels: Tensor, number: Any) -> Tensor:
        x = x + self.down(self.inside(self.up(x), number))
        logits = self.logits(self.head(x).flatten(0, 1), number)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, ROWS // 2, WIDTH, dtype=dtype), torch.randint(0, VOCAB, (2, ROWS // 2))


def graphs(model: nn.Module, backend: str, numbers: Sequence[Any], **options: Any) -> int:
    """How many graphs a schedule makes; with mst each step must agree with eager, and the last be chunked."""
    torch._dynamo.reset()
    counters.clear()
    x, labels = batch()
    compiled = torch.compile(model, backend=backend, **options)
    for number in numbers:
        given = {"x": x, "labels": labels, "number": number}
        found_loss, found = step(model, compiled, given)
        if backend == "mst":
            loss, grads = step(model, model, given)
            assert relative_error(found_loss, loss) < 1e-10
            assert worst_error(found, grads) < 1e-9
    if backend == "mst":
        largest = widest_operand(lambda: compiled(x, labels, numbers[-1]).backward())
        assert largest < ROWS * INNER, largest
    return counters["stats"]["unique_graphs"]


def _inside(x: Tensor, t: float) -> Tensor:
    x = x / t + t * x - torch.mul(x, other=t)
    x = (1 / t) * F.gelu(x.div(t)) + x.add(t).mul(2 * t + 1) - x / (x * x + t)
    return (x * 0.5).mul_(t).sub_(t) + (x > t) * x + ((x < t) * t) * abs(t - 1.0)


def _logits(x: Tensor, t: float) -> Tensor:
    return t * torch.tanh((x - t) / t)


@pytest.mark.slow
def test_a_schedule_of_fifty_values_is_as_many_graphs_as_without_mst() -> None:
    model = Net(_inside, _logits)
    numbers = [1.9 - 0.037 * index for index in range(50)]
    assert graphs(model, "mst", numbers, options=HALVES) == graphs(model, "aot_eager", numbers[:4]) == 2


def _powers(x: Tensor, t: float) -> Tensor:
    x = torch.where(x > 0, x, t) * 0.9 + x.where(x > -1, t / 3)
    return (x * x + 0.5) ** t + (t - x)


@pytest.mark.slow
def test_slopes_are_as_many_graphs_as_with_inductor() -> None:
    def inside(x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            kept = F.leaky_relu(x, t)
        return F.leaky_relu(x, negative_slope=t) * 0.5 + nn.functional.leaky_relu(x - 0.1, t / 3) + kept

    assert graphs(Net(inside, F.leaky_relu), "mst", [0.3, 0.2, -0.1, 0.0], options=HALVES) == 2


@pytest.mark.slow
def test_where_and_powers_are_fewer_graphs_than_without_mst() -> None:
    assert graphs(Net(_powers, _logits), "mst", [1.7, 1.3, 0.9, 0.5], options=HALVES) == 2


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[0.5, -0.5, 0.0, -2.0], [3, 5, 4, -7, 12]], ids=["signs", "ints"])
def test_signs_and_step_counters(numbers: list[Any]) -> None:
    model = Net(lambda x, t: F.silu(x * t) + x / (t * t + 2), lambda x, t: x * (t + 1) - t)
    ours = graphs(model, "mst", numbers, options=HALVES)
    assert ours <= graphs(model, "aot_eager", numbers)


class Layers(nn.Module):
    """Layers that share a branch's scale; a loss that another number weighs; logits are returned.

    Args:
        checkpoints: layers; Dynamo itself then takes no floats (torch 2.13: an AssertionError in
            ``lift_tracked_freevar_to_input``), but ints.
    """

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        torch.manual_seed(0)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.double()

    def layer(self, index: int, x: Tensor, scale: float) -> Tensor:
        inside: Tensor = self.ups[index](x)
        return x + self.downs[index](F.gelu(inside) * scale) / scale

    def forward(self, x: Tensor, labels: Tensor, scale: float, weight: float) -> tuple[Tensor, Tensor]:
        for index in range(2):
            if self.checkpoints:
                x = checkpoint(self.layer, index, x, scale, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = self.layer(index, x, scale)
        logits = self.head(x) / scale
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (each * weight).mean() * weight + weight, logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "scales", [[0.5, 0.7, 0.9, -1.1], [3, 5, 4, -7]], ids=["floats", "ints, checkpointed"]
)
def test_layers_share_a_number_and_deferred_logits_keep_it(scales: list[Any]) -> None:
    model, (x, labels) = Layers(checkpoints=isinstance(scales[0], int)), batch()
    compiled = compile_mst(model)
    counters.clear()
    with mst_fx.watch() as report:
        for scale, weight in zip(scales, (1.5, 1.4, 1.3, 0.2), strict=True):
            given = {"x": x, "labels": labels, "scale": scale, "weight": weight}
            loss, grads = step(model, model, given)
            model.zero_grad(set_to_none=True)
            found_loss, logits = compiled(**given)
            assert isinstance(logits, DeferredLogits)
            found_loss.backward()
            assert relative_error(found_loss, loss) < 1e-10
            assert worst_error(gradients(model), grads) < 1e-9
            assert relative_error(logits[:, -1], model(**given)[1][:, -1]) < 1e-10
    assert counters["stats"]["unique_graphs"] == 2
    mlps = 2 if model.checkpoints else 1  # nothing stands between the two
    assert [(r.kind, r.chunks) for r in report.rewrites] == 2 * [*[("mlp", 5)] * mlps, ("vocab", 4)]


def test_a_scale_of_eager_attention_is_taken_by_the_query() -> None:
    class Eager(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, divisor: float, factor: float) -> Tensor:
            at = torch.arange(q.shape[2])
            mask = torch.where(at[None, :] <= at[:, None], 0.0, float("-inf"))
            for scores in (lambda x: x / divisor, lambda x: factor * 0.5 * x, lambda x: x * factor):
                weights = F.softmax(scores(torch.matmul(q, k.transpose(2, 3))) + mask, dim=-1)
                v = torch.matmul(weights, v)
            return v

    model = Eager()
    compiled = compile_mst(model, {**SMALL_CHUNKS, "attention_chunk_rows": 16})
    counters.clear()
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with mst_fx.watch() as report:
        for divisor, factor in ((-2.5, 0.3), (2.0, 0.4), (1.5, -0.5), (0.5, 0.0)):
            found, truth = compiled(q, k, v, divisor, factor), model(q, k, v, divisor, factor)
            assert relative_error(found, truth) < 1e-12
            grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, truth)]
            assert all(relative_error(a, b) < 1e-10 for a, b in zip(*grads, strict=True))
    assert counters["stats"]["unique_graphs"] == 2
    assert [r.kind for r in report.rewrites].count("attention") >= 4


class Capped(nn.Module):
    """Gemma 2's attention, written out: the cap is a number that changes.

    Args:
        cap: of the scaled scores and the number.
    """

    def __init__(self, cap: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, number: float) -> Tensor:
        at = torch.arange(q.shape[2])
        scores = self.cap(torch.matmul(q, k.transpose(2, 3)) * 0.35, number)
        scores = scores + torch.where(at[None, :] <= at[:, None], 0.0, float("-inf"))
        return torch.matmul(F.softmax(scores, dim=-1), v)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spelling", "cap", "fires"),
    [
        ("as Gemma 2", lambda x, t: torch.tanh(x / t) * t, True),
        ("as methods", lambda x, t: x.div(t).tanh().mul(t), True),
        ("two numbers", lambda x, t: torch.tanh(x / t) * (2 * t), False),
        ("one constant", lambda x, t: torch.tanh(x / 3.0) * t, False),
        ("the wrong way", lambda x, t: torch.tanh(x * t) / t, False),
    ],
)
def test_a_softcap_of_eager_attention_may_change(spelling: str, cap: Any, fires: bool) -> None:
    model = Capped(cap)
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(function: Any, number: float) -> list[Tensor]:
        out = function(q, k, v, number)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    counts = []
    ours: Any = {**SMALL_CHUNKS, "attention_chunk_rows": 16}
    for backend, options in (("aot_eager", None), ("mst", ours)):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=backend, options=options)
        run(compiled, 0.5)  # a constant of the first graph
        with mst_fx.watch() as report:
            for number in (0.7, 3.0, -0.9):
                pairs = zip(run(compiled, number), run(model, number), strict=True)
                assert all(relative_error(a, b) < 1e-10 for a, b in pairs)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == 2
    found = [r.kind for r in report.rewrites], [r.kind for r in report.refusals]
    assert found == ((["attention"], []) if fires else ([], ["attention"]))


def test_negative_scales_of_fused_attention_are_left_alone() -> None:
    """With a mask torch's attention takes them; its causal kernel gives NaN on a CPU (torch 2.13)."""

    def run(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=at[None, :] <= at[:, None], scale=-0.5)

    x = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    with mst_fx.watch() as report:
        found = compile_mst(run, {**SMALL_CHUNKS, "attention_chunk_rows": 16})(x)
    assert relative_error(found, run(x)) < 1e-12
    assert [r.kind for r in report.refusals] == ["attention"] and not report.rewrites


@pytest.mark.slow
def test_numbers_outside_of_loops_stay_numbers() -> None:
    class Weighed(Net):
        def forward(self, x: Tensor, labels: Tensor, number: Any) -> Tensor:
            return super().forward(x, labels, number) * number + x.cumsum(1).mul(number).mean()

    model, (x, labels) = Weighed(lambda x, t: F.gelu(x), lambda x, t: x), batch()
    compiled = compile_mst(model)
    with mst_fx.watch() as report:
        for number in (0.5, 0.75):
            given = {"x": x, "labels": labels, "number": number}
            assert worst_error(step(model, compiled, given)[1], step(model, model, given)[1]) < 1e-9
    assert "item()" in report.after[-1] and "mst_fx.loop" in report.after[-1]
    assert "torch.ones(" not in report.after[-1]


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_sixteen_bits_round_as_with_numbers(inner: str) -> None:
    """An error against the truth of at most 1.1 times eager's; under Inductor also no more graphs than plain."""

    def inside(x: Tensor, t: float) -> Tensor:
        return F.silu(x * t) + (x + t) / (t + 0.77) - (t - x)

    model = Net(inside, _logits, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    x, labels = batch(torch.bfloat16)
    compiled = compile_mst(model, {**SMALL_CHUNKS, "inner": inner})
    counters.clear()
    errors: dict[str, float] = {"eager": 0.0, "mst": 0.0}
    for number in (1.9, 1.3337, 0.71):
        truth = step(exact, exact, {"x": x.double(), "labels": labels, "number": number})[1]
        for name, run in (("eager", model), ("mst", compiled)):
            grads = step(model, run, {"x": x, "labels": labels, "number": number})[1]
            difference = sum(float((grads[k].double() - truth[k]).square().sum()) for k in truth)
            errors[name] += difference / sum(float(truth[k].square().sum()) for k in truth)
    assert errors["mst"] ** 0.5 <= 1.1 * errors["eager"] ** 0.5
    assert counters["stats"]["unique_graphs"] == 2


def _gemma() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GemmaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    ids = batch()[1]
    return transformers.GemmaForCausalLM(config).double(), {
        "input_ids": ids,
        "labels": ids,
        "use_cache": False,
    }


class _Eps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps, self.p, self.gain = 1e-5, 0.0, 1.25
        self.embed, self.up = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, INNER)
        self.down, self.head = nn.Linear(INNER, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = F.layer_norm(self.embed(ids), (WIDTH,), eps=self.eps)
        x = x + self.down(F.dropout(F.gelu(self.up(x)), self.p) * self.gain)
        return F.cross_entropy(self.head(x.cumsum(1)).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("spelling", ["Gemma in float64", "dynamic=True"])
def test_passes_run_once_where_floats_become_constants(spelling: str) -> None:
    """Gemma's embedding scale is a float64 buffer; with ``dynamic=True`` norms' eps and such are floats, too."""
    model, given = _gemma() if spelling != "dynamic=True" else (_Eps(), {"ids": batch()[1]})
    rewritten: list[dict[str, int]] = []
    compiled = compile_mst(model, dynamic=True if spelling == "dynamic=True" else None)
    with on_graph.listening(lambda before, after, report: rewritten.append(kinds(report))):
        found = step(model, compiled, given)[1]
    truth = step(model, model, given)[1]
    assert worst_error(found, truth) < (
        1e-9 if spelling == "dynamic=True" else 1e-5
    )  # Gemma's norms are float32
    assert len(rewritten) == 1 and rewritten[0]["mlp"] == rewritten[0]["vocab"] == 1
