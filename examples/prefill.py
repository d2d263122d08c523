"""Prefill of a long prompt, then generation: chunked forward passes, and logits of the last token only."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192

# A toy that reads bytes; its prompt is the source of Python's standard library.
text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
ids = torch.frombuffer(bytearray(text[:tokens]), dtype=torch.uint8).long()[None]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=2 * tokens,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
eager = model.generate(ids, max_new_tokens=8, do_sample=False)

model.compile(backend="mst")  # in place: generate() finds it, and asks for the last row of logits itself
found = model.generate(ids, max_new_tokens=8, do_sample=False)
print(f"prompt of {ids.shape[1]:,} tokens, then {found[0, tokens:].tolist()}")
assert torch.equal(found, eager)
