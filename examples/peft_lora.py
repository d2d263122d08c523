"""PEFT: LoRA adapters on a frozen model."""

from _common import OPTIONS, token_blocks, toy_llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

config = LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(toy_llama(), config)
model.compile(backend="mst", options=OPTIONS)  # after get_peft_model

arguments = TrainingArguments(
    output_dir="trainer-out",
    per_device_train_batch_size=2,
    max_steps=4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
Trainer(model, arguments, train_dataset=token_blocks(8)).train()
