"""Hugging Face's Trainer with a model that is compiled in place."""

from _common import OPTIONS, token_blocks, toy_llama
from transformers import Trainer, TrainingArguments

model = toy_llama()
model.compile(backend="mst", options=OPTIONS)  # not torch.compile(model), whose wrapper others unpack

arguments = TrainingArguments(
    output_dir="trainer-out",
    per_device_train_batch_size=2,
    max_steps=4,
    logging_steps=1,
    gradient_checkpointing=True,  # as you like: it works with and without; newer: activation_checkpointing
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
Trainer(model, arguments, train_dataset=token_blocks(8)).train()
