"""Tiny random models of the architectures of transformers, for :mod:`tools.sweep.attempt`.

A configuration's defaults are shrunk by the names of their fields: widths to tens, layers to the first of each
kind, probabilities of dropout to 0. What the names do not tell is in ``_OVERRIDES``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LENGTH, HIDDEN, VOCABULARY = 67, 32, 512  # a length that no other size equals

_MAPPINGS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
}
FAMILIES = tuple(_MAPPINGS)

# Need other inputs than tokens, or cannot be made small.
_LEFT_OUT = {
    "gemma3n", "blt", "git", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody",
    "reformer", "dots3_note", "dots3_note_text",
}  # fmt: skip

# What most people use comes first, so that a sweep that is cut short says the most.
_FIRST = [
    "llama", "gpt_oss", "qwen3", "qwen3_moe", "qwen3_next", "gemma3_text", "gemma3n_text", "gemma4_text",
    "llama4_text", "deepseek_v3", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "gemma2", "gemma",
    "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "bamba", "glm4", "glm4_moe", "olmo2", "olmo3",
    "granite", "granitemoe", "falcon", "falcon_h1", "nemotron", "nemotron_h", "cohere", "cohere2",
    "exaone4", "smollm3", "starcoder2", "stablelm", "lfm2", "apertus", "ernie4_5", "hunyuan_v1_dense",
    "minimax", "deepseek_v2", "gpt2", "gpt_neox", "bloom", "opt", "mpt", "xglm",
]  # fmt: skip

# A size by the name of its field; the first pattern that is found counts.
_SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"^(hidden_size|d_model|n_embd|dim|word_embed_proj_dim|embedding_size|embed_dim|model_dim|width)$", HIDDEN),
        (r"(moe|expert|shared).*(intermediate_size|hidden_size|ffn_dim)$", 2 * HIDDEN),
        (r"(^|_)(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|dff|intermediate_dim|hidden_dim)$", 4 * HIDDEN),
        (r"^(intermediate_size_mlp|mlp_dim)$", 4 * HIDDEN),
        (r"^(num_hidden_layers|num_layers|n_layers?|(encoder|decoder)_layers|num_(en|de)coder_layers|num_blocks)$", 2),
        (r"^(num_attention_heads|num_heads|n_heads?|num_attn_heads|(encoder|decoder)_attention_heads)$", 4),
        (r"^encoder_num_attention_heads$", 4),
        (r"^(num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads)$", 2),
        (r"^((v_|global_|swa_|swa_v_|index_|attention_)?head_dim|d_kv|qk_(no|ro)pe_head_dim|kv_channels|dim_head)$", 8),
        (r"^(q_lora_rank|kv_lora_rank|o_lora_rank)$", 16),
        (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts)$", 4),
        (r"^(num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_k|moe_top_k|topk)$", 2),
        (r"^(n_group|topk_group|num_expert_group)$", 1),
        (r"^(n_shared_experts|num_shared_experts|moe_num_shared_experts)$", 1),
        (r"^(first_k_dense_replace|moe_layer_start_index|num_dense_layers)$", 1),
        (r"^((src_|tgt_|decoder_)?vocab_size|vocab_size_per_layer_input)$", VOCABULARY),
        (r"^(max_position_embeddings|n_positions|max_seq(uence)?_len(gth)?|n_ctx|max_(source|target)_positions)$", 512),
        (r"^(sliding_window(_size)?|attention_window|window_size|local_window|attention_chunk_size)$", 24),
        (r"^(linear_key_head_dim|linear_value_head_dim)$", 8),
        (r"^linear_num_key_heads$", 2),
        (r"^linear_num_value_heads$", 4),
        (r"^(ssm_state_size|state_size|mamba_d_state|d_state)$", 8),
        (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", 16),
        (r"^(mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_nheads)$", 4),
        (r"^mamba_d_ssm$", 64),
        (r"^(mamba_n_groups|n_groups|mamba_ngroups)$", 1),
        (r"^(mamba_chunk_size|chunk_size)$", 16),
        (r"^(mamba_dt_rank|time_step_rank)$", 4),
        (r"^(lru_width|conv_dim|attention_hidden_size|rnn_hidden_size)$", HIDDEN),
        (r"^index_n_heads$", 2),
        (r"^index_topk$", 16),
        (r"^(hidden_size_per_layer_input|laurel_rank|rotary_dim)$", 8),
        (r"^(num_nextn_predict_layers|num_kv_shared_layers|mtp_num_hidden_layers)$", 0),
    )
)  # fmt: skip

_DROPOUT = re.compile(r"dropout|pdrop|drop_rate|layerdrop|drop_path|jitter")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DROPPED = "<dropped>"  # the constructor is not given the field
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid"] * 2
_QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_compress_ratio": 4, "indexer_budget": 16,
    "hc_lowrank": 8,
}  # fmt: skip

# "part.field" is a field of a part of the configuration.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dory": {"num_hidden_layers": 2},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    },
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jetmoe": {"kv_channels": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 1},
    "minimax": {"block_size": 16},
    "ministral": {"head_dim": 8, "rope_parameters": _ROPE},
    "mpt": {"attn_config.attn_pdrop": 0},
    "nemotron": {"num_key_value_heads": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen4_exp": {f"text_config.{key}": size for key, size in _QSA.items()},
    "qwen4_exp_text": _QSA,
    "stablelm": {"partial_rotary_factor": 0.5},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 512},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": _HYBRID, "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "attention_hidden_size": _DROPPED, "attention_head_dim": _DROPPED, "kv_channels": _DROPPED,
        "mamba_headdim": _DROPPED, "num_hidden_layers": 4, "layers_block_type": _HYBRID,
    },
}  # fmt: skip


def architectures(family: str) -> list[str]:
    """The names of a family that can be tried, those of most use first."""
    names = [name for name in getattr(modeling_auto, _MAPPINGS[family][1]) if name not in _LEFT_OUT]
    return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def make_model(name: str, family: str, dtype: torch.dtype, attention: str) -> Any:
    """A tiny model in training mode, all its weights random.

    Raises:
        Exception: whatever transformers raises for a configuration or an attention that it does not take.
    """
    config_class = CONFIG_MAPPING[name]
    found = getattr(modeling_auto, _MAPPINGS[family][0])[config_class]
    model_class: Any = found[0] if isinstance(found, (tuple, list)) else found
    config = _config(config_class, name)
    text = getattr(config, "text_config", None)
    if text is not None and model_class.config_class is type(text):
        config = text
    torch.manual_seed(0)
    model: Any = model_class._from_config(config, attn_implementation=attention).to(dtype).train()
    _perturb(model)
    if family == "causal" and getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def make_inputs(model: Any, family: str, batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Token ids ``[batch, length]``, and labels whose first third is ignored, where the model is."""
    generator = torch.Generator().manual_seed(3)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or VOCABULARY
    ids = torch.randint(3, min(vocabulary, VOCABULARY) - 20, (batch, length), generator=generator).to(
        model.device
    )
    labels = ids.clone()
    labels[:, : length // 3] = -100
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids}
    if "labels" in takes or "kwargs" in takes:
        inputs["labels"] = labels
    if family == "causal" and "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


def _perturb(model: nn.Module) -> None:
    """Weights and gates that begin at zero would hide wrong gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                noise: Tensor = torch.randn(weight.shape, generator=generator)
                weight.add_(0.05 * noise.to(weight.dtype))


def _config(config_class: Any, name: str) -> Any:
    fields = _shrunk(_defaults(config_class))
    for key, given in _OVERRIDES.get(name, {}).items():
        part, _, field = key.rpartition(".")
        (fields.setdefault(part, {}) if part else fields)[field] = given
    config = config_class(**{key: given for key, given in fields.items() if given != _DROPPED})
    parts = (getattr(config, part, None) for part in getattr(config_class, "sub_configs", {}))
    for each in (config, *parts):
        if getattr(each, "use_cache", None):
            each.use_cache = False
    if (
        getattr(config, "is_encoder_decoder", False)
        and getattr(config, "decoder_start_token_id", None) is None
    ):
        config.decoder_start_token_id = 0
    return config


def _defaults(config_class: Any) -> dict[str, Any]:
    try:
        config = config_class()
    except Exception:  # without arguments it does not know what to be
        return {}
    hidden = {key: found for key, found in vars(config).items() if not key.startswith("_")}
    aliases = set(getattr(config_class, "attribute_map", None) or {})
    return {key: found for key, found in (hidden | config.to_dict()).items() if key not in aliases}


def _shrunk(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a small model's constructor is given, from the defaults of a large one."""
    heads = next((defaults[key] for key in _HEADS if isinstance(defaults.get(key), int)), None)
    small = {key: _small(key, default, heads) for key, default in defaults.items()}
    fields = {key: given for key, given in small.items() if given is not None}
    return fields | _layers(defaults, fields) | _tokens(defaults)


def _small(key: str, default: Any, heads: int | None) -> Any:
    """What a field is given; None: nothing."""
    if isinstance(default, dict):
        return _small_part(key, default)
    if isinstance(default, bool) or key in _TOKENS:
        return None
    if isinstance(default, (int, float)) and _DROPOUT.search(key):
        return 0.0
    return _size(key, default, heads) if isinstance(default, int) else None


def _small_part(key: str, default: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a field is given that holds fields."""
    if key == "rope_parameters" and default.get("rope_theta", 0) is None:
        return _ROPE
    if not (key.endswith("_config") or key in ("encoder", "decoder")) or key == "quantization_config":
        return None
    kind = default.get("model_type")
    return ({"model_type": kind} if kind else {}) | _shrunk(default)


def _tokens(defaults: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens of a model, inside of the small vocabulary."""
    if "vocab_size" not in defaults:
        return {}
    large = [
        key
        for key, default in defaults.items()
        if re.search(r"_token_(id|index)$", key) and isinstance(default, int) and default >= VOCABULARY
    ]
    known = {key: token for key, token in _TOKENS.items() if key in defaults}
    return dict.fromkeys(large, VOCABULARY - 1) | known


def _size(key: str, default: int, heads: int | None) -> int | None:
    """The small size of a field; None to leave it as it is."""
    size = next((size for pattern, size in _SIZES if pattern.search(key)), None)
    if key in ("num_key_value_heads", "num_kv_heads") and default == heads:
        size = 4  # as many as there are queries' heads
    return size if size is not None and default > max(size, 0) else None


def _layers(defaults: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """How many layers, and what is said of each of them in lists: the first of each kind, two to four."""
    count = next((defaults[key] for key in _LAYERS if isinstance(defaults.get(key), int)), None)
    if not count:
        return {}
    lists = {
        key: found
        for key, found in defaults.items()
        if isinstance(found, (list, tuple)) and len(found) == count > 3
    }
    kinds = _of(lists, (str, bool)) or _of(lists, (int, float))
    first: dict[tuple[Any, ...], int] = {}
    for index in range(count):
        first.setdefault(tuple(found[index] for found in kinds.values()), index)
    chosen = list(first.values())[:4]
    chosen = sorted(
        (chosen + [index for index in range(count) if index not in chosen])[: max(2, len(chosen))]
    )
    layers: dict[str, Any] = {key: len(chosen) for key in _LAYERS if key in fields}
    for key, found in lists.items():
        is_width = re.search(r"intermediate_size|ffn_dim", key)
        layers[key] = [4 * HIDDEN if is_width else found[index] for index in chosen]
    return layers


def _of(lists: Mapping[str, Sequence[Any]], types: tuple[type, ...]) -> dict[str, Sequence[Any]]:
    return {key: found for key, found in lists.items() if all(isinstance(x, types) for x in found)}
