"""``mst-fx run``: a script as Python runs it, but that ``torch.compile`` means mst."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mst_fx.cli.main import main
from tests import apart

ROOT = Path(__file__).parents[2]
_MLP = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).double()
"""
OWN = (
    _MLP
    + """
if __name__ == "__main__":
    print("given", sys.argv[1:], __file__ == sys.argv[0])
    loss = torch.compile(model)(torch.randn(600, 16).double()).square().sum()
    loss.backward()
    print(loss.item())
    if "raise" in sys.argv:
        raise KeyError("mine")
    sys.exit(7 if "exit" in sys.argv else 0)
"""
)
_OPTIONS = ("--option", "inner=eager", "--option", "chunk_rows=100", "--option", "vocab_chunk_rows=100")


def command(*arguments: str) -> None:
    raise SystemExit(main(arguments))


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(OWN)
    (tmp_path / "plain.py").write_text(_MLP + "print(model(torch.ones(2, 16).double()).sum().item())")
    return str(tmp_path / "train.py")


def _run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return apart.call(command, "run", *_OPTIONS, *arguments, env={**os.environ, **more})


@pytest.mark.slow
def test_a_script_gets_its_arguments_and_is_rewritten(script: str, tmp_path: Path) -> None:
    done = _run("--report", "--report-to", str(tmp_path / "said.json"), script, "--lr", "3", "--report")
    assert done.returncode == 0, done.stderr
    given, loss = done.stdout.splitlines()
    assert given == "given ['--lr', '3', '--report'] True"
    assert "mst_fx: compiling a graph of 3 nodes …" in done.stderr
    assert "1 graph(s): rewrote 1 mlp; refused 0" in done.stderr
    assert json.loads((tmp_path / "said.json").read_text())["rewrites"][0]["chunks"] == 6
    off = _run("--report", script, "--lr", "3", "--report", MST_FX="0")
    assert off.returncode == 0 and "rewrote 1" not in off.stderr
    assert "mst-fx: MST_FX=0: nothing was rewritten" in off.stderr
    assert float(off.stdout.splitlines()[1]) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.slow
def test_its_exit_code_is_the_scripts(script: str) -> None:
    assert _run("--quiet", script, "exit").returncode == 7
    done = _run("--quiet", "--report", script, "raise")
    assert done.returncode == 1
    trace, report = done.stderr.split("KeyError: 'mine'\n")
    assert trace.startswith("Traceback") and trace.count('File "') == 1, "of the script's frames alone"
    assert "rewrote 1 mlp" in report, "what came before is said all the same"


def test_a_module(script: str) -> None:
    done = apart.call(command, "run", *_OPTIONS, "-m", "train", "exit", cwd=Path(script).parent)
    assert done.returncode == 7 and "given ['exit'] True" in done.stdout, done.stderr


def test_where_nothing_is_compiled_it_says_so(script: str) -> None:
    done = _run(script.replace("train.py", "plain.py"))
    assert (
        done.returncode == 0
        and "mst-fx: nothing was compiled: the script calls no torch.compile" in done.stderr
    )


def test_other_ranks_say_nothing(script: str) -> None:
    done = _run("--report", script, RANK="1")
    assert done.returncode == 0 and not done.stderr


def test_no_such_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no_such.py"]) == 2
    assert "there is no file no_such.py; a module is given as -m no_such" in capsys.readouterr().err


@pytest.mark.slow
def test_trainer_under_python_torchrun_and_accelerate(tmp_path: Path) -> None:
    """The same losses, with a report at the end, under each launcher."""
    pytest.importorskip("accelerate")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples" / "hf_trainer_run.py")  # which knows neither of mst nor of compiling
    how = [
        "--max_steps",
        "3",
        "--logging_steps",
        "1",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--use_cpu",
    ]
    how += [
        "--output_dir",
        str(tmp_path),
        "--learning_rate",
        "1e-3",
        "--disable_tqdm",
        "True",
        "--per_device_train_batch_size",
    ]
    ours = ["-m", "mst_fx", "run", "--report", *_OPTIONS, script, *how]
    launchers = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    }
    launched = {
        name: subprocess.Popen(
            [sys.executable, *launcher, *ours, "1" if name == "torchrun" else "2"],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name, launcher in launchers.items()
    }
    done = apart.call(command, *ours[2:], "2", cwd=tmp_path)
    said = {"python": (done.stdout, done.stderr)}
    said |= {name: process.communicate(timeout=300) for name, process in launched.items()}
    losses = {}
    for name, (out, err) in said.items():
        found = [line for line in out.splitlines() if line.startswith("losses ")]
        assert len(found) == 1, err[-3000:]
        losses[name] = ast.literal_eval(found[0].removeprefix("losses "))
        assert err.count("1 graph(s): rewrote 2 attention, 2 mlp, 1 vocab; refused 0") == 1, err[-3000:]
    eager = apart.run_script(script, *how, "2", cwd=tmp_path)
    (truth,) = (line for line in eager.stdout.splitlines() if line.startswith("losses "))
    assert len(losses) == 3
    for name, found in losses.items():
        assert found == pytest.approx(ast.literal_eval(truth.removeprefix("losses ")), rel=1e-5), name
