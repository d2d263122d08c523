"""The list of stages, the runner, the spec of changed graphs, and stages on the joint graph."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mst_fx import compiling, joint, pipeline
from mst_fx.bodies.body import BodyConfig
from mst_fx.context import JointContext, PassContext, Shared
from mst_fx.graph import verify
from mst_fx.graph.fill import fill_values
from mst_fx.options import PASS_NAMES, Options
from mst_fx.passes import casts, one_hots, positional, row_slices, stacks
from mst_fx.pipeline import STAGES
from mst_fx.report import Report
from mst_fx.runner import Runner
from mst_fx.stage import Helper, OrderError, Scope, Stage, When, check_order
from tests.helpers import (
    SMALL_CHUNKS,
    ToyLM,
    check_parity,
    report_of,
    token_batch,
)


def _context(function: Callable[..., Any], *inputs: Any) -> PassContext:
    gm = fx.symbolic_trace(function)
    fill_values(gm, inputs)
    return PassContext(gm, Options(), BodyConfig("eager", "auto", ()), True, Shared())


# The list


def test_the_order_is_checked() -> None:
    check_order(STAGES, When.CAPTURED, PASS_NAMES)
    at = {stage.name: index for index, stage in enumerate(STAGES)}
    for first, second in (
        ("values", "attention"),
        ("attention", "mlp"),
        ("mlp", "vocab"),
        ("vocab", "defer_logits"),
    ):
        wrong = list(STAGES)
        wrong[at[first]], wrong[at[second]] = wrong[at[second]], wrong[at[first]]
        with pytest.raises(OrderError, match="which nothing before it gives"):
            check_order(wrong, When.CAPTURED)


def test_what_a_helper_gives_is_gone_behind_its_stage() -> None:
    vocab = next(stage for stage in STAGES if stage.name == "vocab")
    alone = dataclasses.replace(vocab, prepared_by=vocab.prepared_by[:-1])
    with pytest.raises(OrderError, match="vocab needs losses-are-sums"):
        check_order([alone if stage is vocab else stage for stage in STAGES], When.CAPTURED)
    late = Stage("late", print, needs=frozenset({"losses-are-sums"}))
    with pytest.raises(OrderError, match="late needs losses-are-sums"):
        check_order([*STAGES, late], When.CAPTURED)


def test_names_and_times_are_checked() -> None:
    with pytest.raises(OrderError, match="two of the names"):
        check_order([*STAGES, STAGES[0]], When.CAPTURED)
    with pytest.raises(OrderError, match="none of the names"):
        check_order(STAGES, When.CAPTURED, (*PASS_NAMES, "nothing"))
    with pytest.raises(OrderError, match="captured graph, not the joint one"):
        check_order(STAGES, When.JOINT)


# Text in, text out


def _rewritten(run: Callable[[PassContext], object], function: Callable[..., Any], *inputs: Any) -> str:
    """The code of a function after a pass, which gives what it gave before."""
    context = _context(function, *inputs)
    run(context)
    context.graph.lint()
    context.gm.recompile()
    torch.testing.assert_close(context.gm(*inputs), function(*inputs), rtol=0, atol=0)
    lines = [line.partition(";")[0].strip() for line in context.gm.code.partition(":\n")[2].splitlines()]
    return "\n".join(line for line in lines if line)


def test_positional() -> None:
    def before(x: Tensor, w: Tensor) -> Any:
        return F.linear(input=x, weight=w).mean(dim=-1, keepdim=True, dtype=torch.float64)

    after = _rewritten(positional.run, before, torch.randn(3, 4), torch.randn(5, 4))
    assert after == (
        "linear = torch._C._nn.linear(x, w)\nmean = linear.mean(-1, True, dtype = torch.float64)\nreturn mean"
    )


def test_one_hots() -> None:
    after = _rewritten(one_hots.run, lambda y: F.one_hot(y, 7) * 2, torch.randint(0, 7, (2, 3)))
    assert after == (
        "unsqueeze = y.unsqueeze(-1)\n"
        "expand = unsqueeze.expand(-1, -1, 7)\n"
        "zeros_like = torch.zeros_like(expand)\n"
        "scatter = zeros_like.scatter(-1, unsqueeze, 1)\n"
        "mul = scatter * 2\n"
        "return mul"
    )


def test_stacks() -> None:
    after = _rewritten(
        stacks.run, lambda p, q: torch.stack([p, q]).exp().mean(0), torch.ones(3, 4), torch.ones(3, 4)
    )
    assert after == (
        "stack_1 = torch.stack([p, q], -1)\n"
        "exp_1 = stack_1.exp()\n"
        "mean_1 = exp_1.mean(-1)\n"
        "return mean_1"
    )  # fmt: skip
    left = _rewritten(
        stacks.run, lambda p, q: torch.stack([p, q]).cumsum(0), torch.ones(3, 4), torch.ones(3, 4)
    )
    assert left == "stack = torch.stack([p, q])\ncumsum = stack.cumsum(0)\nreturn cumsum"


def test_row_slices() -> None:
    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w).float()[:, :-1]

    after = _rewritten(row_slices.run, before, torch.ones(2, 5, 4), torch.ones(9, 4))
    assert after == (
        "getitem_1 = x[(slice(None, None, None), slice(None, -1, None))]\n"
        "linear_1 = torch._C._nn.linear(getitem_1, w)\n"
        "float_2 = linear_1.float()\n"
        "return float_2"
    )


def test_casts_without_autocast_stay() -> None:
    after = _rewritten(casts.run, lambda x: x.exp().sum().double(), torch.ones(3))
    assert after == "exp = x.exp()\nsum_1 = exp.sum()\ndouble = sum_1.double()\nreturn double"


# The spec


def _exp(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), x.sum()


def _cast_without_saying(gm: fx.GraphModule) -> None:
    exp = next(iter(gm.graph.find_nodes(op="call_method", target="exp")))
    exp.args = (gm.graph.find_nodes(op="call_method", target="sum")[0],)
    gm.graph.find_nodes(op="call_method", target="sum")[0].append(exp)


def _give_the_input(gm: fx.GraphModule) -> None:
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(x):
        view = gm.graph.call_method("view", (x, 3))
    view.meta["example_value"] = x.meta["example_value"].view(3)
    gm.graph.output_node().args = ((view, *gm.graph.output_node().args[0][1:]),)  # type: ignore[index, misc]


def _drop_an_output(gm: fx.GraphModule) -> None:
    gm.graph.output_node().args = (gm.graph.output_node().args[0][:1],)  # type: ignore[index]


def _exchange_outputs(gm: fx.GraphModule) -> None:
    gm.graph.output_node().args = (gm.graph.output_node().args[0][::-1],)  # type: ignore[index]


def _new_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("y")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_cast_without_saying, "a run on fakes another"),
        (_give_the_input, "share memory"),
        (_drop_an_output, "there were 2 outputs"),
        (_exchange_outputs, "output 0 was"),
        (_new_input, "inputs were"),
    ],
)
def test_the_spec(change: Callable[[fx.GraphModule], None], said: str) -> None:
    context = _context(_exp, torch.ones(3))
    before = verify.seen(context.gm)
    verify.check(before, context.gm)
    change(context.gm)
    with pytest.raises(verify.SpecError, match=said):
        verify.check(before, context.gm)


# The runner


def _run(
    stages: list[Stage], function: Callable[..., Any], *inputs: Any, **options: Any
) -> tuple[str, Report]:
    context, report = _context(function, *inputs), Report()
    config = BodyConfig("eager", "auto", ())
    runner = Runner(stages, Options(**options), config, inputs, report, Shared())
    gm = runner.run(context.gm)
    gm.recompile()
    return gm.code, report


def _halve(context: PassContext) -> bool:
    for node in context.graph.find_nodes(op="call_method", target="exp"):
        node.target = "sin"
    return True


def _fail(context: PassContext) -> bool:
    _halve(context)
    raise RuntimeError("a defect")


def test_a_stage_that_fails_leaves_the_graph() -> None:
    code, report = _run([Stage("new", _fail)], _exp, torch.ones(3))
    assert "exp" in code and "sin" not in code
    assert [(r.kind, r.reason) for r in report.refusals] == [("new", "RuntimeError: a defect")]
    with pytest.raises(RuntimeError, match="a defect"):
        _run([Stage("new", _fail)], _exp, torch.ones(3), strict=True)
    with pytest.raises(RuntimeError, match="a defect"):
        _run([Stage("new", _fail, in_place=True)], _exp, torch.ones(3))


def test_a_graph_against_the_spec_is_thrown_away() -> None:
    def lies(context: PassContext) -> bool:
        _exchange_outputs(context.gm)
        return True

    code, report = _run([Stage("new", lies)], _exp, torch.ones(3))
    assert code.index("exp") < code.index("sum") and "output 0 was" in report.refusals[0].reason


def test_helpers_go_with_their_stage() -> None:
    seen: list[str] = []

    def run(context: PassContext) -> bool:
        seen.append(context.gm.graph.python_code("self").src)
        return fires

    stage = Stage("new", run, scope=Scope.EACH_GRAPH, prepared_by=(Helper("half", _halve),))
    fires = False
    code, _ = _run([stage], _exp, torch.ones(3))
    assert "sin" in seen[-1] and "sin" not in code
    fires = True
    code, report = _run([stage], _exp, torch.ones(3))
    assert "sin" in code and set(report.stage_seconds) == {"new"}


@pytest.mark.parametrize("scope", [Scope.PROGRAM, Scope.TOP])
def test_what_is_copied(scope: Scope) -> None:
    """A program's graph, and those that it refers to only where the stage may change them."""
    layer = fx.symbolic_trace(lambda x: x.exp())
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    gm = fx.GraphModule({"layer": layer}, graph)
    fill_values(gm, [torch.ones(3)])
    seen: list[fx.GraphModule] = []
    runner = Runner(
        [Stage("look", lambda context: bool(seen.append(context.gm)), scope=scope)],  # type: ignore[func-returns-value]
        Options(),
        BodyConfig("eager", "auto", ()),
        [torch.ones(3)],
        Report(),
        Shared(),
    )
    assert runner.run(gm) is gm
    (copied,) = seen
    assert copied is not gm and (copied.layer is layer) == (scope is Scope.TOP)


def test_nothing_is_done_where_nothing_matches() -> None:
    stages = [
        Stage("none", _fail, matches=lambda context: False),
        Stage("late", _fail, only_if_changed=True),
        Stage("vocab", _fail),
    ]
    code, report = _run(stages, _exp, torch.ones(3), passes=("mlp",))
    assert "exp" in code and not report.refusals


@pytest.mark.slow
def test_stages_are_in_the_trace() -> None:
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.metadata.get("artifact", {}).get("name", ""))  # type: ignore[attr-defined]

    handler, trace = Handler(), logging.getLogger("torch.__trace")
    trace.addHandler(handler)
    try:
        report_of(ToyLM(), SMALL_CHUNKS, **token_batch(2, 33))
    finally:
        trace.removeHandler(handler)
    ours = [name for name in found if name.startswith("mst_fx_")]
    assert (
        ours.index("mst_fx_before_mlp") + 1
        == ours.index("mst_fx_after_mlp")
        < ours.index("mst_fx_before_vocab")
    )
    assert "mst_fx_after_defer_logits" in ours


# The joint graph


class _Net(nn.Module):
    """An MLP and a head: few kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 96)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = x + self.down(F.relu(self.up(x)))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_joint_stages(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that changes nothing, one that fails half-way; both see the loops of forward and backward."""
    seen: list[int] = []

    def look(context: JointContext) -> bool:
        names = [str(node.target) for node in context.graph.nodes]
        seen.append(sum("mst_fx.loop" in name for name in names))
        return False

    def fail(context: JointContext) -> None:
        for node in list(context.graph.nodes):
            if "loop_backward" in str(node.target):
                node.replace_all_uses_with(context.graph.find_nodes(op="placeholder")[0])
        raise RuntimeError("a defect")

    stages = (Stage("look", look, when=When.JOINT), Stage("fail", fail, when=When.JOINT))
    check_order(stages, When.JOINT)
    monkeypatch.setattr(compiling, "JOINT_STAGES", stages)
    model = _Net()
    batch = {"x": torch.randn(2, 33, 16), "labels": torch.randint(0, 96, (2, 33))}
    kept: dict[str, Any] = (
        {"fx_graph_cache": False} if inner == "inductor" else {}
    )  # no stage runs on what is cached
    options = {**SMALL_CHUNKS, "inner": inner, "inductor": kept}
    check_parity(model, batch, 1e-6, 1e-5, options=options)
    assert len(seen) == 1 and seen[0] >= 3


def test_no_hook_without_joint_stages() -> None:
    """But for Inductor's caches, which a pass tells with what options a graph was compiled."""
    before = (torch._inductor.config.joint_custom_post_pass, torch._functorch.config.joint_custom_pass)
    captured = fx.symbolic_trace(nn.Identity())
    with joint.hooked(pipeline.JOINT_STAGES, Options(inner="aot_eager"), captured):
        assert before == (
            torch._inductor.config.joint_custom_post_pass,
            torch._functorch.config.joint_custom_pass,
        )
    keys = []
    for options in (Options(), Options(layers="each"), Options()):
        with joint.hooked(pipeline.JOINT_STAGES, options, captured):
            keys.append(torch._inductor.config.joint_custom_post_pass.uuid())  # type: ignore[union-attr]
    assert keys[0] == keys[2] != keys[1] and None not in keys
    with joint.hooked((Stage("look", _fail, when=When.JOINT),), Options(), captured):
        assert torch._inductor.config.joint_custom_post_pass is not before[0]
