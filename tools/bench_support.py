"""What the benchmarks share: models, text, versions, tables."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int

    @classmethod
    def llama3_8b(cls, layers: int) -> Shape:
        return cls(4096, 14336, 32, 8, 128256, layers)


class SwiGLU(nn.Module):
    """``[..., H]`` → ``[..., H]``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Head(nn.Module):
    """A vocabulary projection with its cross-entropy: ``[..., H]``, labels → a scalar."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(x).float()
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def text_tokens(count: int, vocabulary: int) -> torch.Tensor:
    """``count`` tokens of Python's standard library: words, numbers and marks, most frequent first.

    Returns:
        int64 ``[count]``, on the CPU; the rarest words share the last id.
    """
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        words += re.findall(r"\w+|\s+|[^\w\s]", text)
        if len(words) >= count:
            break
    if not words:
        raise RuntimeError("this Python has no source of its standard library to read")
    words = (words * (count // len(words) + 1))[:count]
    ranked = {word: rank for rank, (word, _) in enumerate(collections.Counter(words).most_common())}
    return torch.tensor([min(ranked[word], vocabulary - 1) for word in words])


def make_llama(
    shape: Shape,
    seq: int,
    device: str,
    dtype: torch.dtype,
    *,
    checkpoint: bool,
    mask: bool = True,
) -> Any:
    """A Hugging Face Llama with random weights (seed 0), in training mode, attention by SDPA.

    Args:
        checkpoint: with gradient checkpointing of each layer.
        mask: as Hugging Face has it. Without, attention is told that it is causal and gets no mask:
            under ``torch.compile`` the library builds one of S×S bytes.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention = "sdpa"
    if not mask:  # an attention that the library knows no mask function for gets no mask
        attention = "causal_sdpa"
        AttentionInterface.register(attention, sdpa_attention_forward)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(seq, 2048),
        use_cache=False,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if checkpoint:
        model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model.train()


def environment() -> dict[str, str]:
    """Versions, hardware, commit and command, as strings."""
    found = {"command": " ".join([Path(sys.executable).name, *sys.argv]), "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "liger-kernel", "mst-fx"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["cpu"] = f"{_cpu_name()}, {os.cpu_count()} cores"
    found["commit"] = os.environ.get("BENCH_COMMIT") or _git_commit()
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "mst_fx", "passes", "tools")
        return git("rev-parse", "--short=12", "HEAD") + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def numbers(text: str) -> list[int]:
    """``1,2`` of a command line.

    Raises:
        ValueError: if a part is no integer.
    """
    return [int(part) for part in text.split(",")]


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first row is the head. Floats get three decimals at most, None a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return (
                f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
            )
        return str(value)

    head, *body = [[cell(value) for value in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(folder: Path, name: str, results: Any, tables: str) -> None:
    """Writes ``name.json`` and ``name.md``: what was measured, where, with what and by which command."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment()
    text = json.dumps({"environment": facts, "results": results}, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    (folder / f"{name}.md").write_text("\n".join([*lines, "", tables, ""]))
