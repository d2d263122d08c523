"""Two processes, one sequence, sharded parameters that are gathered inside of the graph. Starts itself; on GPUs: torchrun, "nccl"."""

import tempfile

import torch
import torch.distributed as dist
from _common import OPTIONS, token_blocks, toy_llama
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

import mst_fx


class Gathered(torch.nn.Module):  # its gradient: the mean over all ranks, a part on each
    def forward(self, x: torch.distributed.tensor.DTensor) -> torch.Tensor:
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])


def shard(model: torch.nn.Module, mesh: dist.DeviceMesh) -> None:
    for module in [*model.modules()]:
        for name, value in [*module.named_parameters(recurse=False)]:
            setattr(module, name, torch.nn.Parameter(distribute_tensor(value.data, mesh, [Shard(0)])))
            parametrize.register_parametrization(module, name, Gathered(), unsafe=True)


def train(rank: int, world: int, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    shard(model := toy_llama(), mesh := dist.init_device_mesh("cpu", (world,)))
    model.compile(backend="mst", options={**OPTIONS, "sequence_parallel": mesh})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in mst_fx.shared_batches(DataLoader(token_blocks(8)[rank::world], batch_size=4), mesh):
        optimizer.zero_grad()
        (loss := model(**batch).loss).backward()
        optimizer.step()
        print(f"rank {rank}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (2, f"{tempfile.mkdtemp()}/meeting"), nprocs=2)
