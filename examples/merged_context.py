"""HOMER-like long prompts (arXiv 2404.10308): chunks go through layers alone, lose half of their tokens, and merge."""

import sys

import torch
from _common import OPTIONS, token_blocks, toy_llama
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

height, size = int(sys.argv[1]) if len(sys.argv) > 1 else 2, 1024  # 2**height chunks of so many tokens
model = toy_llama(layers=4).eval().requires_grad_(False)


@torch.compile(backend="mst", options=OPTIONS)
def run(hidden, places, first, last):  # some layers; what they cache; the last token's score of each key
    rotary, cache = model.model.rotary_emb(hidden, places[..., 0]), DynamicCache()
    for layer in model.model.layers[first:last]:
        before, hidden = hidden, layer(hidden, position_embeddings=rotary, past_key_values=cache)
    query = layer.self_attn.q_proj(layer.input_layernorm(before[:, -1:])).view(1, 4, 1, 16)
    query, _ = apply_rotary_pos_emb(query, query, *(x[:, -1:] for x in rotary))
    cached = [torch.stack((x.keys, x.values)) for x in cache.layers[first:]]
    return hidden, cached, (query @ cached[-1][0].repeat_interleave(2, 1).mT).amax(1)[0, 0]


def merge(ids, level):  # the left half first: of each level no more than one chunk waits
    leaf = [model.model.embed_tokens(ids[:, :size]), torch.arange(size)[None, :, None]]
    halves = [merge(half, level - 1) for half in ids.chunk(2, 1)] if level else [leaf]
    hidden, places, *cached = (torch.cat(parts, -2) for parts in zip(*halves, strict=True))
    last = len(model.model.layers) - height + level
    hidden, new, scores = run(hidden, places, last - 1 if level else 0, last)
    scores[-1] = torch.inf  # what asks stays
    kept = scores.topk(size // 2).indices.sort().values
    return [x[..., kept, :] for x in (hidden, places, *cached, *new)]  # of all layers so far


prompt = torch.cat([block["input_ids"] for block in token_blocks(2**height, size)])[None]
hidden, places, *cached = merge(prompt, height)
token, cache = model.lm_head(model.model.norm(hidden[:, -1:])).argmax(-1), DynamicCache(cached)
after = model(token, past_key_values=cache, position_ids=places[:, -1:, 0] + 1).logits[:, -1].argmax()
print(f"{prompt.shape[1]:,} tokens are {places.shape[1]} in the cache; next: {[token.item(), after.item()]}")
