"""Hugging Face's Trainer with nothing of mst in it: mst-fx run --report examples/hf_trainer_run.py --output_dir out --max_steps 4 --use_cpu"""

from _common import token_blocks, toy_llama
from transformers import HfArgumentParser, Trainer, TrainingArguments

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
trainer = Trainer(toy_llama(), arguments, train_dataset=token_blocks(8))
trainer.train()
if trainer.is_world_process_zero():
    print("losses", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
