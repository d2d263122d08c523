"""Values as people type them: ``32K``, ``bf16``, ``strict=true``, ``passes=mlp,vocab``."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from typing import Any

from mst_fx.errors import SubjectError
from mst_fx.options import Options, bytes_in, make_options

DTYPES = {
    name: full
    for full, short in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("float64", "fp64"))
    for name in (full, short)
}
# Where chunks are as on it: the same on all that are a GPU.
DEVICES = {"cpu": "cpu", **dict.fromkeys(("cuda", "gpu", "a100", "h100", "h200"), "cuda")}

_FACTORS = {"": 1, "k": 2**10, "m": 2**20}
_COUNT = re.compile(r"(\d[\d_,]*)([kKmM]?)")
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def count(text: str) -> int:
    """``"32K"`` → 32768.

    Raises:
        argparse.ArgumentTypeError: it is no number ≥ 1.
    """
    found = _COUNT.fullmatch(text)
    value = int(re.sub("[_,]", "", found[1])) * _FACTORS[found[2].lower()] if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer ≥ 1, as 4096 or 32K")
    return value


def dtype(text: str) -> str:
    """``"bf16"`` → ``"bfloat16"``.

    Raises:
        argparse.ArgumentTypeError: for another type.
    """
    if text.removeprefix("torch.") not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}")
    return DTYPES[text.removeprefix("torch.")]


def device(text: str) -> str:
    """``"h100"`` → ``"cuda"``.

    Raises:
        argparse.ArgumentTypeError: for another device.
    """
    if text.lower() not in DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DEVICES)}")
    return DEVICES[text.lower()]


def check_sizes(arguments: argparse.Namespace) -> None:
    """
    Raises:
        SubjectError: what is to be a number of bytes is none.
    """
    for flag, allowed in (("memory", "80GiB"), ("host", "128GiB"), ("park", "256MiB, or nothing")):
        text = getattr(arguments, flag, None)
        if text and bytes_in(text) is None:
            raise SubjectError(f"--{flag} is {text!r}; allowed: bytes as in {allowed}")


def pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """``["chunk_rows=128"]`` → ``{"chunk_rows": 128}``.

    Raises:
        SubjectError: there is no ``=``.
    """
    found = {}
    for text in texts:
        name, equals, typed = text.partition("=")
        if not (name and equals):
            raise SubjectError(f"{flag} takes NAME=VALUE, not {text!r}")
        found[name.strip()] = value(typed)
    return found


def value(text: str) -> Any:
    """A Python literal, a word for one, a number with K or M; what is none of these is a string."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"\d+[kKmM]", text):
        return count(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def options(texts: Sequence[str]) -> Options:
    """What ``--option`` says.

    Raises:
        SubjectError: there is no ``=``.
        OptionError: for bad options.
    """
    found = pairs(texts, "--option")
    if isinstance(found.get("passes"), str):
        found["passes"] = tuple(name.strip() for name in found["passes"].split(",") if name.strip())
    return make_options(found)
