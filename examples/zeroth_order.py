"""Zeroth-order fine-tuning (MeZO, arXiv 2305.17333): two forward passes a step, in the memory of a prefill."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

steps, tokens, epsilon, rate = int(sys.argv[1]) if len(sys.argv) > 1 else 40, 1024, 1e-3, 4e-3

# A toy that reads bytes, trained on the source of Python's standard library.
text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()  # no dropout: the two passes must be the same function
model.compile(backend="mst")


def perturb(seed: int, scale: float) -> None:
    """Adds scale x noise in place; the noise is made anew from its seed, never kept."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


with torch.no_grad():
    for step in range(steps):
        chunk = text[step * 64 % (len(text) - tokens) :][:tokens]
        ids = torch.frombuffer(bytearray(chunk), dtype=torch.uint8).long()[None]
        perturb(step, epsilon)
        above = model(input_ids=ids, labels=ids, use_cache=False).loss
        perturb(step, -2 * epsilon)
        below = model(input_ids=ids, labels=ids, use_cache=False).loss
        perturb(step, epsilon - rate * (above - below).item() / (2 * epsilon))
        print(f"step {step}: loss {(above + below).item() / 2:.4f}")
