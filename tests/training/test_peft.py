"""PEFT: adapters on frozen weights. Gradients of the adapters only, and eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

from peft import LoraConfig, get_peft_model

import mst_fx
from mst_fx.declared import DECLARED
from tests.helpers import (
    EAGER_BODIES,
    SMALL_CHUNKS,
    ToyLM,
    check_parity,
    compile_mst,
    forget_gradients,
    kinds,
    loss_of,
    relative_error,
    report_of,
    step,
    token_batch,
    warm_peak,
    worst_error,
)
from tests.text import build_llama, token_blocks
from tools.meters.cpu import call_metered, is_available

_ALL = "all-linear"
_MLP = ["gate_proj", "up_proj", "down_proj"]
_EAGER = {**SMALL_CHUNKS, "inner": "eager"}  # where AOTAutograd is not the point either


def _adapted(model: dict[str, Any] | None = None, **more: Any) -> Any:
    """The toy Llama, of one layer, with LoRA adapters that are not zero."""
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": _ALL, **more})
    adapted = get_peft_model(build_llama(**{"num_hidden_layers": 1, **(model or {})}), config)  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def _batch() -> dict[str, Tensor]:
    blocks = token_blocks(3, 35)
    return {key: torch.stack([block[key] for block in blocks]) for key in blocks[0]}


def _check_lora(report: mst_fx.Diagnosis) -> None:
    assert kinds(report) == {"mlp": 1, "vocab": 1}
    assert not report.refusals
    assert report.rewrites[0].name.endswith("model.layers.0.mlp")


def test_lora() -> None:
    _check_lora(check_parity(_adapted(), _batch(), 1e-5, 1e-5))


def test_what_is_trained_beside_adapters() -> None:
    """Biases, and the head and the embedding as ``modules_to_save``: the head has its gradient."""
    biased = {"attention_bias": True, "mlp_bias": True}
    model = _adapted(biased, bias="all", use_rslora=True, modules_to_save=["lm_head", "embed_tokens"])
    _check_lora(check_parity(model, _batch(), 1e-5, 1e-5, _EAGER))
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert sum(name.endswith("bias") for name in trained) == 7
    assert sum("lm_head" in name for name in trained) == sum("embed_tokens" in name for name in trained) == 1


def test_dropout_in_adapters_of_attention() -> None:
    """Draws other numbers than eager: see test_dropout_in_adapters."""
    model = _adapted(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    _check_lora(report_of(model, _EAGER, **_batch()))


def _loss_in_float64(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """In the place of a model's loss, which is a float32."""
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "checkpointed", "reentrant"])
def test_dropout_in_adapters(reentrant: bool | None) -> None:
    """MLPs with adapters are chunked; the gradient is that of the loss with the masks of its forward pass.

    Held against differences of that loss in float64: the same seed draws the same masks.
    """
    model = _adapted(lora_dropout=0.1, target_modules=_MLP).double()
    model.base_model.model.loss_function = _loss_in_float64
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    @compile_mst
    def compiled(input_ids: Tensor, labels: Tensor) -> Tensor:
        embedded = model.get_input_embeddings()(
            input_ids
        )  # the hook on it breaks the graph, out here but once
        return loss_of(model(inputs_embeds=embedded, labels=labels))

    def seeded(**batch: Any) -> Any:
        torch.manual_seed(7)
        return compiled(**batch)

    with mst_fx.watch() as report:
        loss, found = step(model, seeded, _batch())
    assert kinds(report) == {"mlp": 1, "vocab": 1}
    assert loss.dtype == torch.float64
    torch.manual_seed(8)
    assert abs(float(compiled(**_batch())) - float(loss)) > 1e-6  # other masks
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ("gate_proj.lora_A", "down_proj.lora_A", "up_proj.lora_B"):
        (chosen,) = ((p, found[name]) for name, p in model.named_parameters() if part in name)
        slope = _slope(lambda: float(seeded(**_batch())), [chosen[0]])
        expected = sum(float((way * chosen[1]).sum()) for way in _ways([chosen[0]]).values())
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
        ends.append(loss())  # with gradients, as the step that was compiled
    return (ends[0] - ends[1]) / (2 * size)


class _OneLayer(ToyLM):
    """An MLP and a head, in no loop over layers: Dynamo would leave the function with that loop alone."""

    def forward(self, ids: Tensor, labels: Tensor, with_logits: bool = True) -> Tensor:
        embedded = self.embed(ids)
        block: Any = self.blocks[0]
        return F.cross_entropy(self.head(embedded + block.mlp(embedded)).flatten(0, 1), labels.flatten())


def test_dora_breaks_the_graph() -> None:
    """As the README says: DoRA's layers break the graph in every MLP. Right, but only the head is chunked.

    Torch 2.11 captures them, and there the MLPs are chunked too. Of a toy: after each break all of Llama's
    wrappers are traced once more.
    """
    config = LoraConfig(r=4, use_dora=True, target_modules=["gate", "up", "down"])
    model: Any = get_peft_model(_OneLayer(layers=1), config)  # type: ignore[arg-type]
    report = check_parity(model.base_model.model, token_batch(3, 35), 1e-5, 1e-5, _EAGER)
    is_broken = report.graphs > 1
    assert is_broken or torch.__version__ < "2.12"
    assert kinds(report) == ({"vocab": 1} if is_broken else {"mlp": 1, "vocab": 1})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_input_gradients(reentrant: bool) -> None:
    """What TRL does to adapted models: a hook on the embedding, which breaks the graph there only."""
    model = _adapted(
        target_modules=_MLP
    ).base_model.model  # every wrapper is traced up to the break once more
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert kinds(check_parity(model, _batch(), 1e-5, 1e-5, _EAGER)) == {"mlp": 1, "vocab": 1}


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


def test_quantised_linears() -> None:
    """One that makes its weight in the graph is chunked. Of an unknown operator's rows nothing is known: refused.

    The head is not quantised, and chunked.
    """
    model: Any = build_llama()
    for layer, kind in zip(model.model.layers, (_DequantisedLinear, _QuantisedLinear), strict=True):
        for name in _MLP:
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name)))
    report = check_parity(model, _batch(), 1e-5, 1e-5, _EAGER)
    assert kinds(report) == {"mlp": 1, "vocab": 1}
    assert report.rewrites[0].name.endswith("model.layers.0.mlp")
    assert {r.name for r in report.refusals} == {f"model.layers.1.mlp.{name}" for name in _MLP[:2]}
    assert all("test_peft.quantised_linear.default has no row-wise rule" in r.reason for r in report.refusals)
    assert all("mst_fx.declare_row_wise says so" in r.reason for r in report.refusals)


def _quantise_bases(adapted: Any, kind: type[_QuantisedLinear]) -> None:
    """Puts quantised linears in the place of those that adapters stand beside, in MLPs."""
    for layer in adapted.base_model.model.model.layers:
        for name in _MLP:
            part = getattr(layer.mlp, name)
            part.base_layer = kind(part.base_layer)


def test_qlora_with_a_declared_operator() -> None:
    """Adapters beside frozen weights that only an operator of a library can read: every MLP, once that was said of it.

    Gradients are those of the same model with its weights unpacked in plain sight.
    """
    mst_fx.declare_row_wise(torch.ops.test_peft.quantised_linear, row_args="x")
    try:
        adapted = _adapted({"num_hidden_layers": 2}, target_modules=_MLP).double()
        plain = copy.deepcopy(adapted)
        _quantise_bases(adapted, _QuantisedLinear)
        _quantise_bases(plain, _DequantisedLinear)
        with mst_fx.watch() as report:
            found = step(adapted, compile_mst(adapted, _EAGER), _batch())
        assert kinds(report) == {"mlp": 2, "vocab": 1} and not report.refusals
        found_in = [text.count("test_peft.quantised_linear.default(") for text in report.bodies.values()]
        assert sorted(found_in) == [0, 3, 3]
        truth = step(plain, plain, _batch())
        # Llama's norms and rotary embedding are in float32, whatever the model is in.
        assert relative_error(found[0], truth[0]) < 1e-7
        assert len(found[1]) == 2 * 3 * 2 and worst_error(found[1], truth[1]) < 1e-6
    finally:
        DECLARED.reset()


def _peaks(hidden: int, wide: int, rows: int) -> dict[str, int]:
    """Bytes at the peak of a warm step of an MLP, above what was there, with its weights trained and frozen."""
    from tests.helpers import GatedMLP

    peaks = {}
    for name, is_trained in {"trained": True, "frozen": False}.items():
        mlp = GatedMLP(hidden, wide).requires_grad_(is_trained)
        compiled = torch.compile(mlp, backend="mst", options={**EAGER_BODIES, "chunk_rows": 128})
        x = torch.randn(1, rows, hidden, requires_grad=True)
        peaks[name] = warm_peak(
            lambda: compiled(x).sum().backward(),  # noqa: B023
            lambda: forget_gradients(mlp, x),  # noqa: B023
        )
        peaks["weights"] = sum(p.nbytes for p in mlp.parameters())
    return peaks


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")
def test_frozen_weights_have_no_gradients_in_memory() -> None:
    """No accumulators: what freezing saves is the gradients, and a chunk's work at most is left."""
    hidden, wide, rows = 256, 2048, 1024
    peaks = call_metered(_peaks, hidden, wide, rows)
    assert peaks["trained"] - peaks["frozen"] >= 0.95 * peaks["weights"]
    rows_bytes, chunk_bytes = rows * hidden * 4, 128 * wide * 4
    assert peaks["frozen"] <= 4 * rows_bytes + 8 * chunk_bytes, peaks
