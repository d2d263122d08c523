"""A rank of a group that fails, or is killed: what the others say, and how soon. Three processes with gloo."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

import mst_fx
from mst_fx.group import group_of
from mst_fx.ranks import faults
from mst_fx.ranks.agreement import of_ranks
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.processes import is_of_a_collective
from tests import apart
from tests.helpers import SMALL_CHUNKS, ToyLM, loss_of, relative_error, token_batch, worst_error

_SECONDS = 10  # torch's time-out
_RANKS = 3
_FAILING = 1
_armed: dict[str, str] = {}  # what this rank does, in which pass


def _act(when: str) -> None:
    how = _armed.get(when)
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


@torch.library.custom_op("tests_faults::same", mutates_args=(), tags=(torch.Tag.pointwise,))
def _same(x: Tensor) -> Tensor:
    _act("forward")
    return x.clone()


@torch.library.custom_op("tests_faults::same_backward", mutates_args=(), tags=(torch.Tag.pointwise,))
def _same_backward(grad: Tensor) -> Tensor:
    _act("backward")
    return grad.clone()


_same.register_fake(torch.empty_like)
_same_backward.register_fake(torch.empty_like)
_same.register_autograd(lambda ctx, grad: _same_backward(grad))


class Failing(nn.Module):
    """A toy that fails in the middle: exchanges of attention lie on both sides, in both passes."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = ToyLM(layers=2)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        x = self.lm.blocks[0](self.lm.embed(ids))
        logits = self.lm.head(self.lm.norm(self.lm.blocks[1](_same(x))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _seeded() -> nn.Module:
    torch.manual_seed(0)
    return Failing()


def _tried(model: nn.Module) -> dict[str, Any]:
    """A step: its loss, or its error, and how long it took."""
    start = time.monotonic()
    model.zero_grad(set_to_none=True)
    try:
        loss = loss_of(model(**token_batch(1, 61)))
        loss.backward()
    except Exception as error:
        has_gradients = any(p.grad is not None for p in model.parameters())
        found: dict[str, Any] = {"error": f"{type(error).__name__}: {error}", "has_gradients": has_gradients}
    else:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found = {"loss": loss.detach(), "gradients": gradients}
    return {**found, "seconds": time.monotonic() - start}


def _one(rank: int, group: Any, how: str, when: str, inner: str) -> list[dict[str, Any]]:
    """Two steps that are right, one in which a rank fails, and one more."""
    torch._dynamo.reset()
    _armed.clear()
    model = _seeded()
    model.compile(backend="mst", options={**SMALL_CHUNKS, "inner": inner, "sequence_parallel": group})
    steps = [_tried(model), _tried(model)]
    if rank == _FAILING:
        _armed[when] = how
    steps.append(_tried(model))
    _armed.clear()
    return [*steps, _tried(model)]


_SCENES = {
    "memory in the forward pass": ("memory", "forward", "aot_eager"),
    "memory in the backward pass": ("memory", "backward", "inductor"),
    "killed": ("kill", "backward", "aot_eager"),  # last: the others go on with two ranks, which is the end
}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=_RANKS)
    loader = mst_fx.shared_batches([torch.arange(3) + rank], dist.group.WORLD)
    found: dict[str, Any] = {"batches": [x.tolist() for x in loader]}
    wait = timedelta(seconds=_SECONDS)
    groups = [dist.new_group(timeout=wait) for _ in _SCENES]  # each its own: they cannot be used afterwards
    unused = dist.new_group(timeout=wait)
    for (name, scene), group in zip(_SCENES.items(), groups, strict=True):
        dist.barrier()
        found[name] = _one(rank, group, *scene)
        torch.save(found, f"{folder}/{rank}.pt")
    found["no batches"] = _error(lambda: list(loader))
    found["no compilation"] = _one(rank, unused, "", "", "aot_eager")[0]["error"]
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)


def _error(function: Callable[[], Any]) -> str:
    try:
        return str(function())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _start(folder: str) -> None:
    """Starts the ranks, and lets those go on whose neighbours have ended."""
    context = start_processes(_rank, (folder,), nprocs=_RANKS, join=False, start_method="fork")
    for process in context.processes:
        process.join(200)
        process.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = apart.call(_start, str(folder), timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(_RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("scene", _SCENES)
def test_the_others_say_who_it_was(scene: str, ranks: list[dict[str, Any]]) -> None:
    how = _SCENES[scene][0]
    model = _seeded()
    loss = loss_of(model(**token_batch(1, 61)))
    loss.backward()
    truth: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    of_ranks = [each[scene] for each in ranks if scene in each]
    assert len(of_ranks) == (_RANKS if how == "memory" else _RANKS - 1)
    for at in (0, 1):  # as if nobody watched
        assert all(relative_error(steps[at]["loss"], loss) <= 1e-12 for steps in of_ranks)
        mean = {name: sum(steps[at]["gradients"][name] for steps in of_ranks) for name in truth}
        if how == "memory":
            assert worst_error({name: x / _RANKS for name, x in mean.items()}, truth) <= 1e-12
    for rank, each in enumerate(ranks):
        if scene not in each:
            assert rank == _FAILING
            continue
        failed, again = each[scene][2:]
        assert not failed["has_gradients"]
        assert failed["seconds"] <= _SECONDS + 3, failed
        assert again["error"].startswith(
            "GroupError: a group that works on one sequence cannot be used any more"
        )
        assert again["seconds"] <= 1
        if rank == _FAILING:
            assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
            assert "a step failed on this rank, 1, before: OutOfMemoryError" in again["error"]
            continue
        head, *lines = failed["error"].splitlines()
        assert (
            head
            == "GroupError: a rank of a group that works on one sequence is lost, and the others cannot go on: rank 1"
        )
        assert [line.partition(": ")[0] for line in lines] == ["  rank 0", "  rank 1", "  rank 2"]
        if how == "memory":
            assert (
                lines[1]
                == "  rank 1: failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
            )
        else:
            assert lines[1].startswith("  rank 1: has ended, and said nothing (process ")
            assert failed["seconds"] <= _SECONDS / 2, failed  # a connection that ends is noticed at once
        assert "waited: RuntimeError" in lines[rank]
        assert "lost rank 1" in again["error"]


@pytest.mark.slow
def test_batches_name_it_too(ranks: list[dict[str, Any]]) -> None:
    assert [each["batches"] for each in ranks] == [[[0, 1, 2], [1, 2, 3], [2, 3, 4]]] * _RANKS
    assert "no batches" not in ranks[_FAILING]
    for each in (ranks[0], ranks[2]):
        assert each["no batches"].startswith(
            "GroupError: a rank of a group that works on one sequence is lost"
        )
        assert "  rank 1: has ended" in each["no batches"]
        assert (
            "GroupError: a rank of a group that works on one sequence has not come: rank 1"
            in each["no compilation"]
        )


def _agree(rank: int) -> list[str]:
    """As a memory plan does it, in the middle of AOTAutograd."""
    group = group_of(dist.group.WORLD)
    with enable_python_dispatcher():
        return [text for _ in range(1500) for text in of_ranks(group, f"rank {rank}")]


@pytest.mark.slow
def test_ranks_agree_while_a_graph_is_traced() -> None:
    """Under the Python dispatcher a collective would wait for a thread that waits for the GIL, sooner or later."""
    assert apart.results_of_ranks(_agree, timeout=60) == [["rank 0", "rank 1"] * 1500] * 2


def test_processes_are_told_apart() -> None:
    this = faults.Process.this()
    assert not this.has_ended()
    if Path("/proc/self/stat").exists():
        assert faults.Process(this.name, this.pid, this.host, this.machine, "0").has_ended()
        assert not faults.Process(this.name, 2**22 + 1, this.host, "another", "0").has_ended()


def test_errors_of_a_model_are_none_of_a_collective() -> None:
    for error in (torch.OutOfMemoryError("gloo/"), RuntimeError("shape"), ValueError("gloo/")):
        assert not is_of_a_collective(error)
    assert is_of_a_collective(dist.DistBackendError("NCCL error"))
