"""Groups of layers, whose starts are made again together: the same bits, calls as often as is said, and longer sequences in a budget."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mst_fx.context import JointContext
from mst_fx.listeners import on_plan
from mst_fx.ops.arena import ARENA
from mst_fx.options import bytes_in
from mst_fx.passes import memory_plan
from mst_fx.pipeline import JOINT_STAGES
from mst_fx.plan.choices import choices_of
from mst_fx.plan.groups import groups_of, may_join, ways_in_groups
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.layers import layers_of
from mst_fx.plan.recompute import make_again
from mst_fx.stage import Stage, When
from tests.helpers import ToyLM, loss_of, step, token_batch, worst_error
from tests.models import ACCEPTED, inputs_of
from tests.operators import ATTENTION, times_run
from tests.plan.ways import PLAIN, STRICT, Grouped, Ways, way_of
from tools.meters.cpu import measure_cpu

_LENGTH = 96
_LAYERS = 4


def _model(layers: int, length: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    entry = ACCEPTED["llama"]
    return entry.build(num_hidden_layers=layers).train(), inputs_of(entry, 1, length)


@pytest.mark.slow
def test_groups_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device and on the host, of two layers and more; attention runs again for each start, unless it is kept."""
    torch.manual_seed(0)
    model: Any = ToyLM(layers=_LAYERS)
    batch = token_batch(1, _LENGTH)
    every = [
        Grouped(0, 2),
        Grouped(0, 3),
        Grouped(1, 3),
        Grouped(0, 2, is_sent=True),
        Grouped(1, 3, is_sent=True),
    ]
    compiled = Ways(monkeypatch, model, [PLAIN, *map(way_of, every)])
    loss, truth = step(model, compiled.run, batch)
    for compiled.now, grouped in enumerate(every, start=1):
        found = compiled.run(**batch)
        assert bool(ARENA.used) == grouped.is_sent
        model.zero_grad(set_to_none=True)
        loss_of(found).backward()
        assert torch.equal(loss_of(found), loss)
        assert all(torch.equal(p.grad, truth[name]) for name, p in model.named_parameters())
        inner = sum(not choice.keeps_start for choice in grouped.chosen)
        assert len(groups_of(grouped.chosen)[0]) == grouped.size
        assert grouped.attention == (_LAYERS if grouped.index else 2 * _LAYERS + inner)
        del found
        run = functools.partial(step, model, compiled.run, batch)
        assert times_run(ATTENTION, run) == grouped.attention
        gc.collect()
        assert not ARENA.used


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "opt", "phi3"])
def test_other_models_in_groups_have_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    entry = ACCEPTED[name]
    model, batch = entry.build().train(), inputs_of(entry, 1, _LENGTH)
    grouped = Grouped(0, 2)
    compiled = Ways(monkeypatch, model, [PLAIN, way_of(grouped)])
    loss, truth = step(model, compiled.run, batch)
    compiled.now = 1
    found, gradients = step(model, compiled.run, batch)
    assert not all(choice.keeps_start for choice in grouped.chosen)
    assert torch.equal(found, loss) and all(torch.equal(gradients[n], truth[n]) for n in truth)


@pytest.mark.slow
def test_a_budget_that_groups_make_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory falls by as much as is said; where single layers fit, they are not in groups."""
    model, batch = _model(layers=4, length=2048)
    least: list[int] = []

    def none(*_: Any) -> list[Any]:
        return []

    def ways() -> Iterator[tuple[Sequence[Stage], dict[str, Any]]]:
        yield PLAIN
        for grouped in (ways_in_groups, none):
            monkeypatch.setattr(memory_plan, "ways_in_groups", grouped)
            yield JOINT_STAGES, {"memory": 1, "host_memory": "0"}
            missing = re.search(r"needs ([\d.]+ [KMG]iB) more", str(compiled.errors[-1]))
            assert missing is not None
            least.append(int(1.03 * (bytes_in(missing[1]) or 0)))
            yield JOINT_STAGES, {"memory": least[-1], "host_memory": "0", "inner": "inductor"}
        monkeypatch.setattr(memory_plan, "ways_in_groups", ways_in_groups)
        yield JOINT_STAGES, {"memory": 2 * least[-1], "host_memory": "0"}

    compiled = Ways(monkeypatch, model, ways())
    plans: list[Any] = []
    with on_plan.listening(plans.append):
        _, truth = step(model, compiled.run, batch)
    peaks = []
    for compiled.now in (2, 4):
        _, gradients = step(model, compiled.run, batch)
        assert worst_error(gradients, truth) < 1e-5
        del gradients
        model.zero_grad(set_to_none=True)
        with measure_cpu() as measured:
            compiled.run(**batch).loss.backward()
        peaks.append(measured.peak_bytes)
    in_groups, single, rich = plans
    assert len(compiled.errors) == 2 and least[0] < 0.95 * least[1]
    assert any(each.again.startswith("start + ") for each in in_groups.layers)
    saved = single.peak - in_groups.peak
    assert 0.95 * saved <= peaks[1] - peaks[0] <= 1.05 * saved
    assert not any("start" in each.again for plan in (single, rich) for each in plan.layers)


class _Layer(nn.Module):
    """With dropout, whose mask the backward pass reads, and something that is added, which it does not read."""

    scale: Tensor

    def __init__(self, added: Callable[[Any, Tensor], Tensor | float]) -> None:
        super().__init__()
        self.added, self.qkv, self.out = added, nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(torch.tanh(x))[:, None].chunk(3, -1)
        z = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        y: Tensor = x + z * (torch.rand_like(z) > 0.5) + self.added(self, x)
        self.scale.mul_(1.25)
        return y


class _Toy(nn.Module):
    def __init__(self, added: Callable[[Any, Tensor], Tensor | float]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 16), nn.Linear(16, 96)
        self.layers = nn.ModuleList(_Layer(added) for _ in range(5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(
    ("added", "joins"),
    [
        (lambda layer, x: 0.0, True),
        (lambda layer, x: torch.randn_like(x), False),
        (lambda layer, x: x.detach() * layer.scale, False),
    ],
    ids=["nothing", "noise", "a buffer that the step writes"],
)
def test_what_gives_something_else_a_second_time_is_in_no_group(
    added: Callable[[Any, Tensor], Tensor | float], joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = _Toy(added).double(), {"ids": torch.randint(96, (2, 40))}
    found: list[bool] = []

    def grouped(context: JointContext) -> None:
        joint = JointGraph(context.graph)
        every = [choices_of(layer, joint.kept_anyway) for layer in layers_of(joint)[:-1]]
        found.extend(may_join(joint, every))
        assert bool(ways_in_groups(joint, every)) == joins
        least = [those[0] for those in every]
        make_again(joint, [c.without_start() if i % 2 and joins else c for i, c in enumerate(least)])

    ways = [PLAIN, ((Stage("memory", grouped, when=When.JOINT),), STRICT)]
    compiled = Ways(monkeypatch, model, ways)
    start = deepcopy(model.state_dict())
    results = []
    for compiled.now in (0, 1):
        model.load_state_dict(start)
        torch.manual_seed(1)
        results.append(step(model, compiled.run, batch))
    assert len(found) >= 4 and found == [False, *[joins] * (len(found) - 1)]
    (loss, truth), (again, gradients) = results
    assert torch.equal(again, loss) and all(torch.equal(gradients[n], truth[n]) for n in truth)
