"""What few layers say of many is what many say."""

from __future__ import annotations

import itertools

import pytest
import torch

from mst_fx.context import JointContext
from mst_fx.diagnose.fit_model import subject_of
from mst_fx.diagnose.model_of import Shape
from mst_fx.fit import traced
from mst_fx.fit.forecast import MST_PLANNED, Setting, Subject, _Forecaster, stand_ins
from mst_fx.fit.parts import Key
from mst_fx.fit.traced import FewLayers, TracedStep, trace, traced_step
from mst_fx.options import Options
from mst_fx.passes import memory_plan
from mst_fx.plan.costs import device_of
from mst_fx.plan.room import Room
from mst_fx.report import MemoryPlan
from mst_fx.torch_api.joint import copied

_SEQ, _LAYERS = 16384, 6


def _subject(model: str, **overrides: object) -> Subject:
    small = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000, "num_hidden_layers": _LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return subject_of(model, Shape(overrides={**small, **heads, **overrides}, dtype=torch.bfloat16))


def _all(subject: Subject) -> FewLayers:
    return FewLayers(*trace(subject.build(_LAYERS, False), subject.inputs(_SEQ)), _LAYERS, has_host=True)


def _peak_of_all(every: FewLayers, taken: list[Key]) -> int:
    """Of the whole graph, as the compiler sees it."""
    known = every.unchunked if any(key.unchunked for key in taken) else every.choices
    chosen = [
        {**those, **choices}[key] for those, choices, key in zip(every.choices, known, taken, strict=True)
    ]
    return memory_plan._peak_with(every._graph, chosen, every.unchunking)


def _from_few(subject: Subject, has_host: bool = False) -> TracedStep:
    count, stands_for = stand_ins(subject.kinds, spare=int(has_host))
    assert count < _LAYERS
    return traced_step(subject.build(count, False), subject.inputs(_SEQ), count, stands_for, has_host)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mistral-7b", "gemma2-9b"])
def test_few_layers_say_what_many_take(model: str) -> None:
    """Gemma 2: layers with a window and without, in turns."""
    subject = _subject(model)
    few, every = _from_few(subject), _all(subject)
    for taken in ([0] * 6, [0, 0, 0, 1, 1, 2], [1, 0, 2, 3, 0, 1]):
        keys = [Key(level) for level in taken]
        assert few.taking(keys).peak == _peak_of_all(every, keys), taken
    keys = [Key(1, unchunked=True)] * _LAYERS
    assert few.taking(keys).peak == pytest.approx(_peak_of_all(every, keys), rel=0.001)


@pytest.mark.slow
def test_few_layers_say_what_many_take_with_the_host() -> None:
    subject = _subject("mistral-7b")
    few, every = _from_few(subject, has_host=True), _all(subject)
    for sent in ([0] * 4, [0, 0, 1], [1, 0], [1] * 4):
        keys = [Key(level, on_host=True) for level in sent] + [Key(0)] * (_LAYERS - len(sent))
        tolerance = 0 if len(set(sent)) == 1 else 0.01  # of copies of several sizes two are there together
        assert few.taking(keys).peak == pytest.approx(_peak_of_all(every, keys), rel=tolerance), sent
    assert few.least(0) == few.taking([Key(0)] * _LAYERS).peak > few.least(10**12)
    roomy, tight = (
        few.plan(Room("H200", 10**12, 0), 10**12),
        few.plan(Room("H200", few.least(10**12), 0), 10**12),
    )
    assert roomy is not None and tight is not None
    assert not any(each.host_bytes for each in roomy.layers), "nothing is sent that fits"
    assert any(each.host_bytes for each in tight.layers)
    assert few.plan(Room("H200", few.least(10**12), 0), 0) is None


@pytest.mark.slow
def test_a_plan_is_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few layers, and of all of them in one graph: the same layers do the same, with loops, with loops in some, and without, and in groups."""
    subject = _subject("mistral-7b")
    said: list[MemoryPlan] = []
    few, every = _from_few(subject), _all(subject)
    least, most = few.least(0), few.taking([Key(99)] * _LAYERS).peak
    everything = few.plan(Room("H200", 10**12, 0))
    assert everything is not None and all("un-chunked" in str(each) for each in everything.layers)
    top = everything.whole.peak
    budgets = [(least + most) // 2, (3 * most + top) // 4, 10**12]

    def compiled(room: Room) -> None:
        monkeypatch.setattr(memory_plan, "room_for", lambda *_: room)
        memory_plan.run(JointContext(copied(every._graph), Options(memory="auto"), said.append))

    room = Room("H200", least - few.start // 2, 0)
    asked = _Forecaster(subject, Setting("H200", room.most))
    asked._steps[_SEQ] = few
    asked.weights = asked.gradients = 0  # and beside what the plan makes there is nothing
    monkeypatch.setattr(asked, "_taken", lambda _: 0)
    monkeypatch.setattr(traced, "trace", lambda *_: (copied(every._graph), every._bodies))
    assert asked._point(MST_PLANNED, _SEQ) is None, "while the longest is searched, no groups"
    asked.asked = frozenset([_SEQ])
    point = asked._point(MST_PLANNED, _SEQ)
    compiled(room)
    assert point is not None and point.plan == said[-1].layers and point.peak == said.pop().peak <= room.most
    assert any("start" in str(each) for each in point.plan)

    monkeypatch.setattr(
        memory_plan, "ways_in_groups", lambda *_: []
    )  # where layers fit alone, the forecast knows these alone
    for budget in budgets:
        plan, room = few.plan(Room("H200", budget, 0)), Room("H200", budget, 0)
        compiled(room)
        assert plan is not None and plan.layers == said[-1].layers, budget
        assert said[-1].peak <= budget and plan.whole.peak == pytest.approx(said[-1].peak, rel=0.001)
    assert len({tuple(each.layers) for each in said}) == len(budgets)
    assert {sum(p.layers for p in each.layers if "un-chunked" in str(p)) for each in said} > {0, _LAYERS}


@pytest.mark.slow
def test_a_plan_is_the_fastest_of_those_that_fit() -> None:
    few = _from_few(_subject("mistral-7b"))
    device = device_of("H200")
    least = few.least(0)
    everything = few.plan(Room("H200", 10**12, 0))
    assert everything is not None
    assert few.plan(Room("H200", least - 1, 0)) is None
    seconds = []
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        room = int(least + share * (everything.whole.peak - least))
        plan = few.plan(Room("H200", int(room / 0.99) + 1, 0))
        assert plan is not None and plan.whole.peak <= room
        assert sum(each.layers for each in plan.layers) == _LAYERS
        seconds.append(plan.whole.cost.seconds(device))
    # By all that a step does, and not only by what the plan weighs: un-chunked layers move more bytes.
    assert all(b <= 1.01 * a for a, b in itertools.pairwise(seconds)) and seconds[0] > 1.1 * seconds[-1]
    assert seconds[-1] == pytest.approx(everything.whole.cost.seconds(device), rel=0.01)


def test_stand_ins() -> None:
    assert stand_ins(["a"] * 32) == (3, (0, *[1] * 30, 2))
    assert stand_ins(["a", "b"] * 3) == (4, (0, 1, 2, 1, 2, 3))
    assert stand_ins(["a", "a", "b", "b"]) == (4, (0, 1, 2, 3))
    assert stand_ins(["a", "b", "b", "b", "b"]) == (3, (0, 1, 1, 1, 2))
    assert stand_ins(["a"]) == (1, (0,))


@pytest.mark.slow
def test_rows_that_only_fused_operators_read_are_made_once() -> None:
    """Between gpt-oss's layers every reader of the rows is pointwise; the backward pass finds them made, and not what they are made of."""
    subject = _subject("gpt-oss-20b", num_local_experts=4, num_hidden_layers=3)
    made = traced_step(subject.build(3, False), subject.inputs(4096), 3, (0, 1, 2), False)
    kept = [part.change for part in made.few.unplanned.forward]
    assert made.start == 4096 * 512 * 2
    routing = 4096 * 4 * 16  # keys of four slots a row, and their weights
    assert kept[1:] == [made.start + routing] * 2  # the first layer keeps the tables of RoPE too
