"""What the process remembers has an owner: :mod:`mst_fx.process`."""

from __future__ import annotations

import ast
import collections
import contextvars
import enum
import importlib
import inspect
import itertools
import pkgutil
import threading
import weakref
from collections.abc import Collection, Iterator
from types import GenericAlias, ModuleType
from typing import Any

import pytest

import mst_fx
from mst_fx import process
from mst_fx.listeners import Listeners, on_graph
from mst_fx.options import Options
from mst_fx.process import Named, Said, State
from mst_fx.torch_api.inductor import is_redirected

_TABLES = (dict, list, set)  # may be at the top of a module, to be read
_OF_STATE = ("weakref", "_weakrefset", "collections", "itertools", "_thread", "threading", "queue")
_WRITERS = [
    "add",
    "append",
    "clear",
    "discard",
    "difference_update",
    "extend",
    "insert",
    "intersection_update",
    "move_to_end",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "symmetric_difference_update",
    "update",
    "__setitem__",
    "__delitem__",
]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _modules() -> Iterator[ModuleType]:
    yield mst_fx
    for found in pkgutil.walk_packages(mst_fx.__path__, "mst_fx."):
        yield importlib.import_module(found.name)


def _is_state(value: Any) -> bool:
    """Whether a value of a module may be another one later, and has no owner."""
    if isinstance(
        value, (State, Named, *_TABLES, type, ModuleType, GenericAlias, enum.Enum)
    ) or inspect.isroutine(value):
        return False
    kind = type(value)
    if kind.__module__.startswith("mst_fx"):
        parameters = getattr(kind, "__dataclass_params__", None)
        return not isinstance(value, tuple) and not (parameters and parameters.frozen)
    return kind.__module__.split(".")[0] in _OF_STATE  # a ContextVar is its context's


def _base(node: ast.expr) -> str:
    """The name that ``name.x[y].z`` starts with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _written(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a statement or a call writes into, and the line."""
    if isinstance(node, ast.Global):
        yield from ((name, node.lineno) for name in node.names)
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else node.targets
        for target in targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)):
                yield _base(target), node.lineno
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in _WRITERS:
            yield _base(node.func.value), node.lineno
        elif isinstance(node.func, ast.Name) and node.func.id in ("next", "setattr", "delattr") and node.args:
            yield _base(node.args[0]), node.lineno


def _own_names(function: ast.AST) -> set[str]:
    """The names that a function binds: arguments, and what is assigned to."""
    inside = list(ast.walk(function))
    bound = {node.arg for node in inside if isinstance(node, ast.arg)}
    bound |= {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return bound - {name for node in inside if isinstance(node, ast.Global) for name in node.names}


def writes_to_module_names(source: str, owners: Collection[str] = ()) -> list[str]:
    """Where functions write into what a module, or a class of it, holds, but for its ``owners``: "line: name"."""
    tree = ast.parse(source)
    at_top = {
        name.id
        for node in tree.body
        for name in ast.walk(node)
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef))
        and isinstance(name, ast.Name)
        and isinstance(name.ctx, ast.Store)
    }
    at_top |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, _FUNCTIONS):
            known = at_top - _own_names(function) - set(owners)
            found |= {
                (line, name) for node in ast.walk(function) for name, line in _written(node) if name in known
            }
    return [f"{line}: {name}" for line, name in sorted(found)]


def test_no_module_holds_state_of_its_own() -> None:
    found = [
        f"{module.__name__}.{name}: {type(value).__name__}"
        for module in _modules()
        for name, value in vars(module).items()
        if not name.startswith("__") and module is not process and _is_state(value)
    ]
    assert not found, "\n".join(found)


def test_tables_are_only_read() -> None:
    found = []
    for module in _modules():
        owners = [name for name, value in vars(module).items() if isinstance(value, (State, Named))]
        if module is not process:
            source = inspect.getsource(module)
            found += [f"{module.__name__}:{line}" for line in writes_to_module_names(source, owners)]
    assert not found, "\n".join(found)


def test_what_counts_as_written() -> None:
    source = """
import x
table = {}
here: list[int] = []
class A:
    now = False
    def own(self):
        self.now = True
        A.now = True
def f(here):
    here.append(1)
    table[1].y = 2
    x.setting = 3
def g():
    global here
    here, other = [], {}
    other["x"] = next(table)
    owner.add(4)
owner = {}
"""
    assert writes_to_module_names(source, ["owner"]) == ["9: A", "12: table", "15: here", "17: table"]
    assert writes_to_module_names(source)[-1] == "18: owner"


@pytest.mark.parametrize(
    ("value", "is_state"),
    [
        (itertools.count(), True),
        (weakref.WeakSet[Any](), True),
        (collections.deque[int](), True),
        (threading.Lock(), True),
        (contextvars.ContextVar[int]("x"), False),
        (on_graph, False),
        ({}, False),  # a table, if nothing writes to it
        (Options(), False),
        (mst_fx.enable, False),
    ],
)
def test_what_counts_as_state(value: Any, is_state: bool) -> None:
    assert _is_state(value) == is_state


def test_reset() -> None:
    told: list[str] = []
    said, own = Said(), Listeners[str]("something")
    own.add_own(told.append)
    own.add(print)
    assert said.is_new("a") and said.is_new("b") and not said.is_new("a")
    mst_fx.enable()
    assert is_redirected()
    process.reset()
    assert said.is_new("a") and not is_redirected()
    own.tell("x")
    assert told == ["x"]
