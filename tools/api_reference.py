"""docs/api.md, from the docstrings of all that ``mst_fx`` gives out; ``tests/house/test_api.py`` asks whether it is up to date.

python -m tools.api_reference
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mst_fx

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
_HEAD = """# API

All that `mst_fx` gives out, from its docstrings (`python -m tools.api_reference` writes this page; a test asks whether it did). `import mst_fx` imports torch
when the first of these names is asked for. What else a module has may change from one version to the next.
"""
_LISTS = ("Args", "Attributes", "Raises")
_SECTIONS = (*_LISTS, "Returns", "Yields")
_OF_INTEREST = (property, staticmethod, classmethod)


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    names = [name for name in mst_fx.__all__ if name != "__version__"]
    functions = [name for name in names if not _is_class(name)]
    for title, some in (("Functions", functions), ("Classes", [n for n in names if _is_class(n)])):
        parts.append(f"## {title}\n\n" + " · ".join(f"[`{n}`](#{_anchor(n)})" for n in some) + "\n")
        parts += [_entry(name) for name in some]
    return "\n".join(parts)


def _is_class(name: str) -> bool:
    found = getattr(mst_fx, name)
    return inspect.isclass(found) and name != "enable"  # which is called, and is a class for its ``with``


def _anchor(name: str) -> str:
    return f"mst_fx{name}".lower()


def _entry(name: str) -> str:
    found = getattr(mst_fx, name)
    lines = [f"### mst_fx.{name}", ""]
    if not inspect.isclass(found) or name == "enable":
        lines += ["```text", f"mst_fx.{name}{_signature(found)}", "```", ""]
    elif not issubclass(found, BaseException):
        bases = [base.__name__ for base in found.__mro__[1:] if base.__module__.startswith("mst_fx")]
        lines += [f"A kind of `{bases[0]}`.", ""] if bases else []
    else:
        lines += [f"Raised; of `{found.__mro__[1].__name__}`.", ""]
    lines += [_markdown(inspect.getdoc(found) or ""), ""]
    for member, value in _members(found) if inspect.isclass(found) else ():
        head = f"`{member}`" if isinstance(value, property) else f"`{member}{_signature(value)}`"
        lines += [f"- {head}: {_one_paragraph(inspect.getdoc(value) or '')}"]
    return "\n".join(lines).rstrip() + "\n"


def _signature(function: Any) -> str:
    """The parameters and the result as the source has them, without ``self``."""
    signature = inspect.signature(function)
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts: list[str] = []
    for parameter in (p for p in signature.parameters.values() if p.name != "self"):
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{stars.get(parameter.kind, '')}{parameter.name}: {parameter.annotation}{default}")
    result = "" if inspect.isclass(function) else f" -> {signature.return_annotation}"
    return f"({', '.join(parts)}){result}"


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of our classes, those of a class before those of what it is a kind of."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("mst_fx"):
            continue
        for name, value in vars(base).items():
            is_field = dataclasses.is_dataclass(base) and name in {f.name for f in dataclasses.fields(base)}
            is_member = inspect.isfunction(value) or isinstance(value, _OF_INTEREST)
            if not name.startswith("_") and is_member and not is_field and name not in seen:
                seen.add(name)
                yield name, value


def _one_paragraph(doc: str) -> str:
    return _inline(" ".join(doc.split("\n\n")[0].split()))


def _inline(text: str) -> str:
    """Roles and double backticks of docstrings as Markdown has them."""
    text = re.sub(r":\w+:`~?([^`]*?)([^`.]+)`", r"`\2`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _markdown(doc: str) -> str:
    """A docstring: paragraphs, lists, blocks of code behind ``::``, and sections such as ``Args:``."""
    out: list[str] = []
    lines = doc.splitlines()
    index = 0
    while index < len(lines):
        line = lines[index]
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            index, items = (_items if line.startswith(_LISTS) else _paragraph)(lines, index + 1)
            out += [f"**{line.rstrip(':')}**", "", *items, ""]
            continue
        out.append(_inline(re.sub(r"::$", ":", line)) if line != "::" else "")
        index += 1
        if line.endswith("::"):
            index, code = _indented(lines, index)
            out += ["", "```text", *code, "```", ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _indented(lines: list[str], index: int) -> tuple[int, list[str]]:
    found = []
    while index < len(lines) and (not lines[index] or lines[index].startswith(" ")):
        found.append(lines[index])
        index += 1
    return index, inspect.cleandoc("\n".join(["", *found])).splitlines()


def _items(lines: list[str], index: int) -> tuple[int, list[str]]:
    """``name: text`` with the lines that go on deeper, as a list."""
    index, block = _indented(lines, index)
    items: list[str] = []
    for line in block:
        if line and not line.startswith(" "):
            name, _, text = line.partition(": ")
            items.append(
                f"- {', '.join(f'`{n}`' for n in name.rstrip(':').split(', '))}: {text}"
                if text
                else f"- {line}"
            )
        elif line:
            items[-1] += f" {line.strip()}"
    return index, [_inline(item) for item in items]


def _paragraph(lines: list[str], index: int) -> tuple[int, list[str]]:
    index, block = _indented(lines, index)
    return index, [_inline(" ".join(" ".join(block).split()))]


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
