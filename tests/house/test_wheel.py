"""The wheel holds mst_fx with all its sub-packages and data, and nothing else."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import mst_fx

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked layout, so that nothing is written to the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mst_fx", "passes", "tests", "tools"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built)


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


def test_readme_renders_alone(wheel: zipfile.ZipFile) -> None:
    """What an index shows: no picture and no link needs the files around it; all other text is the README's."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = email.message_from_string(wheel.read(name).decode())
    text = said.get_payload()
    assert said["Description-Content-Type"] == "text/markdown" and isinstance(text, str)
    assert text.startswith("# mst-fx") and "Quick start · Options" in text
    pictures = re.findall(r"!\[(.*?)\]", (ROOT / "README.md").read_text())
    assert pictures and not any(picture in text for picture in pictures) and "![" not in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert re.findall(r"```\w*\n.*?```", text, re.DOTALL) == re.findall(
        r"```\w*\n.*?```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert said["Version"] == mst_fx.__version__ and said["Project-URL"] and said.get_all("Classifier")


@pytest.mark.slow
def test_the_wheel_alone_runs_the_first_example(built: Path, tmp_path: Path) -> None:
    """In a fresh environment that has the packages of this one, but not this checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # A folder in a .pth is put on the path, and no .pth in it is read: of an editable install there is nothing.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(built)]
    subprocess.run([sys.executable, *install], check=True)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    smaller = {
        'backend="mst"': 'backend="mst", options={"inner": "eager"}',
        "num_hidden_layers=2": "num_hidden_layers=1",
    }
    for old, new in smaller.items():
        assert old in code
        code = code.replace(old, new)
    head = "import logging\nlogging.basicConfig()\nlogging.getLogger('mst_fx').setLevel(logging.INFO)\n"
    (tmp_path / "first.py").write_text(
        f"{head}{code}\nimport mst_fx\nprint(mst_fx.__file__, bool(loss > 0))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "first.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{site}/mst_fx/__init__.py True\n", done.stderr
    assert "rewrote 1 attention, 1 mlp, 1 vocab; refused 0" in done.stderr
    script = [str(tmp_path / "venv" / "bin" / "mst-fx"), "--version"]
    said = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == f"mst-fx {mst_fx.__version__}\n"
