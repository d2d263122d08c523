"""The config that a name says: of its own sizes, or shrunk to be quick."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mst_fx.diagnose.shapes import CLASSES, MODELS
from mst_fx.errors import SubjectError, did_you_mean

# Enough of everything to have the structure of the full size (grouped heads, several layers and
# experts, MLPs and logits wider than the model), and no more.
_SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size"), 256),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
_LONGEST_MESSAGE = 400
_POSITIONS = ("max_position_embeddings", "n_positions")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# RoBERTa and its like number positions from pad_token_id + 1 on.
_SPARE_POSITIONS = 8

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def library(name: str) -> Any:
    """The module ``transformers``.

    Args:
        name: what needs it.

    Raises:
        SubjectError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SubjectError(
            f"{name!r} needs transformers (pip install 'mst-fx[hf]'); models of your own are given as module:function"
        ) from error


def is_class_name(name: str) -> bool:
    """Whether a name can be a class of transformers: no short name, file, folder or name on the hub."""
    return name.isidentifier() and name not in MODELS and not Path(name).exists()


def config_of(transformers: Any, name: str, overrides: Mapping[str, Any]) -> tuple[Any, Any]:
    """A config of its own sizes, and the model's class.

    Args:
        name: a short name of :data:`~mst_fx.diagnose.shapes.MODELS`, a folder or file with a config, a model or config class of
            transformers (its defaults), or a name on the Hugging Face hub.
        overrides: fields of the config, by name or by the config's own alias.

    Raises:
        SubjectError: there is none.
    """
    path = Path(name)
    if not path.exists() and (path.suffix == ".json" or name.startswith((".", "/", "~"))):
        raise SubjectError(f"there is no file or folder {name}")
    try:
        if name in MODELS:
            family, known = MODELS[name]
            config_class = getattr(transformers, f"{CLASSES[family]}Config")
            config = _made(config_class, {**known, **overrides})
            return config, getattr(transformers, f"{CLASSES[family]}ForCausalLM")
        if is_class_name(name):
            config_class, model_class = classes_of(transformers, name)
            return _made(config_class, overrides), model_class
        if path.is_file():
            given = json.loads(path.read_text(encoding="utf-8"))
            kind = given.pop("model_type", None)
            if kind is None:
                raise SubjectError(f"{name} has no field 'model_type', which says what model it is")
            config = transformers.AutoConfig.for_model(kind, **given)
        else:
            config = transformers.AutoConfig.from_pretrained(name)
        _check_fields(type(config), config, overrides)
        if overrides:
            config = type(config)(**{**config.to_dict(), **_named(type(config), overrides)})
        return config, _named_class(transformers, config) or model_class_of(transformers, type(config))
    except SubjectError:
        raise
    except Exception as error:
        hint = "" if path.exists() else " (a folder or file with its config serves, too)"
        raise SubjectError(f"there is no config of {name!r}: {one_line(error)}{hint}") from error


def check_class(transformers: Any, name: str) -> None:
    """Asks whether transformers has a class of that name, without its code, which imports torch.

    Raises:
        SubjectError: it has none.
    """
    known = dir(transformers)
    if name not in known:
        hint = did_you_mean(name, [*MODELS, *known]) or f"; short names: {', '.join(MODELS)}"
        raise SubjectError(f"transformers {transformers.__version__} has no class {name!r}{hint}")


def classes_of(transformers: Any, name: str) -> tuple[Any, Any]:
    """The config's class and the model's that a name of a class says.

    Raises:
        SubjectError: it says none.
    """
    check_class(transformers, name)
    named: Any = getattr(transformers, name)
    is_class = isinstance(named, type)
    if is_class and issubclass(named, transformers.PreTrainedModel) and named.config_class is not None:
        return named.config_class, named
    if is_class and issubclass(named, transformers.PreTrainedConfig):
        return named, model_class_of(transformers, named)
    raise SubjectError(
        f"{name!r} of transformers is neither the class of one model nor that of a config; name one, as"
        " Qwen2ForCausalLM, or a model on the hub"
    )


def _named_class(transformers: Any, config: Any) -> Any:
    """The class that a checkpoint's config says, if transformers has it."""
    names = getattr(config, "architectures", None) or ()
    return next((getattr(transformers, n) for n in names if getattr(transformers, n, None) is not None), None)


def _made(config_class: Any, given: Mapping[str, Any]) -> Any:
    _check_fields(config_class, config_class(), given)
    return config_class(**given)


def _check_fields(config_class: Any, config: Any, given: Mapping[str, Any]) -> None:
    """
    Raises:
        SubjectError: a config has no such field.
    """
    fields = {name for name in vars(config) if not name.startswith("_")}
    implementations = {"attn_implementation", "experts_implementation"}  # which its constructor takes
    aliases = set(getattr(config_class, "attribute_map", None) or ())
    known = fields | aliases | implementations | set(config.to_dict())
    for name in given:
        if name not in known:
            raise SubjectError(f"{config_class.__name__} has no field {name!r}{did_you_mean(name, known)}")


def _named(config_class: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by the names that the config has, not by their aliases."""
    aliases = dict(getattr(config_class, "attribute_map", None) or {})
    return {aliases.get(name, name): value for name, value in overrides.items()}


def model_class_of(transformers: Any, config_class: Any) -> Any:
    """The model class of a config: with a language-model head, if there is one."""
    for auto in _AUTO_CLASSES:
        found = getattr(transformers, auto)._model_mapping.get(config_class, None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    raise SubjectError(f"transformers has no model for {config_class.__name__}")


def small_config(
    config_class: Any, given: Mapping[str, Any], seq: int
) -> tuple[Any, dict[str, tuple[int, int]]]:
    """A config with the user's overrides, and with small sizes for what they do not name, which are returned beside it.

    Args:
        given: fields, by name or by the config's own alias.
        seq: tokens that it has positions for.

    Raises:
        SubjectError: it has no such field, or cannot be made of them.
    """
    overrides = _named(config_class, given)
    try:
        default = config_class()
        _check_fields(config_class, default, given)
        small, shrunk = _small_sizes(default, overrides)
        return config_class(**{**required_fields(default, seq), **small, **overrides}), shrunk
    except SubjectError:
        raise
    except Exception as error:
        raise SubjectError(f"cannot build {config_class.__name__}: {one_line(error)}") from error


def required_fields(config: Any, seq: int) -> dict[str, int]:
    """What a config needs beside its defaults for so many tokens."""
    return {**_positions(config, seq), **_decoder_start(config)}


def _small_sizes(
    config: Any, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Constructor arguments that shrink a config (and those of its parts), and what they shrink."""
    small: dict[str, Any] = {}
    shrunk: dict[str, tuple[int, int]] = {}
    aliases = dict(getattr(config, "attribute_map", {}) or {})
    names = {aliases.get(name, name): size for name, size in _SMALL.items()}
    heads = getattr(config, "num_attention_heads", None)
    for name, size in names.items():
        value = vars(config).get(name)
        if not isinstance(value, int) or name in overrides:
            continue
        if name == "num_key_value_heads" and value == heads:
            size = overrides.get(aliases.get("num_attention_heads", "num_attention_heads"), 4)
        if value > size:
            small[name] = size
            shrunk[name] = (value, size)
    vocabulary = overrides.get("vocab_size", small.get("vocab_size"))
    for name in _TOKENS:
        value = vars(config).get(name)
        if (
            vocabulary is not None
            and name not in overrides
            and isinstance(value, int)
            and value >= vocabulary
        ):
            small[name] = vocabulary - 1
    for part in getattr(config, "sub_configs", {}):
        child = vars(config).get(part)
        if child is not None and part not in overrides:
            sizes, inner = _small_sizes(child, {})
            small[part] = {**_given(child), **sizes}
            shrunk |= {f"{part}.{name}": change for name, change in inner.items()}
    return small, shrunk


def _given(config: Any) -> dict[str, Any]:
    """What a part's constructor needs to know: which of several models' config it is."""
    return {"model_type": config.model_type} if getattr(config, "model_type", "") else {}


def _positions(config: Any, seq: int) -> dict[str, int]:
    """As many learned positions as the sequence needs."""
    needed = seq + _SPARE_POSITIONS
    values = {name: vars(config).get(name) for name in _POSITIONS}
    return {name: needed for name, value in values.items() if isinstance(value, int) and 0 < value < needed}


def _decoder_start(config: Any) -> dict[str, int]:
    """The token that decoders begin with, where the defaults leave it to a checkpoint (T5)."""
    is_missing = getattr(config, "decoder_start_token_id", None) is None
    if not (getattr(config, "is_encoder_decoder", False) and is_missing):
        return {}
    return {"decoder_start_token_id": config.pad_token_id or 0}


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
