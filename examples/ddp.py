"""Two processes, data parallel. Starts itself; on GPUs: torchrun, and backend="nccl"."""

import tempfile

import torch
import torch.distributed as dist
from _common import OPTIONS, token_blocks, toy_llama
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

# DDP's default splits the graph at its buckets, which may tear an MLP or the loss from its head.
torch._dynamo.config.optimize_ddp = False


def train(rank: int, world: int, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    model = DistributedDataParallel(toy_llama())
    model.compile(backend="mst", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = token_blocks(8)
    for batch in DataLoader(data, batch_size=2, sampler=DistributedSampler(data)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (2, f"{folder}/meeting"), nprocs=2)
