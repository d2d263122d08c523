"""What the examples share: a toy Llama with random weights, and real text, Python's own library as bytes."""

from __future__ import annotations

import logging
import os
import sysconfig
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

# Nothing for you; tests put {"inner": "eager"} here, which compiles in less time.
OPTIONS = {"inner": os.environ["EXAMPLES_INNER"]} if "EXAMPLES_INNER" in os.environ else {}

# How to see what was rewritten while you train: one line a graph.
logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("mst_fx").setLevel(logging.INFO)

tokenizer = ByT5Tokenizer(extra_ids=0)  # needs no vocabulary: a token is a byte
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def toy_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def texts(count: int, length: int = 512) -> list[str]:
    """``count`` pieces of ``length`` characters of Python's standard library."""
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="ascii", errors="ignore")
    return [source[start : start + length] for start in range(0, count * length, length)]


def token_blocks(count: int, length: int = 512) -> list[dict[str, torch.Tensor]]:
    """The same as ``input_ids`` and ``labels``, each ``[length]``."""
    blocks = [torch.tensor(tokenizer.encode(t, add_special_tokens=False)) for t in texts(count, length)]
    return [{"input_ids": block, "labels": block} for block in blocks]
