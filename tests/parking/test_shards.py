"""States that are DTensors: FSDP2 on two processes, and a plan of tensors that are not all cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import optim
from torch.distributed.fsdp import fully_shard

import mst_fx
from mst_fx.parking.homes import ARENA
from tests import apart
from tests.parking.twins import BUCKET, WIDTH, Layers, backward, places

_KINDS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"foreach": True}),
    (optim.SGD, {"momentum": 0.9}),
]


def _local(x: Any) -> Any:
    return x.to_local() if hasattr(x, "to_local") else x


def _step(model: Layers, optimizer: Any, index: int, rank: int) -> None:
    optimizer.zero_grad()
    backward(model, 10 * rank + index, is_all=index > 1)
    optimizer.step()


def _rank(rank: int) -> list[dict[str, Any]]:
    """Of each kind: whether the bits are those of a plain optimizer, and where the states are."""
    found = []
    for kind, options in _KINDS:
        models = [Layers(), Layers()]
        for model in models:
            for layer in list(model.layers)[1:]:  # the first is not cut
                fully_shard(layer)
        optimizers = [
            kind(
                [{"params": list(m.layers[0].parameters())}, {"params": list(m.layers[1:].parameters())}],
                lr=0.01,
                **options,
            )
            for m in models
        ]
        parking = mst_fx.park(optimizers[1], bucket=BUCKET)
        for index in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                _step(model, optimizer, index, rank)
        # What is loaded is the other's.
        saved = copy.deepcopy(optimizers[0].state_dict())
        optimizers[1].load_state_dict(saved)
        for model, optimizer in zip(models, optimizers, strict=True):
            _step(model, optimizer, 4, rank)
        where = places()
        values = [v for state in optimizers[1].state.values() for v in state.values()]
        inside = [any(a <= _local(v).data_ptr() < b for a, b in where) for v in values]
        size = sum(_local(v).nbytes for v, is_in in zip(values, inside, strict=True) if is_in)
        pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
        found.append(
            {
                "same": all(torch.equal(_local(p), _local(q)) for p, q in pairs),
                "states": all(
                    torch.equal(_local(v), _local(optimizers[1].state[q][key]))
                    for p, q in pairs
                    for key, v in optimizers[0].state[p].items()
                ),
                "cut": sum(hasattr(v, "to_local") for v in values),
                "outside": {
                    _local(v).numel() > 1 for v, is_in in zip(values, inside, strict=True) if not is_in
                },
                "bytes": (size, parking.bytes),
            }
        )
        del values
        parking.remove()
        found[-1]["left"] = ARENA.used
    return found


@pytest.mark.slow
def test_two_processes() -> None:
    for results in apart.results_of_ranks(_rank):
        for (kind, _), found in zip(_KINDS, results, strict=True):
            assert found["same"] and found["states"] and found["cut"] >= 8
            assert found["outside"] <= {False} and found["left"] == 0
            size, said = found["bytes"]
            assert size == said > (1 if kind is optim.SGD else 2) * 3 * 4 * WIDTH * WIDTH
