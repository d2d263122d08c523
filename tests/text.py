"""Real text for the tests of training libraries: Python's standard library, a byte a token."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import ACCEPTED

TEXT_VOCAB = 259  # bytes and ByT5's pad, end and unknown


def build_llama(**more: Any) -> Any:
    return ACCEPTED["llama"].build(vocab_size=TEXT_VOCAB, use_cache=False, **more)


def texts(count: int, length: int) -> list[str]:
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="ascii", errors="ignore")
    assert len(source) >= count * length
    return [source[start : start + length] for start in range(0, count * length, length)]


def token_blocks(count: int, length: int) -> list[dict[str, Tensor]]:
    """``input_ids`` and ``labels`` ``[length]``; the first two labels are ignored."""
    blocks = []
    for text in texts(count, length):
        ids = torch.tensor([3 + byte for byte in text.encode()])
        blocks.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100, -100]), ids[2:]])})
    return blocks
