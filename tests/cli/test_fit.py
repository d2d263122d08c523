"""``mst-fx fit``: what is printed, and what is said to a user who mistypes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mst_fx.cli import main as cli
from mst_fx.diagnose.fit_model import subject_of
from mst_fx.diagnose.model_of import Shape
from mst_fx.errors import SubjectError

_SMALL = ["hidden_size=256", "intermediate_size=1024", "vocab_size=4000", "num_hidden_layers=4"]
_SMALL = [
    f"--set={each}" for each in (*_SMALL, "num_attention_heads=4", "num_key_value_heads=2", "head_dim=64")
]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama3-8b", "--memory", "many"], "--memory is 'many'; allowed: bytes as in 80GiB"),
        (["llama3-8b", "--memory", "80GiB", "--host", "x"], "--host is 'x'; allowed: bytes as in 128GiB"),
        (["llama3-8b", "--memory", "80GiB", "--park"], "--park needs --host: the bytes of the host"),
        (
            ["llama3-8b", "--memory", "80GiB", "--host", "1GiB", "--park", "0"],
            "--park is '0'; allowed: bytes as in 256MiB",
        ),
        (["llama3-8b", "--memory", "80GiB", "--device", "h9"], "--device is 'h9'; known: H200, H100, A100"),
        (
            ["llama3-8b", "--memory", "80GiB", "--optimizer", "lion"],
            "--optimizer is 'lion'; allowed: adamw, ",
        ),
        (
            ["llama3-8b", "--memory", "80GiB", "--seq", "1e5"],
            "--seq is '1e5'; allowed: tokens, 2,048 or more",
        ),
        (["llama3-8b", "--memory", "80GiB", "--seq", "4096,1024"], "--seq is '4096,1024'; allowed: tokens"),
        (["llama3-8b", "--memory", "80GiB", "--set", "width=3"], "LlamaConfig has no field 'width'"),
        (["lama3-8b", "--memory", "80GiB"], "there is no config of 'lama3-8b'"),
        (["LamaConfig", "--memory", "80GiB"], "did you mean"),
        (["BertModel", "--memory", "80GiB", "--seq", "2048"], "BertModel takes no labels"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_config_may_be_a_file_or_a_folder(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **shape, "vocab_size": 100, "intermediate_size": 128}))
    for name in (str(file), str(tmp_path)):
        subject = subject_of(name, Shape(overrides={"vocab_size": 200}, dtype=torch.bfloat16))
        assert len(subject.kinds) == 5 and "LlamaForCausalLM, 5 layers" in subject.title
        model = subject.build(2, False)
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        assert weight.shape == (200, 64) and weight.device.type == "meta" and weight.dtype == torch.bfloat16
    file.write_text(json.dumps(shape))
    with pytest.raises(SubjectError, match="model_type"):
        subject_of(str(file), Shape())


def test_layers_are_told_apart_by_the_config() -> None:
    subject = subject_of("gemma2-9b", Shape(dtype=torch.bfloat16))
    assert len(set(subject.kinds)) == 2 and subject.kinds[0] == subject.kinds[2] != subject.kinds[1]


@pytest.mark.slow
def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "llama3-8b", "--memory", "512MiB", "--device", "h200", *_SMALL]
    three = ["--set=num_hidden_layers=3"]  # of four with memory of the host all would be traced
    assert cli.main([*arguments, *three, "--host", "8GiB", "--seq", "16384"]) == 0
    out = capsys.readouterr().out
    assert "Copies to the host and back" in out
    assert "All of it is predicted" in out and "the plan at 16,384 tokens: " in out
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    longest = [way["longest"] for way in found["ways"]]
    assert longest[0] < longest[1] < min(longest[2:])
    for way in found["ways"]:
        points = {point["seq"]: point for point in way["points"]}
        assert way["longest"] in points and all(point["peak"] <= 2**29 for point in points.values())
    planned, checkpointed = found["ways"][3]["points"], found["ways"][2]["points"]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(planned, checkpointed, strict=False))


@pytest.mark.slow
def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--host", "10MiB", "--park", "1MiB"]
    assert cli.main(["fit", "llama3-8b", "--memory", "20MiB", *more, *_SMALL]) == 0
    out = capsys.readouterr().out
    assert out.count("nothing fits") == 4
    assert "parked: 9.4 MiB of states on the host" in out and "Parked states" in out


@pytest.mark.slow
def test_models_that_are_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "T5ForConditionalGeneration", "--memory", "8GiB", "--seq", "2048"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("mst-fx: nothing can be said of T5ForConditionalGeneration: ") and err.count("\n") == 1
    )
