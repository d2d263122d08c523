"""On a CUDA device: the bits of optimizers that are not parked, and what is on the device in a step and between steps."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.profiler import ProfilerActivity, profile

import mst_fx
from mst_fx.parking.homes import ARENA, Homes
from mst_fx.parking.parked import parked_bytes
from tests.parking.twins import on_device

pytestmark = pytest.mark.gpu

_MIB = 2**20
_WIDTH, _COUNT = 1024, 24
_WEIGHT = 2 * _WIDTH * _WIDTH  # bytes in bfloat16
_BUCKET = 4 * _WEIGHT  # the states of two weights

_KINDS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"fused": True}),
    (optim.AdamW, {"foreach": False}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.Adafactor, {}),
    (optim.RMSprop, {"momentum": 0.9}),
]


def _model(count: int = _COUNT, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, dtype=dtype, device="cuda") for _ in range(count)))


def _backward(model: nn.Sequential, index: int) -> None:
    torch.manual_seed(index)
    x = torch.randn(64, _WIDTH, device="cuda", dtype=next(model.parameters()).dtype)
    for layer in model:
        x = layer(x).tanh()
    x.float().square().sum().backward()


def _steps(model: nn.Sequential, optimizer: Any, first: int, last: int) -> None:
    for index in range(first, last):
        optimizer.zero_grad()
        _backward(model, index)
        optimizer.step()


def _are_same(a: nn.Module, plain: Any, b: nn.Module, parked: Any) -> bool:
    return all(
        torch.equal(p, q)
        and all(
            torch.equal(v.cpu(), parked.state[q][key].cpu())
            for key, v in plain.state[p].items()
            if isinstance(v, Tensor)
        )
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "options"), _KINDS, ids=str)
def test_the_bits_of_one_that_is_not_parked(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    models = [_model(6, dtype), _model(6, dtype)]
    plain, parked = (kind(model.parameters(), lr=1e-3, **options) for model in models)
    mst_fx.park(parked, bucket=_BUCKET)
    for index in range(5):
        for model, optimizer in zip(models, (plain, parked), strict=True):
            _steps(model, optimizer, index, index + 1)
        assert _are_same(models[0], plain, models[1], parked)
        assert on_device(parked) == []
    saved = copy.deepcopy(plain.state_dict())
    parked.load_state_dict(saved)
    assert on_device(parked) == []
    for model, optimizer in zip(models, (plain, parked), strict=True):
        _steps(model, optimizer, 5, 7)
    assert _are_same(models[0], plain, models[1], parked)


def test_copies_that_are_slow_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams have work before each copy, and the device's memory is filled behind each bucket by others."""
    models = [_model(8), _model(8)]
    plain, parked = (optim.AdamW(model.parameters(), lr=1e-3) for model in models)
    mst_fx.park(parked, bucket=_BUCKET)
    real = torch.cuda.Stream.wait_stream

    def wait_stream(self: Any, other: Any) -> None:
        real(self, other)
        with torch.cuda.stream(self):
            torch.cuda._sleep(20_000_000)

    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", wait_stream)
    real_send = Homes.send

    def send(self: Homes, *args: Any) -> None:
        real_send(self, *args)
        noise = [
            torch.full((_WIDTH, _WIDTH), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(4)
        ]
        del noise

    monkeypatch.setattr(Homes, "send", send)
    for index in range(3):
        for model, optimizer in zip(models, (plain, parked), strict=True):
            _steps(model, optimizer, index, index + 1)
        # At once, with nothing that would wait.
        homes = [v.clone() for state in parked.state.values() for v in state.values() if v.numel() > 1]
        truth = [v.cpu() for state in plain.state.values() for v in state.values() if v.numel() > 1]
        assert all(map(torch.equal, homes, truth))
    assert _are_same(models[0], plain, models[1], parked)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_what_is_on_the_device(options: dict[str, Any]) -> None:
    """No states between steps, three buckets of them in one, the first included."""
    model = _model()
    optimizer = optim.AdamW(model.parameters(), **options)
    parking = mst_fx.park(optimizer, bucket=_BUCKET)
    _backward(model, 0)
    gc.collect()
    for _ in range(3):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        # Scalars of fused optimizers are on the device: 512 bytes each.
        assert torch.cuda.memory_allocated() - before <= _MIB
        # foreach has a bucket's square roots, too.
        buckets = 4 if options.get("foreach") else 3
        assert torch.cuda.max_memory_allocated() - before <= (buckets + 0.5) * _BUCKET
    states = 2 * _COUNT * (_WEIGHT + 2 * _WIDTH)
    assert parking.bytes == states > 10 * _BUCKET
    assert parked_bytes(torch.device("cuda", torch.cuda.current_device())) == states // 2
    parking.remove()
    assert torch.cuda.memory_allocated() - before >= states and ARENA.size == 0


def test_loading_and_adopting() -> None:
    """A state dict never is on the device as a whole; a copy of a parked optimizer is taken in."""
    model = _model()
    optimizer = optim.AdamW(model.parameters())
    mst_fx.park(optimizer, bucket=_BUCKET)
    _steps(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.load_state_dict(saved)
    assert torch.cuda.max_memory_allocated() - before <= _BUCKET
    other, again = copy.deepcopy((model, optimizer))
    mst_fx.park(again, bucket=_BUCKET)
    assert on_device(again) == []
    for each, one in ((model, optimizer), (other, again)):
        _steps(each, one, 2, 4)
    assert _are_same(model, optimizer, other, again)


def test_a_device_that_has_no_memory_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step raises; what it has not reached is stepped by the next, with the same bits."""
    models = [_model(8), _model(8)]
    plain, parked = (optim.AdamW(model.parameters(), fused=True) for model in models)
    mst_fx.park(parked, bucket=_BUCKET)
    for model, optimizer in zip(models, (plain, parked), strict=True):
        _steps(model, optimizer, 0, 2)
        optimizer.zero_grad()
        _backward(model, 2)
    before = [p.detach().clone() for p in models[1].parameters()]
    plain.step()
    with monkeypatch.context() as patch:
        count = 0
        real = Homes.fetch

        def fetch(self: Homes, *args: Any) -> Any:
            nonlocal count
            count += 1
            if count >= 3:
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return real(self, *args)

        patch.setattr(Homes, "fetch", fetch)
        with pytest.raises(torch.OutOfMemoryError):
            parked.step()
    assert on_device(parked) == []
    stepped = 0
    for p, old in zip(models[1].parameters(), before, strict=True):
        if not torch.equal(p, old):
            p.grad, stepped = None, stepped + 1
    assert 0 < stepped < len(before)
    parked.step()
    assert _are_same(models[0], plain, models[1], parked)


def test_a_step_that_is_captured_is_refused() -> None:
    model = _model(2)
    optimizer = optim.AdamW(model.parameters())
    mst_fx.park(optimizer)
    _steps(model, optimizer, 0, 2)
    _backward(model, 2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(graph):
        optimizer.step()


def test_copies_hide_beside_each_other() -> None:
    """Both directions at once: while states come from the host, others go there. (A third of the time under the profiler, on an H200.)"""
    model = _model(96)
    optimizer = optim.AdamW(model.parameters(), fused=True)
    mst_fx.park(optimizer, bucket=8 * _BUCKET)
    _steps(model, optimizer, 0, 2)
    _backward(model, 2)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        optimizer.step()
        torch.cuda.synchronize()
    there, back = (_spans(seen, f"Memcpy {way} ") for way in ("DtoH", "HtoD"))
    beside = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in there for b in back)
    assert beside >= 0.2 * min(sum(each.elapsed_us() for each in spans) for spans in (there, back)) > 0


def _spans(seen: profile, name: str) -> list[Any]:
    """When the device did something, in microseconds."""
    events = seen.events()
    assert events is not None
    return [event.time_range for event in events if event.name.startswith(name)]
