"""The command line: what is shown, and what is said to a user who mistypes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mst_fx.cli import main as cli
from tests import apart

TOOLS = Path(__file__).parents[2] / "tools"

OWN_MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    return mlp, (torch.randn(600, 16),), {}

def build_wrongly():
    return nn.Linear(2, 2)

def build_unusable():
    return nn.Linear(2, 2), (torch.randn(3, 3),), {}
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    return "own_model"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_explain_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "LlamaForCausalLM", "--seq", "512", "--set", "num_hidden_layers=1")
    assert code == 0
    assert "hidden_size 4,096 → 64" in out, "what was shrunk is said"
    assert "num_hidden_layers" not in out, "what the user set was not shrunk"
    rows = [line.split() for line in out.splitlines() if line.startswith(("mlp", "vocab"))]
    assert [row[:2] for row in rows] == [["mlp", "model.layers.0.mlp"], ["vocab", "lm_head"]]
    assert all("512" in row for row in rows)
    assert "(logits deferred)" in out
    assert "\x1b" not in out, "no colours in a pipe"


@pytest.mark.slow
def test_diff_shows_nodes_and_each_body_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "diff", "LlamaConfig", "--set", "num_hidden_layers=3", "--seq", "512", "--checkpointing"
    )
    assert code == 0
    lines = out.splitlines()
    assert any(line.startswith("- ") and "linear" in line for line in lines)
    assert any(line.startswith("+ ") and "mst_fx.loop" in line for line in lines)
    assert "mlp model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp" in lines
    assert "512 rows as 2 chunks of ≤ 256" in out
    assert "MiB before" in out
    bodies = [line for line in lines if line.startswith("body ")]
    assert len(bodies) == len(set(bodies)) == 2, "one for all MLPs, one for the head"
    assert "torch.ops.aten.mm.default" in out and '"f32[256, 64]"' in out


def test_json_is_the_report(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", f"{own_module}:build", "--json", "--option", "chunk_rows=100")
    assert code == 0
    (rewrite,) = json.loads(out)["rewrites"]
    assert (rewrite["kind"], rewrite["rows"], rewrite["chunk_rows"], rewrite["chunks"]) == (
        "mlp",
        600,
        100,
        6,
    )
    assert rewrite["chunk_bytes"] * 6 == rewrite["intermediate_bytes"]


def test_own_function(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", f"{own_module}:build")
    assert code == 0
    assert "600" in out and "3 x 256" in out


@pytest.mark.slow
def test_no_labels_leaves_no_loss_to_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "explain", "Qwen2ForCausalLM", "--no-labels", "--set", "num_hidden_layers=1", "--seq", "512"
    )
    assert code == 0
    assert "labels" not in out.splitlines()[0]
    assert "rewrote 1 attention, 1 mlp;" in out


def test_short_sequences_are_left_alone_and_said_to_be(
    own_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "explain", f"{own_module}:build", "--option", "chunk_rows=600")
    assert code == 0
    assert "rewrote nothing" in out and "short: 600 rows fit in one chunk" in out


@pytest.mark.slow
def test_an_encoder_decoder_and_an_image_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "T5Config", "--seq", "300", "--set", "num_layers=1", "--no-labels")
    assert code == 0, out
    assert "decoder_input_ids [1, 300]" in out
    code, out, _ = run(capsys, "explain", "ViTConfig", "--batch", "2", "--set", "num_hidden_layers=1")
    assert code == 0
    assert "pixel_values [2, 3, 224, 224], labels [2]" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["LlamaForCasualLM"], "no class 'LlamaForCasualLM'; did you mean LlamaForCausalLM"),
        (
            ["AutoModelForCausalLM"],
            "neither the class of one model nor that of a config; name one, as Qwen2ForCausalLM",
        ),
        (["LlamaForCausalLM", "--set", "hiden_size=64"], "no field 'hiden_size'; did you mean hidden_size"),
        (["LlamaForCausalLM", "--set", "hidden_size"], "--set takes NAME=VALUE, not 'hidden_size'"),
        (["LlamaForCausalLM", "--set", "hidden_size=sixty"], "hidden_size"),
        (["LlamaForCausalLM", "--option", "chunk_row=128"], "mst has no option 'chunk_row'"),
        (["LlamaForCausalLM", "--option", "chunk_rows=0"], "'chunk_rows' is 0; allowed: 'auto' or an int"),
        (["WhisperForConditionalGeneration"], "takes 'input_features', neither tokens nor pixels"),
        (["no_such_module:build"], "cannot import 'no_such_module'"),
        (["json:no_such_function"], "'json' has no function 'no_such_function'"),
        (["own_model:build_wrongly"], "must return (fn_or_module, args, kwargs), not Linear"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], sentence: str, own_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "explain", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("mst-fx: ") and err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize("arguments", [["explain"], ["explain", "LlamaConfig", "--seq", "0"], ["undo", "x"]])
def test_argparse_mistakes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2


def test_strict_refusals_fail(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(
        capsys, "explain", "GPTBigCodeForCausalLM", "--set", "n_layer=1", "--seq", "512",
        "--option", "strict=True",
    )  # fmt: skip
    assert code == 3
    assert err.startswith("mst-fx: refused: ") and err.count("\n") == 1


def test_colours_on_a_terminal_only(
    own_module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = run(capsys, "diff", f"{own_module}:build")
    assert "\x1b[31m- " in out and "\x1b[32m+ " in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = run(capsys, "diff", f"{own_module}:build")
    assert "\x1b" not in out


def test_missing_rich_is_said(
    own_module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, _, err = run(capsys, "diff", f"{own_module}:build")
    assert code == 2
    assert "pip install rich" in err


@pytest.mark.slow
def test_graph_diff_is_the_same_command(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "diff", f"{own_module}:build")
    script = apart.run_script(TOOLS / "graph_diff.py", f"{own_module}:build", cwd=".")
    script.check_returncode()
    strip = [line for line in script.stdout.splitlines() if "torch.ops.aten" not in line]
    assert strip == [line for line in out.splitlines() if "torch.ops.aten" not in line]
