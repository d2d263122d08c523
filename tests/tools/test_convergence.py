"""tools.convergence: what it compares, and a tiny training in each way."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from tests import apart
from tools import corpus
from tools.convergence import compare, runs
from tools.convergence.__main__ import run

TINY = dataclasses.replace(
    runs.ON_CPU, seq=300, hidden=16, intermediate=64, layers=1, vocabulary=400, steps=4, held_out=2, files=25
)
TINY = dataclasses.replace(
    TINY, memory="4MiB", options={"inner": "aot_eager", "chunk_rows": 64, "vocab_chunk_rows": 64}
)


def _result(way: str, seed: int, held_out: float, losses: list[float]) -> runs.Result:
    more = {
        "norm": 2.5 if way == "eager" else 2.505,
        "rewritten": {},
        "plans": [],
        "first_seconds": 1.0,
        "step_seconds": 0.1,
        "peak_bytes": None,
    }
    return {"way": way, "seed": seed, "held_out": held_out, "losses": losses, **more}


def _results(gap: float, at: float) -> list[runs.Result]:
    """Eager's seeds are 0.2 apart at the end, 0.4 at each step; mst is off at the end, and at two steps."""
    eager = [_result("eager", seed, 5 + seed / 10, [6 + seed / 5] * 40) for seed in range(3)]
    return [*eager, _result("mst", 1, 5.1 - gap, [6.2 + at] * 20 + [6.2] * 20)]


@pytest.mark.parametrize(
    ("gap", "at", "within"), [(0.19, -0.39, True), (0.21, 0.0, False), (0.0, 0.41, False)]
)
def test_gaps_are_held_against_what_seeds_change(gap: float, at: float, within: bool, tmp_path: Path) -> None:
    results = _results(gap, at)
    noise, found = compare.noise(results), compare.compare(results, "mst")
    assert noise.held_out == pytest.approx(0.2) and noise.curve == pytest.approx([0.4, 0.4])
    assert found.held_out_gap == pytest.approx(gap) and found.curve_gap == pytest.approx(abs(at))
    assert noise.has(found) == within and found.norm_gap == pytest.approx(2e-3)
    row = next(line for line in compare.table(results).splitlines() if line.startswith("| mst"))
    assert ("| yes |" in row) == within and ("| NO |" in row) != within
    compare.draw(results, tmp_path / "x.png", "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_says_nothing_of_seeds() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        compare.noise(_results(0.0, 0.0)[:1])


def test_data_are_always_the_same_and_held_out_files_are_not_trained_on() -> None:
    data, again = runs.make_data(TINY), runs.make_data(TINY)
    assert torch.equal(data.train, again.train) and torch.equal(data.held_out, again.held_out)
    assert data.train.shape == (4, 300) and data.held_out.shape == (2, 300)
    assert 300 < int(data.train.max()) < 400 and not torch.equal(data.train[:2], data.held_out)
    texts = corpus.read(corpus.source_files()[:3])
    tokenizer = corpus.train_tokenizer(texts, 300)
    stream = corpus.token_stream(tokenizer, texts, 100_000)
    assert len(stream) == 100_000 and tokenizer.decode(stream).startswith(texts[0])
    with pytest.raises(ValueError, match="tokens, and not"):
        corpus.train_tokenizer(["ab"], 300)


def test_a_nudge_is_a_last_bit() -> None:
    weights, nudged = runs.starting_weights(TINY, 1), runs.starting_weights(TINY, 1, nudged=True)
    for name, x in weights.items():
        assert bool((nudged[name] != x).all())
        up = torch.nextafter(x, torch.tensor(torch.inf))
        down = torch.nextafter(x, -torch.tensor(torch.inf))
        assert bool(((nudged[name] == up) | (nudged[name] == down)).all())
    other = runs.starting_weights(TINY, 2)
    assert not torch.equal(weights["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_rates_rise_and_fall() -> None:
    rates = [runs.rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[5] == 1.0
    assert rates[-1] == pytest.approx(0.1) and rates[5:] == sorted(rates[5:], reverse=True)


def _trained(folder: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    setattr(runs, "spawn", functools.partial(start_processes, start_method="fork"))  # noqa: B010
    run(TINY, ways, [0, 1], Path(folder) / "tiny", Path(folder) / "tiny.png")


@pytest.mark.slow
def test_each_way_trains_alike(tmp_path: Path) -> None:
    ways = [*runs.WAYS, runs.RANKS]
    done = apart.call(_trained, str(tmp_path), ways)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((tmp_path / "tiny.json").read_text())["results"]["runs"]
    assert [(r["way"], r["seed"]) for r in found] == [(way, seed) for way in ways for seed in (0, 1)]
    first = {r["way"]: r for r in found if r["seed"] == 0}
    whole = {"attention": 1, "mlp": 1, "vocab": 1}
    assert first["eager"]["rewritten"] == first["nudged"]["rewritten"] == {}
    assert first["mst"]["rewritten"] == first["plan"]["rewritten"] == whole
    assert first[runs.RANKS]["rewritten"] == {**whole, "exchange": 1, "sequence": 1}
    assert "memory plan" in first["plan"]["plans"][0] and not first["mst"]["plans"]
    assert all(not r["rewritten"] for r in found if r["seed"] == 1), "compiled anew"
    eager = {r["seed"]: r for r in found if r["way"] == "eager"}
    for r in found:
        assert r["losses"] == pytest.approx(eager[r["seed"]]["losses"], abs=2e-5), r["way"]
        assert r["held_out"] == pytest.approx(eager[r["seed"]]["held_out"], abs=2e-5)
        assert r["norm"] == pytest.approx(eager[r["seed"]]["norm"], rel=1e-5)
        assert r["losses"][-1] < r["losses"][0]
    assert eager[0]["losses"] != pytest.approx(eager[1]["losses"], abs=1e-3)
    text = (tmp_path / "tiny.md").read_text()
    assert text.count("| yes |") == 4 and "memory plan" in text and (tmp_path / "tiny.png").exists()
