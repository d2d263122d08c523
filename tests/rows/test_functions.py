"""``torch.autograd.Function`` inside of an MLP: chunked if both its graphs are row-wise, with its own backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

import mst_fx
from mst_fx.errors import Cause
from tests.direct import DIRECT, check, results, rewritten, worst
from tests.helpers import FUNCTIONS_GIVE_THEIR_RESULTS, ToyLM, check_parity, compile_mst, kinds, token_batch


class _Gelu(Function):
    """Bloom's: the gradient of an approximation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return (0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)) * g


class _Rounded(Function):
    """Straight through: the backward is not the derivative, and nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class _Clipped(Function):
    """Gives its input; its backward is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01) * 3


class _Linear(Function):
    """The one of torch's tutorial, on rows in two dimensions; the weight's gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.reshape(-1, x.shape[-1]).mm(weight.t()).view(*x.shape[:-1], -1) + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = 2 * g.reshape(-1, g.shape[-1])
        return g @ weight, rows.t().mm(x.reshape(-1, x.shape[-1])), g.sum((0, 1))


class _Einsum(Function):
    """A gain per channel, and a weight whose gradient is an einsum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, gain)
        return F.linear(x, weight) * gain

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, weight, gain = ctx.saved_tensors
        weighted = g * gain
        of_gain = (g * F.linear(x, weight)).flatten(0, 1).sum(0)
        return weighted @ weight, torch.einsum("bso,bsi->oi", weighted, x), of_gain


class _Two(Function):
    """Two results, one of them saved; a keyword of Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        wide = torch.exp(-x * x)
        ctx.save_for_backward(x, wide)
        ctx.factor = factor
        return wide, torch.sin(x) * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        x, wide = ctx.saved_tensors
        return g * wide * x + h * ctx.factor, None


class _Marked(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True)
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(scale)
        return x / scale, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return g / scale + h


class _MLP(nn.Module):
    def __init__(self, apply: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 32))
        self.fn = apply
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.fn(self, x))


class _Amp(Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (g @ weight).to(x.dtype), (g.flatten(0, 1).t() @ x.flatten(0, 1)).to(weight.dtype)


def _two(m: _MLP, x: Tensor) -> Tensor:
    first, second = _Two.apply(m.up(x), 0.7)
    return first + 2 * second


def _one_of_two(m: _MLP, x: Tensor) -> Tensor:
    return _Two.apply(m.up(x), 0.7)[1]  # type: ignore[no-any-return]


def _marked(m: _MLP, x: Tensor) -> Tensor:
    scaled, scale = _Marked.apply(m.up(x))
    return torch.sin(scaled) * scale


def _those_of_this_torch(names: Iterable[str], others: Sequence[str]) -> list[str]:
    """All names, or those without others where torch captures Functions with their insides ("writes" is torch's own error)."""
    return [name for name in names if FUNCTIONS_GIVE_THEIR_RESULTS or name not in others]


PROVED = {
    "gelu": lambda m, x: _Gelu.apply(m.up(x)),
    "straight through": lambda m, x: _Rounded.apply(F.gelu(m.up(x))),
    "clipped": lambda m, x: F.gelu(_Clipped.apply(m.up(x))),
    "linear": lambda m, x: F.gelu(_Linear.apply(x, m.up.weight, m.up.bias)),
    "einsum": lambda m, x: F.gelu(_Einsum.apply(x, m.up.weight, m.gain)),
    "two results": _two,
    "one of two results": _one_of_two,
    "marked": _marked,
    "twice": lambda m, x: _Gelu.apply(_Rounded.apply(m.up(x)) + _Gelu.apply(m.up(x))),
    "amp": lambda m, x: F.gelu(_Amp.apply(x, m.up.weight)),
    "rounded weight": lambda m, x: F.gelu(F.linear(x, _Rounded.apply(m.up.weight))),
}


def _rows(batch: int, length: int) -> Tensor:
    torch.manual_seed(batch)
    return torch.randn(batch, length, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", _those_of_this_torch(PROVED, ["linear"]))
def test_own_backward(name: str) -> None:
    torch.manual_seed(0)
    report = check(_MLP(PROVED[name]), [_rows(2, 13)], 1e-10)
    assert kinds(report) == {"mlp": 1}, report
    assert not report.refusals


def _function(forward: Any, backward: Any) -> Any:
    """A Function of ``x`` that saves it, with ``backward(g, x)``."""

    class Made(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return backward(g, *ctx.saved_tensors)

    return lambda m, x: Made.apply(m.up(x))


def _gain(backward: Any) -> Any:
    """``x * gain``, with a gradient of the gain that is ``backward(g * x)``."""

    class Made(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
            ctx.save_for_backward(x, gain)
            return x * gain

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            x, gain = ctx.saved_tensors
            return g * gain, backward(g * x)

    return lambda m, x: Made.apply(m.up(x), m.gain)


class _SavesASum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sum((0, 1)))
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + ctx.saved_tensors[0]


# fmt: off
REFUSED = {
    "mixes in forward": (_function(lambda x: x.cumsum(1), lambda g, x: g), "cumsum"),
    "mixes in backward": (_function(torch.sin, lambda g, x: g - g.mean(1, keepdim=True)), "mean"),
    "mixes by a view": (_function(torch.sin, lambda g, x: g.transpose(0, 1).reshape(2, 13, 32)), "transpose"),
    "mixes by a shift": (_function(torch.sin, lambda g, x: g.roll(1, 1)), "roll"),
    "normalises in backward": (_function(torch.sin, lambda g, x: g / g.norm()), "norm"),
    "product of rows": (_function(torch.sin, lambda g, x: (g @ (x.flatten(0, 1).t() @ x.flatten(0, 1)))), "on a sum"),
    "writes": (_function(lambda x: torch.sin(x).mul_(2), lambda g, x: g), "writes"),
    "saves a sum": (lambda m, x: _SavesASum.apply(m.up(x)), "saves a sum"),
    "no sum": (_gain(lambda gx: gx.amax((0, 1))), "amax"),
    "a constant": (_gain(lambda gx: torch.ones(32, dtype=gx.dtype)), "sum over rows"),
    "a sum by sample": (_gain(lambda gx: gx.sum(1)[0]), "sum"),
    "not linear in the sum": (_gain(lambda gx: gx.sum((0, 1)).clamp(-0.1, 0.1)), "clamp"),
    "the last row": (_gain(lambda gx: gx[-1, -1]), "select"),
}
# fmt: on


@pytest.mark.parametrize("name", _those_of_this_torch(REFUSED, ["writes", "saves a sum"]))
def test_what_mixes_rows_is_refused(name: str) -> None:
    torch.manual_seed(0)
    apply, word = REFUSED[name]
    report = check(_MLP(apply), [_rows(2, 13)], 1e-10)
    assert not report.rewrites
    (refusal,) = [refused for refused in report.refusals if refused.kind == "mlp"]
    assert "torch.autograd.Function" in refusal.reason and word in refusal.reason


# Cross-entropies with a backward of their own


def _entropy(backward: Any, reduce: Any = lambda losses: losses, labels: Any = lambda y: y) -> Any:
    """A cross-entropy of rows that saves the softmax, with ``backward(g, p, y)`` for its logits."""

    class Made(Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
            p = logits.softmax(-1)
            ctx.save_for_backward(p, y)
            losses = logits.logsumexp(-1) - logits.gather(-1, y[..., None]).squeeze(-1)
            return reduce(losses)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            return backward(g, *ctx.saved_tensors), None

    return Made.apply


def _less_one(p: Tensor, y: Tensor) -> Tensor:
    return p.scatter_add(-1, y[..., None], -torch.ones_like(p[..., :1]))


def _edited(g: Tensor, p: Tensor, y: Tensor) -> Tensor:
    d = p.clone()
    d[torch.arange(len(y)), y] -= 1
    return g * d / len(y)


class _WholeHead(Function):
    """The product too, so that the logits are inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        logits = x @ weight.t()
        p = logits.softmax(-1)
        ctx.save_for_backward(x, weight, p, y)
        return (logits.logsumexp(-1) - logits.gather(-1, y[:, None]).squeeze(-1)).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, p, y = ctx.saved_tensors
        d = _less_one(p, y) * g
        return d @ weight, d.t() @ x, None


_row_entropy = _entropy(lambda g, p, y: g[..., None] * _less_one(p, y))
_clipped_entropy = _entropy(lambda g, p, y: (g[..., None] * _less_one(p, y)).clamp(-0.005, 0.005))
_mean_entropy = _entropy(_edited, torch.mean)
_mixing_entropy = _entropy(lambda g, p, y: g[..., None] * (p - p.mean(0, keepdim=True)))
LOSSES: dict[str, tuple[Any, Cause | None]] = {
    "rows": (lambda m, x, y: _row_entropy(m.up(x), y).mean(), None),
    "flat rows": (lambda m, x, y: _row_entropy(m.up(x).flatten(0, 1), y.flatten()).sum(), None),
    "clipped": (lambda m, x, y: _clipped_entropy(m.up(x), y).mean() * 3, None),
    "mean": (lambda m, x, y: _mean_entropy(m.up(x).flatten(0, 1), y.flatten()), Cause.UNPROVED),
    "mixing": (lambda m, x, y: _mixing_entropy(m.up(x), y).sum(), Cause.UNPROVED),
    "head": (lambda m, x, y: _WholeHead.apply(x.flatten(0, 1), m.up.weight, y.flatten()), Cause.OPAQUE),
}


@pytest.mark.parametrize("name", _those_of_this_torch(LOSSES, ["rows", "flat rows", "clipped", "head"]))
def test_losses_with_a_backward_of_their_own(name: str) -> None:
    """Rewritten where both graphs are row-wise; else there is a reason, the same for rows without gradients."""
    torch.manual_seed(0)
    step, cause = LOSSES[name]
    model, labels = _MLP(lambda m, x: x), torch.randint(0, 32, (2, 13))
    for x in (_rows(2, 13), _rows(2, 13).detach()):
        report = check(lambda x, y: step(model, x, y), [x, labels], 1e-10, module=model)
        refused = [(r.kind, r.cause) for r in report.refusals]
        assert (kinds(report), refused) == (({"vocab": 1}, []) if cause is None else ({}, [("vocab", cause)]))


@pytest.mark.parametrize("random", [torch.rand_like, lambda x: torch.rand(32, dtype=x.dtype)])
def test_random_numbers_are_refused(random: Any) -> None:
    """Of a row, and of all rows: each chunk would draw its own."""
    for apply in (
        _function(lambda x: x * random(x), lambda g, x: g),
        _function(torch.sin, lambda g, x: g * random(g)),
    ):
        run, report = rewritten(_MLP(apply))
        run(_rows(2, 13))
        assert not report.rewrites
        assert "random numbers" in report.refusals[0].reason


class _GeluMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(_Gelu.apply(_Clipped.apply(self.up(x))))
        return found


class _Model(ToyLM):
    """Its second layer is checkpointed; a Function of the logits clips the gradient of the loss."""

    def forward(self, ids: Tensor, labels: Tensor, with_logits: bool = True) -> Any:
        x = self.embed(ids)
        for index, block in enumerate(self.blocks):
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if index else block(x)
        logits = _Clipped.apply(self.head(self.norm(x)))
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = 3 * F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return (loss, logits) if with_logits else loss


@pytest.mark.slow
def test_in_a_model() -> None:
    """With one body for equal layers and a dynamic length. A clip is not linear: the loss's tangent comes before it."""
    model, batch = _Model("pre", _GeluMLP), {**token_batch(3, 37), "with_logits": False}
    report = check_parity(model, batch, 1e-10, 1e-9, dynamic=True)
    assert kinds(report) == {"mlp": 2, "vocab": 1}, report.refusals
    assert {rewrite.gradient for rewrite in report.rewrites} == {"recompute"}
    assert len({rewrite.body for rewrite in report.rewrites if rewrite.kind == "mlp"}) == 1


def test_no_logits_are_deferred_behind_a_function() -> None:
    """The loss and the deferred logits would each clip a part of the gradient: clipped is their sum."""
    model, batch = _Model(layers=1), token_batch(2, 33)

    def gradients_of(run: Any) -> list[Tensor]:
        loss, logits = run(**batch)
        return list(torch.autograd.grad(loss + torch.sin(logits).sum(), list(model.parameters())))

    with mst_fx.watch() as report:
        found = gradients_of(compile_mst(model))
    assert worst(found, gradients_of(model)) <= 1e-10
    assert kinds(report) == {"mlp": 1}
    assert [(refused.kind, refused.cause) for refused in report.refusals] == [("vocab", Cause.IS_OUTPUT)]


@pytest.mark.skipif(not FUNCTIONS_GIVE_THEIR_RESULTS, reason="this torch has a form of its own")
def test_older_form_of_the_operator() -> None:
    """With a context as the graphs' first input, and a mask of the args that have gradients."""
    model, x, reports = _MLP(PROVED["linear"]), _rows(2, 13), []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        (node,) = (n for n in gm.graph.nodes if "autograd_function_apply" in str(n.target))
        for operand in node.args[:2]:
            graph = getattr(gm, operand.target).graph
            with graph.inserting_before(next(iter(graph.nodes))):
                graph.placeholder("context")
        node.kwargs = {"args_tensor_mask": [True] * 3, "non_differentiable_idx": []}
        new, report = mst_fx.rewrite(gm, example_inputs, DIRECT)
        reports.append(report)
        return new

    torch._dynamo.reset()
    found = results(torch.compile(model, backend=backend), [x], model)
    assert worst(found, results(model, [x], model)) <= 1e-10
    assert kinds(reports[0]) == {"mlp": 1}


def test_autocast() -> None:
    """Eager runs a backward as autocast is then: what multiplies there is refused, what does not is rewritten."""
    for name, expected in (("gelu", {"mlp": 1}), ("amp", {}), ("linear", {})):
        model, x = _MLP(PROVED[name]).float(), _rows(2, 13).detach().float().requires_grad_()
        run, report = rewritten(model)
        found = []
        for function in (run, model):
            with torch.autocast("cpu", torch.bfloat16):
                out = function(x)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, model.up.weight])])
        assert worst(*found) < 0.02
        assert kinds(report) == expected
        assert all("torch.autograd.Function" in refused.reason for refused in report.refusals)
        assert bool(report.refusals) is not bool(expected)


def test_bloom() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=96, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0
    )
    model, batch = BloomForCausalLM(config).double().train(), token_batch(2, 33)
    report = check_parity(
        model, {"input_ids": batch["ids"], "labels": batch["labels"]}, 3e-6, 3e-6
    )  # its loss is float32
    assert kinds(report)["mlp"] == 2
