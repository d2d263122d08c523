"""InfLLM-like long prompts (arXiv 2402.04617): a chunk sees the first tokens, the last ones, and what it looks up."""

import sys

import torch
from _common import OPTIONS, token_blocks, toy_llama
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

chunks, size, block, far, near = int(sys.argv[1]) if len(sys.argv) > 1 else 4, 1024, 64, 8, 8
model = toy_llama().eval().requires_grad_(False)
past = [[] for _ in model.model.layers]  # blocks of keys and values on the host, and what stands for each


@torch.compiler.disable  # which blocks it looks up is known when it runs
def look_up(module, query, key, value):
    wanted = query.mean(2).unflatten(1, (key.shape[1], -1)).sum(2)  # by all queries of a head of keys
    blocks = past[module.layer_idx]
    likes = torch.tensor([float((wanted * x[2]).sum()) for x in blocks[1:-near]])
    found = [blocks[1 + index] for index in likes.topk(min(far, len(likes))).indices.sort().values]
    seen = [*blocks[:1], *found, *blocks[1:][-near:]]
    for k, v, liked in zip(*(x.split(block, 2) for x in (key, value, key * wanted[:, :, None])), strict=True):
        blocks.append((k.cpu(), v.cpu(), k[:, :, liked.sum((0, 1, 3)).topk(4).indices].sum(2)))
    return [torch.cat([*(x[at].to(key.device) for x in seen), (key, value)[at]], 2) for at in range(2)]


def attend(module, query, key, value, *_, **__):
    keys, values = look_up(module, query, key, value)
    before = torch.arange(keys.shape[2], device=key.device) - keys.shape[2] + size
    sees = before <= torch.arange(size, device=key.device)[:, None]
    return scaled_dot_product_attention(query, keys, values, sees, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("look_up", attend)
model.set_attn_implementation("look_up")
model.compile(backend="mst", options=OPTIONS)
for number, piece in enumerate(token_blocks(chunks, size)):
    places = torch.arange(number * size, (number + 1) * size)[None]
    logits = model(piece["input_ids"][None], position_ids=places, use_cache=False, logits_to_keep=1).logits
    print(f"{len(past[0]) * block:,} tokens are kept; the next one is {logits.argmax().item()}")
