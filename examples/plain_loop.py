"""A plain training loop."""

import torch
from _common import OPTIONS, token_blocks, toy_llama
from torch.utils.data import DataLoader

model = toy_llama()
model.compile(backend="mst", options=OPTIONS)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for batch in DataLoader(token_blocks(8), batch_size=2):
    loss = model(**batch).loss  # labels given: the head and its loss are in the graph, and chunked
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
