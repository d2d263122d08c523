"""Loops un-chunked where there is memory to spare: products run once, what is saved is what was promised, and gradients agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mst_fx
from mst_fx import compiling
from mst_fx.context import JointContext
from mst_fx.errors import BudgetError
from mst_fx.listeners import on_plan
from mst_fx.passes import memory_plan
from mst_fx.pipeline import JOINT_STAGES
from mst_fx.plan import room
from mst_fx.plan.choices import Choice
from mst_fx.plan.costs import device_of
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.layers import layers_of
from mst_fx.plan.loops import loops_of
from mst_fx.plan.recompute import make_again
from mst_fx.plan.unchunk import Unchunking
from mst_fx.report import MemoryPlan
from mst_fx.stage import Stage, When
from mst_fx.torch_api import inductor
from mst_fx.torch_api.joint import copied
from tests.helpers import SMALL_CHUNKS, GatedMLP, ToyLM, compile_mst, loss_of, step, token_batch, worst_error
from tests.models import OTHERS, inputs_of
from tests.plan.test_memory_plan import _given, _saved
from tests.plan.ways import STRICT, Ways

_LAYERS = 3
_SEEN = 1 - room._UNSEEN  # of a budget
_PLENTY = {**SMALL_CHUNKS, "memory": "100GiB", "strict": True}


def _toy(*args: Any, **kwargs: Any) -> tuple[ToyLM, dict[str, Tensor]]:
    torch.manual_seed(0)
    return ToyLM(*args, **kwargs), token_batch(2, 48)


def _at_joint(monkeypatch: pytest.MonkeyPatch, run: Callable[[JointContext], Any], key: object) -> None:
    monkeypatch.setattr(compiling, "JOINT_STAGES", (Stage("memory", run, when=When.JOINT),))
    monkeypatch.setattr("mst_fx.joint._key", lambda *_: str(key))


def _products(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Takes the number of ``aten.mm`` of each graph that is compiled from now on, forward and backward."""
    forward: list[int] = []
    backward: list[int] = []
    plain: Any = vars(inductor)["aot_eager"]
    nop: Any = vars(inductor)["boxed_nop"]

    def recorded(gm: fx.GraphModule, inputs: Any, fw_compiler: Any) -> Any:
        def counted(run: Any, found: list[int]) -> Any:
            def compiled(gm: fx.GraphModule, inputs: Any) -> Any:
                assert not any("mst_fx.loop." in str(node.target) for node in gm.graph.nodes)
                found.append(sum(node.target is torch.ops.aten.mm.default for node in gm.graph.nodes))
                return run(gm, inputs)

            return compiled

        return plain(
            gm, inputs, fw_compiler=counted(fw_compiler, forward), bw_compiler=counted(nop, backward)
        )

    monkeypatch.setattr(inductor, "aot_eager", recorded)
    return forward, backward


class _Unchunked:
    """A stage that un-chunks all layers, and takes one choice for each."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.choices: list[Choice] = []

    def __call__(self, context: JointContext) -> None:
        joint = JointGraph(context.graph)
        unchunking = Unchunking(joint, layers_of(joint), ())
        self.choices = [those[self.index] for those in unchunking.choices]
        copies = {node: node for node in context.graph.nodes}
        here = unchunking.written(context.graph, copies, self.choices, is_trial=False)
        make_again(JointGraph(context.graph), here)


@pytest.mark.slow
def test_every_choice_saves_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved bytes differ by what is kept, exactly, and no product of an MLP that is kept runs twice.

    In float32: of attention on a CPU in float64 torch 2.11's fakes have sums of another type.
    """
    model, batch = _toy(layers=_LAYERS)
    model.float()
    _, truth = step(model, model, batch)
    given = _given(model, batch)
    forward, backward = _products(monkeypatch)
    saved, kept = [], []
    every = [_Unchunked(index) for index in (0, 2, -2, -1)]
    ways = [((Stage("memory", stage.__call__, when=When.JOINT),), STRICT) for stage in every]
    compiled = Ways(monkeypatch, model, ways)
    for compiled.now, stage in enumerate(every):
        loss = loss_of(compiled.run(**batch))
        saved.append(_saved(loss, given))
        model.zero_grad(set_to_none=True)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert worst_error(found, truth) < 1e-5
        assert all("un-chunked" in str(choice) for choice in stage.choices)
        kept.append(sum(choice.bytes for choice in stage.choices))
    assert [s - saved[0] for s in saved] == [k - kept[0] for k in kept]
    assert kept == sorted(set(kept))
    # Three products an MLP forward, six backward, and four of attention's two projections.
    assert forward == [3 * _LAYERS] * 4
    assert len(backward) == 4 and backward[-1] == 10 * _LAYERS < backward[0]


class _Dropping(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.dropout(F.gelu(self.up(x)), 0.3))
        return found


class _Twice(nn.Module):
    """Two loops a layer: rows are mixed between the two."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = GatedMLP(width, inner), GatedMLP(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).flip(1))
        return found


class _TwoResults(nn.Module):
    """One loop of two results, which are mixed behind it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(inner, 2)

    def forward(self, x: Tensor) -> Tensor:
        inside = F.gelu(self.up(x))
        found: Tensor = self.down(inside) + self.gate(inside).flip(1).sum(-1, keepdim=True)
        return found


def _frozen(model: ToyLM) -> ToyLM:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up" in name or "qkv" in name)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", ["post", "parallel", "frozen", "dropout", "two loops", "two results"])
def test_gradients_agree(case: str) -> None:
    """Where a loop was that drops out: with those that it drops, of which each row has its key."""
    mlps: dict[str, Any] = {"dropout": _Dropping, "two loops": _Twice, "two results": _TwoResults}
    model, batch = _toy(case if case in ("post", "parallel") else "pre", mlps.get(case, GatedMLP), layers=1)
    if case == "frozen":
        model = _frozen(model)
    torch.manual_seed(1)
    chunked = case == "dropout"
    loss, truth = step(model, compile_mst(model, SMALL_CHUNKS) if chunked else model, batch)
    torch.manual_seed(1)
    with mst_fx.watch() as report:
        found, gradients = step(model, compile_mst(model, _PLENTY), batch)
    (plan,) = report.plans
    assert {"un-chunked" in each.again for each in plan.layers} == {True}
    assert sum(rewrite.kind == "mlp" for rewrite in report.rewrites) == (2 if case == "two loops" else 1)
    assert abs(float(found - loss)) < 1e-12 and worst_error(gradients, truth) < 1e-12


@pytest.mark.slow
def test_lengths_that_change() -> None:
    """The second length is compiled for all lengths."""
    model, batch = _toy(layers=1)
    run = compile_mst(model, _PLENTY)
    plans: list[Any] = []
    with on_plan.listening(plans.append):
        for length in (48, 31, 80):
            batch = token_batch(2, length)
            _, truth = step(model, model, batch)
            _, found = step(model, run, batch)
            assert worst_error(found, truth) < 1e-12
    assert ["un-chunked" in str(plan) for plan in plans] == [True, True]


def test_experts_stay_and_the_shared_one_is_unchunked() -> None:
    torch.manual_seed(0)
    entry = OTHERS["qwen2_moe"]
    model, batch = entry.build().float().train(), inputs_of(entry, 1, 96, torch.float32)
    _, truth = step(model, model, batch)
    with mst_fx.watch() as report:
        _, found = step(model, compile_mst(model, {**_PLENTY, "strict": False}), batch)
    assert "un-chunked" in str(report.plans[0]) and worst_error(found, truth) < 2e-6


@dataclasses.dataclass
class _Planned:
    """What was planned for a budget: its seconds with those of loops, and what the graph was then."""

    plan: MemoryPlan
    unchunked: int
    seconds: float
    graph: str


@pytest.mark.slow
def test_more_memory_is_never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph under many budgets. Those of which the best chunked plan is too much have the plan that they had."""
    model, batch = _toy(layers=_LAYERS)
    written: list[Any] = []
    write: Any = memory_plan._write

    def remembered(*args: Any, is_trial: bool) -> JointGraph:
        written.append(args)
        return write(*args, is_trial=is_trial)

    monkeypatch.setattr(memory_plan, "_write", remembered)

    def planned(context: JointContext, budget: int) -> _Planned:
        plans: list[MemoryPlan] = []
        options = dataclasses.replace(context.options, memory=budget)
        graph = copied(context.graph)
        memory_plan.run(JointContext(graph, options, plans.append))
        graph.lint()
        chosen = written[-1][2]
        joint = JointGraph(context.graph)
        again = Unchunking(joint, layers_of(joint), ()).again
        loops = [
            0 if c.layer.unchunked else a.seconds(device_of("")) for c, a in zip(chosen, again, strict=True)
        ]
        seconds = sum(c.cost.seconds(device_of("")) for c in chosen) + sum(loops)
        assert plans[0].peak <= budget
        return _Planned(plans[0], sum(bool(c.layer.unchunked) for c in chosen), seconds, str(graph))

    def sweep(context: JointContext) -> None:
        with pytest.raises(BudgetError):
            planned(context, 1000)
        rich = planned(context, 10**9)
        monkeypatch.setattr(memory_plan, "unchunking_of", lambda *_: None)
        chunked = planned(context, 10**9)
        top = int(chunked.plan.peak / _SEEN) + 1
        monkeypatch.setattr(memory_plan, "unchunking_of", pytest.fail)
        tight = [planned(context, int(share * top)) for share in (0.9, 0.99)]
        monkeypatch.undo()
        monkeypatch.setattr(memory_plan, "_write", remembered)
        most = int(rich.plan.peak / _SEEN) + 1
        budgets = [int(0.9 * top), int(0.99 * top), *(top + (most - top) * i // 6 for i in range(7))]
        found = [planned(context, budget) for budget in budgets]
        assert [each.graph for each in found[:2]] == [each.graph for each in tight]
        counts = [each.unchunked for each in found]
        assert counts[:2] == [0, 0] and counts[-1] == _LAYERS and counts == sorted(counts)
        assert 0 < min(count for count in counts if count) < _LAYERS
        seconds = [each.seconds for each in found]
        assert seconds == sorted(seconds, reverse=True) and seconds[-1] < seconds[2]

    _at_joint(monkeypatch, sweep, "sweep")
    loss_of(compile_mst(model, {**SMALL_CHUNKS, "strict": True})(**batch)).backward()


@pytest.mark.slow
def test_some_layers_in_chunks_and_some_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _toy(layers=_LAYERS)
    loss, truth = step(model, model, batch)
    plans: list[Any] = []
    budgets: list[int] = []

    def ways() -> Iterator[tuple[Sequence[Stage], dict[str, Any]]]:
        yield JOINT_STAGES, {"memory": "100GiB", **STRICT}
        budgets.append(int(0.8 * plans[0].peak / _SEEN))
        yield JOINT_STAGES, {"memory": budgets[0], **STRICT}

    compiled = Ways(monkeypatch, model, ways())
    compiled.now = 1
    with on_plan.listening(plans.append):
        found, gradients = step(model, compiled.run, batch)
    kinds = {"un-chunked" in each.again for each in plans[1].layers}
    assert kinds == {True, False} and plans[1].peak <= budgets[0]
    assert abs(float(found - loss)) < 1e-12 and worst_error(gradients, truth) < 1e-12


def test_loops_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a policy keeps, or that reads a buffer which the step writes to, and those of losses."""
    model, batch = _toy()
    counts = []

    def look(context: JointContext) -> bool:
        joint = JointGraph(context.graph)
        loops = loops_of(joint)
        counts.append((len(loops), len(loops_of(joint, {loops[0].forward}))))
        return False

    _at_joint(monkeypatch, look, "look")
    loss_of(compile_mst(model, SMALL_CHUNKS)(**batch))
    assert counts == [(2, 1)]


@pytest.mark.slow
def test_a_defect_leaves_the_plan_with_loops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = _toy(layers=1)
    loss, truth = step(model, model, batch)

    def fails(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(memory_plan, "Unchunking", fails)
    with mst_fx.watch() as report:
        found, gradients = step(model, compile_mst(model, {**_PLENTY, "strict": False}), batch)
    assert "on purpose" in caplog.text and "un-chunked" not in str(report.plans[0])
    assert abs(float(found - loss)) < 1e-12 and worst_error(gradients, truth) < 1e-12
    with pytest.raises(Exception, match="on purpose"):
        step(model, compile_mst(model, _PLENTY), batch)


@pytest.mark.slow
def test_under_inductor() -> None:
    model, batch = _toy(layers=1)
    model.float()
    loss, truth = step(model, model, batch)
    with mst_fx.watch() as report:
        found, gradients = step(model, compile_mst(model, {**_PLENTY, "inner": "inductor"}), batch)
    assert "un-chunked" in str(report.plans[0])
    assert abs(float(found - loss)) < 1e-5 and worst_error(gradients, truth) < 1e-5
