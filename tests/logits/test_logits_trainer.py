"""Deferred logits under Hugging Face's Trainer, and what a training step allocates there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import VOCAB
from tools.meters.cpu import call_metered, is_available, malloc_meter

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("no_collections"),
]

OPTIONS = {"chunk_rows": 16, "vocab_chunk_rows": 20}
LENGTH, BATCH = 48, 2


def _llama(vocabulary: int, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]


def _rows(count: int, length: int, vocabulary: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def _trainer(folder: Path, model: Any, rows: list[dict[str, Any]], **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    logging.getLogger("transformers").setLevel(logging.ERROR)
    keys = (
        "compute_metrics",
        "preprocess_logits_for_metrics",
        "callbacks",
        "compute_loss_func",
        "eval_dataset",
    )
    of_trainer = {key: more.pop(key) for key in keys if key in more}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        seed=0,
        **{"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "max_steps": 3, **more},
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, **of_trainer)  # type: ignore[arg-type]


def _metrics(prediction: Any) -> dict[str, float]:
    logits = np.asarray(prediction.predictions, dtype=np.float64)
    hits = logits.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {
        "accuracy": float(hits.mean()),
        "norm": float(np.linalg.norm(logits)),
        "rows": float(logits.shape[1]),
    }


def _loss_of_logits(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A user's own loss, on top of what the model computed."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


_OWN_GRAPHS = {"label_smoothing_factor", "compute_loss_func", "bf16", "gradient_checkpointing"}


@pytest.mark.shares_compiled(automatic_dynamic=True)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"compute_metrics": _metrics},
        {
            "compute_metrics": _metrics,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.float() * 2,
        },
        {"label_smoothing_factor": 0.1, "compute_metrics": _metrics},
        {"compute_loss_func": _loss_of_logits, "compute_metrics": _metrics},
        {"gradient_accumulation_steps": 2, "eval_accumulation_steps": 1, "compute_metrics": _metrics},
        {"bf16": True, "bf16_full_eval": True, "compute_metrics": _metrics},
        {"gradient_checkpointing": True, "prediction_loss_only": True},
    ],
    ids=lambda more: ", ".join(more) or "plain",
)
def test_trainer(tmp_path: Path, more: dict[str, Any]) -> None:
    """Losses, gradient norms, metrics and predictions are eager's."""
    found = {}
    rows = _rows(12, LENGTH, VOCAB)
    # The last batch is smaller, but where that would only compile one graph more.
    evaluated = rows[: 2 if more.keys() & {"bf16", "gradient_checkpointing"} else 3]
    inner = "eager" if more.keys() & _OWN_GRAPHS else "aot_eager"
    for way in ("eager", "mst"):
        model = _llama(VOCAB)
        if way == "mst":
            model.compile(backend="mst", options={**OPTIONS, "inner": inner})
        trainer = _trainer(tmp_path, model, rows, eval_dataset=evaluated, **more)
        before = trainer.evaluate()
        trainer.train()
        logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
        assert len(logs) == 3
        predicted = trainer.predict(trainer.eval_dataset)
        values = {k: v for k, v in predicted.metrics.items() if "time" not in k and "second" not in k}
        found[way] = (logs, before["eval_loss"], values, predicted.predictions)
    bar = 2e-2 if "bf16" in more else 1e-4
    np.testing.assert_allclose(found["mst"][0], found["eager"][0], rtol=bar)
    assert found["mst"][1] == pytest.approx(found["eager"][1], rel=bar)
    assert found["mst"][2] == pytest.approx(found["eager"][2], rel=bar)
    if not more.get("prediction_loss_only"):
        np.testing.assert_allclose(found["mst"][3], found["eager"][3], rtol=bar, atol=bar)


# What a step allocates

_SEQ, _WIDE = 256, 6000


# The dtype, the batches of a step and the option "logits": the meter sees logits where they are.
_MEASURED = [
    ("float32", 1, "auto"),
    ("float32", 2, "auto"),
    ("float32", 1, "keep"),
    ("bfloat16", 1, "auto"),
    ("bfloat16", 2, "auto"),
    ("bfloat16", 1, "keep"),
]


def _largest_blocks(folder: str) -> list[list[int]]:
    """The largest block, in bytes, that each warm step of a Trainer allocates, for each of ``_MEASURED``."""
    from transformers import TrainerCallback

    meter = malloc_meter()

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.largest: list[int] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.reset()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.largest.append(max(size for _, _, size in meter.events()))

    found = []
    for dtype, accumulate, logits in _MEASURED:
        model = _llama(_WIDE, getattr(torch, dtype))
        inner = "aot_eager" if dtype == "float32" else "eager"
        options = {"inner": inner, "chunk_rows": 64, "vocab_chunk_rows": 32, "logits": logits}
        model.compile(backend="mst", options=options)
        rows, watch = _rows(8 * accumulate, _SEQ, _WIDE), Watch()
        more = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 1}
        _trainer(Path(folder), model, rows, callbacks=[watch], **more).train()
        found.append(watch.largest[1:])  # the first one compiles
    return found


@pytest.mark.skipif(not is_available(), reason="needs Linux and a C compiler")
def test_a_trainers_step_allocates_no_logits(tmp_path: Path) -> None:
    found = call_metered(_largest_blocks, str(tmp_path))
    for (dtype, _, logits), largest in zip(_MEASURED, found, strict=True):
        wide = _SEQ * _WIDE * getattr(torch, dtype).itemsize
        assert len(largest) == 2
        if logits == "auto":
            assert max(largest) < wide / 2
        else:
            assert max(largest) >= wide
