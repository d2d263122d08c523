"""Two GPUs under FSDP2 and NCCL: numbers beside FSDP2 alone, and neither the mask nor the logits are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import mst_fx
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import DYNAMO_COMPILES_CHECKPOINTED_LAYERS, kinds, relative_error, worst_error
from tests.models import ACCEPTED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

_VOCABULARY, _LENGTH, _LONG = 8192, 257, 16_384
_GIB = 2**30


def _build(checkpointing: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    model: Any = ACCEPTED["llama"].build(
        use_cache=False, vocab_size=_VOCABULARY, max_position_embeddings=_LONG, **sizes
    )
    if checkpointing:
        model.gradient_checkpointing_enable()
    for layer in model.cuda().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _batch(rank: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, _VOCABULARY, (1, length), generator=generator).cuda()
    return {"input_ids": ids, "labels": ids.clone()}


def _step(model: Any, rank: int, length: int = _LENGTH) -> dict[str, Any]:
    model.zero_grad()
    out = model(**_batch(rank, length))
    out.loss.backward()
    gradients = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}
    is_deferred = isinstance(out.logits, DeferredLogits) and out.logits._value is None
    return {"loss": out.loss.detach().cpu(), "gradients": gradients, "deferred": is_deferred}


def _train(checkpointing: bool, rank: int) -> dict[str, Any]:
    torch._dynamo.reset()
    truth = _step(_build(checkpointing), rank)
    model = _build(checkpointing)
    chunks: Any = {"chunk_rows": 64, "vocab_chunk_rows": 64, "attention_chunk_rows": 64}
    model.compile(backend="mst", options=chunks)
    with mst_fx.watch() as report:
        found = _step(model, rank)
    torch._dynamo.reset()
    model = _build(checkpointing)
    model.compile(backend="mst")
    _step(model, rank, _LONG)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(model, rank, _LONG)
    return {
        "truth": truth,
        "found": found,
        "kinds": kinds(report),
        "peak": torch.cuda.max_memory_allocated() - before,
    }


def _rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save([_train(checkpointing, rank) for checkpointing in (False, True)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_fully_sharded_layers(tmp_path: Any) -> None:
    spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for checkpointing, ran in enumerate(torch.load(tmp_path / f"{rank}.pt")):
            assert relative_error(ran["found"]["loss"], ran["truth"]["loss"]) <= 1e-5
            assert worst_error(ran["found"]["gradients"], ran["truth"]["gradients"]) <= 1e-4
            assert ran["found"]["deferred"]
            if checkpointing and not DYNAMO_COMPILES_CHECKPOINTED_LAYERS:
                assert ran["kinds"] == {"mask": 1, "vocab": 1}
                continue
            assert ran["kinds"] == {"attention": 1, "mask": 1, "mlp": 1, "vocab": 1}
            # The logits alone would take 0.5 GiB, and as much again for their gradient; the mask 0.25.
            assert ran["peak"] < 0.45 * _GIB, ran["peak"] / _GIB
