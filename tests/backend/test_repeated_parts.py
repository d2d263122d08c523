"""Equal layers are compiled once, whatever was done to them: that they are, and that bits and bytes stay.

With real Inductor, since no other compiler gets such graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.checkpoint import checkpoint

from mst_fx.listeners import on_plan
from mst_fx.torch_api import called_graphs, inductor
from tests.helpers import GatedMLP, loss_of, step, worst_error
from tests.models import ACCEPTED, inputs_of
from tests.operators import ATTENTION, operators, times_run
from tests.plan.ways import Grouped, Ways, way_of
from tools.bench.models import Shape, make_llama, text_tokens
from tools.meters.cpu import measure_cpu

pytestmark = pytest.mark.slow

WIDTH = 8
SMALL = {"chunk_rows": 8, "vocab_chunk_rows": 8}


class Layer(nn.Module):
    def __init__(self, inner: int = 24, drops: bool = False) -> None:
        super().__init__()
        self.norm, self.mlp, self.drops = nn.LayerNorm(WIDTH), GatedMLP(WIDTH, inner), drops

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        made = self.mlp(self.norm(x))
        return x + (F.dropout(made, 0.5) if self.drops else made)


class Stack(nn.Module):
    """Layers in float64, one after the other, and something in front of them and behind."""

    def __init__(self, *layers: nn.Module, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.layers, self.is_checkpointed = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(layers),
            is_checkpointed,
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).cos()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        return x.mean(1).sin().sum()


def _x(length: int = 32) -> Tensor:
    return torch.linspace(-1, 1, 2 * length * WIDTH, dtype=torch.float64).reshape(2, length, WIDTH)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """For each graph that goes to Inductor, of each repetition the number of parts."""
    found: list[list[int]] = []
    call = called_graphs.call_repetitions

    def watched(gm: fx.GraphModule, repetitions: Sequence[Any], *rest: Any) -> None:
        found.append([len(each.stretches) for each in repetitions])
        call(gm, repetitions, *rest)

    monkeypatch.setattr(inductor, "call_repetitions", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several add up in another order each time
    with fresh_inductor_cache():
        yield found
    torch.set_num_threads(threads)


def _compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="mst", options={**SMALL, **options}, fullgraph=True)


def _step(
    model: nn.Module, run: Callable[..., Any], batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    return step(model, run, batch)


def _check_bits(model: nn.Module, batch: dict[str, Any], **options: Any) -> None:
    """A step gives the bits that it gives where each layer is compiled by itself."""
    loss, truth = _step(model, _compiled(model, layers="each", **options), batch)
    found_loss, found = _step(model, _compiled(model, **options), batch)
    assert torch.equal(found_loss, loss) and found.keys() == truth.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in truth.items())


def test_layers_without_checkpoints(parts: list[list[int]]) -> None:
    model, batch = Stack(*(Layer() for _ in range(4))), {"x": _x()}
    _check_bits(model, batch)
    assert parts == [[], [], [4], [4]]
    loss, truth = step(model, model, batch)
    found_loss, found = step(model, _compiled(model), batch)
    assert abs(found_loss - loss) <= 1e-12 * abs(loss) and worst_error(found, truth) <= 1e-12


def test_layers_of_two_kinds(parts: list[list[int]]) -> None:
    """In a row, and one more."""
    model = Stack(*(Layer() for _ in range(3)), *(Layer(inner=40) for _ in range(2)), Layer(inner=56))
    _check_bits(model, {"x": _x()})
    assert [sorted(each) for each in parts[2:]] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_random_numbers(parts: list[list[int]], is_checkpointed: bool) -> None:
    """Each layer draws its own, and the same as before."""
    model = Stack(*(Layer(drops=True) for _ in range(3)), is_checkpointed=is_checkpointed)
    _check_bits(model, {"x": _x()})
    assert parts[2:] == [[3], [3]]


class _Shifted(nn.Module):
    """Layers of two kinds, and between them a parameter, whose gradient is what the backward pass of the first kind is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Stack(*(Layer() for _ in range(3)))
        self.second = nn.ModuleList(Layer(inner=40) for _ in range(5))  # looked at first, being more
        self.shift = nn.Parameter(torch.linspace(-1, 1, 2 * 32 * WIDTH).view(2, 32, WIDTH))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first.first(x).cos()
        for layer in self.first.layers:
            x = layer(x)
        x = x + self.shift
        for layer in self.second:
            x = layer(x)
        return x.mean(1).sin().sum()


def test_nobody_writes_over_what_another_repetition_gives(parts: list[list[int]]) -> None:
    model = _Shifted()
    _check_bits(model, {"x": _x()})
    assert all(len(each) == 2 for each in parts[2:]), parts
    loss, truth = step(model, model, {"x": _x()})
    found_loss, found = step(model, _compiled(model), {"x": _x()})
    assert abs(found_loss - loss) <= 1e-12 * abs(loss) and worst_error(found, truth) <= 1e-12


def test_what_a_part_gives_is_written_over(parts: list[list[int]]) -> None:
    """By the loop of a layer of another kind, whose tangent it is: as often as if each layer is compiled by itself, and without copies."""
    model, x = Stack(Layer(inner=96), *(Layer() for _ in range(3))), _x()
    counts = {}
    for layers in ("each", "once"):
        compiled = _compiled(model, layers=layers)
        compiled(x).backward()
        names = [name for name, _ in operators(lambda run=compiled: run(x).backward())]  # type: ignore[misc]
        counts[layers] = [names.count(name) for name in ("mst_fx::loop_backward_over", "aten::clone")]
    assert parts == [[], [], [3], [3]]
    assert counts["once"] == counts["each"] and counts["once"][0] >= 3, counts


def test_two_backward_passes(parts: list[list[int]]) -> None:
    """The second finds what the first read."""
    model, x = Stack(*(Layer() for _ in range(3))), _x()
    compiled = _compiled(model)
    loss = compiled(x)
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, once, again)) and parts == [[3], [3]]


class _Scaled(Layer):
    """The gradient of the scale is a sum of two dimensions and more, which the backward pass of the layer before may read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.scaled_dot_product_attention(x * self.scale, x, x, is_causal=True))


def test_sums_that_lose_a_dimension_are_given_as_views(
    parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that kernels of a GPU may give with one, in torch 2.11."""
    given: list[Any] = []
    call = called_graphs._called

    def watched(name: str, whole: fx.GraphModule, *rest: Any) -> Any:
        given.extend(node.target for node in whole.graph.output_node().args[0])  # type: ignore[union-attr]
        return call(name, whole, *rest)

    monkeypatch.setattr(called_graphs, "_called", watched)
    _check_bits(Stack(*(_Scaled() for _ in range(4))), {"x": _x()})
    assert all(parts[2:]) and torch.ops.aten.view.default in given
    assert torch.ops.aten.sum.dim_IntList not in given


def test_parameters_at_odd_addresses(parts: list[list[int]]) -> None:
    """Kernels that count on even ones are not given them: another graph is called."""
    model = Stack(*(Layer() for _ in range(4)))
    for layer in model.layers[2:]:
        whole = torch.randn(WIDTH * 24 + 1, dtype=torch.float64)
        layer.mlp.up.weight = nn.Parameter(whole[1:].view(24, WIDTH))  # type: ignore[union-attr]
    _check_bits(model, {"x": _x()})
    assert parts[2:] == [[4], [4]]


SETTINGS: dict[str, dict[str, Any]] = {
    "each": {"layers": "each"},
    "C++": {"inductor": {"cpp_wrapper": True}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_leave_all(name: str, parts: list[list[int]]) -> None:
    with torch.no_grad():
        _compiled(Stack(*(Layer() for _ in range(3))), **SETTINGS[name])(_x())
    assert parts == [[]]


def test_a_defect_leaves_all(parts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise IndexError("here")

    monkeypatch.setattr("mst_fx.repeated_parts.find_repetitions", fails)
    model = Stack(*(Layer() for _ in range(3)))
    with torch.no_grad():
        assert torch.allclose(_compiled(model)(_x()), model(_x()), rtol=1e-12)
        assert parts == [[]]
        with pytest.raises((IndexError, BackendCompilerFailed), match="here"):
            _compiled(model, strict=True)(_x())


def test_sizes_that_change_leave_all(parts: list[list[int]]) -> None:
    model = Stack(*(Layer() for _ in range(3)))
    torch._dynamo.reset()
    torch.compile(model, backend="mst", options={**SMALL}, dynamic=True)(_x()).backward()
    assert parts == [[], []]


PLANS = {
    "all but a start is kept": lambda: Grouped(1, 3),
    "groups": lambda: Grouped(0, 2),
    "groups on the host": lambda: Grouped(0, 2, is_sent=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, parts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, attention as often, and no more memory: in the order of the graph, which Inductor would change where that saves a little."""
    torch.manual_seed(0)
    entry = ACCEPTED["llama"]
    model: Any = entry.build(num_hidden_layers=6).train()
    batch = inputs_of(entry, 1, 384)
    as_ordered = {"inner": "inductor", "inductor": {"reorder_for_peak_memory": False}}
    stages, strict = way_of(PLANS[name]())
    ways = [(stages, {**strict, **as_ordered, "layers": layers}) for layers in ("each", "once")]
    compiled = Ways(monkeypatch, model, ways, SMALL)
    run = functools.partial(_step, model, compiled.run, batch)
    found = []
    for compiled.now in (0, 1, 0, 1):  # what one finds in the host's arena depends on what was there before
        loss, gradients = run()
        model.zero_grad(set_to_none=True)
        with measure_cpu() as measured:
            loss_of(compiled.run(**batch)).backward()
        found.append((loss, gradients, times_run(ATTENTION, run), measured.peak_bytes))
    (loss, truth, times, peak), (found_loss, mine, mine_times, mine_peak) = found[2:]
    assert torch.equal(found_loss, loss) and all(torch.equal(mine[name], truth[name]) for name in truth)
    assert mine_times == times
    sines = 2 * 384 * 16 * 4  # times 1.0: a part is given them, where kernels would make them again
    assert mine_peak <= peak + sines, (mine_peak, peak)
    assert sorted(map(bool, parts)) == [False, False, True, True]


def test_plans_without_loops(parts: list[list[int]]) -> None:
    """Un-chunked MLPs take no more in equal parts, and what the plan says but for a tensor: products for weights come before what is made behind
    them, and what a part is given is not held for what waits for it."""
    shape, length = Shape(hidden=128, intermediate=1024, heads=4, kv_heads=2, vocabulary=512, layers=4), 1024
    model = make_llama(shape, length, "cpu", torch.float32, checkpoint=False)
    ids = text_tokens(length, shape.vocabulary).view(1, length)
    batch = {"input_ids": ids, "labels": ids}
    plans: list[Any] = []
    peaks = []
    for layers in ("each", "once"):
        torch._dynamo.reset()
        options: dict[str, Any] = {"memory": "4GiB", "host_memory": "0", "layers": layers}
        compiled = torch.compile(model, backend="mst", options=options, fullgraph=True)
        with on_plan.listening(plans.append):
            _step(model, compiled, batch)
        model.zero_grad(set_to_none=True)
        with measure_cpu() as measured:
            loss_of(compiled(**batch)).backward()
        model.zero_grad(set_to_none=True)
        peaks.append(measured.peak_bytes)
    assert "un-chunked" in str(plans[1]) and str(plans[0]) == str(plans[1])
    assert sorted(map(bool, parts)) == [False, False, True, True]
    assert peaks[1] <= peaks[0] + 2**16
    inside = 4 * length * shape.intermediate  # a kernel that a CPU runs writes over none of what it reads
    assert peaks[1] <= plans[1].peak - plans[1].taken + inside, (peaks, plans[1])
