"""Lightning."""

import lightning as L
import torch
from _common import OPTIONS, token_blocks, toy_llama
from torch import Tensor
from torch.utils.data import DataLoader


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = toy_llama()
        self.model.compile(backend="mst", options=OPTIONS)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        print(f"loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(Task(), DataLoader(token_blocks(8), batch_size=2))
