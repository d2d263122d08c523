"""The benchmarks' own arithmetic."""

from __future__ import annotations

from typing import Any

import torch

from tools.bench_support import markdown_table, text_tokens
from tools.gpu_profile import blocks_at_peak

MIB = 2**20


def _event(action: str, address: int, mib: int, line: int = 1) -> dict[str, Any]:
    frames = [{"filename": "/x/model/layers.py", "line": line, "name": "forward"}]
    return {"action": action, "addr": address, "size": mib * MIB, "frames": frames}


def test_blocks_at_peak_finds_what_is_alive() -> None:
    trace = [
        _event("alloc", 1, 100),
        _event("alloc", 2, 100),
        _event("free_requested", 9, 50),  # from before the trace
        _event("alloc", 3, 300, line=7),
        _event("alloc", 4, 1),
        _event("free_requested", 3, 300),
        _event("free_completed", 3, 300),
        _event("alloc", 5, 200),
    ]
    first, *groups = blocks_at_peak(trace, base=1024 * MIB).split("\n\n")
    assert first.startswith(f"peak {(1024 + 451) / 1024:.3f} GiB at event 5 of 8")
    assert [group.splitlines()[0] for group in groups] == ["300.0 MiB (event 3)", "2 x 100.0 MiB (event 0)"]
    assert "layers.py:7 forward" in groups[0]


def test_text_tokens_are_ranked_words() -> None:
    tokens = text_tokens(5000, vocabulary=300)
    assert tokens.shape == (5000,) and tokens.dtype == torch.int64
    assert tokens.min() == 0 and tokens.max() == 299
    assert torch.equal(tokens, text_tokens(5000, vocabulary=300))


def test_markdown_table() -> None:
    assert markdown_table([("a", "b"), (None, 0.5), ("x", 1234.5)]) == (
        "| a | b |\n| --- | --- |\n| – | 0.5 |\n| x | 1234 |"
    )
