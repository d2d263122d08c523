"""What ``mst-fx explain`` and ``mst-fx diff`` look at: a model with arguments to call it with.

Built from a name: a Hugging Face model or config class (random weights, on the CPU), or the user's own
``module:function``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


class SubjectError(ValueError):
    """The user named something that cannot be built or called; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function or module, and the arguments of one training step.

    Attributes:
        title: what it is, in one line.
        shrunk: sizes that differ from the config's defaults only to be quick: name → (default, used).
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    title: str
    shrunk: dict[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a Hugging Face model is built and called.

    Attributes:
        overrides: fields of its config, by name or by the config's own alias.
        full_size: keep the sizes of the config's defaults.
        labels: call it with labels, so that its loss is in the graph.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 1
    seq: int = 1024
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    labels: bool = True
    full_size: bool = False


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


def build_subject(name: str, shape: Shape) -> Subject:
    """Builds what a name says.

    Args:
        name: a class of transformers (``LlamaForCausalLM``, ``LlamaConfig``), or ``module:function``:
            a function without arguments that returns ``(fn_or_module, args, kwargs)``. The module is
            found as ``python -m`` would find it.

    Raises:
        SubjectError: the name is unknown, or what it names cannot be built.
    """
    return _from_function(name) if ":" in name else _from_transformers(name, shape)


def _from_function(name: str) -> Subject:
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SubjectError(f"cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SubjectError(f"{module_name!r} has no function {function_name!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 3 and callable(made[0])):
        raise SubjectError(f"{name} must return (fn_or_module, args, kwargs), not {type(made).__name__}")
    fn, args, kwargs = made
    return Subject(fn, tuple(args), dict(kwargs), name, {})


def _from_transformers(name: str, shape: Shape) -> Subject:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise SubjectError(
            f"{name!r} needs transformers (pip install 'mst-fx[hf]'); models of your own are given as module:function"
        ) from error
    try:
        named: Any = getattr(transformers, name)
    except AttributeError:
        raise SubjectError(
            f"transformers {transformers.__version__} has no class {name!r}"
            + did_you_mean(name, dir(transformers))
        ) from None
    model_class: Any = None
    config_class: Any = None
    is_class = isinstance(named, type)
    if is_class and issubclass(named, transformers.PreTrainedModel):
        model_class, config_class = named, named.config_class
    elif is_class and issubclass(named, transformers.PreTrainedConfig):
        model_class, config_class = model_class_of(transformers, named), named
    if config_class is None:
        raise SubjectError(f"{name!r} of transformers is neither the class of one model nor that of a config")
    config, shrunk = _make_config(config_class, shape)
    try:
        model = random_model(model_class, config, checkpointing=shape.checkpointing).to(shape.dtype)
    except Exception as error:
        raise SubjectError(f"cannot build {model_class.__name__}: {one_line(error)}") from error
    kwargs = make_inputs(model, shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    inputs = ", ".join(f"{key} {list(value.shape)}" for key, value in kwargs.items())
    dtype = str(shape.dtype).removeprefix("torch.")
    title = f"{model_class.__name__}: {count:,} random {dtype} weights; {inputs}"
    return Subject(model, (), kwargs, title + (", checkpointing" if shape.checkpointing else ""), shrunk)


def random_model(
    model_class: Callable[[Any], Any],
    config: Any,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Any:
    """A model of transformers with random weights (seed 0), in training mode.

    Args:
        dtype: in which it is made.
        checkpointing: of each layer, where the model can.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        # Its name in transformers 5.23 and on; the other one is deprecated there.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def model_class_of(transformers: Any, config_class: Any) -> Any:
    """The model class of a config: with a language-model head, if there is one."""
    for auto in _AUTO_CLASSES:
        found = getattr(transformers, auto)._model_mapping.get(config_class, None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    raise SubjectError(f"transformers has no model for {config_class.__name__}")


def _make_config(config_class: Any, shape: Shape) -> tuple[Any, dict[str, tuple[int, int]]]:
    """A config with the user's overrides, and with small sizes for what they do not name."""
    aliases = dict(getattr(config_class, "attribute_map", {}) or {})
    overrides = {aliases.get(name, name): value for name, value in shape.overrides.items()}
    try:
        default = config_class()
        known = default.to_dict().keys() | {name for name in vars(default) if not name.startswith("_")}
        for name in overrides:
            if name not in known:
                hint = did_you_mean(name, [*known, *aliases])
                raise SubjectError(f"{config_class.__name__} has no field {name!r}{hint}")
        small, shrunk = ({}, {}) if shape.full_size else _small_sizes(default, overrides)
        required = {**_positions(default, shape.seq), **_decoder_start(default)}
        return config_class(**{**required, **small, **overrides}), shrunk
    except SubjectError:
        raise
    except Exception as error:
        raise SubjectError(f"cannot build {config_class.__name__}: {one_line(error)}") from error


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


def make_inputs(model: Any, shape: Shape) -> dict[str, torch.Tensor]:
    """Random arguments for a model's forward.

    Raises:
        SubjectError: it takes neither tokens nor pixels.
    """
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def integers(below: int, *size: int) -> torch.Tensor:
        return torch.randint(below, size, generator=generator)

    inputs: dict[str, torch.Tensor] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "input_ids" in accepted:
        inputs["input_ids"] = integers(text.vocab_size, shape.batch, shape.seq)
    elif "pixel_values" in accepted:
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        size = (shape.batch, config.num_channels, side, side)
        inputs["pixel_values"] = torch.randn(size, generator=generator).to(shape.dtype)
    else:
        takes = model.main_input_name
        raise SubjectError(
            f"{type(model).__name__} takes {takes!r}, neither tokens nor pixels; give it as module:function"
        )
    if shape.labels and "labels" in accepted:
        name = type(model).__name__
        if "Classification" not in name:
            inputs["labels"] = inputs["input_ids"] if "input_ids" in inputs else integers(2, shape.batch)
        elif "TokenClassification" in name:
            inputs["labels"] = integers(config.num_labels, shape.batch, shape.seq)
        else:
            inputs["labels"] = integers(config.num_labels, shape.batch)
    elif "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    # As in training: transformers' Trainer turns the cache off too.
    if hasattr(text, "use_cache"):
        text.use_cache = False
    return inputs


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
