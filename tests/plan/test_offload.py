"""What a plan keeps in the host's memory: the same bits, there and back once, and nothing left behind."""

from __future__ import annotations

import _thread
import dataclasses
import gc
import logging
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mst_fx.context import JointContext
from mst_fx.listeners import on_plan
from mst_fx.ops import offload, port
from mst_fx.ops.arena import ARENA, Arena
from mst_fx.options import bytes_in
from mst_fx.pipeline import JOINT_STAGES
from mst_fx.plan import costs, transfer
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.joint_graph import JointGraph, bytes_of
from mst_fx.plan.layers import Begin, layers_of
from mst_fx.plan.peak import calls_of, curve_of, peak_of
from mst_fx.plan.recompute import make_again
from mst_fx.stage import Stage, When
from tests.helpers import SMALL_CHUNKS, ToyLM, compile_mst, loss_of, step, token_batch, worst_error
from tests.models import ACCEPTED, inputs_of
from tests.plan.ways import PLAIN, STRICT, Ways

_LENGTH = 96
_LAYERS = 3


def _model(name: str = "llama", layers: int = _LAYERS, length: int = _LENGTH) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    entry = ACCEPTED[name]
    model = entry.build(num_hidden_layers=layers) if name == "llama" else entry.build()
    return model.train(), inputs_of(entry, 1, length)


def _toy(layers: int, length: int = _LENGTH) -> tuple[Any, dict[str, Any]]:
    """In float64, with a capture of a third of the time."""
    torch.manual_seed(0)
    return ToyLM(layers=layers), token_batch(1, length)


class Sending:
    """A stage that keeps one choice of every layer but the last on the host."""

    def __init__(self, index: int, sent: tuple[int, ...] | None = None) -> None:
        self.index, self.sent = index, sent
        self.host = self.count = self.peak = 0

    def __call__(self, context: JointContext) -> None:
        joint = JointGraph(context.graph)
        layers = layers_of(joint)[:-1]
        every = [choices_of(layer, joint.kept_anyway) for layer in layers]
        sent = range(len(layers) - 1) if self.sent is None else self.sent
        chosen = [
            choice.on_host() if index in sent else choice
            for index, choice in enumerate(those[min(self.index, len(those) - 1)] for those in every)
        ]
        make_again(joint, chosen)
        self.count = max(map(len, every))
        self.host = sum(-(-x // 4096) * 4096 for c in chosen for x in map(bytes_of, c.sent))
        self.peak = peak_of(joint)


def _way(sending: Sending) -> tuple[tuple[Stage, ...], dict[str, Any]]:
    return (Stage("memory", sending.__call__, when=When.JOINT),), STRICT


@pytest.mark.slow
def test_every_choice_on_the_host_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes the arena holds what the plan sends, and nothing afterwards."""
    model, batch = _toy(_LAYERS)
    every: list[Sending] = []

    def ways() -> Iterator[tuple[Sequence[Stage], dict[str, Any]]]:
        yield PLAIN
        while not every or len(every) < every[-1].count:
            every.append(Sending(len(every)))
            yield _way(every[-1])

    compiled = Ways(monkeypatch, model, ways())
    loss, truth = step(model, compiled.run, batch)
    for compiled.now, sending in enumerate(every, start=1):
        found = compiled.run(**batch)
        assert ARENA.used == sending.host > 0
        model.zero_grad(set_to_none=True)
        loss_of(found).backward()
        assert torch.equal(loss_of(found), loss)
        assert all(torch.equal(p.grad, truth[name]) for name, p in model.named_parameters())
        del found
        gc.collect()
        assert ARENA.used == 0
    assert len(every) >= 5


@pytest.mark.slow
def test_graphs_that_live_on_are_dropped_or_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs alive at once, one retained; one dropped; one whose backward pass raises: nobody reads another's memory."""
    model, batch = _toy(_LAYERS)
    sending = Sending(1)
    ways = Ways(monkeypatch, model, [PLAIN, _way(sending)])
    loss, truth = step(model, ways.run, batch)
    ways.now, compiled = 1, ways.run

    def gradients(found: Any, **kwargs: Any) -> list[Any]:
        return list(torch.autograd.grad(loss_of(found), list(model.parameters()), **kwargs))

    first, second, dropped = compiled(**batch), compiled(**batch), compiled(**batch)
    assert ARENA.used == 3 * sending.host
    del dropped
    gc.collect()
    assert ARENA.used == 2 * sending.host
    expected = [truth[name] for name, _ in model.named_parameters()]
    for found in (gradients(first, retain_graph=True), gradients(second), gradients(first)):
        assert all(map(torch.equal, found, expected))

    def fail(_: torch.Tensor) -> None:
        raise InterruptedError

    third = compiled(**batch)
    handle = next(iter(model.parameters())).register_post_accumulate_grad_hook(fail)
    with pytest.raises(InterruptedError):
        loss_of(third).backward()
    handle.remove()
    del first, second, third
    gc.collect()
    assert ARENA.used == 0
    fourth = compiled(**batch)
    assert torch.equal(loss_of(fourth), loss) and all(map(torch.equal, gradients(fourth), expected))


@pytest.mark.slow
def test_layers_between_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched ahead is that of the next layer alone; others start their copies where they begin."""
    model, batch = _toy(layers=4)
    every = [Sending(0, sent) for sent in ((0,), (1,), (0, 2))]
    compiled = Ways(monkeypatch, model, [PLAIN, *map(_way, every)])
    loss, truth = step(model, compiled.run, batch)
    for compiled.now, sending in enumerate(every, start=1):
        found, gradients = step(model, compiled.run, batch)
        assert sending.host > 0 and torch.equal(found, loss), sending.sent
        assert all(torch.equal(gradients[name], gradient) for name, gradient in truth.items()), sending.sent


def test_two_kinds_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _model("gemma2")
    every = [Sending(1), Sending(100)]
    compiled = Ways(monkeypatch, model, [PLAIN, *map(_way, every)])
    loss, truth = step(model, compiled.run, batch)
    for compiled.now, sending in enumerate(every, start=1):
        found, gradients = step(model, compiled.run, batch)
        assert sending.host > 0 and torch.equal(found, loss)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in truth.items())
    assert every[0].host < every[1].host


@pytest.mark.slow
def test_by_inductor(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """To rounding, as Inductor fuses; and it meets no operator of ours that it was not told of, which takes torch 2.11 forever."""
    model, batch = _model(layers=2)
    sending = Sending(1)
    stages, options = _way(sending)
    by_inductor = {**options, "inner": "inductor", "inductor": {"force_disable_caches": True}}
    compiled = Ways(monkeypatch, model, [PLAIN, (stages, by_inductor)])
    log = logging.getLogger("torch._inductor.graph")
    monkeypatch.setattr(log, "disabled", False)
    with caplog.at_level(logging.INFO, logger=log.name):
        loss, truth = step(model, compiled.run, batch)
        compiled.now = 1
        found, gradients = step(model, compiled.run, batch)
    assert sending.host > 0 and worst_error(gradients, truth) < 1e-5
    assert float((found - loss).abs()) < 1e-5
    assert not [
        record
        for record in caplog.records
        if "implicit fallback" in record.msg and "mst_fx" in record.getMessage()
    ]


def test_a_budget_that_the_host_makes_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With bytes of the host less is made again on the same device; where it cannot be had, a warning says so and the plan does without."""
    pytest.importorskip("scipy", reason="the ladder without it sends layers only where nothing else fits")
    monkeypatch.setattr("mst_fx.passes.memory_plan.ways_in_groups", lambda *_: [])  # would need less yet
    model, batch = _model(layers=3, length=512)
    found: list[Any] = []
    budgets: list[int] = []

    def refuse(*_: Any) -> None:
        raise MemoryError("cudaHostRegister of 1 bytes gave error 2")

    def ways() -> Iterator[tuple[Sequence[Stage], dict[str, Any]]]:
        yield JOINT_STAGES, {"memory": 1, "host_memory": "0"}
        missing = re.search(r"needs ([\d.]+ [KMG]iB) more", str(compiled.errors[0]))
        assert missing is not None
        least = int(1.03 * (bytes_in(missing[1]) or 0))
        budgets.append(least)
        yield JOINT_STAGES, {"memory": least, "host_memory": "0"}
        yield JOINT_STAGES, {"memory": least, "host_memory": "1GiB"}
        monkeypatch.setattr(costs, "_OTHER", dataclasses.replace(costs._OTHER, link=1e15))
        yield JOINT_STAGES, {"memory": least, "host_memory": "1GiB"}
        monkeypatch.setattr(ARENA, "reserve", refuse)
        yield JOINT_STAGES, {"memory": least, "host_memory": "1GiB"}

    compiled = Ways(monkeypatch, model, ways())
    compiled.now = 1
    with caplog.at_level(logging.WARNING, logger="mst_fx"), on_plan.listening(found.append):
        loss, truth = step(model, compiled.run, batch)
    for compiled.now in (2, 3, 4):
        again, gradients = step(model, compiled.run, batch)
        assert float((again - loss).abs()) < 1e-5 and worst_error(gradients, truth) < 1e-5
    without, slow, lent, refused = found

    def flops(plan: Any) -> float:
        return float(sum(each.layers * each.flops for each in plan.layers))

    assert len(compiled.errors) == 1
    assert not any(each.host_bytes for each in slow.layers), (
        "nothing hides copies: attention is sooner made again"
    )
    assert lent.peak <= budgets[0] and sum(each.host_bytes for each in lent.layers) > 0
    assert not any(each.host_bytes for each in without.layers)
    assert flops(lent) < flops(without)
    assert refused.layers == without.layers
    assert "does without host memory: cudaHostRegister of 1 bytes gave error 2" in caplog.text


def test_the_arena_uses_its_memory_again() -> None:
    arena = Arena()
    arena.reserve([10_000, 5_000], is_pinned=False)
    size = arena.size
    assert size == 3 * 4096 + 2 * 4096 and arena.used == 0
    wide, small = (arena.buffer(torch.empty(count), is_pinned=False) for count in (2500, 1250))
    assert arena.size == size and arena.used == size
    part = wide.fill_(1)[1:]
    del wide
    assert arena.used == size, "a view holds its memory"
    del part, small
    assert arena.used == 0
    whole = arena.buffer(torch.empty(5 * 1024), is_pinned=False)
    assert arena.size == size, "pieces beside each other are one again"
    del whole
    arena.release()
    assert arena.size == 0


def test_ctrl_c_while_a_buffer_is_given_back_is_raised() -> None:
    """The end of a step's storages is where Python looks for signals first, when the backward pass is over."""
    arena = Arena()
    kept = [arena.buffer(torch.empty(1000), is_pinned=False)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            # One after the other with no bytecode between.
            list(map(partial.__call__, [partial(_thread.interrupt_main), partial(kept.clear)]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert arena.used == 0


def _fetched(gradient: Tensor) -> None:
    host = gradient.cpu()
    offload._start([host], [0], gradient.device)
    offload._COPIES.coming.pop(host.data_ptr()).take()


def _put_down(gradient: Tensor) -> None:
    port._PUT_DOWN.put(gradient)


@pytest.mark.parametrize("use", [_fetched, _put_down])
def test_ctrl_c_while_a_backward_pass_ends_is_raised(use: Callable[[Tensor], None]) -> None:
    """A GPU's thread makes the pass, and the main thread sees signals when it is over: where it drops what belonged to it."""

    class Used(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            use(gradient)
            # The last that is called in the pass.
            torch.autograd.Variable._execution_engine.queue_callback(partial(_thread.interrupt_main))  # type: ignore[attr-defined]
            return gradient

    loss = Used.apply(torch.ones(4, requires_grad=True)).square().sum()  # type: ignore[no-untyped-call]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_longer_sequence_than_the_plan_holds_is_planned_anew() -> None:
    """One graph of all lengths, as far as its plan's budget goes."""
    model, _ = _toy(layers=2)
    found: list[Any] = []
    compiled = compile_mst(model, {**SMALL_CHUNKS, "memory": 2_500_000}, dynamic=True)
    counts = []
    with on_plan.listening(found.append):
        for length in (300, 200, 280, 700):
            batch = token_batch(1, length)
            loss, gradients = step(model, compiled, batch)
            counts.append(len(found))
    assert counts == [1, 1, 1, 2] and all(plan.peak <= plan.budget for plan in found)
    expected, truth = step(model, model, batch)
    assert float((loss - expected).abs()) < 1e-12 and worst_error(gradients, truth) < 1e-12


def _whole(
    joint: JointGraph, group: list[tuple[Choice, transfer._Sent]], begin: Begin
) -> list[transfer._Station]:
    return [transfer._Station(begin, sent) for _, sent in group]


def test_what_attention_gave_comes_back_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's values come in two parts, and the next layer's only with the second: the backward pass of its MLP has less beside it."""
    model, batch = _model(layers=4)
    sending = Sending(-1)
    found: list[tuple[int, int]] = []

    def counted(context: JointContext) -> None:
        sending(context)
        fetches = context.graph.find_nodes(op="call_function", target=torch.ops.mst_fx.fetch.default)
        joint = JointGraph(context.graph)
        pairs = zip(calls_of(joint), curve_of(joint), strict=True)
        sizes = [size for call, size in pairs if "loop_backward" in str(call.target)]
        found.append((len(fetches), sizes[-2]))  # of the last layer that has one ahead

    def ways() -> Iterator[tuple[Sequence[Stage], dict[str, Any]]]:
        for stations in (transfer._stations, _whole):
            monkeypatch.setattr(transfer, "_stations", stations)
            yield (Stage("memory", counted, when=When.JOINT),), STRICT

    Ways(monkeypatch, model, ways()).run(**batch)
    (parts, in_parts), (wholes, at_once) = found
    assert wholes == 3 and parts == 2 * wholes
    assert in_parts < 0.95 * at_once
