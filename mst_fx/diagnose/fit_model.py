"""What ``mst-fx fit`` is asked about: a model by its config, on ``meta``, of as many layers as are wanted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mst_fx.diagnose.configs import config_of, library, one_line
from mst_fx.diagnose.model_of import Shape, make_inputs, random_model
from mst_fx.errors import SubjectError
from mst_fx.fit.eager import recomputing_contexts
from mst_fx.fit.forecast import Subject


def subject_of(name: str, shape: Shape, lora: int = 0) -> Subject:
    """The model that a name says.

    Args:
        name: a short name of :data:`~mst_fx.diagnose.shapes.MODELS`, a folder or file with a config, a model or config class of
            transformers (its defaults), or a name on the Hugging Face hub.
        shape: overrides of the config's fields, batch and type; its length does not count.
        lora: rank of PEFT's LoRA on all linear layers but the head, all else frozen; 0: none.

    Raises:
        SubjectError: the name is unknown, or what it names cannot be built.
    """
    config, model_class = config_of(library("mst-fx fit"), name, shape.overrides)
    kinds = _kinds_of(config)

    @functools.cache
    def inputs(seq: int) -> Mapping[str, Tensor]:
        plain = random_model(model_class, _cut(config, 1), device="meta", dtype=shape.dtype)
        made = make_inputs(plain, Shape(batch=shape.batch, seq=seq, dtype=shape.dtype))
        if "labels" not in made:
            raise SubjectError(f"{model_class.__name__} takes no labels, so that it has no loss to train on")
        return {key: value.to("meta") for key, value in made.items()}

    def build(layers: int, checkpointed: bool) -> nn.Module:
        try:
            model = random_model(model_class, _cut(config, layers), device="meta", dtype=shape.dtype)
            model = _with_lora(model, lora, shape.dtype) if lora else model
        except SubjectError:
            raise
        except Exception as error:
            raise SubjectError(f"cannot build {model_class.__name__}: {one_line(error)}") from error
        if checkpointed:
            settings = {"use_reentrant": False, "context_fn": recomputing_contexts}
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(settings)
        for part in (model.config, model.config.get_text_config()):
            part.use_cache = False  # as transformers' Trainer
        made: nn.Module = model.train()
        return made

    count = sum(parameter.numel() for parameter in build(len(kinds), False).parameters())
    dtype = str(shape.dtype).removeprefix("torch.")
    adapters = f", LoRA of rank {lora}" if lora else ""
    title = f"{model_class.__name__}, {len(kinds)} layers: {count:,} {dtype} parameters{adapters}"
    return Subject(title, kinds, build, inputs)


def _kinds_of(config: Any) -> tuple[Hashable, ...]:
    """Of each layer what the config's lists of as many entries say of it."""
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise SubjectError(f"{type(config).__name__} does not say how many layers there are")
    lists = [vars(text)[name] for name in _lists(text, count)]
    return tuple(tuple(map(str, entries)) for entries in zip(*lists, strict=True)) if lists else ((),) * count


def _lists(text: Any, count: int) -> list[str]:
    return [
        n for n, value in vars(text).items() if isinstance(value, (list, tuple)) and len(value) == count > 1
    ]


def _cut(config: Any, layers: int) -> Any:
    """A config of the first layers of another."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name in _lists(text, text.num_hidden_layers):
        setattr(text, name, list(vars(text)[name])[:layers])
    text.num_hidden_layers = layers
    return config


def _with_lora(model: Any, rank: int, dtype: torch.dtype) -> Any:
    try:
        import peft
    except ImportError as error:
        raise SubjectError("--lora needs PEFT: pip install peft") from error
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.device("meta"):
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).to(dtype)
