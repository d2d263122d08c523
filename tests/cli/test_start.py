"""What is imported before there is an answer: nothing of torch, where none is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mst_fx

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "sympy", "networkx", "jinja2")  # transformers without torch takes half a second
_CALL = """
import sys
from mst_fx.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
print("imported", *(name for name in {heavy!r} if name in sys.modules))
raise SystemExit(code)
"""


def _start(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--version"], 0, f"mst-fx {mst_fx.__version__}"),
        (["--help"], 0, "run,explain,diff,doctor,fit"),
        (["run", "--help"], 0, "torchrun --nproc-per-node 8 -m mst_fx run train.py"),
        ([], 2, "usage: mst-fx"),
        (["explian", "LlamaConfig"], 2, "invalid choice: 'explian'"),
        (["explain", "LlamaConfig", "--sqe", "3"], 2, "mst-fx explain: there is no --sqe 3; did you mean --set or --seq?"),
        (["explain", "LlamaConfig", "--seq", "1e5"], 2, "'1e5' is not an integer ≥ 1, as 4096 or 32K"),
        (["explain", "LlamaConfig", "--dtype", "int4"], 2, "'int4' is none of bfloat16, bf16"),
        (["explain", "LlamaConfig", "--option", "chunk_row=3"], 2, "mst has no option 'chunk_row'; did you mean chunk_rows"),
        (["explain", "LlamaConfig", "--option", "passes=mpl"], 2, "'passes' is ('mpl',); allowed: a tuple or list of"),
        (["diff", "LlamaConfig", "--html", "no/such/folder.html"], 2, "--html no/such/folder.html: there is no such folder"),
        (["diff", "LlamaConfig", "--html", "x.html", "--json"], 2, "--json: not allowed with argument --html"),
        (["fit", "llama3-8b", "--memory", "many"], 2, "--memory is 'many'; allowed: bytes as in 80GiB"),
        (["run", "--option", "strict=perhaps", "train.py"], 2, "'strict' is 'perhaps'; allowed: True or False"),
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported(arguments: list[str], status: int, said: str) -> None:
    done = _start(_CALL.format(arguments=arguments, heavy=HEAVY))
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "imported"


def test_import_mst_fx_imports_what_is_used() -> None:
    code = "import sys, mst_fx; print(mst_fx.__version__, 'torch' in sys.modules, 'explain' in dir(mst_fx))"
    assert _start(code).stdout.split() == [mst_fx.__version__, "False", "True"]


def test_module_and_script_are_one() -> None:
    command = [sys.executable, "-m", "mst_fx", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"mst-fx {mst_fx.__version__}\n"


def test_all_names_are_there() -> None:
    assert all(getattr(mst_fx, name) is not None for name in mst_fx.__all__)
    assert callable(mst_fx.enable) and set(mst_fx.__all__) <= set(dir(mst_fx))
    with pytest.raises(AttributeError, match="has no attribute 'explian'"):
        mst_fx.explian  # noqa: B018
