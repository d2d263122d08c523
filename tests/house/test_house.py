"""What the house looks like: lengths, complexity, where imports stand. Who may import whom is import-linter's (``make lint``)."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LONGEST = 450  # lines
_MOST_COMPLEX = 20  # paths through a function, as McCabe counts them, and one more a Boolean operator

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef)
_ALWAYS_THERE = ("mst_fx", "passes", "torch", "networkx", "sympy")
_BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.Assert,
    ast.match_case,
)


@functools.cache
def _files(*folders: str) -> list[tuple[str, str]]:
    """Names and texts."""
    # mst_fx/passes is passes/
    paths = sorted({path.resolve() for folder in folders for path in (_ROOT / folder).rglob("*.py")})
    assert len(paths) > 5
    return [(str(path.relative_to(_ROOT)), path.read_text()) for path in paths]


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        name = getattr(node, "name", None) if isinstance(node, _SCOPES) else None
        yield from _functions(node, f"{prefix}{name}." if name else prefix)


def complexity(node: ast.AST) -> int:
    """As radon counts: a function inside of another counts by itself."""
    return 1 + sum(map(_branches, ast.iter_child_nodes(node)))


def _branches(node: ast.AST) -> int:
    if isinstance(node, _FUNCTIONS):
        return 0
    found = int(isinstance(node, _BRANCHES))
    found += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
    found += 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return found + sum(map(_branches, ast.iter_child_nodes(node)))


def _is_library(module: str) -> bool:
    """Whether a module is not there wherever mst-fx is: neither ours nor what we need, nor Python's."""
    return module.partition(".")[0] not in {*_ALWAYS_THERE, *sys.stdlib_module_names}


def late_imports(source: str) -> list[str]:
    """The imports inside of functions, but for those of libraries that need not be there: "line: module"."""
    found: set[tuple[int, str]] = set()
    for _, function in _functions(ast.parse(source)):
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                found |= {(node.lineno, alias.name) for alias in node.names if not _is_library(alias.name)}
            elif isinstance(node, ast.ImportFrom) and not _is_library(node.module or ""):
                found.add((node.lineno, node.module or ""))
    return [f"{line}: {module}" for line, module in sorted(found)]


def test_files_are_short() -> None:
    lengths = {name: text.count("\n") for name, text in _files("mst_fx", "passes", "tools", "examples")}
    long = {name: length for name, length in lengths.items() if length > _LONGEST}
    assert not long


def test_functions_are_simple() -> None:
    found = [
        f"{path}: {name} {complexity(function)}"
        for path, text in _files("mst_fx", "passes", "tools", "examples")
        for name, function in _functions(ast.parse(text))
        if complexity(function) > _MOST_COMPLEX
    ]
    assert not found, "\n".join(found)


def test_imports_stand_at_the_top() -> None:
    # Tools may: some measure what an import costs.
    found = [f"{path}:{late}" for path, text in _files("mst_fx", "passes") for late in late_imports(text)]
    assert not found, "\n".join(found)


def test_operators_know_no_graph() -> None:
    """A step runs :mod:`mst_fx.ops`: nothing there is about nodes of a graph."""
    found = []
    for path, text in _files("mst_fx/ops"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}." for alias in node.names]
                found += [path for name in names if name.startswith("torch.fx.")]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.fx":
                found.append(path)
    assert not found


def test_what_is_counted() -> None:
    source = """
def f(x):
    if x and x.y or x.z:
        return [a for a in x if a]
    def g():
        from mst_fx import graph
        import json, rich
        return 1 if x else 2
class A:
    def m(self):
        import torch
"""
    functions = dict(_functions(ast.parse(source)))
    assert {name: complexity(function) for name, function in functions.items()} == {
        "f": 6,
        "f.g": 2,
        "A.m": 1,
    }
    assert late_imports(source) == ["6: mst_fx", "7: json", "11: torch"]
