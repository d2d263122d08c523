"""accelerate, with mixed precision."""

import torch
from _common import OPTIONS, token_blocks, toy_llama
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(mixed_precision="bf16", cpu=True)
model = toy_llama()
model.compile(
    backend="mst", options=OPTIONS
)  # or: Accelerator(dynamo_backend="inductor") and mst_fx.enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(token_blocks(8), batch_size=2))

for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.3f}")
