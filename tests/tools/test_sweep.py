"""tools.sweep: one tiny architecture, a sweep that goes on, and the page made of what it found."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from tests.house.test_docs import PAGES
from tools.sweep import __main__ as command
from tools.sweep import attempt as trial
from tools.sweep import jobs, page
from tools.sweep.attempt import Outcome, Way
from tools.sweep.configs import LENGTH, architectures

_WHOLE = {"attention": 2, "mlp": 2, "vocab": 1}
_GROUPED = ("mlp", "model.layers.0.mlp.experts", "bmm_1 (bmm) multiplies rows", "experts")
_MIXER = ("mlp", "model.layers.1.mixer.in_proj", "conv1d_3 (conv1d) works along the rows | 0.5", "unproved")
_OUTCOMES = [
    Outcome("llama", "causal", "right", "LlamaForCausalLM", rewrites=_WHOLE, graphs=1, deferred=True),
    Outcome("mixture", "causal", "right", rewrites={"vocab": 1}, refusals=[_GROUPED, _GROUPED, _MIXER]),
    Outcome("squares", "causal", "right", rewrites={"mlp": 1}, squares=["softmax", "matmul"]),
    Outcome("bare", "causal", "right"),
    Outcome("broken", "causal", "crash", why="RuntimeError: escaped"),
    Outcome("odd", "causal", "not built", why="KeyError: 'x'"),
]


def test_the_page_has_each_architecture_once_under_its_end() -> None:
    text = page.page(_OUTCOMES, "models.jsonl")
    sections = dict(part.split("\n", 1) for part in text.split("## ")[1:])
    titles = [title.rsplit(" ", 1)[0] for title in sections]
    assert titles == [title for title, _ in page._SECTIONS]
    rows = [[line for line in body.splitlines() if line.startswith("| `")] for body in sections.values()]
    assert [[row.split("`")[1] for row in each] for each in rows] == [
        ["llama"], ["mixture", "squares"], ["bare"], ["broken"], ["odd"],
    ]  # fmt: skip
    assert rows[0] == ["| `llama` | 2 | 2 | 1 | – |"]
    assert rows[1][0] == (
        "| `mixture` | – | – | 1 | 2 × experts `mlp.experts`; mlp `mixer.in_proj`: conv1d works along the rows \\| 0·5 |"
    )
    assert "2 values of S×S elements" in rows[1][1]
    assert "RuntimeError: escaped" in rows[3][0]
    assert torch.__version__ in text and "python -m tools.sweep models.jsonl" in text


def test_what_needs_looking_into_is_counted() -> None:
    refused = dataclasses.replace(_OUTCOMES[2], refusals=[("attention", "a", "why", "scores")])
    assert _OUTCOMES[2].silent and not refused.silent and not refused.is_whole
    doubtful = dataclasses.replace(_OUTCOMES[1], doubtful=["mlp model.layers.1.mixer.in_proj"])
    text = page.summary([*_OUTCOMES, doubtful])
    assert "   1 rewritten wholly" in text and "   1 with S×S values and no refusal" in text
    assert "   1 with refusals of what is no MLP and no head" in text


def test_a_sweep_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes of their own: one that ends well, one that dies, one that is late; then only what is asked for."""
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(_OUTCOMES[0])) + "\n")

    def attempt(name: str, family: str, way: Way | None = None) -> Outcome:
        if name == "dead":
            raise SystemExit(3)
        if name == "late":
            time.sleep(60)
        return Outcome(name, family, "right", made=str(way))

    for module in (command, jobs):
        monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setattr(command.logging, "disable", lambda level: None)  # type: ignore[attr-defined]
    common = [str(path), "--jobs", "3", "--timeout", "5"]
    command.main([*common, "--only", "llama,fine,dead,late"])
    found = {name: outcome.status for (_, name), outcome in command.load(path).items()}
    assert found == {"llama": "right", "fine": "right", "dead": "died", "late": "timeout"}
    command.main([*common, "--only", "llama,fine,dead,new", "--redo", "died", "--limit-minutes", "0"])
    assert ("causal", "new") not in command.load(path)
    command.main([*common, "--only", "llama,fine,dead,new", "--redo", "died"])
    redone = [json.loads(line)["name"] for line in path.read_text().splitlines()][4:]
    assert sorted(redone) == ["dead", "new"]
    command.main([*common, "--only", "odd", "--device", "meta", "--inner", "inductor", "--length", "205"])
    assert command.load(path)["causal", "odd"].made == ", meta, inductor, 205 tokens"
    command.main([str(path), "--table", str(tmp_path / "models.md")])
    assert "| `fine` |" in (tmp_path / "models.md").read_text()


@pytest.mark.slow
def test_a_tiny_model_is_compared_with_eager() -> None:
    outcome = trial.attempt("llama", "causal")
    assert outcome.status == "right" and outcome.is_whole and outcome.error < 1e-6
    assert outcome.rewrites == _WHOLE and outcome.deferred and outcome.graphs == 1
    assert not outcome.doubtful and json.loads(json.dumps(dataclasses.asdict(outcome)))
    assert {"llama", "gpt_oss", "mamba"} <= set(architectures("causal")) and LENGTH % 16


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one parameter, by a millionth part of what a wrong chunk would be off."""
    right = trial._step

    def wrong(model: torch.nn.Module, run: object, inputs: dict[str, object]) -> trial.Step:
        loss, grads = right(model, run, inputs)  # type: ignore[arg-type]
        if run is not model:
            grads["model.norm.weight"] *= 1 + 1e-4
        return loss, grads

    monkeypatch.setattr(trial, "_step", wrong)
    monkeypatch.setattr(trial, "_compiled_step", lambda model, inputs, **how: (
        wrong(model, model.forward, inputs) if how["backend"] == "mst" else right(model, model, inputs)
    ))  # fmt: skip
    outcome = trial.attempt("llama", "causal")
    assert outcome.status == "wrong" and outcome.peer == "off by 0.0e+00"


def test_the_committed_page_is_a_page_of_this_tool() -> None:
    (models,) = [page for page in PAGES if page.stem == "models"]
    assert models.read_text().startswith(page._LEAD)
