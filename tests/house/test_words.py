"""Words mean one thing, as CONTRIBUTING.md says: what names with them are, by their annotations, and words that are no names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("mst_fx", "passes", "tools")

# What has such a name is of one of these types.
_TYPES = {
    "rows": {"int", "torch.SymInt", "int | torch.SymInt", "Any"},  # Any: an int, or a symbolic one
    "body": {"Body", "str"},  # the report's is its key
    "body_key": {"str"},
    "chunk_size": {"ChunkSize"},
    "row_inputs": {"Sequence[Tensor]", "Sequence[torch.Tensor]", "list[Tensor]"},
    "row_metas": {"Sequence[TensorMeta]"},
}
# No name of ours has one of these as a part: there is another word.
_NO_NAMES = {
    "lazy",
    "lazily",
    "late",
    "later",
    "postpone",
    "postponed",
    "delayed",
    "deferral",
    "deferrals",
    "deferring",
}


def _trees() -> Iterator[tuple[str, ast.Module]]:
    # mst_fx/passes is passes/
    paths = {path.resolve() for folder in _FOLDERS for path in (_ROOT / folder).rglob("*.py")}
    assert len(paths) > 100
    for path in sorted(paths):
        yield str(path.relative_to(_ROOT)), ast.parse(path.read_text())


def _is_no_name(name: str) -> bool:
    return not _NO_NAMES.isdisjoint(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


def annotated(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Arguments, fields and variables: line, name and type."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.lineno, node.arg, ast.unparse(node.annotation)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.lineno, node.target.id, ast.unparse(node.annotation)


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What is defined: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_names_are_what_their_words_mean() -> None:
    found = [
        f"{path}:{line}: {name}: {kind}"
        for path, tree in _trees()
        for line, name, kind in annotated(tree)
        if name in _TYPES and kind not in _TYPES[name]
    ]
    assert not found, "\n".join(found)


def test_words_that_have_another() -> None:
    found = [
        f"{path}:{line}: {name}" for path, tree in _trees() for line, name in names(tree) if _is_no_name(name)
    ]
    assert not found, "\n".join(found)


def test_what_is_seen() -> None:
    source = """
def f(rows: list[int], other):
    late_users: int = 1
    other.lazy = body = rows
class LazyRows:
    rows: bool = False
"""
    tree = ast.parse(source)
    assert sorted(annotated(tree)) == [
        (2, "rows", "list[int]"),
        (3, "late_users", "int"),
        (6, "rows", "bool"),
    ]
    assert [name for _, name in sorted(names(tree)) if _is_no_name(name)] == [
        "late_users",
        "lazy",
        "LazyRows",
    ]
