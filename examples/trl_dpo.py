"""TRL: direct preference optimisation. The second half of a file is chosen, a shuffled one rejected."""

from _common import OPTIONS, texts, tokenizer, toy_llama
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

model, reference = toy_llama(), toy_llama()
model.compile(backend="mst", options=OPTIONS)
reference.compile(backend="mst", options=OPTIONS)

arguments = DPOConfig(
    output_dir="trainer-out",
    per_device_train_batch_size=2,
    max_length=512,
    max_steps=4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    gradient_checkpointing=False,  # TRL would switch it off and on in every step, and all be compiled anew
    use_cpu=True,
    bf16=False,
)
rows = [{"prompt": t[:128], "chosen": t[128:500], "rejected": t[500:128:-1]} for t in texts(8)]
data = Dataset.from_list(rows)
DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=tokenizer).train()
