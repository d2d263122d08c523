"""SHERL-like tuning (arXiv 2407.07523): frozen early layers keep nothing; what they gave feeds the last ones."""

import sys

import torch
from _common import OPTIONS, token_blocks, toy_llama
from torch import nn
from torch.nn.functional import cosine_similarity


class Tuned(nn.Module):
    def __init__(self, layers: int, late: int) -> None:
        super().__init__()
        self.llama = toy_llama(layers).requires_grad_(False)
        decoder, width = self.llama.model, self.llama.config.hidden_size
        self.early, decoder.layers = decoder.layers[:-late], decoder.layers[-late:]
        self.down, self.up = nn.Linear(width, 16, bias=False), nn.Linear(16, width, bias=False)
        nn.init.zeros_(self.up.weight)  # what begins is the model as it was

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden, given = self.llama.model.embed_tokens(input_ids), []
        rotary = self.llama.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.early:
            hidden = layer(hidden, position_embeddings=rotary)
            given.append(hidden)
        likeness = torch.stack([cosine_similarity(x, hidden, dim=-1) for x in given[:-1]])
        shares = (-likeness).softmax(0)[..., None]  # the less alike, the less redundant
        mixed = sum(share * x for share, x in zip(shares, given[:-1], strict=True))
        return self.llama(inputs_embeds=hidden + self.up(self.down(mixed)), labels=labels).loss


model = Tuned(layers=int(sys.argv[1]) if len(sys.argv) > 1 else 6, late=1)
model.compile(backend="mst", options=OPTIONS)
optimizer = torch.optim.AdamW([model.down.weight, model.up.weight], lr=1e-2)
for batch in token_blocks(8, 2048):
    loss = model(batch["input_ids"][None], batch["labels"][None])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
