"""TRL: what is rewritten under its trainers, and that losses and gradients are eager's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer
from trl import (  # type: ignore[attr-defined]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

import mst_fx
from tests.helpers import SMALL_CHUNKS, compile_mst
from tests.text import build_llama, texts

pytestmark = pytest.mark.usefixtures("no_collections")

_EAGER = {**SMALL_CHUNKS, "inner": "eager"}  # what compiles the rest of the graph is not TRL's matter


def _llama() -> Any:
    return build_llama(num_hidden_layers=1)


def _tokenizer() -> Any:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def _config(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **more,
    )


def _sft(model: Any, folder: Path, **more: Any) -> Any:
    peft = more.pop("peft_config", None)
    config = _config(SFTConfig, folder, max_steps=3, per_device_train_batch_size=2, max_length=64, **more)
    data = Dataset.from_dict({"text": texts(8, 80)})
    return SFTTrainer(model, config, train_dataset=data, processing_class=_tokenizer(), peft_config=peft)


def _dpo(model: Any, folder: Path, **more: Any) -> Any:
    reference = _llama()
    config = _config(DPOConfig, folder, **{"max_steps": 3, "per_device_train_batch_size": 2, **more})
    data = Dataset.from_list(
        [{"prompt": t[:16], "chosen": t[16:72], "rejected": t[72:16:-1]} for t in texts(8, 80)]
    )
    return DPOTrainer(model, reference, config, train_dataset=data, processing_class=_tokenizer())


def _letters(completions: list[str], **_: Any) -> list[float | None]:
    return [sum(c.isalpha() for c in text) / 8 for text in completions]


def _grpo(model: Any, folder: Path, **more: Any) -> Any:
    config = _config(
        GRPOConfig,
        folder,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        **more,
    )
    data = Dataset.from_dict({"prompt": texts(8, 48)})
    return GRPOTrainer(model, _letters, config, train_dataset=data, processing_class=_tokenizer())


def _train(make: Any, route: str, folder: Path, **more: Any) -> dict[str, list[float]]:
    torch._dynamo.reset()
    model = _llama()
    if route == "model.compile":
        model.compile(backend="mst", options=_EAGER)
    if route == "wrapper":
        model = compile_mst(model, _EAGER)
    trainer = make(model, folder, torch_compile=route == "enable", **more)
    enabled = mst_fx.enable(_EAGER) if route == "enable" else contextlib.nullcontext()
    with enabled:
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {key: [float(entry[key]) for entry in logged] for key in ("loss", "grad_norm")}


def _rewrites(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name == "mst_fx"]
    return [line for line in lines if " mlp" in line]


@pytest.mark.parametrize("route", ["model.compile", "enable"])
@pytest.mark.parametrize("make", [_sft, _dpo, _grpo])
def test_as_eager(make: Any, route: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLPs are chunked. The head is not mst's: TRL computes log-probabilities in tiles of its own."""
    caplog.set_level("INFO", "mst_fx")
    more = {"gradient_checkpointing": make is _sft}
    truth = _train(make, "eager", tmp_path, **more)
    assert not _rewrites(caplog)
    with mst_fx.watch() as report:
        found = _train(make, route, tmp_path, **more)
    if make is _sft and route == "model.compile":
        assert [finding.cause for finding in report.findings] == ["head-by-trainer"]
    assert all("1 mlp" in line for line in _rewrites(caplog))
    # With and without gradients; while text is generated, logits are an output, and lengths are dynamic.
    assert 1 <= len(_rewrites(caplog)) <= 4
    assert len(truth["loss"]) >= 2 and min(truth["grad_norm"]) > 0.1
    assert found["loss"] == pytest.approx(truth["loss"], rel=1e-4, abs=1e-6)
    assert found["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-4)


def test_sft_with_lora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mst_fx")

    def peft() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")

    truth = _train(_sft, "eager", tmp_path, peft_config=peft())
    found = _train(_sft, "enable", tmp_path, peft_config=peft())
    assert ["1 mlp; refused 0" in line for line in _rewrites(caplog)] == [True]
    assert found["loss"] == pytest.approx(truth["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-4)


def test_a_compiled_wrapper_runs_eagerly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the README says: TRL calls what is inside of ``torch.compile(model)``. When this fails, say less."""
    caplog.set_level("INFO", "mst_fx")
    _train(_sft, "wrapper", tmp_path)
    assert not _rewrites(caplog)


def test_checkpointing_that_is_switched_compiles_every_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the README says: around every reference pass TRL switches the model's checkpointing off and on,
    which adds a hook to its embedding. When this fails, say less."""
    caplog.set_level("INFO", "mst_fx")
    checkpointed: dict[str, Any] = {"gradient_checkpointing": True, "max_steps": 2}
    _train(_dpo, "model.compile", tmp_path, **checkpointed)
    assert len(_rewrites(caplog)) == 2  # a graph a step
    caplog.clear()
    _train(_dpo, "model.compile", tmp_path, **checkpointed, precompute_ref_log_probs=True)
    assert len(_rewrites(caplog)) == 1
