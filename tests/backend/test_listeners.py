"""The door to those who watch: who listens hears of each graph, and costs no run."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import mst_fx
from mst_fx.listeners import Listeners, on_graph, on_logits
from tests.helpers import SMALL_CHUNKS, GatedMLP, ToyLM, compile_mst, token_batch

ROOT = Path(__file__).parents[2]


def _rewritten(**more: Any) -> mst_fx.Report:
    graph = torch.fx.symbolic_trace(GatedMLP(16, 64))
    return mst_fx.rewrite(graph, [torch.randn(2, 130, 16)], {**SMALL_CHUNKS, **more})[1]


def test_a_listener_gets_the_graph_before_and_after_and_its_report() -> None:
    heard: list[tuple[Any, ...]] = []
    with on_graph.listening(lambda *event: heard.append(event)):
        report = _rewritten()
    _rewritten()
    ((captured, new, told),) = heard
    assert told is report and report.rewrites
    targets = [[str(node.target) for node in gm.graph.nodes] for gm in (captured, new)]
    assert [any("mst_fx.loop" in target for target in each) for each in targets] == [False, True]


@pytest.mark.parametrize("strict", [False, True])
def test_a_listener_that_fails_costs_nothing(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the rewrite nor what the next listener hears."""
    heard: list[mst_fx.Report] = []

    def fail(*event: Any) -> None:
        raise ValueError("no such luck")

    with on_graph.listening(fail), on_graph.listening(lambda before, after, report: heard.append(report)):
        report = _rewritten(strict=strict)
    assert heard == [report] and report.rewrites
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "mst-fx: who listens to graphs failed: ValueError: no such luck"
    ]


def test_logits_that_are_made_are_told_even_if_a_listener_fails() -> None:
    heard: list[str] = []

    def fail(place: str) -> None:
        heard.append(place)
        raise ValueError

    model, batch = ToyLM(layers=1), token_batch(2, 41)
    run = compile_mst(model)
    with on_logits.listening(fail):
        _, logits = run(**batch)
        assert not heard
        found = logits + 0
    assert len(heard) == 1 and "test_listeners.py" in heard[0]
    torch.testing.assert_close(found, model(**batch)[1])


def test_who_listens_twice_hears_once_and_may_leave_while_it_hears() -> None:
    listeners: Listeners[int] = Listeners("numbers")
    heard: list[int] = []

    def once(number: int) -> None:
        heard.append(number)
        listeners.remove(once)

    def always(number: int) -> None:
        heard.append(-number)

    for _ in range(2):
        listeners.add(once)
    listeners.add(always)
    listeners.tell(1)
    listeners.tell(2)
    assert heard == [1, -1, -2]


def test_listeners_come_and_go_on_all_threads() -> None:
    listeners: Listeners[int] = Listeners("numbers")

    def come_and_go() -> None:
        for number in range(300):
            with listeners.listening(lambda heard: None):
                listeners.tell(number)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert listeners._listeners == ()


def test_the_core_knows_no_listener() -> None:
    """Nobody imports the wing for people but the API and the command line."""
    files = [*(ROOT / "mst_fx").rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    inside = [path for path in files if not {"diagnose", "cli", "api.py"} & {*path.parts}]
    assert len(inside) > 20 and not [path for path in inside if "mst_fx.diagnose" in path.read_text()]


WARNS = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
torch.manual_seed(0)
head, loss = torch.nn.Linear(16, 4096), torch.nn.functional.cross_entropy
x = torch.randn(600, 16, requires_grad=True)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = head
    def forward(self, x):
        return self.head(x)
for _ in range(2):
    torch._dynamo.reset()
    model = torch.compile(Model(), backend="mst", options={"inner": "eager"})
    loss(model(x), torch.zeros(600, dtype=torch.long)).backward()
"""


@pytest.mark.slow
def test_the_warning_comes_by_the_entry_point() -> None:
    """``torch.compile(backend="mst")`` in a process that has not imported mst_fx; once."""
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, cwd=ROOT, check=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(said) == 1 and "loss-not-compiled" in said[0], done.stderr
