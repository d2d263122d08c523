"""Parked optimizers: the bits of those that are not, with every optimizer of torch and around it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import mst_fx
from mst_fx.parking.homes import ARENA
from tests.parking.twins import BUCKET, WIDTH, Layers, Twins, backward, on_device
from tools.meters.cpu import measure_cpu

_EACH: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"foreach": True}),
    (optim.AdamW, {"foreach": False, "amsgrad": True}),
    (optim.AdamW, {"fused": True}),
    (optim.Adam, {"weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"momentum": 0.9, "foreach": True}),
    (optim.SGD, {}),
    (optim.Adafactor, {}),
    (optim.Adafactor, {"foreach": True}),
    (optim.RMSprop, {"momentum": 0.5, "centered": True, "foreach": True}),
    (optim.Adadelta, {"foreach": True}),
    (optim.Adagrad, {}),
    (optim.Adamax, {}),
    (optim.ASGD, {"foreach": True}),
    (optim.NAdam, {}),
    (optim.RAdam, {}),
    (optim.Rprop, {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"), _EACH, ids=lambda x: x.__name__ if isinstance(x, type) else str(x)
)
def test_every_optimizer_of_torch(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Two groups, and parameters that have no gradients at first."""

    def make(parameters: list[nn.Parameter]) -> Any:
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.01}]
        return kind(groups, lr=0.003, **options)

    twins = Twins(make, dtype, bucket=BUCKET // 2)
    for index in range(4):
        twins.steps(index, index + 1)
        twins.check()
    assert (twins.parking.bytes > 0) == any(len(state) > 0 for state in twins.parked[1].state.values())


def test_muon() -> None:
    twins = Twins(lambda ps: optim.Muon([p for p in ps if p.ndim == 2]), bucket=BUCKET // 2)
    twins.steps(0, 4)
    twins.check()
    assert twins.parking.bytes == 5 * WIDTH * WIDTH * 4


def _watch_parts(monkeypatch: pytest.MonkeyPatch, of: Any = optim.AdamW) -> list[int]:
    """The numbers of parameters that ``_init_group`` sees."""
    found: list[int] = []
    real = of._init_group

    def init_group(self: Any, group: Any, *args: Any) -> Any:
        found.append(len(group["params"]))
        return real(self, group, *args)

    monkeypatch.setattr(of, "_init_group", init_group)
    return found


def test_an_optimizer_sees_a_bucket_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(optim.AdamW)
    twins.steps(0, 3)
    parts = _watch_parts(monkeypatch)
    backward(twins.parked[0], 3)
    twins.parked[1].step()
    assert parts == [1] * 10  # each weight's states fill a bucket, and leave no place for a bias'
    twins.parking.remove()
    parking = mst_fx.park(twins.parked[1], bucket=3 * BUCKET)
    parts.clear()
    twins.parked[1].step()
    assert parts == [4, 4, 2] and parking.bytes == 10 * WIDTH * (WIDTH + 1) * 4


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_three_buckets_are_on_the_device(options: dict[str, Any]) -> None:
    """From the first step on, which makes the states: by the meter of torch's allocator, which does not see the arena."""
    model = Layers(count=24)
    optimizer = optim.AdamW(model.parameters(), **options)
    parking = mst_fx.park(optimizer, bucket=2 * BUCKET)
    backward(model, 0)
    peaks = []
    for _ in range(2):
        with measure_cpu() as measured:
            optimizer.step()
        peaks.append(measured.peak_bytes)
    states = 2 * 24 * 4 * WIDTH * (WIDTH + 1)
    assert parking.bytes == states > 10 * BUCKET
    # foreach has the square root of a bucket's second moments, too.
    assert max(peaks) <= (3 + (2 if options else 1) / 2) * 2 * BUCKET
    with measure_cpu() as measured:
        optimizer.zero_grad()
    mst_fx.process.reset()
    with measure_cpu() as measured:
        backward(model, 1)
        optimizer.step()
    assert on_device(optimizer) != []


def test_states_that_are_there_are_parked() -> None:
    plain, parked = Layers(), Layers()
    optimizers = [optim.AdamW(model.parameters()) for model in (plain, parked)]
    for index in range(4):
        if index == 2:
            mst_fx.park(optimizers[1], bucket=BUCKET)
            assert on_device(optimizers[1]) == []
        for model, optimizer in zip((plain, parked), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, index)
            optimizer.step()
    assert all(map(torch.equal, plain.parameters(), parked.parameters()))


def test_strides_are_kept_and_what_shares_memory_stays() -> None:
    """A weight in another order; states that are views, shared, the parameter's own, expanded or of one element."""
    weight = nn.Parameter(torch.randn(6, 5, 4).permute(2, 0, 1))
    optimizer = optim.AdamW([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    shared = torch.ones(8)
    stays = {
        "view": torch.ones(8)[2:],
        "one": shared,
        "other": shared,
        "own": weight.detach(),
        "expanded": torch.ones(1).expand(8),
        "overlapping": torch.ones(6).as_strided((2, 3), (1, 1)),
        "scalar": torch.ones(()),
        "text": "x",
    }
    state.update(stays)
    mst_fx.park(optimizer)
    assert state["exp_avg"].stride() == weight.stride() == (1, 20, 4)
    assert all(state[key] is value for key, value in stays.items())
    assert on_device(optimizer) == [
        (0, key) for key in ("view", "one", "other", "own", "expanded", "overlapping")
    ]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_scheduler_before_or_behind(is_first: bool) -> None:
    plain, parked = Layers(), Layers()
    optimizers = [optim.AdamW(model.parameters()) for model in (plain, parked)]
    if not is_first:
        mst_fx.park(optimizers[1], bucket=BUCKET)
    schedulers = [lr_scheduler.LinearLR(each, 0.1, total_iters=5) for each in optimizers]
    if is_first:
        mst_fx.park(optimizers[1], bucket=BUCKET)
    for index in range(4):
        for model, optimizer, scheduler in zip((plain, parked), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            backward(model, index)
            optimizer.step()
            scheduler.step()
    assert all(map(torch.equal, plain.parameters(), parked.parameters()))
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    assert on_device(optimizers[1]) == []


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_a_grad_scaler_skips_and_unscales(options: dict[str, Any]) -> None:
    """Fused optimizers get the scale and what was found as attributes."""
    twins = Twins(lambda ps: optim.AdamW(ps, **options))
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2)]
    for index in range(5):
        for (model, optimizer), scaler in zip(twins.both(), scalers, strict=True):
            optimizer.zero_grad()
            loss = model(torch.full((2, WIDTH), float(index + 1))).square().sum()
            scaler.scale(loss).backward()
            if index == 2:
                next(model.layers[1].parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        twins.check()
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_gradients_that_accumulate_and_a_closure() -> None:
    twins = Twins(optim.AdamW)
    for index in range(3):
        losses = []
        for model, optimizer in twins.both():

            def closure(model: Layers = model, optimizer: Any = optimizer, index: int = index) -> Tensor:
                optimizer.zero_grad()
                backward(model, 2 * index)
                return backward(model, 2 * index + 1)

            losses.append(optimizer.step(closure))
        assert torch.equal(*losses)
        twins.check()


def test_hooks_see_one_step_of_the_optimizer_itself() -> None:
    """Also one that changes gradients, and was registered behind."""
    twins = Twins(optim.AdamW)
    seen: list[Any] = []
    for model, optimizer in twins.both():

        def before(one: Any, args: Any, kwargs: Any, model: Layers = model) -> None:
            seen.append(("before", type(one), len(one.param_groups[0]["params"])))
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(
            lambda one, *_: seen.append(("behind", type(one), on_device(one) == []))
        )
    twins.steps(2, 4)
    twins.check()
    assert seen[2:4] == seen[6:8] == [("before", optim.AdamW, 10), ("behind", optim.AdamW, True)]


def test_groups_that_come_behind_and_parameters_of_several_types() -> None:
    """Adafactor's epsilon is that of the first parameter's type, for all of its group: then the group is one bucket."""
    plain, parked = ([nn.Parameter(x.clone()) for x in _tensors()] for _ in range(2))
    optimizers = [optim.Adafactor(parameters[:3]) for parameters in (plain, parked)]
    mst_fx.park(optimizers[1], bucket=1)
    for parameters, optimizer in zip((plain, parked), optimizers, strict=True):
        optimizer.add_param_group({"params": parameters[3:], "lr": 0.5})
        for _ in range(3):
            for p in parameters:
                p.grad = torch.full_like(p, 1e-4)
            optimizer.step()
    assert all(map(torch.equal, plain, parked)) and on_device(optimizers[1]) == []


def _tensors() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        yield torch.randn(8, 8, generator=generator).to(dtype)


class _Coupled(optim.Optimizer):
    """As D-adaptation does: all parameters' states decide the step of each, over two loops."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.zeros(())
        for p in parameters:
            state = self.state[p]
            state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
            total += state["sum"].abs().sum()
        for p in parameters:
            p.sub_(self.state[p]["sum"] * (self.param_groups[0]["lr"] / total))


def test_an_optimizer_that_is_not_known_has_all_of_its_states() -> None:
    class Own(optim.AdamW):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            found = super().step(closure)
            self.steps = getattr(self, "steps", 0) + 1
            return found

    for kind in (_Coupled, Own):
        twins = Twins(kind)
        twins.steps(0, 4)
        twins.check()
        assert twins.parking.bytes > 0


def test_an_optimizer_for_each_parameter_steps_in_the_backward_pass() -> None:
    models = [Layers(), Layers()]
    for index, model in enumerate(models):
        for p in model.parameters():
            optimizer = optim.AdamW([p])
            if index:
                mst_fx.park(optimizer)

            def step(p: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(step)
    for index in range(3):
        for model in models:
            backward(model, index)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert ARENA.used == 20 * 4096


def test_state_dicts_have_values_and_are_loaded_parked() -> None:
    """From a plain optimizer to a parked one and back, and of a parked one into itself, over later steps."""
    twins = Twins(optim.AdamW)
    twins.steps(0, 3)
    plain, parked = (optimizer.state_dict() for _, optimizer in twins.both())
    assert differences(plain["state"], parked["state"]) == []
    saved, held = copy.deepcopy(plain), copy.deepcopy(parked)
    for state in saved["state"].values():
        state.update({key: value.double() for key, value in state.items() if key != "step"})
    as_it_was = copy.deepcopy(saved)
    twins.steps(3, 5)
    live = twins.parked[1].state_dict()["state"]
    assert all(live[n][key] is value for n, state in parked["state"].items() for key, value in state.items())
    with measure_cpu() as measured:
        twins.parked[1].load_state_dict(saved)
    assert measured.peak_bytes < BUCKET
    twins.plain[1].load_state_dict(held)
    assert differences(*(optimizer.state_dict()["state"] for _, optimizer in twins.both())) == []
    twins.steps(5, 7)
    twins.check()
    # Nothing writes to what was loaded, but for the scalars, which torch takes as they are.
    assert {key for _, key in differences(saved["state"], as_it_was["state"])} == {"step"}


def differences(one: dict[int, Any], other: dict[int, Any]) -> list[tuple[int, str]]:
    assert list(one) == list(other) and len(one) > 0
    return [
        (number, key)
        for number, state in one.items()
        for key, value in state.items()
        if not torch.equal(value, other[number][key]) or value.dtype != other[number][key].dtype
    ]


def test_a_file_a_copy_and_a_pickled_one() -> None:
    twins = Twins(optim.AdamW)
    twins.steps(0, 3)
    file = io.BytesIO()
    torch.save(twins.parked[1].state_dict(), file)
    assert len(file.getvalue()) < 1.5 * twins.parking.bytes, "buffers, and not the arena"
    file.seek(0)
    fresh = copy.deepcopy(twins.parked[0])
    optimizer = optim.AdamW(fresh.parameters())
    mst_fx.park(optimizer, bucket=BUCKET)
    optimizer.load_state_dict(torch.load(file))
    other, again = copy.deepcopy((twins.parked[0], twins.parked[1]))
    mst_fx.park(again, bucket=BUCKET)
    third = io.BytesIO()
    torch.save((twins.parked[0], twins.parked[1]), third)
    third.seek(0)
    loaded, once_more = torch.load(third, weights_only=False)
    twins.steps(3, 5)
    for model, each in ((fresh, optimizer), (other, again), (loaded, once_more)):
        for index in range(3, 5):
            each.zero_grad()
            backward(model, index)
            each.step()
        assert all(map(torch.equal, model.parameters(), twins.plain[0].parameters()))
    assert on_device(optimizer) == on_device(again) == [] != on_device(once_more)


def test_loading_states_in_another_order_and_of_another_type() -> None:
    """What is loaded may lie where the homes of others are."""
    twins = Twins(optim.AdamW)
    twins.steps(2, 4)
    for _, optimizer in twins.both():
        saved = optimizer.state_dict()
        states = saved["state"]
        swapped = {0: states[2], 2: states[4], 4: states[0], 1: states[3], 3: states[1]}
        if optimizer is twins.plain[1]:  # which torch would share
            swapped = copy.deepcopy(swapped)
        swapped[0] = {**swapped[0], "exp_avg": swapped[0]["exp_avg"].double()}
        optimizer.load_state_dict({**saved, "state": {**states, **swapped}})
    twins.check()
    twins.steps(4, 6)
    twins.check()


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    twins = Twins(optim.AdamW)
    twins.steps(0, 2)
    saved = copy.deepcopy(twins.parked[1].state_dict())
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="size of optimizer's group"):
        twins.parked[1].load_state_dict(saved)
    twins.check()
    twins.steps(2, 4)
    twins.check()


def test_a_wrapper_of_accelerate() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    twins = [Layers(), Layers()]
    wrapped = [accelerator.prepare(optim.AdamW(model.parameters())) for model in twins]
    mst_fx.park(wrapped[1], bucket=BUCKET)
    for index in range(3):
        for model, optimizer in zip(twins, wrapped, strict=True):
            optimizer.zero_grad()
            backward(model, index)
            optimizer.step()
    assert all(map(torch.equal, twins[0].parameters(), twins[1].parameters()))
    assert on_device(wrapped[1].optimizer) == []
    again = accelerator.prepare(wrapped[1].optimizer)
    assert on_device(again.optimizer) == []


def test_undone_at_the_end_and_nothing_left() -> None:
    gc.collect()
    twins = Twins(optim.AdamW)
    with twins.parking as parking:
        twins.steps(0, 3)
        assert ARENA.used >= parking.bytes > 0
    assert ARENA.size == parking.bytes == 0
    twins.check(is_parked=False)
    twins.steps(3, 5)
    twins.check(is_parked=False)
    assert len(on_device(twins.parked[1])) == 20
    parking.remove()
    mst_fx.park(twins.parked[1])
    dead = weakref.ref(twins.parked[1])
    twins.parked = twins.plain
    gc.collect()
    assert dead() is None and ARENA.used == 0
