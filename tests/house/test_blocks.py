"""Each block of code and each command of README.md and docs/ runs, or has a mark before it that says why not.

The mark is a comment, ``<!-- not run: needs several GPUs -->``. README's and the quick start's Python run in ``test_docs``.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mst_fx
from mst_fx.cli import main as cli
from mst_fx.declared import DECLARED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BY_TEST_DOCS = ("README.md", "docs/quick-start.md")
_NO_CODE = ("text", "")  # a signature, or what a command prints


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    why_not: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks() -> Iterator[Block]:
    pattern = r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$"
    for page in PAGES:
        for why, language, text in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
            yield Block(page.relative_to(ROOT).as_posix(), language, text, why)


def _commands(block: Block) -> list[str]:
    """The lines that are typed; ``$`` marks them where what they print is shown too."""
    lines = block.text.splitlines()
    if block.language == "sh":
        return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    return [line[2:] for line in lines if line.startswith("$ ")]


ALL = list(blocks())
_PYTHON = sorted({b.page for b in ALL if b.language == "python" and not b.why_not} - set(_BY_TEST_DOCS))
_TYPED = [(block, line) for block in ALL if not block.why_not for line in _commands(block)]


def test_all_blocks_are_known() -> None:
    assert len(ALL) == sum(page.read_text().count("\n```") for page in PAGES) / 2
    assert {block.language for block in ALL} <= {"python", "sh", *_NO_CODE}


@pytest.mark.parametrize("block", [b for b in ALL if b.why_not], ids=str)
def test_marks_name_tests_that_are_there(block: Block) -> None:
    assert block.language in ("python", "sh")
    for path in re.findall(r"tests/[\w/]+\.py", block.why_not):
        assert (ROOT / path).exists(), path


def test_only_commands_of_ours_are_left_to_run() -> None:
    for block, command in _TYPED:
        assert re.match(r"mst-fx (explain|doctor|diff) ", command), f"{block}: {command} needs a mark"


def _given() -> dict[str, Any]:
    """What pages speak of without making it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 512, (1, 600))

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    return {
        "mst_fx": mst_fx,
        "torch": torch,
        "model": model,
        "ids": ids,
        "trainer": SimpleNamespace(train=train),
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", _PYTHON)
def test_python_runs(page: str) -> None:
    """All blocks of a page, one after the other."""
    names, (root, ours) = _given(), (logging.getLogger(), logging.getLogger("mst_fx"))
    handlers, level = list(root.handlers), ours.level
    try:
        for block in ALL:
            if block.page == page and block.language == "python" and not block.why_not:
                code = block.text.replace('backend="mst"', 'backend="mst", **inner').replace(
                    'backend="mst", **inner, options={', 'backend="mst", options={"inner": "aot_eager", '
                )
                names["inner"] = {"options": {"inner": "aot_eager"}}
                exec(compile(code, str(block), "exec"), names)
        names["trainer"].train()
    finally:
        root.handlers[:] = handlers
        ours.setLevel(level)
        DECLARED.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("block", "command"), _TYPED, ids=[command for _, command in _TYPED])
def test_commands_run(
    block: Block,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a page shows of their output, but for ``…``, is what they print."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == 0
    if block.language != "sh":
        printed = capsys.readouterr().out
        for line in block.text.splitlines()[1:]:
            assert line == "…" or line in printed.splitlines(), printed
