"""What mst leaves behind in a process: other compilations keep their settings, and what is over is freed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import mst_fx
from mst_fx.bodies.body import BODIES
from mst_fx.compiling import mst
from mst_fx.process import only_new_garbage
from tests.helpers import SMALL_CHUNKS, GatedMLP, ToyLM, compile_mst, gradients, token_batch, worst_error

_BAR = 1e-9
_DONATION = "donated_buffer"


class _Donating(nn.Module):
    """Saves a tensor that no input, output or gradient is an alias of: a donated buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x).sin().sum()
        return found


class _Small(nn.Module):
    """An MLP that is chunked, and a loss behind it that saves a tensor which could be donated."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = GatedMLP(8, 24)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.mlp(x)
        return ((y.mT @ y).exp().mean(),)


def _thrice(model: nn.Module, run: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Tensor]:
    run(**batch)[0].backward()  # code that is compiled in a pass that keeps its graph would donate nothing
    model.zero_grad(set_to_none=True)
    loss = run(**batch)[0]
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
    return gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "setting"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_donated_buffers_are_others_business(inner: str, setting: bool) -> None:
    config = torch._functorch.config
    with config.patch({_DONATION: setting}):
        model, batch = _Small(), {"x": torch.randn(1, 40, 8, dtype=torch.float64)}
        truth = _thrice(model, model, batch)
        compiled = compile_mst(model, {**SMALL_CHUNKS, "inner": inner})
        other = _Donating()
        plain = torch.compile(other, backend=inner)
        x = torch.randn(4, 8, dtype=torch.float64)
        plain(x).backward()
        for _ in range(2):
            assert worst_error(_thrice(model, compiled, batch), truth) <= _BAR
            assert config.donated_buffer is setting
            if setting:  # torch's own limit, which is only there where buffers are donated
                with pytest.raises(RuntimeError, match=_DONATION):
                    plain(x).backward(retain_graph=True)
            else:
                plain(x).backward(retain_graph=True)
        again = compile_mst(model, {**SMALL_CHUNKS, "inner": inner})  # from Inductor's cache
        assert worst_error(_thrice(model, again, batch), truth) <= _BAR


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No body of an earlier test, whoever holds it; and later collections are quick."""
    BODIES.reset()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """As in a user's process; tests freeze what they begin with."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_the_collector_looks_at_what_is_made_inside_alone_and_at_all_before_and_afterwards() -> None:
    gone, held = weakref.ref(_Cycle()), [_Cycle()]
    old = weakref.ref(held[0])
    with pytest.raises(KeyError), only_new_garbage():
        assert gone() is None
        held.clear()
        new = weakref.ref(_Cycle())
        gc.collect()
        assert new() is None and old() is not None
        raise KeyError
    assert not gc.get_freeze_count()
    gc.collect()
    assert old() is None


@pytest.mark.usefixtures("nothing_left")
def test_what_others_froze_stays_so() -> None:
    frozen = gc.get_freeze_count()
    made: list[list[int]] = [[] for _ in range(10_000)]  # which would be frozen, too
    with only_new_garbage():
        # Some may have gone: other threads let go of what they had.
        assert 0 < gc.get_freeze_count() <= frozen
    assert 0 < gc.get_freeze_count() <= frozen
    del made


def _gone() -> bool:
    torch._dynamo.reset()
    gc.collect()
    return not list(BODIES)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_reset_frees_bodies_but_not_those_of_passes_to_come(inner: str) -> None:
    model, batch = ToyLM(layers=1), token_batch(1, 48)
    loss, logits = model(**batch)
    (loss + logits.square().mean()).backward()
    truth = gradients(model)
    compiled = compile_mst(model, {**SMALL_CHUNKS, "inner": inner})
    for _ in range(2 if inner == "eager" else 1):
        model.zero_grad()
        loss, logits = compiled(**batch)
        total = loss + logits.square().mean()
        bodies = [weakref.ref(body) for body in BODIES]
        assert len(bodies) == 2
        assert not _gone(), "there is a backward pass to come"
        total.backward()
        assert worst_error(gradients(model), truth) <= _BAR
        del loss, logits, total
        assert _gone() and not any(body() for body in bodies)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_one_output_of_a_forgotten_graph_is_enough() -> None:
    model = _Small()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y = model.mlp(x)
        return y, y[:, -1], y.sum(-1), x.detach().sin()

    x = torch.randn(1, 40, 8, dtype=torch.float64)
    for index in range(3):
        truth = torch.autograd.grad(run(x)[index].sum(), list(model.parameters()))
        found = compile_mst(run)(x)[index]
        assert not _gone()
        pairs = zip(torch.autograd.grad(found.sum(), list(model.parameters())), truth, strict=True)
        assert all(torch.allclose(f, t, rtol=_BAR) for f, t in pairs)
        del found, pairs
        assert _gone()


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_rewritten_modules_keep_their_bodies() -> None:
    model, x = _Small(), torch.randn(1, 40, 8, dtype=torch.float64, requires_grad=True)
    truth = model(x)[0]
    new, report = mst_fx.rewrite(fx.symbolic_trace(model), [x], SMALL_CHUNKS)
    assert len(report.rewrites) == 1
    copied = copy.deepcopy(new)
    (body,) = new.meta["mst_fx"]
    assert pickle.loads(pickle.dumps(body)) is body  # as modules are
    code = make_fx(new)(x)  # nothing but its keys are left of the rewritten module
    del new, body
    gc.collect()
    assert torch.allclose(code(x)[0], truth, rtol=_BAR)
    assert not _gone()
    loss = copied(x)[0]
    assert torch.allclose(loss, truth, rtol=_BAR)
    del copied
    assert not _gone(), "there is a backward pass to come"
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.allclose(grad, torch.autograd.grad(truth, x)[0], rtol=_BAR)
    del loss
    assert _gone()
    with pytest.raises(RuntimeError, match="no body"):
        code(x)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_compiled_function_that_is_alive_works_on() -> None:
    """Dynamo forgets it; whoever called the backend himself has it still."""
    model, x = _Small(), torch.randn(1, 40, 8, dtype=torch.float64)
    compiled = mst(fx.symbolic_trace(model), [x], options=SMALL_CHUNKS)
    truth = model(x)[0]
    assert not _gone()
    assert torch.allclose(compiled(x)[0], truth, rtol=_BAR)
    del compiled
    assert _gone()
