"""``MST_FX=0``: graphs go to their compiler as they are, and that is said once."""

from __future__ import annotations

import logging

import pytest
import torch

import mst_fx
from tests.helpers import SMALL_CHUNKS, ToyLM, compile_mst, relative_error, token_batch
from tests.operators import operators


def _loops(run: object) -> list[str]:
    return [name for name, _ in operators(run) if name.startswith("mst_fx::")]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_nothing_is_rewritten(
    inner: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = ToyLM(), token_batch(2, 41)
    options = {**SMALL_CHUNKS, "inner": inner}
    assert _loops(lambda: compile_mst(model, options)(**batch)), "it is rewritten without the switch"
    monkeypatch.setenv("MST_FX", "0")
    compiled = compile_mst(model, options)
    with caplog.at_level(logging.WARNING, "mst_fx"), mst_fx.watch() as report:
        assert not _loops(lambda: compiled(**batch))
        compile_mst(lambda x: x + 1, options)(torch.ones(3))
    assert relative_error(compiled(**batch)[0], model(**batch)[0]) <= 1e-12
    assert [message for message in caplog.messages if "MST_FX" in message] == [
        f"MST_FX=0: nothing is rewritten, graphs go to {inner} as they are"
    ]
    assert not report.graphs and [finding.cause for finding in report.findings] == ["switched-off"]


def test_enable_is_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_FX", "0")
    model, batch = ToyLM(), token_batch(2, 41)
    with mst_fx.enable(SMALL_CHUNKS):
        assert not _loops(lambda: torch.compile(model)(**batch))


def test_options_are_checked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_FX", "0")
    with pytest.raises(Exception, match="mst has no option 'chunk_row'"):
        torch.compile(lambda x: x + 1, backend="mst", options={"chunk_row": 3})(torch.ones(3))


def test_another_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_FX", "off")
    with pytest.raises(Exception, match=r"MST_FX is 'off'; allowed: 0 \(switched off\) or 1"):
        compile_mst(lambda x: x + 1)(torch.ones(3))


def test_nothing_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_FX", "0")
    weight = torch.ones(8, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    with mst_fx.park(optimizer, "1MiB") as parking:
        weight.sum().backward()
        optimizer.step()
        assert parking.bytes == 0 and optimizer.param_groups[0]["params"] == [weight]
    optimizer.step()
