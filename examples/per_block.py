"""Layer by layer, as torchtitan compiles with ``compile.backend = "mst"``, and the head with its loss."""

import torch
from _common import OPTIONS, token_blocks, toy_llama
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

model = toy_llama()
for layer in model.model.layers:
    layer.compile(backend="mst", options=OPTIONS)  # one compilation serves all layers


@torch.compile(backend="mst", options=OPTIONS)
def head_and_loss(hidden: Tensor, labels: Tensor) -> Tensor:
    logits = model.lm_head(hidden[:, :-1])  # the projection has to be in the graph of its loss
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for batch in DataLoader(token_blocks(8), batch_size=2):
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    loss = head_and_loss(hidden, batch["labels"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
