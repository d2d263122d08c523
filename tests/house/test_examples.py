"""Every example runs as its reader would run it, but with one layer; says what was rewritten; and is short."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from tests import apart

_FOLDER = Path(__file__).resolve().parents[2] / "examples"
_NAMES = sorted(path.stem for path in _FOLDER.glob("[!_]*.py"))
_WITHOUT_GRADIENTS = ("perplexity", "prefill", "zeroth_order")  # tests/training/test_inference.py runs them
_NEEDS = {
    "accelerate": "accelerate",
    "peft": "peft",
    "trl": "trl",
    "lightning": "lightning",
    "hf": "accelerate",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _NAMES if name not in _WITHOUT_GRADIENTS])
def test_runs(name: str, tmp_path: Path) -> None:
    needed = _NEEDS.get(name.split("_")[0])
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(_FOLDER.parent),
        "EXAMPLES_INNER": "aot_eager" if name == "plain_loop" else "eager",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = apart.call(_run, str(_FOLDER / f"{name}.py"), cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "mst_fx: rewrote" in line]
    assert any("mlp" in line for line in said), done.stderr[-2000:]
    if not name.startswith("trl"):  # which has its own tiled head
        assert any("1 vocab" in line for line in said), done.stderr[-2000:]
    if name == "fsdp2":
        assert any("attention" in line for line in said), done.stderr[-2000:]
    assert "refused vocab" not in done.stderr
    assert "loss" in done.stdout
    if name in ("plain_loop", "lightning_module", "per_block", "accelerate_loop"):
        losses = [float(found) for found in re.findall(r"^loss (\S+)$", done.stdout, re.MULTILINE)]
        assert losses == pytest.approx(_eager_losses(), abs=1e-2 if name == "accelerate_loop" else 1e-3)


@functools.cache
def _eager_losses() -> list[float]:
    """What plain_loop.py prints without its line about mst."""
    code = (_FOLDER / "plain_loop.py").read_text().replace("model.compile", "dict")
    done = apart.call(_run_code, code)
    done.check_returncode()
    assert "mst" not in done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines()]


def _run_code(code: str) -> None:
    _with_one_layer()
    exec(code, {"__name__": "__main__"})


def _run(path: str) -> None:
    _with_one_layer()
    apart.script(path)


def _with_one_layer() -> None:
    """What the examples share makes smaller models in this process, and in those that it starts."""
    sys.path.insert(0, str(_FOLDER))
    common = importlib.import_module("_common")
    config = common.LlamaConfig
    common.LlamaConfig = lambda **values: config(**{**values, "num_hidden_layers": 1})  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", _NAMES)
def test_is_short(name: str) -> None:
    text = (_FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 40
    assert 'backend="mst"' in text or "mst_fx.enable" in text
