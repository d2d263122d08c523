"""Two processes with gloo under DistributedDataParallel: losses and gradients are eager's.

Dynamo's DDPOptimizer (``torch._dynamo.config.optimize_ddp``, on by default) splits a graph into one part
for each of DDP's buckets, so that a bucket is sent when its part of the backward pass is done. A
region that lies in two parts cannot be found.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests import apart
from tests.helpers import (
    SMALL_CHUNKS,
    GatedMLP,
    ToyLM,
    gradients,
    loss_of,
    relative_error,
    token_batch,
    worst_error,
)
from tests.models import ACCEPTED, inputs_of

_ENTRY = ACCEPTED["llama"]
_TINY = 1.0  # MiB: one weight of this model's MLPs, as of any real model; the least that DDPOptimizer takes


@dataclasses.dataclass(frozen=True)
class Case:
    """How a model is compiled ("eager", "inside" of DDP, "around" it) and wrapped.

    Checkpointed layers are those of a Llama, others of a toy, which compiles in less time.
    """

    compiled: str
    split: bool = False
    checkpointing: bool = False
    bucket_mb: float = 25.0
    static_graph: bool = False


_CASES = (
    Case("eager"),
    Case("eager", checkpointing=True),
    Case("inside", checkpointing=True),
    Case("around", static_graph=True),
    Case("inside", split=True, bucket_mb=_TINY),
    Case("inside", split=True, bucket_mb=_TINY, checkpointing=True),
)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _model(case: Case) -> nn.Module:
    if case.checkpointing:
        llama = _ENTRY.build(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
        llama.gradient_checkpointing_enable()  # type: ignore[operator]
        return llama
    torch.manual_seed(0)
    toy = ToyLM(layers=1, width=128, vocab=512)
    toy.blocks[0].mlp = GatedMLP(128, 1024).double()
    return toy


def _batch(case: Case, length: int) -> dict[str, Any]:
    return inputs_of(_ENTRY, 1, length) if case.checkpointing else token_batch(1, length)


def _train(case: Case, rank: int) -> tuple[dict[str, Tensor], str]:
    """Two steps of a rank on its own batches; the last loss and gradients, and what was logged."""
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = case.split
    handler, log = _Lines(), logging.getLogger("mst_fx")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    model = _model(case)
    if case.compiled == "inside":
        model.compile(backend="mst", options=SMALL_CHUNKS)
    ddp = DistributedDataParallel(model, bucket_cap_mb=case.bucket_mb, static_graph=case.static_graph)  # type: ignore[arg-type]
    if case.compiled == "around":
        ddp.compile(backend="mst", options=SMALL_CHUNKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(ddp(**_batch(case, 35 + rank)))
        loss.backward()
        found = {"loss": loss.detach(), **gradients(model)}
        optimizer.step()
    log.removeHandler(handler)
    return found, "\n".join(handler.lines)


def _rank(rank: int) -> list[Any]:
    return [_train(case, rank) for case in _CASES]


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """What each rank found in each case."""
    return apart.results_of_ranks(_rank)


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES[2:], ids=str)
def test_as_eager(case: Case, results: list[Any]) -> None:
    for rank in range(2):
        truth, _ = results[rank][_CASES.index(Case("eager", checkpointing=case.checkpointing))]
        found, lines = results[rank][_CASES.index(case)]
        assert relative_error(found["loss"], truth["loss"]) <= 1e-5
        assert worst_error(found, truth) <= 1e-5
        assert "1 vocab; refused 0" in lines
        # Checkpointed layers are not torn apart; other MLPs are, as the README says.
        rewritten = [line for line in lines.splitlines() if line.startswith("rewrote")]
        assert any(" mlp" in line for line in rewritten) == (not case.split or case.checkpointing), lines


def test_one_gradient_for_both(results: list[Any]) -> None:
    """The ranks have other batches, other losses, and the same averaged gradients."""
    for (first, _), (second, _) in zip(*results, strict=True):
        assert not torch.equal(first.pop("loss"), second.pop("loss"))
        assert worst_error(first, second) == 0
