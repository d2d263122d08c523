"""Graphs that lie in wait: each is either right or refused with the true reason, never wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx.errors import Cause
from tests.direct import DIRECT, check
from tests.helpers import (
    SMALL_CHUNKS,
    GatedMLP,
    ToyLM,
    check_parity,
    compile_mst,
    kinds,
    relative_error,
    report_of,
    token_batch,
)

_F64 = torch.float64


@torch.library.custom_op("hostile::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: grad * 2)


class Hostile(nn.Module):
    """A pre-norm MLP with ``mid`` between its activation and its second matmul."""

    def __init__(self, mid: Callable[[Hostile, Tensor], Tensor], width: int = 16, inner: int = 48) -> None:
        super().__init__()
        self.norm, self.mid = nn.LayerNorm(width), mid
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.extra = nn.Parameter(torch.randn(inner, inner) * 0.1)
        self.batch_norm = nn.BatchNorm1d(inner)
        self.conv = nn.Conv1d(inner, inner, 3, padding=1)
        self.register_buffer("counter", torch.ones(inner))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.mid(self, F.gelu(self.up(self.norm(x)))))


@dataclasses.dataclass(frozen=True)
class Case:
    """What stands inside an MLP, and what must come of it.

    Attributes:
        reason: what every refusal's text must hold; "" where a rewrite must be made.
        fires_alone: it mixes nothing when there is only one sequence in the batch.
    """

    mid: Callable[[Hostile, Tensor], Tensor]
    reason: str = ""
    fires_alone: bool = False


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]


ROWWISE = {
    "nothing": lambda m, x: x,
    "cumsum_features": lambda m, x: x.cumsum(-1),
    "softmax_features": lambda m, x: x.softmax(-1),
    "sort_features": lambda m, x: x.sort(-1).values,
    "computed_weight": lambda m, x: x @ (m.extra @ m.extra.t()).tanh(),
    "in_place": lambda m, x: x.__iadd__(1.0),
    "in_place_on_a_copy": lambda m, x: x.clone().mul_(2.0).add_(1.0),
    "dropout_0": lambda m, x: F.dropout(x, 0.0, True),
    "dropout_off": lambda m, x: F.dropout(x, 0.5, False),
    "einsum": lambda m, x: torch.einsum("bsi,ij->bsj", x, m.extra),
    "heads": lambda m, x: x.view(*x.shape[:2], 4, 12).softmax(-1).flatten(2),
    "chunk_and_cat": lambda m, x: torch.cat([part * 2 for part in x.chunk(2, -1)], -1),
    "feature_norm": lambda m, x: x / x.norm(dim=-1, keepdim=True),
}

MIXING = {
    "custom_op": Case(lambda m, x: torch.ops.hostile.twice(x), "hostile.twice"),
    "cumsum": Case(lambda m, x: x.cumsum(1), "cumsum"),
    "softmax": Case(lambda m, x: x.softmax(1), "softmax"),
    "convolution": Case(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), "conv1d"),
    "batch_norm": Case(lambda m, x: m.batch_norm(x.flatten(0, 1)).view(x.shape), "batch_norm"),
    "group_norm": Case(lambda m, x: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2), "group_norm"),
    "flip": Case(lambda m, x: x.flip(1), "flip"),
    # The batch folds into the rows: a size of 1 stands where it was, and nothing may work along it.
    "flip_batch": Case(lambda m, x: x.flip(0), "flip"),
    "cumsum_batch": Case(lambda m, x: x.cumsum(0), "cumsum"),
    "softmax_batch": Case(lambda m, x: x.softmax(0), "softmax"),
    "roll_batch": Case(lambda m, x: x.roll(1, 0), "roll"),
    "sort_batch": Case(lambda m, x: x.sort(0).values, "sort"),
    "normalize_batch": Case(lambda m, x: F.normalize(x, dim=0), "normalize"),
    "pad_batch": Case(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, -1)), "pad"),
    "roll": Case(lambda m, x: x.roll(1, 1), "roll"),
    "shift": Case(lambda m, x: F.pad(x, (0, 0, 1, 0))[:, :-1], "pad"),
    "mean": Case(lambda m, x: x - x.mean(1, keepdim=True), "mean"),
    "max": Case(lambda m, x: x - x.max(dim=1, keepdim=True).values, "max"),
    "sort": Case(lambda m, x: x.sort(1).values, "sort"),
    "gram": Case(lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x, "matmul"),
    "row_index": Case(lambda m, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)], "index"),
    "global_norm": Case(lambda m, x: x / x.norm(), "norm"),
    "first_token": Case(lambda m, x: x + x[:, :1], "slice"),
    "reshape_and_cumsum": Case(
        lambda m, x: x.reshape(x.shape[0], -1, 24).cumsum(1).reshape(x.shape), "reshape"
    ),
    "swap_batch_and_length": Case(lambda m, x: x.transpose(0, 1).reshape(x.shape), "transpose", True),
    "positions": Case(lambda m, x: x * _positions(x), "mul", True),
    "sequence_numbers": Case(
        lambda m, x: x * torch.arange(x.shape[0], dtype=x.dtype)[:, None, None], "mul", True
    ),
    "random": Case(lambda m, x: x * (torch.rand_like(x) < 0.5), "rand_like"),
}


def _input(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=_F64, requires_grad=True)


@pytest.mark.parametrize("name", ROWWISE)
def test_row_wise_inside_is_rewritten(name: str) -> None:
    report = check(Hostile(ROWWISE[name]), [_input(3, 20, 16)])
    assert kinds(report) == {"mlp": 1} and not report.refusals


@pytest.mark.parametrize("shape", [(3, 20, 16), (1, 48, 16)], ids=["batch", "alone"])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_inside_is_refused(name: str, shape: tuple[int, ...]) -> None:
    case, model, x = MIXING[name], Hostile(MIXING[name].mid), _input(*shape)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def seeded(x: Tensor) -> Tensor:  # random numbers agree where the same are drawn
        torch.manual_seed(5)
        return model(x)

    report = check(seeded if name == "random" else model, [x], module=model)
    assert name == "batch_norm" or all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    if case.fires_alone and shape[0] == 1:
        assert kinds(report) == {"mlp": 1}
    else:
        assert not report.rewrites
        assert report.refusals and all(case.reason in refused.reason for refused in report.refusals)


@pytest.mark.slow
def test_square_batches_do_not_confuse_dimensions() -> None:
    """B = S = H: sizes that are equal say nothing about what lies along them."""
    for case in (MIXING["swap_batch_and_length"], MIXING["positions"], MIXING["gram"], MIXING["mean"]):
        assert not check(Hostile(case.mid), [_input(16, 16, 16)]).rewrites
    assert check(Hostile(ROWWISE["nothing"]), [_input(16, 16, 16)]).rewrites


def test_mean_over_everything() -> None:
    assert not check(Hostile(lambda m, x: x - x.mean()), [_input(3, 20, 16)]).rewrites


def test_spread_over_the_batch() -> None:
    """``std`` over the batch mixes rows; with one sequence it is NaN, as in eager."""
    spread = Hostile(lambda m, x: x / x.std(dim=0, keepdim=True).add(1))
    assert not check(spread, [_input(3, 20, 16)]).rewrites
    x = _input(1, 48, 16)
    assert spread(x).isnan().all() and compile_mst(spread, DIRECT)(x).isnan().all()


class Leaking(Hostile):
    """Returns what is inside the MLP too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        wide = F.gelu(self.up(self.norm(x)))
        return x + self.down(wide), wide


def test_output_from_the_middle() -> None:
    report = check(Leaking(ROWWISE["nothing"]), [_input(3, 20, 16)])
    assert not report.rewrites


class FromWeights(nn.Module):
    """An MLP whose matrices are computed in the graph, LoRA merged on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(48, 16)), nn.Parameter(torch.randn(16, 48))
        self.a, self.b = nn.Parameter(torch.randn(48, 2)), nn.Parameter(torch.randn(2, 16))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        up = self.up + self.a @ self.b
        return x + F.linear(torch.relu(F.linear(x, up)), F.normalize(self.down))


def test_weights_computed_in_the_graph() -> None:
    assert kinds(check(FromWeights(), [_input(3, 20, 16)])) == {"mlp": 1}


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "broadcast_rows"])
def test_strides(kind: str) -> None:
    base = {
        "transposed": lambda: _input(20, 3, 16),
        "sliced": lambda: _input(3, 40, 32),
        "expanded": lambda: _input(1, 20, 16),
        "broadcast_rows": lambda: _input(3, 1, 16),
    }[kind]()
    view = {
        "transposed": lambda x: x.transpose(0, 1),
        "sliced": lambda x: x[:, ::2, 3:19],
        "expanded": lambda x: x.expand(3, 20, 16),
        "broadcast_rows": lambda x: x.expand(3, 20, 16),
    }[kind]
    model = Hostile(ROWWISE["nothing"])
    report = check(lambda x: model(view(x)), [base], module=model)  # the view is in the graph
    assert kinds(report) == {"mlp": 1}
    given = view(base.detach())  # and it is an input
    assert kinds(check(model, [given])) == {"mlp": 1}


def _count_up(model: Hostile, x: Tensor) -> Tensor:
    model.counter.add_(1)  # type: ignore[operator]
    return x * model.counter  # type: ignore[operator]


def test_mutated_buffer() -> None:
    """Refused. AOTAutograd alone differentiates this differently from eager: it is the measure here."""
    model, x = Hostile(_count_up), _input(3, 20, 16)

    def run(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.counter.fill_(1.0)  # type: ignore[operator]
        out = fn(x)
        grads = torch.autograd.grad(out.square().sum(), [x, model.up.weight])
        return [out.detach(), model.counter.clone(), *grads]  # type: ignore[operator]

    eager = run(model)
    plain = run(torch.compile(model, backend="aot_eager"))
    found = run(compile_mst(model, DIRECT))
    assert all(relative_error(f, t) <= 1e-9 for f, t in zip(found[:2], eager[:2], strict=True))
    assert all(relative_error(f, t) <= 1e-9 for f, t in zip(found, plain, strict=True))
    report = mst_fx.explain(model, DIRECT)(x)
    assert not report.rewrites
    assert ["in place" in refused.reason for refused in report.refusals] == [True]


@pytest.mark.parametrize("shape", [(0, 20, 16), (3, 0, 16)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    model, x = Hostile(ROWWISE["nothing"]), _input(*shape)
    out = compile_mst(model, DIRECT)(x)
    assert out.shape == shape
    out.sum().backward()
    assert model.up.weight.grad is not None and not model.up.weight.grad.any()


def test_rows_that_vanish_after_compilation() -> None:
    """Compiled for any length, then called with an empty batch."""
    model = Hostile(ROWWISE["nothing"])
    compiled = compile_mst(model, DIRECT, dynamic=True)
    for rows in (5, 4, 0):
        x = _input(rows, 8, 16)
        out = compiled(x)
        assert relative_error(out, model(x)) <= 1e-9
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


def test_strict_raises() -> None:
    model = Hostile(MIXING["cumsum"].mid)
    compiled = compile_mst(model, {**DIRECT, "strict": True})
    with pytest.raises(Exception, match="cumsum") as caught:
        compiled(_input(3, 20, 16))
    chain: list[BaseException | None] = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(error, mst_fx.Refusal) for error in chain)


def test_strict_rewrite_raises() -> None:
    gm = torch.fx.symbolic_trace(Hostile(MIXING["cumsum"].mid))
    with pytest.raises(mst_fx.Refusal, match="cumsum"):
        mst_fx.rewrite(gm, [_input(3, 20, 16)], {**DIRECT, "strict": True})


@pytest.mark.slow
def test_a_failure_while_deferring_leaves_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    model, batch = ToyLM(), token_batch(2, 33)
    monkeypatch.setattr("mst_fx.logits.take_out._take_out", fail)
    report = report_of(model, SMALL_CHUNKS, **batch)
    assert not report.rewrites
    assert [refused.reason for refused in report.refusals] == ["RuntimeError: a defect"]
    check_parity(model, batch, 1e-10, 1e-9)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_weight() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = Hostile(ROWWISE["nothing"])
    truth = [model(x := _input(3, 20, 16)).detach()]
    with torch.no_grad():
        for linear in (model.up, model.down):
            for key, parameter in list(linear.named_parameters()):
                setattr(linear, key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
    distribute_module(model, mesh)  # the rest is replicated
    placed = DTensor.from_local(x.detach(), mesh, [Replicate()])
    report = mst_fx.explain(model, DIRECT)(placed)
    assert not report.rewrites
    found = compile_mst(model, DIRECT)(placed).full_tensor()
    assert relative_error(found, truth[0]) <= 1e-9


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_refusals_of_distributed_weights() -> None:
    """Places that would be loops, by name, once each; not the widening projection into attention."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1,))
    model, inputs = ToyLM(layers=1), token_batch(2, 33)
    plan: dict[str, Any] = {
        "blocks.0.attention.qkv": ColwiseParallel(),
        "blocks.0.mlp.gate": ColwiseParallel(),
        "blocks.0.mlp.up": ColwiseParallel(),
        "blocks.0.mlp.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    report = mst_fx.explain(model, DIRECT)(**inputs)
    assert not report.rewrites
    assert sorted((r.kind, r.name, r.cause) for r in report.refusals) == [
        ("mlp", "blocks.0.mlp", Cause.NOT_PLAIN),
        ("vocab", "head", Cause.NOT_PLAIN),
    ]
    assert all("is a DTensor" in r.reason for r in report.refusals)
    torch._dynamo.reset()
    report = mst_fx.explain(model, {**DIRECT, "chunk_rows": 100, "vocab_chunk_rows": 100})(**inputs)
    assert not report.refusals  # one chunk: there is nothing to save


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # type: ignore[untyped-decorator]
def test_rows_that_data_pick() -> None:
    """How many there are is known when the step runs: that MLP is refused by name, and the one before it chunked."""

    class Picking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GatedMLP(16, 48).to(_F64), GatedMLP(16, 48).to(_F64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.first(x)
            return x, self.second(x[x[..., 0] > 0]).sum()

    report = check(Picking(), [_input(2, 40, 16)])
    assert kinds(report) == {"mlp": 1}
    assert {(r.name, r.reason.split(") ")[1]) for r in report.refusals} == {
        ("second.gate", "has as many rows as its data say"),
        ("second.up", "has as many rows as its data say"),
    }
