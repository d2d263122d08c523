"""What few layers say of many is what many say."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx

from mst_fx.bodies.body import Body
from mst_fx.diagnose.fit_model import subject_of
from mst_fx.diagnose.model_of import Shape
from mst_fx.fit.forecast import Subject, stand_ins
from mst_fx.fit.parts import Key, together
from mst_fx.fit.traced import TracedStep, trace, traced_step
from mst_fx.plan.choices import choices_of
from mst_fx.plan.costs import device_of
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.layers import layers_of
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import on_trial
from mst_fx.plan.room import Room

_SEQ, _LAYERS = 16384, 6


def _subject(model: str, **overrides: object) -> Subject:
    small = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000, "num_hidden_layers": _LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return subject_of(model, Shape(overrides={**small, **heads, **overrides}, dtype=torch.bfloat16))


@functools.cache
def _few(model: str, has_host: bool = False) -> TracedStep:
    return _from_few(_subject(model), has_host)


@functools.cache
def _all(model: str) -> tuple[fx.Graph, tuple[Body, ...]]:
    subject = _subject(model)
    return trace(subject.build(_LAYERS, False), subject.inputs(_SEQ))


def _peak_of_all(model: str, taken: list[Key]) -> int:
    graph, bodies = _all(model)
    *layers, _ = layers_of(JointGraph(graph))
    assert len(layers) == _LAYERS and bodies
    chosen = [
        choices_of(layer)[level].on_host() if on_host else choices_of(layer)[level]
        for layer, (level, on_host) in zip(layers, taken, strict=True)
    ]
    return peak_of(on_trial(graph, chosen)[0])


def _from_few(subject: Subject, has_host: bool = False) -> TracedStep:
    traced, stands_for = stand_ins(subject.kinds, spare=int(has_host))
    assert traced < _LAYERS
    return traced_step(subject.build(traced, False), subject.inputs(_SEQ), traced, stands_for, has_host)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mistral-7b", "gemma2-9b"])
def test_few_layers_say_what_many_take(model: str) -> None:
    """Gemma 2: layers with a window and without, in turns."""
    few = _few(model)
    for taken in ([0] * 6, [0, 0, 0, 1, 1, 2], [1, 0, 2, 3, 0, 1]):
        keys = [(level, False) for level in taken]
        assert together(few.known, few.stands_for, keys).peak == _peak_of_all(model, keys), taken


@pytest.mark.slow
def test_few_layers_say_what_many_take_with_the_host() -> None:
    few = _few("mistral-7b", has_host=True)
    for sent in ([0] * 4, [0, 0, 1], [1, 0], [1] * 4):
        keys = [(level, True) for level in sent] + [(0, False)] * (_LAYERS - len(sent))
        tolerance = 0 if len(set(sent)) == 1 else 0.01  # of copies of several sizes two are there together
        peak = together(few.known, few.stands_for, keys).peak
        assert peak == pytest.approx(_peak_of_all("mistral-7b", keys), rel=tolerance), sent
    assert few.least(0) == few.every(0).peak + few.outputs > few.least(10**12)
    roomy, tight = (
        few.plan(Room("H200", 10**12, 0), 10**12),
        few.plan(Room("H200", few.least(10**12), 0), 10**12),
    )
    assert roomy is not None and tight is not None
    assert not any(each.host_bytes for each in roomy.layers), "nothing is sent that fits"
    assert any(each.host_bytes for each in tight.layers)
    assert few.plan(Room("H200", few.least(10**12), 0), 0) is None


@pytest.mark.slow
def test_a_plan_is_the_fastest_of_those_that_fit() -> None:
    few = _few("mistral-7b")
    device = device_of("H200")
    least, most = few.every(0), few.every(len(few.choices[1]) - 1)
    assert few.plan(Room("H200", least.peak + few.outputs - 1, 0)) is None
    seconds = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        room = int(least.peak + share * (most.peak - least.peak)) + few.outputs
        plan = few.plan(Room("H200", int(room / 0.99) + 1, 0))
        assert plan is not None and plan.whole.peak <= room
        assert sum(each.layers for each in plan.layers) == _LAYERS
        seconds.append(plan.whole.cost.seconds(device))
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert seconds[-1] == pytest.approx(most.cost.seconds(device), rel=0.01)


def test_stand_ins() -> None:
    assert stand_ins(["a"] * 32) == (3, (0, *[1] * 30, 2))
    assert stand_ins(["a", "b"] * 3) == (4, (0, 1, 2, 1, 2, 3))
    assert stand_ins(["a", "a", "b", "b"]) == (4, (0, 1, 2, 3))
    assert stand_ins(["a", "b", "b", "b", "b"]) == (3, (0, 1, 1, 1, 2))
    assert stand_ins(["a"]) == (1, (0,))
