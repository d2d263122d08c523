"""Two-layer Hugging Face models with random weights, one entry an architecture."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers
from torch import nn

from mst_fx.diagnose.model_of import random_model

VOCAB = 384
_BASE = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_HEADS = {**_GQA, "head_dim": 16}
_BERT = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An architecture: its class, its config, and what mst must find in it.

    Attributes:
        mlps: rewrites of kind "mlp", experts among them.
        vocab: rewrites of kind "vocab".
    """

    config: str
    model: str
    overrides: dict[str, Any]
    mlps: int = 2
    vocab: int = 1

    def build(self, **more: Any) -> nn.Module:
        config = getattr(transformers, self.config)(**{**self.overrides, **more})
        model: nn.Module = random_model(getattr(transformers, self.model), config)
        if self.model == "GPT2LMHeadModel":
            model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # else a warning breaks the graph
        return model


def _causal(name: str, overrides: dict[str, Any], **more: Any) -> Entry:
    return Entry(f"{name}Config", f"{name}ForCausalLM", overrides, **more)


ACCEPTED = {
    "llama": _causal("Llama", _GQA),
    "mistral": _causal("Mistral", {**_GQA, "sliding_window": 16}),
    "qwen2": _causal("Qwen2", _GQA),
    "qwen3": _causal("Qwen3", _HEADS),
    "gemma2": _causal("Gemma2", _HEADS),
    "gemma3": Entry("Gemma3TextConfig", "Gemma3ForCausalLM", _HEADS),
    "phi3": _causal("Phi3", _GQA),
    "gpt2": Entry("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "vocab_size": VOCAB}),
    "gpt_neox": _causal("GPTNeoX", _BASE),
    "opt": _causal(
        "OPT",
        {
            "hidden_size": 64,
            "ffn_dim": 172,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": VOCAB,
            "word_embed_proj_dim": 64,
            "dropout": 0.0,
            "max_position_embeddings": 256,
        },
    ),
    "falcon": _causal(
        "Falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    ),
    "mixtral": _causal("Mixtral", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bert": Entry("BertConfig", "BertForMaskedLM", {**_BERT, "vocab_size": VOCAB}),
    "t5": Entry(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_ff": 256,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        mlps=4,
    ),
    "vit": Entry(
        "ViTConfig", "ViTForImageClassification", {**_BERT, "image_size": 32, "patch_size": 4}, vocab=0
    ),
}

# Nobody listed these: the analysis must carry them.
OTHERS = {
    "olmo2": _causal("Olmo2", _GQA),
    "granite": _causal("Granite", {**_GQA, "logits_scaling": 2.0}),
    "cohere": _causal("Cohere", {**_GQA, "logit_scale": 0.25}),
    "stablelm": _causal("StableLm", _GQA),
    "smollm3": _causal("SmolLM3", _GQA),
    "glm4": _causal("Glm4", _HEADS),
    "nemotron": _causal("Nemotron", _GQA),
    "gptj": Entry("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "vocab_size": VOCAB, "rotary_dim": 8}),
    "mpt": _causal("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}),
    "qwen2_moe": _causal(
        "Qwen2Moe", {**_GQA, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 172}, mlps=4
    ),
    "deepseek_v3": _causal(
        "DeepseekV3",
        {
            **_BASE,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_shared_experts": 1,
        },
        mlps=3,
    ),
}


def inputs_of(entry: Entry, batch: int, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    random = functools.partial(torch.randint, generator=generator)
    if entry.model.startswith("ViT"):
        pixels = torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": random(0, 2, (batch,))}
    ids = random(3, VOCAB, (batch, length))
    labels = ids.clone()
    labels[:, : min(2, length - 1)] = -100
    return {"input_ids": ids, "labels": labels}


ATTENTION_SEQ = 41  # a prime: no other dimension has this size


def attention_batch(
    name: str, batch: int, variant: str, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Token ids and labels with an attention mask or positions.

    Args:
        variant: "", padding ("ones", "right", "left", "holes"), "packed" documents, or a "square" mask.
    """
    inputs = inputs_of({**ACCEPTED, **OTHERS}[name], batch, ATTENTION_SEQ, dtype)
    mask = torch.ones(batch, ATTENTION_SEQ, dtype=torch.long)
    if variant == "right":
        mask[0, ATTENTION_SEQ - 9 :] = 0
    elif variant == "left":
        mask[0, :9] = 0
    elif variant == "holes":
        mask[0, 5:9] = 0
    if variant in ("ones", "right", "left", "holes"):
        inputs["attention_mask"] = mask
    if variant == "packed":
        places = torch.cat([torch.arange(ATTENTION_SEQ - 15), torch.arange(15)])
        inputs["position_ids"] = places[None].expand(batch, ATTENTION_SEQ)
    if variant == "square":
        inputs["attention_mask"] = torch.ones(batch, 1, ATTENTION_SEQ, ATTENTION_SEQ, dtype=torch.bool).tril()
    return inputs
