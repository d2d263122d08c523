"""The wheel holds mst_fx with all its sub-packages and data, and nothing else."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the tracked layout, so that nothing is written to the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mst_fx", "passes", "tests", "tools"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_packages(wheel: zipfile.ZipFile) -> None:
    files = [Path(name) for name in wheel.namelist() if not name.endswith("/")]
    installed = {path.as_posix() for path in files if not path.parts[0].endswith(".dist-info")}
    tree = [path for path in (ROOT / "mst_fx").rglob("*.*") if "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT).as_posix() for path in tree}
    expected |= {f"mst_fx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert installed == expected
    assert {"mst_fx/py.typed", "mst_fx/diagnose/page.html", "mst_fx/cli/main.py"} <= installed


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["torch_dynamo_backends"]) == {"mst": "mst_fx.backend:mst"}
    assert dict(entry_points["console_scripts"]) == {"mst-fx": "mst_fx.cli.main:main"}
