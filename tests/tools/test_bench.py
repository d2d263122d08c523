"""The benchmarks' own arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench.contenders import CONTENDERS, find_contender
from tools.bench.models import text_tokens
from tools.bench.tables import markdown_table
from tools.draw import draw, draw_longest, longest, whole_steps
from tools.meters.gpu import blocks_at_peak, exposed

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


def test_variants_of_contenders() -> None:
    found = find_contender(
        "mst+ckpt[chunk_rows=512;accumulate=weight;inductor.max_autotune=True]", CONTENDERS
    )
    assert found.checkpoint and found.mode is None
    assert found.options == {
        "chunk_rows": 512,
        "accumulate": "weight",
        "inductor": {"max_autotune": True},
    }
    assert find_contender("mst[mode=reduce-overhead]", CONTENDERS).mode == "reduce-overhead"
    assert find_contender("eager", CONTENDERS) is CONTENDERS["eager"]
    with pytest.raises(ValueError, match=r"unknown contender 'fast\[x=1\]'"):
        find_contender("fast[x=1]", CONTENDERS)


def test_pictures_hold_plain_steps_only(tmp_path: Path) -> None:
    plain = {"level": "model", "model": "llama3-8b", "contender": "mst", "seq": 16384, "lora": 0}
    plain |= {"peak_bytes": 2**34, "step_seconds": 0.5}
    failed = {**plain, "contender": "eager", "error": "out of memory"}
    again = {**plain, "contender": "eager"}  # in a later run
    tables = {"a": {"results": [plain, failed]}, "b": {"results": [{**plain, "lora": 16}, again]}}
    assert whole_steps(tables, "llama3-8b") == [plain, again]
    draw([plain, {**plain, "seq": 32768}], tmp_path / "x.png", "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_of_copies_no_kernel_hides() -> None:
    kernels = [(0.0, 4.0), (3.0, 5.0), (8.0, 9.0)]
    assert exposed([(1.0, 2.0), (4.5, 8.5)], kernels) == pytest.approx(3.0)
    assert exposed([(1.0, 2.0)], kernels) == exposed([], kernels) == 0.0
    assert exposed([(6.0, 7.0), (6.5, 7.5)], []) == pytest.approx(1.5)


def test_the_longest_sequence_of_each_model(tmp_path: Path) -> None:
    short, long = ({"model": "m", "contender": "mst+ckpt", "found": {"length": n}} for n in (1000, 3000))
    eager = {**short, "contender": "eager"}
    found = longest([long, short, eager, {**long, "model": "other", "found": None}])
    assert found == {"m": {"mst+ckpt": 3000, "eager": 1000}}
    draw_longest(found, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
