"""Hugging Face's Trainer that compiles the model itself: torch_compile=True."""

from _common import OPTIONS, token_blocks, toy_llama
from transformers import Trainer, TrainingArguments

import mst_fx

arguments = TrainingArguments(
    output_dir="trainer-out",
    torch_compile=True,  # torch_compile_backend="mst" is refused: accelerate has a list of backends
    per_device_train_batch_size=2,
    max_steps=4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
trainer = Trainer(toy_llama(), arguments, train_dataset=token_blocks(8))
with mst_fx.enable(OPTIONS):  # from here to the end, torch.compile means mst
    trainer.train()
