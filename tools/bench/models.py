"""What the benchmarks train: shapes of published models, small Llamas, single blocks, and text."""

from __future__ import annotations

import collections
import dataclasses
import re
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mst_fx.diagnose.model_of import random_model
from mst_fx.diagnose.shapes import CLASSES as CLASSES
from mst_fx.diagnose.shapes import MODELS as MODELS


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int


def config_of(
    model: str, seq: int, *, attention: str | None = None, experts: str | None = None, **overrides: Any
) -> Any:
    """The Hugging Face config of a shape, for sequences of ``seq`` tokens.

    Args:
        attention: transformers' implementation of attention, None: what the model takes by itself.
        experts: transformers' implementation of experts, likewise.
    """
    family, known = MODELS[model]
    known = {**known, "max_position_embeddings": max(seq, 2048), "use_cache": False, **overrides}
    made = getattr(transformers, f"{CLASSES[family]}Config")(**known)
    if attention is not None:
        made._attn_implementation = attention
    if experts is not None:
        made._experts_implementation = experts
    return made


def make_llama(
    shape: Shape,
    seq: int,
    device: str,
    dtype: torch.dtype,
    *,
    checkpoint: bool,
    mask: bool = True,
) -> Any:
    """A Hugging Face Llama with random weights (seed 0), in training mode, attention by SDPA.

    Args:
        checkpoint: with gradient checkpointing of each layer.
        mask: as Hugging Face has it. Without, attention is told that it is causal and gets no mask:
            under ``torch.compile`` the library builds one of S×S bytes.
    """
    attention = "sdpa"
    if not mask:  # an attention that the library knows no mask function for gets no mask
        attention = "causal_sdpa"
        transformers.AttentionInterface.register(attention, sdpa_attention_forward)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(seq, 2048),
        use_cache=False,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    return random_model(
        transformers.LlamaForCausalLM, config, device=device, dtype=dtype, checkpointing=checkpoint
    )


class SwiGLU(nn.Module):
    """``[..., H]`` → ``[..., H]``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """What a decoder layer of transformers does behind its attention: ``[B, S, H]`` → ``[B, S, H]``."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.experts = layer.post_attention_layernorm, layer.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.experts(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)  # type: ignore[no-any-return]


class Head(nn.Module):
    """A vocabulary projection with its cross-entropy: ``[..., H]``, labels → a scalar."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(x).float()
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def text_tokens(count: int, vocabulary: int) -> torch.Tensor:
    """``count`` tokens of Python's standard library: words, numbers and marks, most frequent first.

    Returns:
        int64 ``[count]``, on the CPU; the rarest words share the last id.
    """
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        words += re.findall(r"\w+|\s+|[^\w\s]", text)
        if len(words) >= count:
            break
    if not words:
        raise RuntimeError("this Python has no source of its standard library to read")
    words = (words * (count // len(words) + 1))[:count]
    ranked = {word: rank for rank, (word, _) in enumerate(collections.Counter(words).most_common())}
    return torch.tensor([min(ranked[word], vocabulary - 1) for word in words])
