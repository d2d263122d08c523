"""Dropout inside of MLPs: masks that chunks, recomputation and checkpointing agree on, and that are random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import mst_fx
from mst_fx import chunk_rows
from mst_fx.ops.dropout import dropout_rows, mixed, row_keys
from tests.direct import results, rewritten, worst
from tests.helpers import compile_mst, kinds, report_of

_F64 = torch.float64
_ALL = 2**32


# The hash


def _reference(x: int) -> int:
    """lowbias32 in unsigned arithmetic, as its author writes it in C, without its last step."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % _ALL
    return ((x ^ (x >> 15)) * 0x846CA68B) % _ALL


@given(st.integers(0, _ALL - 1))
@settings(deadline=None)
def test_the_hash_is_that_of_its_author(x: int) -> None:
    assert mixed(torch.tensor(x)).item() == _reference(x)


def test_the_hash_at_its_ends() -> None:
    ends = [0, 1, _ALL - 1, _ALL - 2, 2**31, 2**31 - 1]
    assert mixed(torch.tensor(ends)).tolist() == [_reference(x) for x in ends]


_CPU = torch.device("cpu")


def _kept(keys: Tensor, width: int, p: float) -> Tensor:
    return dropout_rows(torch.ones(len(keys), width), keys, p) != 0


def test_keys_of_rows() -> None:
    """In range, all different, and others with each draw."""
    torch.manual_seed(0)
    first, second = row_keys([300, 400], _CPU), row_keys([300, 400], _CPU)
    assert first.shape == (300, 400) and first.dtype == torch.int64
    assert len(torch.cat([first, second]).unique()) == 240_000
    high = first >> 32
    assert int(high.max()) < 2**30 and bool((high % 2 == 1).all()) and int(first.min()) > 0


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_asked(p: float) -> None:
    """In all, by row and by column: each within 6 standard deviations (5 million elements)."""
    torch.manual_seed(0)
    dropped = ~_kept(row_keys([5000], _CPU), 1000, p)
    assert abs(float(dropped.double().mean()) - p) <= 6 * (p * (1 - p) / dropped.numel()) ** 0.5
    for dim, count in ((0, 5000), (1, 1000)):
        shares = dropped.double().mean(dim)
        spread = (p * (1 - p) / count) ** 0.5
        assert float((shares - p).abs().max()) <= 6 * spread + 2 / count
        assert 0.8 * spread <= float(shares.std()) <= 1.2 * spread  # neither clumped nor evened out


def test_elements_are_independent() -> None:
    """Of those some rows or columns further, and of the next draw's: half agree, within 6 standard deviations."""
    torch.manual_seed(0)
    kept = _kept(row_keys([4096], _CPU), 1024, 0.5)
    others = {
        **{f"{rows} rows": kept.roll(rows, 0) for rows in (1, 2, 3, 64, 1024, 2048)},
        **{f"{columns} columns": kept.roll(columns, 1) for columns in (1, 2, 3, 64, 256, 512)},
        "both": kept.roll((1, 1), (0, 1)),
        "another draw": _kept(row_keys([4096], _CPU), 1024, 0.5),
    }
    for name, other in others.items():
        agree = float((kept == other).double().mean())
        assert abs(agree - 0.5) <= 6 * 0.5 / kept.numel() ** 0.5, name
    # The number of pairs of neighbouring rows that agree more than chance allows, and of columns.
    for dim in (0, 1):
        alike = (kept == kept.roll(1, 1 - dim)).double().mean(dim)
        assert float((alike - 0.5).abs().max()) <= 6 * 0.5 / kept.shape[dim] ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, _F64])
def test_what_is_kept_is_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 40, dtype=dtype)
    found = dropout_rows(x, row_keys([300], _CPU), 0.25)
    kept = found != 0
    assert found.dtype == dtype and kept.sum() > 1000
    error = (found.double() - x.double() / 0.75)[kept].abs() / x.double()[kept].abs()
    assert float(error.max()) <= torch.finfo(dtype).eps * (0.75 if dtype.itemsize == 2 else 1.5)


# In loops


class Dropping(nn.Module):
    """A gated MLP with dropout on its input, inside of it, and on its output, as adapters and GPT-2 have it."""

    def __init__(self, drop: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 48, dtype=_F64), nn.Linear(16, 48, dtype=_F64)
        self.down, self.drop = nn.Linear(48, 16, dtype=_F64), drop

    def forward(self, x: Tensor) -> Tensor:
        inside = F.silu(self.gate(self.drop(0, x))) * self.up(x)
        return x + self.drop(2, self.down(self.drop(1, inside)))


_P = (0.1, 0.5, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 20, 16), (1, 48, 16), (41, 16)], ids=["batch", "alone", "flat"])
def test_masks_are_those_of_the_keys(shape: tuple[int, ...]) -> None:
    """Values and gradients are those of eager with the masks that the drawn keys stand for."""
    torch.manual_seed(1)
    model = Dropping(lambda site, x: F.dropout(x, _P[site]))
    x = torch.randn(*shape, dtype=_F64, requires_grad=True)
    run, report = rewritten(model)
    run(x)  # captures
    torch.manual_seed(7)
    found = results(run, [x], model)
    torch.manual_seed(7)
    keys = [row_keys(x.shape[:-1], _CPU) for _ in _P]
    model.drop = lambda site, x: dropout_rows(x, keys[site], _P[site])
    truth = results(model, [x], model)
    assert kinds(report) == {"mlp": 1} and not report.refusals
    assert worst(found, truth) <= 1e-12


def _linear_in(weight: Tensor, loss: Tensor) -> float:
    """|<weight, gradient> - loss| / |loss|, which is 0 for a loss that is linear in the weight (Euler)."""
    assert weight.grad is not None
    return float(abs((weight.detach() * weight.grad).sum() - loss.detach()) / abs(loss.detach()))


class Linear(nn.Module):
    """An MLP without an activation: linear in each of its weights and in its input, whatever is dropped."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(16, 48, bias=False, dtype=_F64) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(48, 16, bias=False, dtype=_F64) for _ in range(layers))
        self.checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):

            def layer(x: Tensor, up: Any = up, down: Any = down) -> Tensor:
                return down(F.dropout(up(F.dropout(x, 0.2)), 0.4))

            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_recomputation_drops_the_same(inner: str, checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass recomputes with other chunks than the forward pass had: 8 rows, not 16."""
    monkeypatch.setitem(chunk_rows._LEAST_ROWS, "cpu", 8)
    torch.manual_seed(2)
    model = Linear(2)
    model.checkpoint = checkpoint
    options = {"inner": inner}
    x = torch.randn(3, 20, 16, dtype=_F64, requires_grad=True)
    compiled = compile_mst(model, options)
    weights = torch.randn(3, 20, 16, dtype=_F64)
    losses = []
    with mst_fx.watch() as report:
        for seed in (1, 2, 1):
            model.zero_grad()
            x.grad = None
            torch.manual_seed(seed)
            loss = (compiled(x) * weights).sum()
            loss.backward()
            losses.append(loss.item())
            for tensor in (x, *model.parameters()):
                assert _linear_in(tensor, loss) <= 1e-12
    assert kinds(report) == {"mlp": 2}
    assert report.rewrites[0].why == "d_model = 16 rows; 8 in the backward pass"
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.slow
def test_masks_are_stored_nowhere() -> None:
    """Of what decides them, Inductor's code holds what was drawn and the keys of the rows, and nothing by chunk."""
    torch.manual_seed(0)
    base, down = torch.randn(48, 16), torch.randn(16, 48)
    adapters = [torch.randn(*shape, requires_grad=True) for shape in ((4, 16), (48, 4), (4, 48), (16, 4))]

    def adapted(x: Tensor) -> Tensor:
        a, b, c, d = adapters
        inside = F.silu(F.linear(x, base) + F.linear(F.linear(F.dropout(x, 0.1), a), b))
        return x + F.linear(inside, down) + F.linear(F.linear(F.dropout(inside, 0.1), c), d)

    x = torch.randn(1, 60, 16, requires_grad=True)
    compiled = compile_mst(adapted, {"chunk_rows": 20})
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: torch.autograd.grad(compiled(x).sum(), [x, *adapters]))
    lines = [line for code in codes for line in code.splitlines() if "= empty_strided_cpu((" in line]
    assert len(lines) > 10
    whole = [line for line in lines if "torch.float32" not in line]
    assert len(whole) >= 2 and all("((1, 60)" in line or "((2, )" in line for line in whole), whole  # 60 rows


def test_dynamic_shapes() -> None:
    model = Linear(1)
    compiled = compile_mst(model, {"inner": "aot_eager", "chunk_rows": 10}, dynamic=True)
    with mst_fx.watch() as report:
        for length in (20, 33):
            x = torch.randn(3, length, 16, dtype=_F64, requires_grad=True)
            model.zero_grad()
            loss = compiled(x).sum()
            loss.backward()
            assert _linear_in(x, loss) <= 1e-12 and _linear_in(model.ups[0].weight, loss) <= 1e-12  # type: ignore[arg-type]
    assert kinds(report) == {"mlp": 1}


class Between(nn.Module):
    """An MLP with something between its activation and its second matmul."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(16, 48), nn.Linear(48, 16), drop

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.drop(F.relu(self.up(x))))
        return found


def test_off_when_not_training() -> None:
    model, x = Between(nn.Dropout(0.5)).eval(), torch.randn(2, 20, 16)
    compiled = compile_mst(model)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    model.train()
    assert not torch.allclose(compiled(x), compiled(x))


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: F.dropout(x, 1.0),
        lambda x: F.dropout(x.clone(), 0.5, True, True),
        lambda x: F.dropout1d(x, 0.5),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: x * (torch.rand_like(x) < 0.5),
    ],
    ids=["everything", "in-place", "channels", "alpha", "rand_like"],
)
def test_other_random_numbers_are_refused(drop: Callable[[Tensor], Tensor]) -> None:
    report = report_of(Between(drop), None, torch.randn(2, 20, 16))
    assert not report.rewrites and report.refusals


def test_dropout_elsewhere_stays() -> None:
    """Before attention, and of its scores: torch's own, as in the user's graph. The loop takes the other two."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.1)
            scores = F.dropout((x @ x.transpose(1, 2)).softmax(-1), 0.1)
            x = x + F.dropout(scores @ x, 0.1)
            x = x + F.dropout(self.down(F.relu(self.up(x))), 0.1)
            return x.cumsum(1)

    gms: list[torch.fx.GraphModule] = []
    x = torch.randn(2, 20, 16)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        gms.append(mst_fx.rewrite(gm, inputs, {"inner": "aot_eager", "chunk_rows": 16})[0])
        return gms[-1]

    torch._dynamo.reset()
    torch.compile(Model(), backend=backend)(x)
    targets = [node.target for node in gms[0].graph.nodes]
    assert targets.count(F.dropout) == 2 and targets.count(torch.ops.mst_fx.loop.default) == 1
    assert targets.count(row_keys) == 2 and dropout_rows not in targets
