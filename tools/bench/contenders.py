"""What the GPU benchmarks compare: ways to train a model."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from mst_fx.diagnose.model_of import random_model
from tools.bench.models import CLASSES, MODELS, Experts, Head, SwiGLU, config_of


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train a model.

    Attributes:
        way: "eager", "inductor", "autochunker", "liger", "liger-tiled", "cce" or "mst".
        checkpoint: with gradient checkpointing of each layer.
        options: of mst.
        mode: of ``torch.compile``, for "inductor" and "mst" (there, instead of options).
        attention: transformers' implementation of attention, None: what the model takes by itself.
        experts: transformers' implementation of experts, likewise.
    """

    way: str
    checkpoint: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mode: str | None = None
    attention: str | None = None
    experts: str | None = None


_ATTENTION_ONLY = {"passes": ("attention",)}
CONTENDERS = {
    "eager": Contender("eager"),
    "eager+ckpt": Contender("eager", True),
    "inductor": Contender("inductor"),
    "inductor+ckpt": Contender("inductor", True),
    "autochunker": Contender("autochunker"),
    "autochunker+ckpt": Contender("autochunker", True),
    "attention": Contender("mst", options=_ATTENTION_ONLY),
    "attention+ckpt": Contender("mst", True, _ATTENTION_ONLY),
    "liger": Contender("liger"),
    "liger+ckpt": Contender("liger", True),
    "liger-tiled+ckpt": Contender("liger-tiled", True),
    "mst": Contender("mst"),
    "mst+ckpt": Contender("mst", True),
}
BLOCKS = {
    "mlp": {
        "eager": Contender("eager"),
        "inductor": Contender("inductor"),
        "inductor+ckpt": Contender("inductor", True),
        "liger-tiled": Contender("liger-tiled"),
        "mst": Contender("mst"),
        "mst-16bit-sums": Contender("mst", options={"accumulate": "weight"}),
    },
    "experts": {
        "eager": Contender("eager"),
        "eager+ckpt": Contender("eager", True),
        "inductor+ckpt": Contender("inductor", True),
        "mst": Contender("mst"),
    },
    "head": {
        "eager": Contender("eager"),
        "inductor": Contender("inductor"),
        "autochunker": Contender("autochunker"),
        "liger": Contender("liger"),
        "cce": Contender("cce"),
        "mst": Contender("mst"),
    },
}


def find_contender(name: str, known: Mapping[str, Contender]) -> Contender:
    """A contender by its name, or a variant of mst or Inductor: ``mst[chunk_rows=8192;accumulate=weight]``.

    Settings are options of mst, ``inductor.NAME`` patches of Inductor's config, ``mode``, and for every contender ``attention`` and
    ``experts``, transformers' implementations: ``eager+ckpt[experts=batched_mm]``.

    Raises:
        ValueError: for a name that is not known.
    """
    if name in known:
        return known[name]
    base, _, settings = name.removesuffix("]").partition("[")
    if base not in known:
        raise ValueError(f"unknown contender {name!r}; there are {', '.join(known)}")
    fields, options = {}, dict(known[base].options)
    for setting in filter(None, settings.split(";")):
        key, _, text = setting.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if key in ("mode", "attention", "experts"):
            fields[key] = value
        elif key.startswith("inductor."):
            options["inductor"] = {**options.get("inductor", {}), key.removeprefix("inductor."): value}
        else:
            options[key] = value
    return dataclasses.replace(known[base], options=options, **fields)


def make_model(
    model: str,
    contender: Contender,
    seq: int,
    device: str,
    *,
    lora: int = 0,
    lora_dropout: float = 0.0,
    **overrides: Any,
) -> nn.Module:
    """A causal language model with random weights, bfloat16 on a GPU, in training mode.

    Args:
        lora: rank of PEFT's LoRA on all linear layers but the head, all else frozen; 0: none.
        lora_dropout: of the adapters' inputs, in [0, 1).
    """
    family = MODELS[model][0]
    _patch_liger(family, contender.way)
    made = random_model(
        getattr(transformers, f"{CLASSES[family]}ForCausalLM"),
        config_of(model, seq, attention=contender.attention, experts=contender.experts, **overrides),
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        checkpointing=contender.checkpoint,
    )
    if contender.way == "liger-tiled" and "Tiled" not in type(made.model.layers[0].mlp).__name__:
        raise RuntimeError(
            f"Liger's tiled MLP is not in the model: {type(made.model.layers[0].mlp).__name__}"
        )
    if lora:
        import peft

        settings = peft.LoraConfig(
            r=lora, lora_alpha=2 * lora, lora_dropout=lora_dropout, target_modules="all-linear"
        )
        made = peft.get_peft_model(made, settings, autocast_adapter_dtype=False)
    found: nn.Module = made.train()  # PEFT's parts too
    return found


def loss_function(model: nn.Module, contender: Contender) -> Callable[..., Tensor]:
    """``(input_ids, **more) -> loss``, compiled where the contender compiles."""
    if contender.way == "autochunker":  # it looks for a matmul on flat rows whose result nobody else sees
        return compiled(_FlatHead(model), contender)
    run = compiled(model, contender)

    def loss(ids: Tensor, **more: Tensor) -> Tensor:
        return run(input_ids=ids, labels=ids, **more).loss  # type: ignore[no-any-return]

    return loss


def compiled(module: nn.Module, contender: Contender) -> Callable[..., Any]:
    if contender.way in ("inductor", "autochunker"):
        run = torch.compile(module, mode=contender.mode)
        return run if contender.way == "inductor" else _autochunked(run)  # type: ignore[no-any-return]
    if contender.way == "mst":
        return torch.compile(  # type: ignore[no-any-return]
            module, backend="mst", options=dict(contender.options) or None, mode=contender.mode
        )
    return module


def expert_block(model: str, contender: Contender, seq: int, device: str) -> nn.Module:
    """The norm, router and experts of a model's layer, with the residual: ``[B, S, H]`` → ``[B, S, H]``."""
    one = {"num_hidden_layers": 1, "vocab_size": 128}
    plain = dataclasses.replace(contender, checkpoint=False)
    made = Experts(make_model(model, plain, seq, device, **one).model.layers[0])  # type: ignore[union-attr, index]
    return _Checkpointed(made) if contender.checkpoint else made


def block(kind: str, contender: Contender, hidden: int, wide: int, device: str) -> nn.Module:
    """One SwiGLU MLP (``kind`` "mlp", ``wide`` I), or one head with its loss ("head", ``wide`` V)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    made: nn.Module
    if kind == "head":
        head = {"liger": _LigerHead, "cce": _CutHead, "autochunker": _ChunkedHead}.get(contender.way, Head)
        made = head(hidden, wide)
    elif contender.way == "liger-tiled":
        from liger_kernel.transformers import LigerTiledSwiGLUMLP

        made = LigerTiledSwiGLUMLP(transformers.LlamaConfig(hidden_size=hidden, intermediate_size=wide))
    else:
        made = SwiGLU(hidden, wide)
    made = made.to(device, dtype)
    return _Checkpointed(made) if contender.checkpoint else made


def model_flops(config: Any, seq: int, *, recompute_mlp: bool = False) -> float:
    """Floating-point operations of one step's matmuls and causal attention, B = 1, nothing recomputed.

    Args:
        recompute_mlp: with the first two of an MLP's matmuls once more, as a chunked MLP does.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = width * config.num_attention_heads, width * config.num_key_value_heads
    projections = hidden * (2 * queries + 2 * keys)
    matmuls = layers * (projections + 3 * hidden * inner) + hidden * config.vocab_size
    attention = layers * 2 * seq * seq * queries  # half of the scores, twice
    again = 2 * seq * layers * 2 * hidden * inner if recompute_mlp else 0
    return 3.0 * 2 * seq * matmuls + 3.5 * attention + again


class _Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Tensor) -> Tensor:
        return checkpoint(self.inside, *args, use_reentrant=False)  # type: ignore[no-any-return]


class _LigerHead(Head):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return loss(self.head.weight, x.view(-1, x.shape[-1]), labels.view(-1))  # type: ignore[no-any-return]


class _CutHead(Head):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(x.view(-1, x.shape[-1]), self.head.weight, labels.view(-1))  # type: ignore[no-any-return]


class _ChunkedHead(Head):
    """As Inductor's AutoChunker wants it: flat rows, and the loss alone leaves."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(x.view(-1, x.shape[-1])).float()
        return nn.functional.cross_entropy(logits, labels.view(-1))


class _FlatHead(nn.Module):
    """A Hugging Face causal model whose loss alone leaves, its head on flat rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, **more: Tensor) -> Tensor:
        model: Any = self.model
        hidden = model.model(input_ids=ids, **more).last_hidden_state
        logits = model.lm_head(hidden.view(-1, hidden.shape[-1])).float()
        labels = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        return nn.functional.cross_entropy(logits, labels.reshape(-1))


def _autochunked(run: Callable[..., Any]) -> Callable[..., Any]:
    """With Inductor's AutoChunker, its threshold below what it finds in a head."""
    settings: Any = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 4}

    def call(*args: Any, **kwargs: Any) -> Any:
        with inductor_config.patch(settings):
            return run(*args, **kwargs)

    return call


def _patch_liger(family: str, way: str) -> None:
    """Patches the library before a model is made, as Liger's users do."""
    if not way.startswith("liger"):
        return
    from liger_kernel import transformers as liger

    # RoPE, norms, activation and the fused linear cross-entropy.
    getattr(liger, f"apply_liger_kernel_to_{family}")()
    if way == "liger-tiled":
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        name = "LigerTiledGEGLUMLP" if family.startswith("gemma") else "LigerTiledSwiGLUMLP"
        setattr(modeling, f"{CLASSES[family]}MLP", getattr(liger, name))
