"""PEFT: adapters on frozen weights. Gradients of the adapters only, and eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

from peft import LoraConfig, get_peft_model

import mst_fx
from tests.helpers import (
    SMALL_CHUNKS,
    check_parity,
    compile_mst,
    kinds,
    relative_error,
    report_of,
    step,
)
from tests.text import build_llama, token_blocks
from tools.meters.cpu import call_metered, is_available, malloc_meter

_ALL = "all-linear"


def _adapted(**more: Any) -> Any:
    """The toy Llama with LoRA adapters that are not zero."""
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": _ALL, **more})
    model = get_peft_model(build_llama(), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _batch() -> dict[str, Tensor]:
    blocks = token_blocks(3, 35)
    return {key: torch.stack([block[key] for block in blocks]) for key in blocks[0]}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"bias": "all", "use_rslora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    ],
    ids=["all-linear", "biases", "modules_to_save", "attention-with-dropout"],
)
def test_lora(more: dict[str, Any]) -> None:
    model = _adapted(**more)
    if more.get("lora_dropout"):  # draws other numbers than eager: see test_dropout_in_adapters
        report = report_of(model, SMALL_CHUNKS, **_batch())
    else:
        report = check_parity(model, _batch(), 1e-5, 1e-5)
    assert kinds(report) == {"mlp": 2, "vocab": 1}
    assert not report.refusals
    assert report.rewrites[0].name.endswith("model.layers.0.mlp")


def test_the_head_in_modules_to_save_is_trained() -> None:
    model = _adapted(modules_to_save=["lm_head"])
    loss, truth = step(model, model, _batch())
    _, found = step(model, compile_mst(model), _batch())
    (head,) = (name for name in truth if "lm_head" in name)
    assert relative_error(found[head], truth[head]) <= 1e-5
    assert loss.isfinite()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "checkpointed", "reentrant"])
def test_dropout_in_adapters(reentrant: bool | None) -> None:
    """MLPs with adapters are chunked; the gradient is that of the loss with the masks of its forward pass.

    Held against differences of that loss in float64: the same seed draws the same masks.
    """
    model = _adapted(lora_dropout=0.1).double()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def loss_in_float64(input_ids: Tensor, labels: Tensor, **more: Any) -> Tensor:
        logits = model(input_ids=input_ids, **more).logits  # model(labels=...) makes a float32 loss
        return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())

    assert kinds(report_of(model, SMALL_CHUNKS, **_batch())) == {"mlp": 2, "vocab": 1}
    compiled = compile_mst(loss_in_float64)

    def seeded(**batch: Any) -> Any:
        torch.manual_seed(7)
        return compiled(**batch)

    with mst_fx.watch() as report:
        loss, found = step(model, seeded, _batch())
    # The hook on the embedding breaks the graph, and this loss is not in the model's part of it.
    assert kinds(report) == {"mlp": 2, **({"vocab": 1} if reentrant is None else {})}
    torch.manual_seed(8)
    assert abs(float(compiled(**_batch())) - float(loss)) > 1e-6  # other masks
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("gate_proj.lora_A", "down_proj.lora_A", "up_proj.lora_B"):
        chosen = {p: found[name] for name, p in model.named_parameters() if part in name}
        assert len(chosen) == 2
        slope = _slope(lambda: float(seeded(**_batch())), list(chosen))
        expected = sum(float((way * chosen[p]).sum()) for p, way in _ways(list(chosen)).items())
        assert abs(slope - expected) <= 2e-4 * abs(expected), part


def _ways(parameters: list[Tensor]) -> dict[Tensor, Tensor]:
    """A direction to move some parameters in."""
    torch.manual_seed(1)
    return {parameter: torch.randn_like(parameter) for parameter in parameters}


def _slope(loss: Callable[[], float], parameters: list[Tensor], size: float = 1e-3) -> float:
    """The slope of a loss in :func:`_ways`, from central differences (rotary tables and norms are float32)."""
    ends = []
    for move in (size, -2 * size, size):
        with torch.no_grad():
            for parameter, way in _ways(parameters).items():
                parameter.add_(way, alpha=move)
            ends.append(loss())
    return (ends[0] - ends[1]) / (2 * size)


def test_dora_breaks_the_graph() -> None:
    """As the README says: DoRA's layers break the graph in every MLP. Right, but only the head is chunked.

    Torch 2.11 captures them, and there the MLPs are chunked too.
    """
    model = _adapted(use_dora=True)
    report = check_parity(model, _batch(), 1e-5, 1e-5)
    is_broken = report.graphs > 1
    assert is_broken or torch.__version__ < "2.12"
    assert kinds(report) == ({"vocab": 1} if is_broken else {"mlp": 2, "vocab": 1})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_input_gradients(reentrant: bool) -> None:
    """What TRL does to adapted models: a hook on the embedding, which breaks the graph there only."""
    model = _adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert kinds(check_parity(model, _batch(), 1e-5, 1e-5)) == {"mlp": 2, "vocab": 1}


@torch.library.custom_op("test_peft::quantised_linear", mutates_args=())
def _quantised_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x @ (packed.to(x.dtype) * scale).t()


@_quantised_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    packed, scale = ctx.saved_tensors
    return grad @ (packed.to(grad.dtype) * scale), None, None


_quantised_linear.register_autograd(_input_gradient, setup_context=_save)


class _QuantisedLinear(nn.Module):
    """Frozen int8 weights behind an operator of its own, as bitsandbytes has them."""

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return _quantised_linear(x, self.packed, self.scale)


class _DequantisedLinear(_QuantisedLinear):
    """The same weights, made in the graph, as torchao's weight-only linears have them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale)


def _quantised(kind: type[_QuantisedLinear]) -> Any:
    """The toy Llama with quantised MLPs."""
    model: Any = build_llama()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name)))
    return model


def test_a_quantised_linear_that_makes_its_weight_in_the_graph() -> None:
    report = check_parity(_quantised(_DequantisedLinear), _batch(), 1e-5, 1e-5)
    assert kinds(report) == {"mlp": 2, "vocab": 1} and not report.refusals


def test_an_unknown_quantised_linear_is_refused() -> None:
    """Nothing is known of such an operator's rows. The head is not quantised, and chunked."""
    model = _quantised(_QuantisedLinear)
    report = check_parity(model, _batch(), 1e-5, 1e-5)
    assert kinds(report) == {"vocab": 1}
    assert {r.name for r in report.refusals} == {
        f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate_proj", "up_proj")
    }
    assert all("test_peft.quantised_linear.default has no row-wise rule" in r.reason for r in report.refusals)


def _peaks(hidden: int, wide: int, rows: int, frozen: bool) -> dict[str, int]:
    """Bytes at the peak of a warm step of an MLP, or of a head with its loss, above what was there."""
    from tests.helpers import GatedMLP

    torch.manual_seed(0)
    mlp = GatedMLP(hidden, wide)
    for parameter in mlp.parameters():
        parameter.requires_grad_(not frozen)
    compiled = torch.compile(mlp, backend="mst", options={"chunk_rows": 128})
    x = torch.randn(1, rows, hidden, requires_grad=True)
    meter = malloc_meter()
    peaks = {}
    for _ in range(2):
        mlp.zero_grad(set_to_none=True)
        x.grad = None
        start = meter.current()
        meter.reset()
        compiled(x).sum().backward()
        peaks = {"peak": meter.peak() - start, "weights": sum(p.nbytes for p in mlp.parameters())}
    return peaks


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")
def test_frozen_weights_have_no_gradients_in_memory() -> None:
    """No accumulators: what freezing saves is the gradients, and a chunk's work at most is left."""
    hidden, wide, rows = 256, 2048, 1024
    trained = call_metered(_peaks, hidden, wide, rows, False)
    frozen = call_metered(_peaks, hidden, wide, rows, True)
    assert trained["peak"] - frozen["peak"] >= 0.95 * trained["weights"]
    rows_bytes, chunk_bytes = rows * hidden * 4, 128 * wide * 4
    assert frozen["peak"] <= 4 * rows_bytes + 8 * chunk_bytes, frozen
