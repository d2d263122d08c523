"""MeZO-SVRG (arXiv 2404.08080): zeroth-order steps that an anchor steadies, in the memory of a prefill."""

import sys

import torch
from _common import OPTIONS, token_blocks, toy_llama

steps, period, epsilon, rates = int(sys.argv[1]) if len(sys.argv) > 1 else 40, 5, 1e-3, (1e-3, 5e-4)
model, anchor = (toy_llama().eval().requires_grad_(False) for _ in range(2))
for net in (model, anchor):
    net.compile(backend="mst", options=OPTIONS)
data, slopes = [block["input_ids"][None] for block in token_blocks(2, 2048)], {}


def perturb(net: torch.nn.Module, seed: int, scale: float) -> None:  # noise is made anew, never kept
    generator = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=scale)


def slope(net: torch.nn.Module, seed: int, batches: list[torch.Tensor]) -> float:  # along that noise
    for scale, losses in ((epsilon, above := []), (-2 * epsilon, below := [])):
        perturb(net, seed, scale)
        losses += [net(input_ids=ids, labels=ids).loss.item() for ids in batches]
    perturb(net, seed, epsilon)
    return (sum(above) - sum(below)) / (2 * epsilon * len(batches))


for step in range(steps):
    start = step - step % period
    if step == start:  # the anchor comes here, and all data say where to go
        anchor.load_state_dict(model.state_dict())
        slopes[start] = slope(model, start, data)
        perturb(model, start, -rates[0] * slopes[start])
    else:  # and one batch what is new since then
        here, there = (slope(net, step, [data[step % len(data)]]) for net in (model, anchor))
        perturb(model, step, -rates[1] * (here - there))
        perturb(model, start, -rates[1] * slopes[start])
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in data]
    print(f"step {step}: loss {sum(losses) / len(losses):.4f}")
