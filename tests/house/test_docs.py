"""README.md and docs/ say what is so: options, causes, commands, links, code, and numbers that benchmarks/ has."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest

import mst_fx
from mst_fx import Options
from mst_fx.cli.arguments import parser
from mst_fx.diagnose import doctor

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


def _id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


_LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)\)")
_PLACE = re.compile(r"\[[^\]]+\]\(([^)#:]*)#([^)]+)\)")
_OUTSIDE = ("https://arxiv.org/", "https://docs.pytorch.org/")
_VERSIONS = r"(torch|Python|transformers|bitsandbytes|torchao|DeepSpeed) \d+(\.\d+)+"


def _rows(page: Path) -> list[list[str]]:
    """The cells of all tables of a page."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_options_are_all_there_with_their_defaults() -> None:
    said = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in _rows(DOCS / "options.md")[1:]}
    assert said == {field.name: getattr(Options(), field.name) for field in dataclasses.fields(Options)}


def test_causes_are_all_there() -> None:
    said = [row[0].strip("`") for row in _rows(DOCS / "diagnostics.md") if re.fullmatch(r"`[a-z-]+`", row[0])]
    sources = inspect.getsource(doctor)
    assert sorted(said) == sorted(set(re.findall(r'Finding\(\s*"([a-z-]+)"', sources)))


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        assert link.startswith(_OUTSIDE) or (page.parent / link).exists(), link
    for name, place in _PLACE.findall(page.read_text()):
        assert place in _places(page.parent / name if name else page), f"{name}#{place}"


def _places(page: Path) -> list[str]:
    """What a link to a heading of a page says, as GitHub has it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_page_is_in_the_list() -> None:
    assert {
        DOCS / link for link in _LINK.findall((DOCS / "README.md").read_text()) if link.endswith(".md")
    } == {page for page in PAGES if page.name != "README.md"}
    assert {
        link
        for link in _LINK.findall(README.read_text())
        if link.startswith("docs/") and link.endswith(".md")
    } == {f"docs/{page.name}" for page in PAGES if page.name != "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_numbers_are_those_of_the_benchmarks(page: Path) -> None:
    """Each decimal of a row that names a benchmark is in one row of that benchmark's file."""
    for row in _rows(page):
        links = _LINK.findall(row[-1])
        if not links or "benchmarks/" not in links[0]:
            said = re.sub(_VERSIONS, "", " ".join(row))
            assert not re.search(r"\d\.\d", said), f"a number without a benchmark: {row}"
            continue
        said = " ".join(row[:-1])
        numbers = re.findall(r"\d[\d,]*\.\d+", said) or re.findall(r"\d{1,3}(?:,\d{3})+", said)
        measured = (page.parent / links[0]).read_text().splitlines()
        assert numbers
        for number in numbers:
            assert any(re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", line) for line in measured), (
                number
            )


def test_the_table_by_memory_is_the_benchmarks() -> None:
    measured = (ROOT / "benchmarks" / "fit-cards.md").read_text()
    lines = [line for line in (DOCS / "fit.md").read_text().splitlines() if "[fit-cards]" in line]
    assert len(lines) == 3 * 2 * 3
    for line in lines:
        assert line.rpartition(" [fit-cards]")[0] in measured, line


def test_commands_can_be_given() -> None:
    blocks = [block for page in PAGES for block in _blocks(page.read_text(), "sh")]
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    commands = [found[1] for line in lines if (found := re.search(r"(?:mst-fx|-m mst_fx) (.*)", line))]
    assert len(commands) >= 10
    for command in commands:
        parsed = parser().parse(shlex.split(command))
        assert parsed.command


def test_readme_first_of_all_compiles_in_place() -> None:
    first = _blocks(README.read_text(), "python")[0]
    assert 'model.compile(backend="mst")' in first and "torch.compile(" not in first


def test_citation_has_the_version() -> None:
    assert f"\nversion: {mst_fx.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {mst_fx.__version__} - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_code_is_python(page: Path) -> None:
    for block in _blocks(page.read_text(), "python"):
        compile(block, str(page), "exec")


def _run(page: Path) -> None:
    """All Python of a page, with less to compile than a reader has: what it says is of our passes."""
    names: dict[str, object] = {}
    for block in _blocks(page.read_text(), "python"):
        code = block.replace('backend="mst"', 'backend="mst", options={"inner": "aot_eager"}')
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.slow
def test_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    _run(DOCS / "quick-start.md")
    out = capsys.readouterr().out
    assert "torch.Size([1, 1024, 512])" in out
    assert "rewrote 2 attention, 2 mlp, 1 vocab; refused 0" in out


@pytest.mark.slow
def test_readme_runs() -> None:
    with mst_fx.watch() as report:
        _run(README)
    assert (report.graphs, len(report.rewrites), report.refusals, report.findings) == (2, 10, [], [])
