"""docs/ says what is so: options, causes, commands, links, and numbers that benchmarks/ has."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest

from mst_fx import Options
from mst_fx.cli.arguments import parser
from mst_fx.diagnose import doctor

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)\)")


def _rows(page: str) -> list[list[str]]:
    """The cells of all tables of a page, without heads."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_options_are_all_there_with_their_defaults() -> None:
    said = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in _rows("options.md")[1:]}
    assert said == {field.name: getattr(Options(), field.name) for field in dataclasses.fields(Options)}


def test_causes_are_all_there() -> None:
    said = [row[0].strip("`") for row in _rows("diagnostics.md") if re.fullmatch(r"`[a-z-]+`", row[0])]
    sources = inspect.getsource(doctor)
    assert sorted(said) == sorted(set(re.findall(r'Finding\(\s*"([a-z-]+)"', sources)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        assert link.startswith("https://arxiv.org/") or (DOCS / link).exists(), link


def test_every_page_is_in_the_list() -> None:
    assert {
        DOCS / link for link in _LINK.findall((DOCS / "README.md").read_text()) if link.endswith(".md")
    } == {page for page in PAGES if page.name != "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_numbers_are_those_of_the_benchmarks(page: Path) -> None:
    """Each decimal of a row that names a benchmark is in one row of that benchmark's file."""
    for row in _rows(page.name):
        links = _LINK.findall(row[-1])
        if not links or "benchmarks/" not in links[0]:
            assert not any(re.search(r"\d\.\d", cell) for cell in row), f"a number without a benchmark: {row}"
            continue
        numbers = re.findall(r"\d[\d,]*\.\d+", " ".join(row[:-1]))
        measured = (DOCS / links[0]).read_text().splitlines()
        assert numbers
        for number in numbers:
            assert any(re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", line) for line in measured), (
                number
            )


def test_commands_can_be_given() -> None:
    commands = [
        line.split("#")[0]
        for page in PAGES
        for block in _blocks(page.read_text(), "sh")
        for line in block.splitlines()
        if line.startswith("mst-fx ")
    ]
    assert len(commands) >= 3
    for command in commands:
        parser().parse(shlex.split(command)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_python(page: Path) -> None:
    for block in _blocks(page.read_text(), "python"):
        compile(block, str(page), "exec")


@pytest.mark.slow
def test_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """With less to compile than a reader has: what it says is of our passes."""
    names: dict[str, object] = {}
    for block in _blocks((DOCS / "quick-start.md").read_text(), "python"):
        code = block.replace('backend="mst"', 'backend="mst", options={"inner": "aot_eager"}')
        exec(compile(code, "quick-start.md", "exec"), names)
    out = capsys.readouterr().out
    assert "torch.Size([1, 1024, 512])" in out
    assert "rewrote 2 attention, 2 mlp, 1 vocab; refused 0" in out
