"""LoRC-like key-value cache (arXiv 2410.03111): kept is what truncated SVDs of the projections make of a token."""

import sys

import torch
from _common import OPTIONS, token_blocks, toy_llama
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

tokens, least, most = map(int, sys.argv[1:] or (2048, 8, 16))  # ranks, of 32
model, prompt = toy_llama().eval(), token_blocks(1, tokens)[0]["input_ids"][None]


class LowRank(torch.nn.Module):
    def __init__(self, attention: torch.nn.Module, rank: int) -> None:
        super().__init__()
        self.q, self.o, self.index = attention.q_proj, attention.o_proj, attention.layer_idx
        factors = [torch.linalg.svd(p.weight, False) for p in (attention.k_proj, attention.v_proj)]
        self.down = torch.nn.ParameterList(s[:rank, None] * vh[:rank] for _, s, vh in factors)
        self.up = torch.nn.ParameterList(u[:, :rank] for u, _, _ in factors)

    def forward(self, hidden_states, past_key_values, **_):  # a prompt without padding, then token by token
        new = (linear(hidden_states, down)[:, None] for down in self.down)  # [B, 1, S, rank]
        small = past_key_values.update(*new, self.index)
        parts = [self.q(hidden_states), *(linear(x[:, 0], up) for x, up in zip(small, self.up, strict=True))]
        query, key, value = (x.unflatten(2, (-1, 16)).transpose(1, 2) for x in parts)
        cos, sin = model.model.rotary_emb(key, torch.arange(key.shape[2], device=key.device)[None])
        query, _ = apply_rotary_pos_emb(query, query, *(x[:, -query.shape[2] :] for x in (cos, sin)))
        _, key = apply_rotary_pos_emb(key, key, cos, sin)
        found = scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)
        return self.o(found.transpose(1, 2).flatten(2)), None


# Errors of early layers grow in all that lie behind them, so these keep more.
for layer, rank in zip(model.model.layers, torch.linspace(most, least, 2).int().tolist(), strict=True):
    layer.self_attn = LowRank(layer.self_attn, rank)
model.compile(backend="mst", options=OPTIONS)
out = model.generate(prompt, max_new_tokens=8, use_cache=True, return_dict_in_generate=True)
held = sum(x.keys.nbytes + x.values.nbytes for x in out.past_key_values.layers)
print(f"{held / 1024:.1f} KiB are cached; then {out.sequences[0, tokens:].tolist()}")
