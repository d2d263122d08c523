"""Every example runs in a process of its own, but with one layer; says what was rewritten; and is short."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest

from tests import apart, quick

_FOLDER = Path(__file__).resolve().parents[2] / "examples"
_NAMES = sorted(path.stem for path in _FOLDER.glob("[!_]*.py"))
_WITHOUT_GRADIENTS = ("perplexity", "prefill", "zeroth_order")  # tests/training/test_inference.py runs them
_SYSTEMS = (  # tests/training/test_systems.py runs them
    *("frozen_layers", "looked_up_context", "low_rank_cache", "merged_context", "zeroth_order_svrg"),
)
_OF_THE_COMMAND_LINE = ("hf_trainer_run",)  # tests/cli/test_program.py runs it
_ELSEWHERE = {*_WITHOUT_GRADIENTS, *_SYSTEMS, *_OF_THE_COMMAND_LINE}
_NEEDS = {
    "accelerate": "accelerate",
    "peft": "peft",
    "trl": "trl",
    "lightning": "lightning",
    "hf": "accelerate",
}
_EAGER = "plain_loop_without_mst"


def _is_runnable(name: str) -> bool:
    needed = _NEEDS.get(name.split("_")[0])
    return needed is None or importlib.util.find_spec(needed) is not None


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each example that is tested: its status and what it wrote."""
    folder = tmp_path_factory.mktemp("examples")
    tested = [item for item in request.session.items if getattr(item, "originalname", "") == "test_runs"]
    names = [str(item.callspec.params["name"]) for item in tested]  # type: ignore[attr-defined]
    for name in [*names, _EAGER]:
        text = (_FOLDER / f"{name.replace(_EAGER, 'plain_loop')}.py").read_text()
        (folder / name).mkdir()
        code = text.replace("model.compile", "dict") if name == _EAGER else text
        (folder / name / f"{name}.py").write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_FOLDER.parent), str(_FOLDER)]),
        "EXAMPLES_INNER": "eager",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    apart.call(_run_all, str(folder), env=environment, timeout=600).check_returncode()
    return folder


def _run_all(folder: str) -> None:
    """Runs the programs in a folder, each in a fork of this process, which has imported what they import."""
    programs = [path for path in sorted(Path(folder).glob("*/*.py")) if _is_runnable(path.stem)]
    for path in programs:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})
    common = importlib.import_module("_common")
    config = common.LlamaConfig
    common.LlamaConfig = lambda **values: config(**{**values, "num_hidden_layers": 1})  # type: ignore[attr-defined]
    quick.collections()
    for path in programs:
        pid = os.fork()
        if pid == 0:
            os._exit(_run(path))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (path.parent / "status").write_text(str(status))


def _run(path: Path) -> int:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(path.parent / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(path.parent)
    return apart.status_of(apart.script, str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _NAMES if name not in _ELSEWHERE])
def test_runs(name: str, ran: Path) -> None:
    if not _is_runnable(name):
        pytest.skip(f"{_NEEDS[name.split('_')[0]]} is not installed")
    stdout, stderr = ((ran / name / stream).read_text() for stream in ("stdout", "stderr"))
    assert (ran / name / "status").read_text() == "0", stderr[-2000:]
    said = [line for line in stderr.splitlines() if "mst_fx: rewrote" in line]
    assert any("mlp" in line for line in said), stderr[-2000:]
    if not name.startswith("trl"):  # which has its own tiled head
        assert any("1 vocab" in line for line in said), stderr[-2000:]
    if name in ("fsdp2", "simple_fsdp"):
        assert any("attention" in line for line in said), stderr[-2000:]
    assert "refused vocab" not in stderr
    assert "loss" in stdout
    if name in ("plain_loop", "lightning_module", "per_block", "accelerate_loop"):
        bar = 1e-2 if name == "accelerate_loop" else 1e-3
        assert _losses(stdout) == pytest.approx(_eager_losses(ran / _EAGER), abs=bar)


def _losses(stdout: str) -> list[float]:
    return [float(found) for found in re.findall(r"^loss (\S+)$", stdout, re.MULTILINE)]


def _eager_losses(folder: Path) -> list[float]:
    """What plain_loop.py prints without its line about mst."""
    assert (folder / "status").read_text() == "0"
    assert "mst_fx:" not in (folder / "stderr").read_text()
    losses = _losses((folder / "stdout").read_text())
    assert losses
    return losses


@pytest.mark.parametrize("name", _NAMES)
def test_is_short(name: str) -> None:
    text = (_FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 40
    assert 'backend="mst"' in text or "mst_fx.enable" in text or "mst-fx run" in text
