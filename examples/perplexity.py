"""Perplexity of a long text: the loss is computed in chunks, and no logits are made."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384

# A toy that reads bytes, scored on the source of Python's standard library.
text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
ids = torch.frombuffer(bytearray(text[:tokens]), dtype=torch.uint8).long()[None]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=tokens,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
model.compile(backend="mst")
with torch.no_grad():
    out = model(input_ids=ids, labels=ids, use_cache=False)
print(f"perplexity of {ids.shape[1]:,} tokens: {out.loss.exp().item():.3f}")
print(f"logits: {out.logits!r}")  # there if somebody looks
