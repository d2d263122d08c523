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

# Of the published checkpoints; layers and vocabulary can be overridden.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "vocab_size": 128256,
        },
    ),
    "llama3-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
            "vocab_size": 128256,
        },
    ),
    "llama3.2-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 16,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "vocab_size": 32768,
            "sliding_window": None,
        },
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "num_hidden_layers": 24,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-7b": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_hidden_layers": 28,
            "vocab_size": 152064,
        },
    ),
    "gemma2-9b": (
        "gemma2",
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "num_hidden_layers": 42,
            "vocab_size": 256000,
        },
    ),
    "tiny": (
        "llama",
        {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 997,
        },
    ),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gemma2": "Gemma2"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int


def config_of(model: str, seq: int, **overrides: Any) -> Any:
    """The Hugging Face config of a shape, for sequences of ``seq`` tokens."""
    family, known = MODELS[model]
    known = {**known, "max_position_embeddings": max(seq, 2048), "use_cache": False, **overrides}
    return getattr(transformers, f"{CLASSES[family]}Config")(**known)


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
