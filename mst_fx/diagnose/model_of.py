"""What ``mst-fx explain`` and its kin look at: a model with arguments to call it with.

Built from a name: a model or config of Hugging Face, with random weights on the CPU, or of its full size on ``meta``; or the user's
own ``module:function``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mst_fx.diagnose.configs import (
    classes_of,
    config_of,
    is_class_name,
    library,
    one_line,
    required_fields,
    small_config,
)
from mst_fx.diagnose.programs import call_of
from mst_fx.errors import SubjectError

_SEQ, _FULL_SEQ = 1024, 2**15  # tokens, if nobody says how many


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function or module, and the arguments of one training step.

    Attributes:
        title: what it is, in one line.
        shrunk: sizes that differ from the config's defaults only to be quick: name → (default, used).
        is_meta: it has no memory: it is traced, and cannot be run.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    title: str
    shrunk: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    is_meta: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a Hugging Face model is built and called.

    Attributes:
        overrides: fields of its config, by name or by the config's own alias.
        labels: call it with labels, so that its loss is in the graph.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 1
    seq: int = 1024
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    labels: bool = True


def build_subject(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    batch: int | None = None,
    seq: int | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    labels: bool = True,
    full_size: bool = False,
) -> Subject:
    """Builds what a name says.

    Args:
        name: a class of transformers (``LlamaForCausalLM``, ``LlamaConfig``), small unless ``full_size``; a short name, a folder or
            file with a config, or a name on the hub, of its full size; ``module:function`` or ``file.py:function``: a function that
            returns ``(fn_or_module, args, kwargs)``.
        overrides: fields of the config; of a function, its arguments.
        batch, seq, dtype: None: as is usual; a function is given what is not None, by name, and ``checkpointing`` and ``labels``
            if they are not the default.

    Raises:
        SubjectError: the name is unknown, or what it names cannot be built.
        ProgramError: the user's function raised.
    """
    given = {"batch": batch, "seq": seq, "dtype": dtype, "checkpointing": checkpointing or None}
    if ":" in name:
        if full_size:
            raise SubjectError(f"--full-size is for models by name; {name} has the sizes that it makes")
        said = {**given, "labels": None if labels else False}
        fn, args, kwargs = call_of(
            name, {**{key: value for key, value in said.items() if value is not None}, **(overrides or {})}
        )
        return Subject(fn, args, kwargs, name)
    is_full = full_size or not is_class_name(name)
    shape = Shape(
        overrides or {},
        batch or 1,
        seq or (_FULL_SEQ if is_full else _SEQ),
        dtype or (torch.bfloat16 if is_full else torch.float32),
        checkpointing,
        labels,
    )
    return _from_transformers(name, shape, is_full)


def _from_transformers(name: str, shape: Shape, is_full: bool) -> Subject:
    transformers = library(name)
    shrunk: dict[str, tuple[int, int]] = {}
    if is_full:
        config, model_class = config_of(transformers, name, shape.overrides)
        for field, value in required_fields(config, shape.seq).items():
            setattr(config, field, value)
    else:
        config_class, model_class = classes_of(transformers, name)
        config, shrunk = small_config(config_class, shape.overrides, shape.seq)
    device = "meta" if is_full else "cpu"
    try:
        # Of the full size in its type at once: float32 and a cast would be two models, if not in memory.
        made_in = shape.dtype if is_full else torch.float32
        model = random_model(
            model_class, config, device=device, dtype=made_in, checkpointing=shape.checkpointing
        ).to(shape.dtype)
    except Exception as error:
        raise SubjectError(f"cannot build {model_class.__name__}: {one_line(error)}") from error
    kwargs = {key: value.to(device) for key, value in make_inputs(model, shape).items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    inputs = ", ".join(f"{key} {list(value.shape)}" for key, value in kwargs.items())
    dtype = str(shape.dtype).removeprefix("torch.")
    weights = f"{count:,} {dtype} weights, without memory" if is_full else f"{count:,} random {dtype} weights"
    title = f"{model_class.__name__}: {weights}; {inputs}"
    return Subject(
        model, (), kwargs, title + (", checkpointing" if shape.checkpointing else ""), shrunk, is_full
    )


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
