"""Hugging Face's Trainer, 20 steps on real text: eager beside the two ways to hand it a model for mst.

What is trained another way (accumulation, checkpointing, bf16) takes 6 longer steps.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import mst_fx
from tests.helpers import SMALL_CHUNKS, compile_mst
from tests.operators import operators
from tests.text import build_llama, token_blocks

pytestmark = [pytest.mark.shares_compiled, pytest.mark.usefixtures("no_collections")]

ROUTES = ("model.compile", "enable")
_STEPS, _FEW = 20, 6
_SHORT: dict[str, Any] = {"steps": _FEW, "rate": 4e-3}
_LOOPS = ("mst_fx::loop", "mst_fx::loop_backward", "mst_fx::loop_with_grad")


def _llama() -> Any:
    return build_llama(num_hidden_layers=1)


def _options(route: str, gradient_checkpointing: bool = False, **_: Any) -> dict[str, Any]:
    """Of the two routes one goes without AOTAutograd, but where layers are run again: it runs less of them again."""
    is_traced = gradient_checkpointing or route == "model.compile"
    return SMALL_CHUNKS if is_traced else {**SMALL_CHUNKS, "inner": "eager"}


def _accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    kept = labels != -100
    size = float(np.abs(prediction.predictions).mean())
    return {"accuracy": float((guesses[kept] == labels[kept]).mean()), "size": size}


class _Trainer(Trainer):
    """Counts the loops that run in the second step: what was compiled before is used again, and not spoken of."""

    loops: collections.Counter[str]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 0:
            self.loops = collections.Counter()
        if self.state.global_step != 1:
            return super().training_step(*args, **kwargs)
        losses: list[Tensor] = []
        ran = operators(lambda: losses.append(super(_Trainer, self).training_step(*args, **kwargs)))
        self.loops.update(name for name, _ in ran if name in _LOOPS)
        return losses[0]


def _train(
    route: str, folder: Path, model: nn.Module, *, steps: int = _STEPS, rate: float = 1e-3, **arguments: Any
) -> _Trainer:
    data = token_blocks(44, 64)
    chosen = TrainingArguments(
        output_dir=str(folder / route),
        torch_compile=route == "enable",
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=steps // 2,
        save_steps=steps // 2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    if route == "model.compile":
        model.compile(backend="mst", options=_options(route, **arguments))
    trainer = _Trainer(
        model, chosen, train_dataset=data[:40], eval_dataset=data[40:], compute_metrics=_accuracy
    )
    enabled = mst_fx.enable(_options(route, **arguments)) if route == "enable" else contextlib.nullcontext()
    with enabled:
        trainer.train()
    return trainer


def _logged(trainer: Trainer, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def _check_rewrites(trainer: _Trainer, infos: pytest.LogCaptureFixture, batches: int = 1) -> None:
    """A loop for the MLP and one for the loss in each batch; nothing is refused where anything is compiled."""
    assert trainer.loops == dict.fromkeys(_LOOPS, batches)
    said = [message for message in infos.messages if "rewrote" in message]
    assert all("refused 0" in message for message in said)
    # torch 2.11 breaks the graph behind a checkpointed layer while it evaluates; of what an earlier test has compiled
    # nothing is said.
    mlps, heads = (sum(f"1 {kind}" in message for message in said) for kind in ("mlp", "vocab"))
    assert mlps == heads and (mlps or not said)


def _agree(found: Trainer, truth: Trainer, bar: float = 1e-5, size_bar: float = 1e-5) -> None:
    steps = truth.args.max_steps
    for key, count in (("loss", steps), ("grad_norm", steps), ("eval_loss", 2), ("eval_size", 2)):
        values = _logged(truth, key)
        assert len(values) == count
        assert _logged(found, key) == pytest.approx(values, rel=bar if key.endswith("loss") else size_bar)
    assert _logged(found, "eval_accuracy") == _logged(truth, "eval_accuracy")
    assert _logged(truth, "loss")[-1] < _logged(truth, "loss")[0] - 0.5  # it learns


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return _train("eager", tmp_path_factory.mktemp("eager"), _llama())


@functools.cache
def _truth(arguments: tuple[tuple[str, Any], ...]) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        return _train("eager", Path(folder), _llama(), **_SHORT, **dict(arguments))


@pytest.fixture
def infos(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "mst_fx")
    return caplog


@pytest.mark.parametrize("route", ROUTES)
def test_twenty_steps(route: str, eager: Trainer, tmp_path: Path, infos: pytest.LogCaptureFixture) -> None:
    trainer = _train(route, tmp_path, _llama())
    _check_rewrites(trainer, infos)
    _agree(trainer, eager)

    checkpoint = tmp_path / route / f"checkpoint-{_STEPS}"
    weights = load_file(checkpoint / "model.safetensors")
    assert weights.keys() == _llama().state_dict().keys()
    reloaded = LlamaForCausalLM.from_pretrained(checkpoint)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    for name, parameter in trained.named_parameters():
        assert torch.equal(reloaded.get_parameter(name), parameter)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("arguments", "bar", "size_bar"),
    [
        ({"gradient_accumulation_steps": 2}, 1e-5, 1e-5),
        ({"gradient_checkpointing": True}, 1e-5, 1e-5),
        ({"bf16": True}, 2e-4, 1e-2),  # sums in another order round to other bfloat16s
    ],
    ids=["accumulation", "checkpointing", "bf16"],
)
def test_variants(
    route: str,
    arguments: dict[str, Any],
    bar: float,
    size_bar: float,
    tmp_path: Path,
    infos: pytest.LogCaptureFixture,
) -> None:
    trainer = _train(route, tmp_path, _llama(), **_SHORT, **arguments)
    _check_rewrites(trainer, infos, arguments.get("gradient_accumulation_steps", 1))
    _agree(trainer, _truth(tuple(arguments.items())), bar, size_bar)


def test_a_compiled_wrapper(eager: Trainer, tmp_path: Path) -> None:
    """Why ``model.compile`` is what to use: ``torch.compile(model)`` hides the names of forward's arguments,
    by which Trainer picks columns and finds labels to evaluate with, and renames weights in checkpoints."""
    model = compile_mst(_llama())
    with pytest.raises(ValueError, match="The batch received was empty"):
        _train("wrapper", tmp_path, model)
    trainer = _train("wrapper", tmp_path, model, remove_unused_columns=False)
    assert _logged(trainer, "loss") == pytest.approx(_logged(eager, "loss"), rel=1e-5)
    assert not _logged(trainer, "eval_loss")
    weights = load_file(tmp_path / "wrapper" / f"checkpoint-{_STEPS}" / "model.safetensors")
    assert all(name.startswith("_orig_mod.") for name in weights)


def test_a_named_backend_is_refused_by_accelerate(tmp_path: Path) -> None:
    """As the README says: the list of backends is accelerate's. When this fails, the README can be shorter."""
    arguments = TrainingArguments(output_dir=str(tmp_path), torch_compile_backend="mst", use_cpu=True)
    with pytest.raises(ValueError, match="'MST' is not a valid DynamoBackend"):
        Trainer(_llama(), arguments, train_dataset=token_blocks(4, 64))


@pytest.mark.parametrize("route", ROUTES)
def test_resumed(route: str, eager: Trainer, tmp_path: Path) -> None:
    """The second half, from the checkpoint in the middle, is eager's."""
    checkpoint = Path(str(eager.args.output_dir)) / f"checkpoint-{_STEPS // 2}"
    model = _llama()
    if route == "model.compile":
        model.compile(backend="mst", options=_options(route))
    arguments = TrainingArguments(
        **{**eager.args.to_dict(), "output_dir": str(tmp_path), "torch_compile": route == "enable"}
    )
    resumed = Trainer(
        model, arguments, train_dataset=token_blocks(44, 64)[:40], eval_dataset=eager.eval_dataset
    )
    with mst_fx.enable(_options("enable")):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert _logged(resumed, "loss") == pytest.approx(_logged(eager, "loss"), rel=1e-5)
