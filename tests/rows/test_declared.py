"""Operators that somebody declared row-wise: what is taken on trust, what is proved, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx.declared import DECLARED
from mst_fx.errors import Refusal
from mst_fx.rows.labels import Row
from mst_fx.rows.tracer import RowTracer
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.symbolic_rows import symbolic_rows
from tests.helpers import compile_mst, forget_gradients, kinds, relative_error, warm_peak
from tools.meters.cpu import call_metered, is_available

_OPTIONS = {"inner": "eager", "chunk_rows": 16}
_HIDDEN, _WIDE = 16, 64


def _unpacked(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K / 2] bytes, and a scale a row → [N, K]."""
    digits = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return (digits.to(dtype) - 8) * absmax.to(dtype)


@torch.library.custom_op("test_declared::linear4bit", mutates_args=())
def _linear4bit(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    return x @ _unpacked(packed, absmax, x.dtype).t()


@_linear4bit.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("test_declared::linear4bit_backward", mutates_args=())
def _linear4bit_backward(grad: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    return grad @ _unpacked(packed, absmax, grad.dtype)


@_linear4bit_backward.register_fake
def _(grad: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], 2 * packed.shape[1]))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


_linear4bit.register_autograd(
    lambda ctx, grad: (_linear4bit_backward(grad, *ctx.saved_tensors), None, None), setup_context=_save
)


class _Linear4bit(nn.Module):
    """A frozen weight of 4 bits, and LoRA beside it, as QLoRA has them."""

    packed: Tensor
    absmax: Tensor

    def __init__(self, narrow: int, wide: int, rank: int = 2) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 256, (wide, narrow // 2), dtype=torch.uint8))
        self.register_buffer("absmax", torch.rand(wide, 1) / 8 + 0.01)
        self.lora_a, self.lora_b = nn.Linear(narrow, rank, bias=False), nn.Linear(rank, wide, bias=False)
        self.is_opaque = True

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.packed, self.absmax)
        base = _linear4bit(x, *weight) if self.is_opaque else F.linear(x, _unpacked(*weight, x.dtype))
        return base + self.lora_b(self.lora_a(x))


class _MLP(nn.Module):
    def __init__(self, hidden: int = _HIDDEN, wide: int = _WIDE) -> None:
        super().__init__()
        self.gate, self.up = _Linear4bit(hidden, wide), _Linear4bit(hidden, wide)
        self.down = _Linear4bit(wide, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def nothing_declared() -> Iterator[None]:
    DECLARED.reset()
    yield
    DECLARED.reset()


def _rows(*lead: int) -> Tensor:
    return torch.randn(*lead, _HIDDEN, dtype=torch.float64, requires_grad=True)


def _step(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> list[Tensor]:
    """A loss, and the gradients of x and of what is trained."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    loss = run(x).square().sum()
    loss.backward()
    assert x.grad is not None
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def _report(model: nn.Module, x: Tensor) -> mst_fx.Diagnosis:
    """Compiles and steps; the numbers must be those of the same model with weights unpacked in plain sight."""
    with mst_fx.watch() as report:
        found = _step(compile_mst(model, _OPTIONS), x, model)
    for part in model.modules():
        if isinstance(part, _Linear4bit):
            part.is_opaque = False
    truth = _step(model, x, model)
    assert len(found) == len(truth) > 2
    assert max(map(relative_error, found, truth)) < 1e-10
    return report


def _declare_both() -> None:
    mst_fx.declare_row_wise(torch.ops.test_declared.linear4bit, row_args="x")
    mst_fx.declare_row_wise(_linear4bit_backward, row_args="grad")


@pytest.mark.parametrize("lead", [(3, 35), (70,)])
def test_declared(lead: tuple[int, ...]) -> None:
    _declare_both()
    report = _report(_MLP().double(), _rows(*lead))
    assert kinds(report) == {"mlp": 1} and not report.refusals
    (body,) = report.bodies.values()
    assert body.count("test_declared.linear4bit.default") == 3


@pytest.mark.slow
def test_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_OPTIONS, "inner", "inductor")
    _declare_both()
    assert kinds(_report(_MLP().double(), _rows(3, 35))) == {"mlp": 1}


def test_is_a_product_without_adapters() -> None:
    """The operator alone says where the bulge begins."""
    _declare_both()
    model, x = _Bare(_MLP().double()), _rows(3, 35)
    with mst_fx.watch() as report:
        compile_mst(model, _OPTIONS)(x).square().sum().backward()
    assert kinds(report) == {"mlp": 1} and not report.refusals
    found, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert found is not None and x.grad is not None and relative_error(found, x.grad) < 1e-10


class _Bare(nn.Module):
    def __init__(self, mlp: _MLP) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = ((part.packed, part.absmax) for part in (self.mlp.gate, self.mlp.up, self.mlp.down))
        return x + _linear4bit(F.silu(_linear4bit(x, *gate)) * _linear4bit(x, *up), *down)


def test_not_declared() -> None:
    report = _report(_MLP().double(), _rows(3, 35))
    assert not report.rewrites
    assert {r.name for r in report.refusals} == {"gate", "up"}
    for refusal in report.refusals:
        assert "test_declared.linear4bit.default has no row-wise rule" in refusal.reason
        assert "mst_fx.declare_row_wise" in refusal.reason


def test_only_forward_declared() -> None:
    """The backward is proved, not trusted: its operator has to be declared, too."""
    mst_fx.declare_row_wise(_linear4bit, row_args="x")
    report = _report(_MLP().double(), _rows(3, 35))
    assert not report.rewrites
    assert all(
        "in the gradient of test_declared.linear4bit.default: test_declared.linear4bit_backward.default has no row-wise rule"
        in refusal.reason
        for refusal in report.refusals
    )


def test_no_gradient_needs_no_proof() -> None:
    """In inference the forward operator is all that is run."""
    mst_fx.declare_row_wise(_linear4bit, row_args="x")
    model, x = _MLP().double().requires_grad_(False), _rows(3, 35).detach()
    with mst_fx.watch() as report, torch.no_grad():
        found = compile_mst(model, _OPTIONS)(x)
    assert kinds(report) == {"mlp": 1}
    assert relative_error(found, model(x)) < 1e-10


# One operator, of which each test says in its own way what it does: x [*, K], w [N, K] → [*, N].


@torch.library.custom_op("test_declared::product", mutates_args=())
def _product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


@_product.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


_Backward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def _by_rows(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ w, grad.flatten(0, -2).t() @ x.flatten(0, -2)


_BACKWARD: dict[str, _Backward] = {"": _by_rows}


def _run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return _BACKWARD[""](grad, *ctx.saved_tensors)


def _save_all(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output)


_product.register_autograd(_run_backward, setup_context=_save_all)


class _Trained(nn.Module):
    """Weights that get gradients."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(wide, _HIDDEN, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(_HIDDEN, wide, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return _product(F.silu(_product(x, self.up)), self.down)


def _of_trained(monkeypatch: pytest.MonkeyPatch, backward: _Backward) -> mst_fx.Diagnosis:
    """A step's report; the numbers are eager's, whose backward is the same."""
    monkeypatch.setitem(_BACKWARD, "", backward)
    torch.manual_seed(0)
    mst_fx.declare_row_wise(_product, row_args="x")
    # Of another width each time: what was compiled with another backward is another body's.
    model, x = _Trained(_WIDE + 8 * _BACKWARDS.index(backward)), _rows(2, 40)
    with mst_fx.watch() as report:
        found = _step(compile_mst(model, _OPTIONS), x, model)
    truth = _step(model, x, model)
    assert len(found) == len(truth) == 4
    assert max(map(relative_error, found, truth)) < 1e-10
    return report


def _scaled_by_largest(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return _by_rows(grad / grad.abs().amax(), x, w, out)


def _mean_of_rows(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return _by_rows(grad / x[..., 0].numel(), x, w, out)


def _mean_by_tensor(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return _by_rows(grad / torch.ones(grad.shape[:-1], dtype=grad.dtype).sum(), x, w, out)


def _as_many_rows(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    factor = 2 if x[..., 0].numel() > 20 else 1
    return grad @ w * factor, _by_rows(grad, x, w, out)[1]


def _from_other_rows(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ w + x.cumsum(-2), _by_rows(grad, x, w, out)[1]


def _saved_result(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return (grad + out) @ w, _by_rows(grad, x, w, out)[1]


def _saved_result_mixed(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return (grad + out.sum(-2, keepdim=True)) @ w, _by_rows(grad, x, w, out)[1]


def _of_nothing(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ w, torch.ones_like(w)


_RIGHT: list[_Backward] = [_by_rows, _saved_result]
_WRONG: list[_Backward] = [
    *(_scaled_by_largest, _mean_of_rows, _mean_by_tensor, _as_many_rows),
    *(_from_other_rows, _saved_result_mixed, _of_nothing),
]
_BACKWARDS = [*_RIGHT, *_WRONG]


@pytest.mark.parametrize("backward", _RIGHT)
def test_gradients_are_proved(backward: _Backward, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _of_trained(monkeypatch, backward)
    assert kinds(report) == {"mlp": 1} and not report.refusals


@pytest.mark.parametrize("backward", _WRONG)
def test_gradients_of_other_rows(backward: _Backward, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward in which rows meet, or are counted, is refused, whatever was declared."""
    report = _of_trained(monkeypatch, backward)
    assert not report.rewrites
    assert any("gradient of test_declared.product.default" in r.reason for r in report.refusals)


def test_equal_nodes_with_gradients_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of one is not taken for the other: only one of them has a gradient, which is wrong by row."""
    monkeypatch.setitem(_BACKWARD, "", _scaled_by_largest)
    mst_fx.declare_row_wise(_product, row_args="x")
    up, down = torch.randn(48, _HIDDEN, dtype=torch.float64), torch.randn(_HIDDEN, 48, dtype=torch.float64)

    def twice(x: Tensor) -> Tensor:
        for each in (x.detach(), x):
            x = x + _product(F.silu(_product(each, up)), down)
        return x

    x = _rows(2, 40)
    with mst_fx.watch() as report:
        found = _step(compile_mst(twice, _OPTIONS), x, nn.Module())
    assert kinds(report) == {"mlp": 1} and report.refusals
    assert max(map(relative_error, found, _step(twice, x, nn.Module()))) < 1e-10


@torch.library.custom_op("test_declared::doubled", mutates_args=())
def _doubled(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([x @ w.t(), x @ w.t()])


@_doubled.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((2 * x.shape[0], *x.shape[1:-1], w.shape[0]))


@torch.library.custom_op("test_declared::mixed", mutates_args=())
def _mixed(x: Tensor, w: Tensor) -> Tensor:
    return (x / x.abs().amax()) @ w.t()


@_mixed.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def test_result_of_another_shape() -> None:
    mst_fx.declare_row_wise(_doubled, row_args="x")
    w = torch.randn(_WIDE, _HIDDEN, dtype=torch.float64)
    with mst_fx.watch() as report, torch.no_grad():
        compile_mst(lambda x: _doubled(x, w)[: x.shape[0]] @ w, _OPTIONS)(_rows(70))
    assert not report.rewrites
    assert any("was declared row-wise, and gives (2*" in r.reason for r in report.refusals), report.refusals


def test_rows_in_another_argument() -> None:
    """Rows that reach an argument of which it was not said."""
    mst_fx.declare_row_wise(_product, row_args="x")
    w = torch.randn(_WIDE, _HIDDEN, dtype=torch.float64)
    with mst_fx.watch() as report, torch.no_grad():
        compile_mst(lambda x: _product(w, x).t() @ w, _OPTIONS)(_rows(70))
    assert not report.rewrites


def _clipped(grad: Tensor, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return _by_rows(grad.clamp(-0.5, 0.5), x, w, out)


class _Head(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(words, _HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor, factor: float) -> Tensor:
        logits = _product(x, self.w)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * factor


@pytest.mark.parametrize("backward", [_by_rows, _clipped])
def test_head(backward: _Backward, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that somebody wrote need not be linear in the tangent: it is run with the one that comes."""
    monkeypatch.setitem(_BACKWARD, "", backward)
    mst_fx.declare_row_wise(_product, row_args="x")
    words = _WIDE if backward is _clipped else 2 * _WIDE  # another body
    model, x = _Head(words), _rows(2, 40)
    labels = torch.randint(0, _WIDE, (2, 40))
    options = {"inner": "eager", "vocab_chunk_rows": 16}

    def run(of: Any) -> list[Tensor]:
        return _step(lambda x: of(x, labels, 100.0), x, model)

    with mst_fx.watch() as report:
        found = run(compile_mst(model, options))
    assert kinds(report) == {"vocab": 1} and report.rewrites[0].gradient == "recompute"
    assert max(map(relative_error, found, run(model))) < 1e-10


# A backward operator that gives a sum, too: of a trained scale.


@torch.library.custom_op("test_declared::scaled", mutates_args=())
def _scaled(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return (x @ w.t()) * scale


@_scaled.register_fake
def _(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@torch.library.custom_op("test_declared::scaled_backward", mutates_args=())
def _scaled_backward(grad: Tensor, x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * scale) @ w, (grad * (x @ w.t())).flatten(0, -2).sum(0)


@_scaled_backward.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def _gradients_of_scaled(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    of_x, of_scale = _scaled_backward(grad, *ctx.saved_tensors)
    return of_x, None, of_scale


def _save_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


_scaled.register_autograd(_gradients_of_scaled, setup_context=_save_inputs)


class _Scaled(nn.Module):
    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(_WIDE, _HIDDEN, dtype=torch.float64))
        self.scale = nn.Parameter(torch.rand(_WIDE, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(_scaled(x, self.w, self.scale)) @ self.w


@pytest.mark.parametrize("sums", [1, ()])
def test_backward_that_gives_sums(sums: Any) -> None:
    mst_fx.declare_row_wise(_scaled, row_args="x")
    mst_fx.declare_row_wise(_scaled_backward, row_args=("grad", "x"), sums=sums)
    model, x = _Scaled(), _rows(2, 40)
    with mst_fx.watch() as report:
        found = _step(compile_mst(model, _OPTIONS), x, model)
    assert max(map(relative_error, found, _step(model, x, model))) < 1e-10
    if sums == ():  # not said: then the second result has no rows
        assert not report.rewrites and "was declared row-wise, and gives (64,)" in report.refusals[0].reason
    else:
        assert kinds(report) == {"mlp": 1}


# An operator that is given no rows, inside of a Function: what bitsandbytes does.


@torch.library.custom_op("test_declared::unpack", mutates_args=())
def _unpack(packed: Tensor, absmax: Tensor) -> Tensor:
    return _unpacked(packed, absmax, absmax.dtype)


@_unpack.register_fake
def _(packed: Tensor, absmax: Tensor) -> Tensor:
    return absmax.new_empty((packed.shape[0], 2 * packed.shape[1]))


_IS_VIEWED = {"": False}


class _Linear(torch.autograd.Function):
    """Writes to what it has unpacked, as bitsandbytes does; it may be that something else reads that, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        return F.linear(x, _unpack(packed, absmax))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = _unpack(*ctx.saved_tensors)
        other = weight.view(-1) if _IS_VIEWED[""] else None
        weight *= 2
        if other is not None:
            weight = other.view(weight.shape)
        return grad @ (weight / 2), None, None


@pytest.mark.parametrize(("is_said", "is_viewed"), [(True, False), (True, True), (False, False)])
def test_unpacks_inside_of_a_function(
    is_said: bool, is_viewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_IS_VIEWED, "", is_viewed)

    def forward(self: _Linear4bit, x: Tensor) -> Tensor:
        weight = (self.packed, self.absmax)
        base = _Linear.apply(x, *weight) if self.is_opaque else F.linear(x, _unpacked(*weight, x.dtype))
        return base + self.lora_b(self.lora_a(x))  # type: ignore[no-any-return]

    monkeypatch.setattr(_Linear4bit, "forward", forward)
    if is_said:
        mst_fx.declare_row_wise(_unpack, row_args=())
    model, x = _MLP().double(), _rows(3, 35)
    with mst_fx.watch() as report:
        found = _step(compile_mst(model, _OPTIONS), x, model)
    for part in model.children():
        part.is_opaque = False  # type: ignore[assignment]
    assert max(map(relative_error, found, _step(model, x, model))) < 1e-10
    assert kinds(report) == ({"mlp": 1} if is_said and not is_viewed else {})
    assert all("writes in place" in r.reason for r in report.refusals) or not is_viewed


def test_only_where_gradients_are_seen_to() -> None:
    """Experts and tokens that are cut among ranks are traced without the proof of its gradient."""
    mst_fx.declare_row_wise(_product, row_args="x")
    mode, n = symbolic_rows(())
    tracer = RowTracer(n)
    with torch.no_grad(), enable_python_dispatcher(), mode:
        x, w = torch.empty(n, _HIDDEN), torch.empty(_WIDE, _HIDDEN)
        tracer.set_label(x, Row(0))
        with tracer, pytest.raises(Refusal, match="does for MLPs and heads alone"):
            _product(x, w)


def _peaks(hidden: int, wide: int, rows: int) -> list[int]:
    """Bytes at the peak of a warm step, above what was there: of an operator that was not declared, and declared."""
    found = []
    for is_said in (False, True):
        if is_said:
            _declare_both()
        torch.compiler.reset()
        mlp = _MLP(hidden, wide)
        compiled = torch.compile(mlp, backend="mst", options={"inner": "aot_eager", "chunk_rows": 128})
        x = torch.randn(1, rows, hidden, requires_grad=True)
        found.append(
            warm_peak(
                lambda: compiled(x).sum().backward(),  # noqa: B023
                lambda: forget_gradients(mlp, x),  # noqa: B023
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")
def test_memory_is_saved() -> None:
    before, after = call_metered(_peaks, 128, 1024, 2048)
    assert after < 0.35 * before


# What people are told


@pytest.mark.parametrize(
    ("op", "rows", "more", "said"),
    [
        (3, "x", {}, "takes an operator, such as torch.ops.lib.name.default, not int"),
        (torch.ops.aten.add, "self", {}, "aten.add, which has several: name one, such as aten.add."),
        (torch.ops.aten.add.Tensor, "self", {}, "has a rule of its own"),
        (torch.ops.aten.index_put_.default, "self", {}, "writes to an argument"),
        (torch.ops.aten.view.default, "self", {}, "gives a view"),
        (torch.ops.aten.bernoulli.default, "self", {}, "draws random numbers"),
        (torch.ops.aten.split.Tensor, "self", {}, "gives a view of one"),
        (_product, "y", {}, "no argument 'y' that is a tensor; it has x, w"),
        (_linear4bit, "absmx", {}, "did you mean absmax?"),
        (_product, "x", {"sums": 1}, "has 1 results, and sums is (1,)"),
    ],
)
def test_what_cannot_be_declared(op: Any, rows: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(said)) as caught:
        mst_fx.declare_row_wise(op, rows, **more)
    assert "\n" not in str(caught.value)
    assert DECLARED.of(op) is None


def test_declared_twice() -> None:
    mst_fx.declare_row_wise(_product, "x")
    mst_fx.declare_row_wise(_product, row_args=["x"])  # says the same
    with pytest.raises(ValueError, match="was declared before, with row_args="):
        mst_fx.declare_row_wise(_product, row_args=("x", "w"))


def test_check() -> None:
    _declare_both()
    mst_fx.declare_row_wise(_product, row_args="x")
    mst_fx.declare_row_wise(_scaled, row_args="x")
    mst_fx.declare_row_wise(_scaled_backward, row_args=("grad", "x"), sums=1)
    model, x, scaled = _Linear4bit(_HIDDEN, _WIDE), _rows(2, 9).detach(), _Scaled()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = x.to(dtype).requires_grad_()
        mst_fx.check_row_wise(_linear4bit, rows, model.packed, absmax=model.absmax)
        mst_fx.check_row_wise(_product, rows, torch.randn(_WIDE, _HIDDEN, dtype=dtype, requires_grad=True))
    mst_fx.check_row_wise(_scaled, _rows(9), scaled.w, scaled.scale)
    grad = torch.randn(9, _WIDE, dtype=torch.float64)
    mst_fx.check_row_wise(_scaled_backward, grad, x[0].detach(), scaled.w, scaled.scale.detach())


def test_check_finds() -> None:
    x, w = _rows(2, 9).detach(), torch.randn(_WIDE, _HIDDEN, dtype=torch.float64)
    with pytest.raises(ValueError, match="was not declared"):
        mst_fx.check_row_wise(_mixed, x, w)
    for op in (_mixed, _doubled, _product):
        mst_fx.declare_row_wise(op, row_args="x")
    with pytest.raises(ValueError, match="result 0 of some rows changes with other rows"):
        mst_fx.check_row_wise(_mixed, x, w)
    with pytest.raises(ValueError, match=re.escape("result 0 is (18, 64) for (9, 16)")):
        mst_fx.check_row_wise(_doubled, x[0], w)
    with pytest.raises(ValueError, match="on at least 4 rows, not 3"):
        mst_fx.check_row_wise(_product, x[0, :3], w)
