"""What benchmarks write: Markdown tables, and JSON with versions, hardware and command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
GIB, MIB = 2**30, 2**20


def environment() -> dict[str, str]:
    """Versions, hardware, commit and command, as strings."""
    found = {"command": _command(), "python": platform.python_version()}
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


def _command() -> str:
    spec = sys.modules["__main__"].__spec__  # of python -m
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return " ".join([Path(sys.executable).name, *program, *sys.argv[1:]])


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


def markdown_table(lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first row is the head. Floats get three decimals at most, None a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return (
                f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
            )
        return str(value)

    head, *others = [[cell(value) for value in row] for row in lines]
    written = [head, ["---"] * len(head), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in written)


def write_results(folder: Path, name: str, results: Any, tables: str) -> None:
    """Writes ``name.json`` and ``name.md``: what was measured, where, with what and by which command."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment()
    text = json.dumps({"environment": facts, "results": results}, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    (folder / f"{name}.md").write_text("\n".join([*lines, "", tables, ""]))
