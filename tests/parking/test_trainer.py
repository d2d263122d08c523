"""Hugging Face's Trainer with an optimizer that is parked: the bits of one that is not, over a checkpoint that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from transformers import Trainer, TrainingArguments

import mst_fx
from tests.parking.twins import BUCKET, WIDTH, Layers, on_device


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Layers()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.inner(x) - labels).square().mean()}


def _train(folder: Path, is_parked: bool, resumed: Any = None) -> tuple[_Model, Any]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(24, WIDTH, generator=made)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = _Model()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    if is_parked:
        mst_fx.park(optimizer, bucket=BUCKET)
    data: Any = [{"x": row, "labels": row.flip(0)} for row in x]
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resumed)
    return model, optimizer


def test_trainer(tmp_path: Path) -> None:
    plain, _ = _train(tmp_path / "plain", is_parked=False)
    parked, optimizer = _train(tmp_path / "parked", is_parked=True)
    resumed, other = _train(
        tmp_path / "resumed", is_parked=True, resumed=str(tmp_path / "plain" / "checkpoint-3")
    )
    for model in (parked, resumed):
        assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert on_device(optimizer) == on_device(other) == []
