"""Values as people type them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from mst_fx.cli import typed
from mst_fx.errors import OptionError, SubjectError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("none", None),
        ("32K", 2**15),
        ("1m", 2**20),
        ("0.5", 0.5),
        ("70GiB", "70GiB"),
        ("auto", "auto"),
        ("('mlp',)", ("mlp",)),
        ('{"max_autotune": True}', {"max_autotune": True}),
        ("K", "K"),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert typed.pairs([f"name={text}"], "--set") == {"name": value}


@pytest.mark.parametrize(("text", "count"), [("7", 7), ("4,096", 4096), ("32k", 2**15), ("1M", 2**20)])
def test_counts(text: str, count: int) -> None:
    assert typed.count(text) == count


@pytest.mark.parametrize("text", ["0", "0K", "-3", "3.5", "K", "32G", ""])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        typed.count(text)


def test_options() -> None:
    found = typed.options(["passes=mlp, vocab", "strict=true", "chunk_rows=2K", "memory=70GiB"])
    assert (found.passes, found.strict, found.chunk_rows, found.memory) == (
        ("mlp", "vocab"),
        True,
        2048,
        "70GiB",
    )
    assert typed.options(["passes=mlp"]).passes == ("mlp",)
    with pytest.raises(OptionError, match="'strict' is 1; allowed: True or False"):
        typed.options(["strict=1"])
    with pytest.raises(SubjectError, match="NAME=VALUE"):
        typed.options(["strict"])


def test_types_and_devices() -> None:
    assert [typed.dtype(name) for name in ("bf16", "float32", "torch.float16")] == [
        "bfloat16",
        "float32",
        "float16",
    ]
    assert [typed.device(name) for name in ("cpu", "H100", "cuda")] == ["cpu", "cuda", "cuda"]
    for read in (typed.dtype, typed.device):
        with pytest.raises(argparse.ArgumentTypeError, match="'tpu' is none of"):
            read("tpu")
