"""Parked optimizers when the host is full, when a step raises, and what cannot be parked; and what plans know of them."""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import mst_fx
from mst_fx.parking import homes, parked
from mst_fx.parking.homes import ARENA, Homes
from mst_fx.plan.room import Room, host_bytes
from tests.parking.twins import WIDTH, Layers, Twins, backward, on_device


def _raise_at(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: type[BaseException],
    is_behind: bool,
) -> Callable[[], bool]:
    """The ``call``-th call of a function raises, before or behind what it does; whether it has."""
    count = 0
    real = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not is_behind:
            raise error("injected")
        found = real(*args, **kwargs)
        if count == call:
            raise error("injected")
        return found

    monkeypatch.setattr(owner, name, replaced)
    return lambda: count >= call


_PLACES = {
    "update": (sys.modules["torch.optim.adam"], "adam"),
    "fetch": (Homes, "fetch"),
    "send": (Homes, "send"),
    "arrive": (homes.Coming, "arrive"),
    "settle": (Homes, "settle"),
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize("place", _PLACES)
def test_a_step_that_raises_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, place: str, is_behind: bool, error: type[BaseException]
) -> None:
    """Wherever it raises: each parameter and its states are as before the step, or as behind it, and training goes on.

    The parameters that were not stepped are stepped then, alone: the bits are those of a step that has not raised.
    """
    owner, name = _PLACES[place]
    for call in (1, 2, 5, 10, 11):
        twins = Twins(optim.AdamW)
        twins.steps(0, 3)
        for model, optimizer in twins.both():
            optimizer.zero_grad()
            backward(model, 3)
        before = _copied(twins.parked[1])
        twins.plain[1].step()
        behind = _copied(twins.plain[1])
        with monkeypatch.context() as patch:
            has_raised = _raise_at(patch, owner, name, call, error, is_behind)
            try:
                twins.parked[1].step()
                is_quiet = True
            except error:
                is_quiet = False
            # Memory that lacks for what is fetched ahead is no error.
            assert has_raised() or is_quiet
        stepped = [
            _is_stepped(*those) for those in zip(_copied(twins.parked[1]), before, behind, strict=True)
        ]
        assert not is_quiet or all(stepped)
        for p, is_done in zip(twins.parked[0].parameters(), stepped, strict=True):
            if is_done:
                p.grad = None
        twins.parked[1].step()
        twins.check()
        twins.steps(4, 6)
        twins.check()


def _copied(optimizer: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [
        (p.detach().clone(), copy.deepcopy(optimizer.state[p]))
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def _is_stepped(found: Any, before: Any, behind: Any) -> bool:
    """Whether a parameter and all of its states are as behind a step; else they are as before."""
    (p, states), (q, olds), (r, news) = found, before, behind
    assert len(states) == 3
    if torch.equal(p, r):
        assert all(torch.equal(states[key], news[key]) for key in states)
        return True
    assert torch.equal(p, q) and all(torch.equal(states[key], olds[key]) for key in states)
    return False


@pytest.mark.parametrize("call", [1, 2, 7])
def test_the_first_step_may_raise(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """States that it has made are parked."""
    twins = Twins(optim.AdamW)
    for model, optimizer in twins.both():
        backward(model, 3)
        with monkeypatch.context() as patch:
            at = 1 if model is twins.plain[0] else call
            _raise_at(patch, *_PLACES["update"], at, ValueError, is_behind=False)
            with pytest.raises(ValueError, match="injected"):
                optimizer.step()
    assert on_device(twins.parked[1]) == []
    assert sum(len(state) > 0 for state in twins.parked[1].state.values()) == call
    twins.steps(3, 5)
    assert on_device(twins.parked[1]) == []


def test_memory_that_lacks_for_a_bucket_ahead_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(optim.AdamW)
    twins.steps(0, 3)
    real = Homes.fetch
    calls: list[int] = []

    def fetch(self: Homes, *args: Any) -> Any:
        calls.append(len(self._leaving))
        if len(calls) in (2, 3, 6):
            raise torch.OutOfMemoryError("injected")
        return real(self, *args)

    monkeypatch.setattr(Homes, "fetch", fetch)
    twins.steps(3, 4)
    twins.check()
    assert calls[2:4] == [1, 0], "what leaves is waited for, before the second try"


def test_a_host_that_is_full(caplog: pytest.LogCaptureFixture) -> None:
    """Half of the states have place; the others stay, and the warning is said once."""
    states = 2 * 5 * 4 * WIDTH * (WIDTH + 1)
    with caplog.at_level(logging.WARNING, "mst_fx"):
        twins = Twins(optim.AdamW, host_memory=states // 2)
        twins.steps(0, 5)
        twins.check(is_parked=False)
    assert 0.3 * states < twins.parking.bytes <= states // 2
    assert 0 < len(on_device(twins.parked[1])) < 20
    (record,) = caplog.records
    said = record.getMessage()
    assert "states of an optimizer stay on the device" in said and "more than host_memory allows" in said
    twins.parked[1].load_state_dict(copy.deepcopy(twins.plain[1].state_dict()))
    twins.steps(5, 7)
    twins.check(is_parked=False)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("cause", ["mmap", "cudaHostRegister", "free"])
def test_memory_that_the_system_does_not_give(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("injected")

    def refuse_to_register(*_: Any) -> None:
        raise MemoryError("cudaHostRegister of 1 bytes gave error 2")

    twins = Twins(optim.AdamW)
    ARENA.release()
    if cause == "mmap":
        monkeypatch.setattr("mst_fx.ops.arena.mmap.mmap", refuse)
    elif cause == "free":
        monkeypatch.setattr(homes, "free_on_host", lambda: 100)
    else:
        monkeypatch.setattr(ARENA, "_grow", refuse_to_register)
    with caplog.at_level(logging.WARNING, "mst_fx"):
        twins.steps(0, 3)
    twins.check(is_parked=False)
    assert len(on_device(twins.parked[1])) == 20 and twins.parking.bytes == 0
    (record,) = caplog.records
    expected = {
        "mmap": "no .* bytes of host memory",
        "free": "more than is free",
        "cudaHostRegister": "error 2",
    }
    assert re.search(expected[cause], record.getMessage())
    assert mst_fx.parking.parked.parked_bytes(torch.device("cpu")) == 0


def test_what_cannot_be_parked() -> None:
    model = Layers()

    def refused(optimizer: Any, said: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=said):
            mst_fx.park(optimizer, **options)

    refused(model, "takes a torch.optim.Optimizer, not Layers")
    refused(optim.LBFGS(model.parameters()), "LBFGS runs forward and backward passes")
    refused(optim.AdamW(model.parameters(), differentiable=True), "differentiable=True")
    refused(optim.AdamW([nn.Parameter(torch.empty(2, device="meta"))]), "a parameter is on meta")
    optimizer = optim.AdamW(model.parameters())
    for options in ({"bucket": "1"}, {"host_memory": "0"}, {"host_memory": None}, {"bucket": 0}):
        refused(optimizer, "allowed: bytes as in", **options)
    parking = mst_fx.park(optimizer)
    refused(optimizer, "is parked already")
    parking.remove()
    mst_fx.park(optimizer)
    optimizer = optim.AdamW(model.parameters())
    optimizer.param_groups[0]["capturable"] = True
    refused(optimizer, "capturable=True")


def test_a_compiled_step_is_refused() -> None:
    twins = Twins(optim.AdamW)
    twins.steps(0, 3)
    optimizer = twins.parked[1]
    for step in (optimizer.step, lambda: optimizer.step()):
        with pytest.raises(RuntimeError, match="has to step outside of what torch"):
            torch.compile(step, backend="eager")()
    twins.steps(3, 4)
    twins.check()


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(optim.AdamW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        twins.parked[1].step()


def test_plans_know_what_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters whose states are, or will be, on the host, and the host's bytes that will be taken."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("mst_fx.plan.room.free_on_host", lambda: 1000000)
    gpu = Room("H200", 1, 0, is_gpu=True)
    free = host_bytes(None, gpu)
    parameters = 5 * 4 * WIDTH * (WIDTH + 1)
    twins = Twins(optim.AdamW)
    assert parked.parked_bytes(cpu) == parameters and parked.parked_bytes(torch.device("meta")) == 0
    assert host_bytes(None, gpu) == free - 2 * parameters and host_bytes(123, gpu) == 123
    twins.steps(2, 3)
    assert parked.parked_bytes(cpu) == parameters
    assert host_bytes(None, gpu) == free
    twins.parking.remove()
    assert parked.parked_bytes(cpu) == 0
    full = Twins(optim.AdamW, host_memory=parameters // 5 * 2)
    assert parked.parked_bytes(cpu) == parameters
    full.steps(2, 3)
    assert parked.parked_bytes(cpu) == parameters // 5
    del full, twins


def test_a_budget_of_auto_leaves_out_states_that_will_be_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what CUDA would say of a device, of which the inputs of a joint graph are."""
    from mst_fx.plan import room

    class Joint:
        trained_bytes = 1000
        backward: frozenset[Any] = frozenset()

        class graph:
            @staticmethod
            def find_nodes(op: str) -> list[str]:
                return ["weight"]

    weight = torch.empty(250, device="meta")
    monkeypatch.setattr(room, "tensor_of", lambda _: _OnCUDA())
    monkeypatch.setattr(room, "bytes_of", lambda _: weight.nbytes)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10000, 20000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")

    def budget(parked: int) -> int:
        monkeypatch.setattr(room, "parked_bytes", lambda _: parked)
        return room.room_for(None, Joint()).budget  # type: ignore[arg-type]

    assert [budget(x) - budget(0) for x in (400, 1000, 5000)] == [800, 2000, 2000]


class _OnCUDA:
    device = torch.device("cuda", 0)
