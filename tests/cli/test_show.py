"""The command line: what is shown, and what is said to a user who mistypes."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from mst_fx.cli import main as cli
from tests import apart

TOOLS = Path(__file__).parents[2] / "tools"

OWN_MODEL = """
import torch
from torch import nn

def build(seq=600, width=16):
    torch.manual_seed(0)
    print("built")
    mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
    return mlp, (torch.randn(seq, width),), {}

def build_any(**given):
    print("given", sorted(given.items()))
    return build()

def build_wrongly():
    return nn.Linear(2, 2)

def build_three():
    return 3, (), {}

def build_parentheses():
    return nn.Linear(2, 2), torch.ones(2, 2), {}

def build_no_kwargs():
    return nn.Linear(2, 2), (torch.ones(2, 2),), None

def build_needs(layers):
    pass

def build_unusable():
    return nn.Linear(2, 2), (torch.randn(3, 3),), {}

def boom():
    raise RuntimeError("no such data")

def boom_when_called():
    def call(x):
        raise KeyError("mine")
    return call, (torch.ones(3),), {}
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    (tmp_path / "no_python.py").write_text("def f(:")
    (tmp_path / "imports.py").write_text("import no_such_thing")
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
    assert "mlp model.layers.0–2.mlp ×3" in lines
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
        (["no_such_file.py:build"], "there is no file no_such_file.py"),
        (["own_model:biuld"], "'own_model' has no function 'biuld'; did you mean build"),
        (["own_model:build_wrongly"], "must return (fn_or_module, args, kwargs), not Linear"),
        (["own_model:build_three"], "the first is of type int, which cannot be called"),
        (["own_model:build_parentheses"], "args is of type Tensor, not a tuple; of one argument (x,)"),
        (["own_model:build_no_kwargs"], "kwargs is None, not a dict; of none {}"),
        (
            ["own_model:build_needs"],
            "needs layers: --seq, --batch, --dtype, --checkpointing or --set NAME=VALUE",
        ),
        (
            ["own_model:build", "--dtype", "bf16"],
            "no parameter 'dtype', so that what was given of it would be ignored",
        ),
        (["own_model:build", "--set", "widht=3"], "no parameter 'widht', so that"),
        (["own_model:build", "--full-size"], "--full-size is for models by name"),
        (["some/config.json"], "there is no file or folder some/config.json"),
        (
            ["llama3-8b", "--set", "hiden_size=3"],
            "LlamaConfig has no field 'hiden_size'; did you mean hidden_size",
        ),
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


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_model:boom", "own_model:boom raised RuntimeError: no such data (own_model.py:34 in boom; "),
        ("own_model.py:boom_when_called", "raised KeyError: 'mine' (own_model.py:38 in call; "),
        ("own_model:build_unusable", "own_model:build_unusable raised "),
        ("no_python:build", "importing no_python: SyntaxError: invalid syntax (no_python.py, line 1)"),
        (
            "imports:build",
            "importing imports raised ModuleNotFoundError: No module named 'no_such_thing' (imports.py:1 in",
        ),
    ],
)
def test_what_a_users_program_raises_is_shown_as_its_own(
    name: str, sentence: str, own_module: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "explain", name)
    assert code == 4
    assert out == "" and err.startswith("mst-fx: ") and err.count("\n") == 1
    assert sentence in err.replace(f"{tmp_path}/", "")


def test_verbose_shows_the_whole_trace(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "explain", f"{own_module}:boom", "--verbose")
    logging.getLogger("mst_fx").setLevel(logging.NOTSET)
    assert code == 4 and "Traceback" in err and 'raise RuntimeError("no such data")' in err


def test_a_function_gets_what_its_signature_names(
    own_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "explain", f"{own_module}.py:build", "--seq", "1K", "--set", "width=32")
    assert code == 0 and "1,024  4 x 256" in out
    assert "built" in err and "built" not in out, "what it prints is no part of the answer"
    given = ["--batch", "2", "--dtype", "bf16", "--checkpointing", "--no-labels", "--set", "x=y"]
    _, _, err = run(capsys, "explain", f"{own_module}:build_any", *given)
    wanted = [("batch", 2), ("checkpointing", True), ("dtype", torch.bfloat16), ("labels", False), ("x", "y")]
    assert f"given {wanted}" in err


@pytest.mark.slow
def test_full_sizes_have_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a short name, and by a folder with a config; with chunks as on a GPU, or on a CPU."""
    code, out, err = run(capsys, "explain", "llama3-8b", "--set", "num_hidden_layers=1", "--seq", "16K")
    assert code == 0 and not err
    assert "1,268,789,248 bfloat16 weights, without memory; input_ids [1, 16384]" in out
    rows = {
        line.split()[0]: " ".join(line.split())
        for line in out.splitlines()
        if "model.layers" in line or "lm_head" in line
    }
    assert "16,384 4 x 4,096" in rows["mlp"] and "16,384 4 x 4,096" in rows["vocab"]
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "explain", str(tmp_path), "--seq", "2K", "--device", "cpu")
    assert code == 0 and out.startswith("LlamaForSequenceClassification: ") and "4 x 512" in out, out


def test_chunks_as_on_a_gpu(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", f"{own_module}:build", "--device", "h100")
    assert code == 0 and "short: 600 rows fit in one chunk of 4,096" in out


@pytest.mark.slow
def test_what_needs_values_is_not_told_of_without_memory(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "num_hidden_layers=1", "--set", "hidden_size=64", "--set", "intermediate_size=64"]
    code, _, err = run(
        capsys,
        "explain",
        "MixtralForCausalLM",
        "--full-size",
        *small,
        "--set",
        "experts_implementation=eager",
    )
    assert code == 2 and "cannot be traced without memory: " in err and err.count("\n") == 1, err


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
