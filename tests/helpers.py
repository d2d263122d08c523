"""What the tests share: steps, errors relative to a norm, toy transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from tools.meters.cpu import malloc_meter

EAGER_BODIES = {"inner": "aot_eager"}  # for tests that are not about Inductor
# torch 2.11's Dynamo runs a layer eagerly that FSDP2 shards and a checkpoint calls.
DYNAMO_COMPILES_CHECKPOINTED_LAYERS = torch.__version__ >= torch.torch_version.TorchVersion("2.12")
# In torch 2.11 a captured torch.autograd.Function gives all values inside of it beside its results; those that are no
# rows make it one that we refuse.
FUNCTIONS_GIVE_THEIR_RESULTS = torch.__version__ >= torch.torch_version.TorchVersion("2.12")
SMALL_CHUNKS = {**EAGER_BODIES, "chunk_rows": 16, "vocab_chunk_rows": 20}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in float64; NaN where only one is NaN."""
    found, truth = found.detach().double(), truth.detach().double()
    assert torch.equal(torch.isnan(found), torch.isnan(truth)), "NaNs at different places"
    norm = truth.nan_to_num().norm()
    error = (found.nan_to_num() - truth.nan_to_num()).norm()
    return float(error / norm) if norm > 0 else float(error)


def step(
    model: nn.Module, run: Callable[..., Any], batch: dict[str, Any], scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward of ``run(**batch)``: the loss and every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(run(**batch))
    (loss * scale).backward()
    return loss.detach(), gradients(model)


def loss_of(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    found = out[0] if isinstance(out, tuple) else out.loss
    assert isinstance(found, Tensor)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient; the two must have the same gradients.

    A gradient that is 0 but for rounding (a key projection's bias: softmax does not see it) is held
    against the largest gradient instead of against itself.
    """
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    largest = max(float(grad.nan_to_num().norm()) for grad in truth.values())
    errors = []
    for name, grad in truth.items():
        is_zero = float(grad.nan_to_num().norm()) < 1e-9 * largest
        scale = float(grad.norm()) / largest if is_zero else 1.0
        errors.append(relative_error(found[name], grad) * scale)
    return max(errors)


class Sharing:
    """Whether the test that runs shares compiled code (marked ``shares_compiled``), and the file of the last that did."""

    now = False
    file: Path | None = None


def compile_mst(fn: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """``fn`` under mst, compiled anew when it is called, but for what a test marked ``shares_compiled`` finds."""
    if not Sharing.now:
        torch._dynamo.reset()
    chosen: Any = options or SMALL_CHUNKS
    return torch.compile(fn, backend="mst", options=chosen, **kwargs)


def check_parity(
    model: nn.Module,
    batch: dict[str, Any],
    loss_bar: float,
    gradient_bar: float,
    options: dict[str, Any] | None = None,
    **compile_options: Any,
) -> mst_fx.Diagnosis:
    """Loss and all gradients under mst agree with eager's; returns what was rewritten in that step."""
    loss, grads = step(model, model, batch)
    with mst_fx.watch() as report:
        found_loss, found = step(model, compile_mst(model, options, **compile_options), batch)
    assert relative_error(found_loss, loss) <= loss_bar
    assert worst_error(found, grads) <= gradient_bar
    return report


def report_of(fn: Any, options: Any = None, /, *args: Any, **kwargs: Any) -> mst_fx.Diagnosis:
    return mst_fx.explain(fn, options or SMALL_CHUNKS)(*args, **kwargs)


def kinds(report: mst_fx.Report) -> dict[str, int]:
    found = [rewrite.kind for rewrite in report.rewrites]
    return {kind: found.count(kind) for kind in sorted(set(found))}


class PlainMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """One layer: ``order`` is "pre", "post" or "parallel"."""

    def __init__(self, order: str, mlp: type[nn.Module], width: int = 16, inner: int = 40) -> None:
        super().__init__()
        self.order = order
        self.attention, self.mlp = Attention(width, 2), mlp(width, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "pre":
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        if self.order == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class ToyLM(nn.Module):
    """A causal LM in float64 throughout; returns the loss, or loss and logits."""

    def __init__(
        self,
        order: str = "pre",
        mlp: type[nn.Module] = GatedMLP,
        layers: int = 2,
        width: int = 16,
        vocab: int = 96,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(order, mlp, width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.double()

    def forward(self, ids: Tensor, labels: Tensor, with_logits: bool = True) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return (loss, logits) if with_logits else loss


def token_batch(batch: int, length: int, vocab: int = 96, ignored: int = 2) -> dict[str, Tensor]:
    """Random ids and labels; the first labels of every sequence are ignored."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    labels = ids.clone()
    labels[:, : min(ignored, length - 1)] = -100
    return {"ids": ids, "labels": labels}


def graph_calls(gm: torch.fx.GraphModule) -> Iterator[str]:
    """The names of the mst-fx ops in a graph and its sub-graphs."""
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if str(node.target).startswith("mst_fx."):
                    yield str(node.target).removesuffix(".default")


class Exponential(torch.autograd.Function):
    """Reads its input as kernels written by hand do: no function of torch sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.exp()


def warm_peak(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> int:
    """Bytes at the peak of a call above what was there, by the malloc meter (:func:`tools.meters.cpu.call_metered`); of the second one,
    for the first compiles.

    Args:
        prepare: is called before each, and not measured.
    """
    meter, peak = malloc_meter(), 0
    for _ in range(2):
        prepare()
        meter.reset()
        level = meter.current()
        call()
        peak = meter.peak() - level
    return peak


def forget_gradients(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None
