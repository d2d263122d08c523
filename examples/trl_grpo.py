"""TRL: group relative policy optimisation; the reward is the share of ASCII letters."""

from _common import OPTIONS, texts, tokenizer, toy_llama
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def letters(completions: list[str], **_: object) -> list[float]:
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


model = toy_llama()
model.compile(backend="mst", options=OPTIONS)

arguments = GRPOConfig(
    output_dir="trainer-out",
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=16,
    max_steps=2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
data = Dataset.from_dict({"prompt": texts(8, 256)})
GRPOTrainer(model, letters, arguments, train_dataset=data, processing_class=tokenizer).train()
