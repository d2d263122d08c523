"""What a plan keeps in the host's memory: the same bits, there and back once, and nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch

from mst_fx import backend
from mst_fx.context import JointContext
from mst_fx.ops.arena import ARENA
from mst_fx.plan.choices import choices_of
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.layers import layers_of
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import make_again
from mst_fx.stage import Stage, When
from mst_fx.torch_api.joint import must_save
from tests.helpers import SMALL_CHUNKS, compile_mst, step
from tests.models import ACCEPTED, inputs_of

_LENGTH = 96
_LAYERS = 3


def _model(name: str = "llama", layers: int = _LAYERS) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    entry = ACCEPTED[name]
    model = entry.build(num_hidden_layers=layers) if name == "llama" else entry.build()
    return model.train(), inputs_of(entry, 1, _LENGTH)


class Sending:
    """A stage that keeps one choice of every layer but the last on the host."""

    def __init__(self, index: int, sent: tuple[int, ...] | None = None) -> None:
        self.index, self.sent = index, sent
        self.host = self.count = self.peak = 0

    def __call__(self, context: JointContext) -> None:
        joint = JointGraph(context.graph)
        layers = layers_of(joint)[:-1]
        wanted = {node for node in joint.forward if must_save(node)} | joint.reads_written
        every = [choices_of(layer, wanted) for layer in layers]
        sent = range(len(layers) - 1) if self.sent is None else self.sent
        chosen = [
            dataclasses.replace(those[min(self.index, len(those) - 1)], is_on_host=index in sent)
            for index, those in enumerate(every)
        ]
        make_again(joint, chosen)
        self.count = max(map(len, every))
        self.host = sum(-(-x // 4096) * 4096 for c in chosen for x in map(_bytes, c.sent))
        self.peak = peak_of(joint)


def _bytes(node: Any) -> int:
    value = node.meta["val"]
    return int(value.numel()) * int(value.element_size())


def _sending(monkeypatch: pytest.MonkeyPatch, index: int, sent: tuple[int, ...] | None = None) -> Sending:
    found = Sending(index, sent)
    monkeypatch.setattr(backend, "JOINT_STAGES", (Stage("memory", found, when=When.JOINT),))
    monkeypatch.setattr("mst_fx.joint._key", lambda *_: f"{index} {sent}")
    return found


def test_every_choice_on_the_host_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes the arena holds what the plan sends, and nothing afterwards."""
    model, batch = _model()
    loss, truth = step(model, compile_mst(model, SMALL_CHUNKS), batch)
    index = count = 0
    while index <= count:
        sending = _sending(monkeypatch, index)
        found = compile_mst(model, {**SMALL_CHUNKS, "strict": True})(**batch)
        assert ARENA.used == sending.host > 0
        model.zero_grad(set_to_none=True)
        found.loss.backward()
        assert torch.equal(found.loss, loss)
        assert all(torch.equal(p.grad, truth[name]) for name, p in model.named_parameters())
        del found
        gc.collect()
        assert ARENA.used == 0
        index, count = index + 1, sending.count - 1
    assert count >= 4
