"""TRL: supervised fine-tuning."""

from _common import OPTIONS, texts, tokenizer, toy_llama
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

model = toy_llama()
model.compile(backend="mst", options=OPTIONS)

arguments = SFTConfig(
    output_dir="trainer-out",
    per_device_train_batch_size=2,
    max_length=512,
    max_steps=4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
data = Dataset.from_dict({"text": texts(8)})
SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
