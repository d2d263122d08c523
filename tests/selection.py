"""Which tests are of real models: what ``make test-fast`` leaves out, beside those that are marked slow."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

_LIBRARIES = {"transformers", "accelerate", "peft", "trl", "lightning"}
_HELPERS = ("tests.models", "tests.text")  # whose names stand for models of those


def is_of_a_real_model(item: pytest.Item) -> bool:
    """Whether a test, or what it uses of its file, names a library of models."""
    function = getattr(item, "function", None)
    fixtures = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    waiting: list[Any] = [function, *(each[-1].func for each in fixtures.values())]
    seen: set[int] = set()
    while waiting:
        used = waiting.pop()
        if id(used) in seen:
            continue
        seen.add(id(used))
        if isinstance(used, type):
            waiting += [value for value in vars(used).values() if isinstance(value, types.FunctionType)]
        if not isinstance(used, types.FunctionType):
            continue
        for name in _names(used.__code__):
            value = used.__globals__.get(name)
            if name in _LIBRARIES or _is_of_a_library(name, value):
                return True
            if getattr(value, "__module__", None) == used.__module__:
                waiting.append(value)
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant.partition(".")[0]


def _is_of_a_library(name: str, value: Any) -> bool:
    home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    if str(home).partition(".")[0] in _LIBRARIES or home in _HELPERS:
        return True
    tables = (getattr(sys.modules.get(helper), name, None) for helper in _HELPERS)
    return isinstance(value, dict) and any(value is table for table in tables)
