"""docs/troubleshooting.md quotes what is said: texts that are ours are in the code, and no error of a running step lacks a line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Of programs that run; what options, commands and our own checks say names what is allowed.
_MET_IN_A_STEP = ("RuntimeError", "GroupError", "BudgetError")
_ROOMS = ("logits", "masks", "ops", "parking", "ranks", "bodies", "plan")


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(
        {p.resolve() for p in (ROOT / "mst_fx").rglob("*.py")} | set((ROOT / "passes").glob("*.py"))
    ):
        yield path, ast.parse(path.read_text())


def _texts(tree: ast.AST) -> list[str]:
    """What stands between the placeholders of texts."""
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def _section(title: str) -> str:
    return _PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def _quoted(title: str) -> list[str]:
    first = [line.split(" | ")[0] for line in _section(title).splitlines() if line.startswith("| ")]
    return [text for cell in first for text in re.findall(r"`([^`]+)`", cell)]


def test_texts_of_ours_are_in_the_code() -> None:
    said = [text for _, tree in _trees() for text in _texts(tree)]
    others = (
        "torch.OutOfMemoryError",
        "mst_fx",
        "is a Int8Tensor",
        "is a DTensor",
        "rewrote nothing; refused 0",
        "mst-fx",
    )
    for text in (*_quoted("Memory is not saved"), *_quoted("Errors of mst-fx")):
        assert text.startswith(others) or any(text in each for each in said), text


def test_errors_of_a_step_are_there() -> None:
    quoted = _quoted("Errors of mst-fx")
    missing = []
    for path, tree in _trees():
        if path.parent.name not in _ROOMS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name, text = ast.unparse(node.exc.func), " ".join(_texts(node.exc))
                if name in _MET_IN_A_STEP and len(text) > 20 and not any(each in text for each in quoted):
                    missing.append(f"{path.name}:{node.lineno}: {text}")
    assert not missing, "\n".join(missing)
