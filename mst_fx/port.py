"""A way into a compiled backward pass for a gradient that is there only if deferred logits were used.

AOTAutograd gives every output of a graph a tangent, zeros where nobody used it: S×H zeros for the hidden
rows that deferred logits are computed from, at the peak of a step. So the graph returns these rows
detached, and with them a *port*, a float64 scalar on the CPU. :func:`joined_to_port` puts the rows back
into the autograd graph behind the port. Their gradient is put down here under a number, the number travels
as the port's tangent, and the loop's backward pass (``mst_fx::joined``) picks the gradient up. 0 says that
there is none.

Numbers must not add up: there is one junction a port, and autograd runs it once a backward pass, with the
sum of all gradients of the rows.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_put_down: dict[int, Tensor] = {}
_numbers = itertools.count(1)


def new_port() -> Tensor:
    # On the CPU: reading it must not wait for a GPU, nor may a CUDA graph replay what it once held.
    return torch.zeros((), dtype=torch.float64, device="cpu")


def joined_to_port(port: Tensor, rows: Tensor) -> Tensor:
    """``rows``, whose gradient goes through ``port``; to be called once a port."""
    return _Junction.apply(port, rows)  # type: ignore[no-untyped-call, no-any-return]


def pick_up(tangent: Tensor) -> Tensor | None:
    """The gradient whose number a port's tangent is."""
    number = int(tangent.item())
    return _put_down.pop(number) if number else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _put(gradient: Tensor) -> Tensor:
    # Never compiled: a number must not become part of a graph.
    number = next(_numbers)
    _put_down[number] = gradient
    return torch.tensor(float(number), dtype=torch.float64, device="cpu")


class _Junction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, port: Tensor, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _put(grad), None
