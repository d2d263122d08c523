"""docs/api.md has all that ``mst_fx`` gives out, as its docstrings say it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import mst_fx
from tools import api_reference

_NAMES = [name for name in mst_fx.__all__ if name != "__version__"]


def test_is_up_to_date() -> None:
    assert api_reference.PAGE.read_text() == api_reference.page(), "python -m tools.api_reference writes it"


def test_is_complete() -> None:
    said = re.findall(r"^### mst_fx\.(\w+)$", api_reference.PAGE.read_text(), re.MULTILINE)
    assert sorted(said) == sorted(_NAMES)


@pytest.mark.parametrize("name", _NAMES)
def test_all_is_described(name: str) -> None:
    """Each name, each argument of a function, each public method."""
    found: Any = getattr(mst_fx, name)
    doc = inspect.getdoc(found) or ""
    assert doc.splitlines()[0].endswith((".", ":")) or len(doc.splitlines()) > 1
    assert not doc.startswith(f"{name}("), "dataclasses makes that of a class without one"
    if not inspect.isclass(found):
        described = api_reference.page().partition(f"### mst_fx.{name}\n")[2].partition("\n### ")[0]
        for parameter in inspect.signature(found).parameters:
            assert f"`{parameter}`" in described, parameter
    else:
        for member, value in api_reference._members(found):
            assert inspect.getdoc(value), member
