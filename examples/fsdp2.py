"""Two processes, sharded parameters. Starts itself; on GPUs: torchrun, and backend="nccl"."""

import tempfile

import torch
import torch.distributed as dist
from _common import OPTIONS, token_blocks, toy_llama
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader


class HeadAndLoss(torch.nn.Module):  # in one module: FSDP2 breaks the graph at each one that it shards
    def __init__(self, projection: torch.nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.projection(hidden[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def train(rank: int, world: int, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    llama = toy_llama()
    trunk, head = llama.model, HeadAndLoss(llama.lm_head)
    for part in (*trunk.layers, head):
        fully_shard(part).compile(backend="mst", options=OPTIONS)
    optimizer = torch.optim.AdamW([*fully_shard(trunk).parameters(), *head.parameters()], lr=1e-3)
    for batch in DataLoader(token_blocks(8)[rank::world], batch_size=2):
        loss = head(trunk(batch["input_ids"]).last_hidden_state, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (2, f"{folder}/meeting"), nprocs=2)
