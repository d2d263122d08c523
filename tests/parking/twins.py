"""Two equal models with equal optimizers, of which the states of one are parked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import mst_fx
from mst_fx.parking.homes import ARENA

WIDTH = 24
# Of the states of Adam for one weight in float32: so many a bucket.
BUCKET = 2 * 4 * WIDTH * WIDTH

Make = Callable[[list[nn.Parameter]], Optimizer]


class Layers(nn.Module):
    """Linear layers, of which the last two take part from the third step on: parameters without gradients until then."""

    def __init__(self, count: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(count))

    def forward(self, x: Tensor, is_all: bool = True) -> Tensor:
        for layer in self.layers if is_all else self.layers[:-2]:
            x = layer(x).tanh()
        return x


def backward(model: Layers, index: int, is_all: bool = True) -> Tensor:
    """Gradients of step ``index``."""
    made = torch.Generator().manual_seed(index)
    x = torch.randn(7, WIDTH, generator=made).to(next(model.parameters()).dtype)
    loss = model(x, is_all).float().square().sum()
    loss.backward()
    return loss.detach()


class Twins:
    """``plain`` and ``parked``: (model, optimizer); ``parking`` of the second."""

    def __init__(
        self, make: Make, dtype: torch.dtype = torch.float32, bucket: int = BUCKET, **options: Any
    ) -> None:
        models = [Layers(dtype=dtype), Layers(dtype=dtype)]
        self.plain, self.parked = [(model, make(list(model.parameters()))) for model in models]
        self.parking = mst_fx.park(self.parked[1], bucket=bucket, **options)

    def both(self) -> list[tuple[Layers, Any]]:
        return [self.plain, self.parked]

    def steps(self, first: int, last: int) -> None:
        for index in range(first, last):
            for model, optimizer in self.both():
                optimizer.zero_grad()
                backward(model, index, is_all=index > 1)
                optimizer.step()

    def check(self, is_parked: bool = True) -> None:
        """Parameters and states have the same bits, and large states are on the host."""
        assert self.differences() == []
        assert not is_parked or on_device(self.parked[1]) == []

    def differences(self) -> list[str]:
        found = []
        (a, plain), (b, parked) = self.both()
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            one, other = plain.state.get(p, {}), parked.state.get(q, {})
            found += [] if torch.equal(p, q) else [name]
            found += [] if list(one) == list(other) else [f"{name}: {list(one)}, {list(other)}"]
            for key, value in one.items():
                is_same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
                is_alike = not isinstance(value, Tensor) or (
                    (value.dtype, value.shape, value.stride())
                    == (other[key].dtype, other[key].shape, other[key].stride())
                )
                found += [] if is_same and is_alike else [f"{name}.{key}"]
        return found


def places() -> list[tuple[int, int]]:
    """Where the arena's memory is: first and last address."""
    found = []
    for slab in ARENA._slabs:
        start = torch.frombuffer(slab.memory, dtype=torch.uint8).data_ptr()
        found.append((start, start + slab.size))
    return found


def on_device(optimizer: Optimizer) -> list[tuple[int, Any]]:
    """States of several elements that are not in the arena: number of the parameter, and key."""
    where = places()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (index, key)
        for index, p in enumerate(parameters)
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
        and value.numel() > 1
        and not any(start <= value.data_ptr() < end for start, end in where)
    ]
