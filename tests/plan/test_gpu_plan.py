"""On a CUDA device: budgets hold by the allocator's count, and a plan has the numbers of the step without one."""

from __future__ import annotations

import _thread
import gc
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mst_fx.listeners import on_plan
from mst_fx.ops import offload
from mst_fx.ops.arena import ARENA
from mst_fx.options import bytes_in
from mst_fx.passes import memory_plan
from mst_fx.plan.choices import Choice
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.peak import peak_of
from mst_fx.plan.recompute import on_trial
from mst_fx.plan.room import _UNSEEN
from mst_fx.report import MemoryPlan
from tests.helpers import compile_mst
from tools.bench.models import Shape, make_llama, text_tokens

pytestmark = pytest.mark.gpu

_SHAPE = Shape(hidden=1024, intermediate=4096, heads=8, kv_heads=4, vocabulary=8192, layers=6)
_LENGTH = 16384


def test_budgets_hold_and_more_is_never_slower() -> None:
    model = make_llama(_SHAPE, _LENGTH, "cuda", torch.bfloat16, checkpoint=False)
    ids = text_tokens(_LENGTH, _SHAPE.vocabulary).view(1, _LENGTH).cuda()

    def run(memory: Any) -> tuple[float, int, MemoryPlan | None]:
        plans: list[Any] = []
        model.zero_grad(set_to_none=True)
        compiled = compile_mst(model, {"memory": memory, "host_memory": "0"})
        with on_plan.listening(plans.append):
            compiled(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), torch.cuda.max_memory_allocated(), plans[0] if plans else None

    loss, free_peak, _ = run(None)
    truth = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(Exception, match="BudgetError") as error:
        run(1)
    missing = re.search(r"needs ([\d.]+ [MG]iB) more", str(error.value))
    assert missing is not None
    least = int(1.06 * (bytes_in(missing[1]) or 0))  # said in two digits
    budgets = [least, (2 * least + free_peak) // 3, (least + 2 * free_peak) // 3, "auto"]
    made, peaks = [], []
    for budget in budgets:
        found, peak, plan = run(budget)
        assert plan is not None
        # Un-chunked, sums are others; and what Inductor fuses with what is rounded to 16 bits elsewhere.
        assert abs(found - loss) <= (1e-3 if "un-chunked" in str(plan) else 1e-5) * loss
        assert peak <= plan.budget
        # Un-chunked, Inductor writes gradients over what they are made of; scratch of small calls of attention is less than said.
        least_of_it = 0.85 if "un-chunked" in str(plan) else 0.93
        assert least_of_it * plan.peak <= peak <= 1.01 * plan.peak, f"{peak / plan.peak:.3f} of {plan}"
        for parameter, gradient in zip(model.parameters(), truth, strict=True):
            # Inductor fuses sums otherwise: not to the bit.
            error_of = (parameter.grad.float() - gradient.float()).norm() / gradient.float().norm()
            assert float(error_of) < 1e-2
        made.append(sum(each.layers * each.seconds for each in plan.layers))
        peaks.append(peak)
    assert made == sorted(made, reverse=True) and made[-1] < 0.5 * made[0]
    assert peaks[0] < 0.8 * peaks[-1]


# Three of the layers send to the host then; without one, half of them make attention again.
_ROOM = 760 * 2**20


class _Planned:
    """A model with a plan that sends to the host, and what a step of it gives."""

    def __init__(self, host: str = "auto") -> None:
        gc.collect()  # what a failed test has left is no room
        self.model = make_llama(_SHAPE, _LENGTH, "cuda", torch.bfloat16, checkpoint=False)
        self.ids = text_tokens(_LENGTH, _SHAPE.vocabulary).view(1, _LENGTH).cuda()
        self.plans: list[Any] = []
        # A hundredth of any budget is left out: more is given, so that as much is left whatever is there already.
        memory = int(torch.cuda.memory_allocated() / (1 - _UNSEEN)) + _ROOM
        options = {"memory": memory, "host_memory": host}
        with on_plan.listening(self.plans.append):
            self.compiled = compile_mst(self.model, options)
            self.step()

    def step(self) -> tuple[float, int]:
        """The loss of a step with fresh gradients, and its peak above what was there."""
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = self.compiled(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.cuda.synchronize()
        return float(loss.detach()), torch.cuda.max_memory_allocated() - before

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad.clone() for p in self.model.parameters()]


def _is_same(found: tuple[float, int], other: tuple[float, int]) -> bool:
    """The same loss, and the same peak but for the allocator's rounding."""
    return found[0] == other[0] and abs(found[1] - other[1]) <= 0.01 * other[1]


def test_groups_that_keep_some_on_the_host_take_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a group's layers make for their own backward passes is not what their starts were made of: that would be held in between."""

    def in_groups(joint: JointGraph, choices: list[list[Choice]], *_: Any) -> tuple[list[Choice], int]:
        first, inner = [those[0].on_host() for those in choices], [those[1] for those in choices]
        chosen = [first[0], inner[1].without_start().on_host(), first[2], inner[3].without_start().on_host()]
        chosen += [those[0] for those in choices[4:]]
        return chosen, peak_of(on_trial(joint.graph, chosen)[0])

    monkeypatch.setattr(memory_plan, "fastest_choices", in_groups)
    planned = _Planned()
    plan: MemoryPlan = planned.plans[0]
    assert {"start" in each.again for each in plan.layers if each.host_bytes} == {True, False}
    _, peak = planned.step()
    said = plan.peak - plan.taken
    assert 0.9 * said <= peak <= 1.01 * said, f"{peak / said:.3f} of {plan}"


def _error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    pairs = zip(found, truth, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def test_what_is_on_the_host_is_right_however_long_copies_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(_SHAPE, _LENGTH, "cuda", torch.bfloat16, checkpoint=False)
    ids = text_tokens(_LENGTH, _SHAPE.vocabulary).view(1, _LENGTH).cuda()
    compile_mst(model, {"memory": None})(input_ids=ids, labels=ids).loss.backward()
    truth = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    planned = _Planned()
    assert sum(each.layers for each in planned.plans[0].layers if each.host_bytes) >= 2
    loss, peak = planned.step()
    assert peak <= _ROOM
    assert 0 < _error(planned.gradients(), truth) < 1e-2
    streams_of = offload._Copies.streams_of

    def slow(self: Any, device: torch.device) -> Any:
        streams = streams_of(self, device)
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # 10 ms, many times a layer
        return streams

    monkeypatch.setattr(offload._Copies, "streams_of", slow)
    for _ in range(2):
        assert _is_same(planned.step(), (loss, peak))
        assert _error(planned.gradients(), truth) < 1e-2


def _out_of_memory(planned: _Planned) -> None:
    """In the backward pass."""
    planned.model.zero_grad(set_to_none=True)
    loss = planned.compiled(input_ids=planned.ids, labels=planned.ids).loss
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _interrupted(planned: _Planned) -> None:
    """By Ctrl-C, wherever the step is."""
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # it may be ignored: a background process
    threading.Timer(0.3, _thread.interrupt_main).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(200):
                planned.step()
    finally:
        signal.signal(signal.SIGINT, before)


def _dropped(planned: _Planned) -> None:
    """A forward pass without a backward pass."""
    planned.compiled(input_ids=planned.ids, labels=planned.ids)


@pytest.mark.parametrize("fault", [_out_of_memory, _interrupted, _dropped])
def test_after_a_fault_steps_are_as_before(fault: Callable[[_Planned], None]) -> None:
    planned = _Planned()
    first, size = planned.step(), ARENA.size
    truth = planned.gradients()
    assert size
    for _ in range(2):
        fault(planned)
        assert _is_same(planned.step(), first)
        assert _error(planned.gradients(), truth) < 1e-2
    assert ARENA.size == size
    planned.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    assert ARENA.used == 0
    again = _Planned()  # compiled anew in this process
    assert _is_same(again.step(), first)
    assert ARENA.size == size


def test_host_memory_that_is_full(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()
    ARENA.release()
    assert ARENA.size == 0
    monkeypatch.setattr("mst_fx.ops.arena._register", _refuses)
    planned = _Planned()
    assert "the memory plan does without host memory: cudaHostRegister" in caplog.text
    assert not any(each.host_bytes for each in planned.plans[0].layers)
    assert planned.step()[1] <= _ROOM
    assert ARENA.size == 0
    monkeypatch.undo()
    few = _Planned("128MiB")  # one layer's
    assert 0 < sum(each.layers * each.host_bytes for each in few.plans[0].layers) <= 2**27
    assert few.step()[1] <= _ROOM


def _refuses(memory: Any, size: int) -> None:
    raise MemoryError(f"cudaHostRegister of {size} bytes gave error 2")
