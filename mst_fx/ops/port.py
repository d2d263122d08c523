"""A way into a compiled backward pass for a gradient that is there only if deferred logits were used.

AOTAutograd gives every output of a graph a tangent, zeros where nobody used it: S×H zeros for the hidden
rows that deferred logits are computed from, at the peak of a step. So the graph returns these rows
detached, and with them a *port*, a float64 scalar on the CPU. :func:`enter_at_port` puts the rows back
into the autograd graph behind the port. Their gradient is put down here under a number, the number travels
as the port's tangent, and the loop's backward pass (``mst_fx::add_port_gradient``) picks the gradient up. 0 says that
there is none.

Numbers must not add up: there is one junction a port, and autograd runs it once a backward pass, with the
sum of all gradients of the rows.

A backward pass may raise between the two (out of memory, a user's hook). What was put down belongs to it, and goes with it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_fx.ops.chunks import plain_mode
from mst_fx.ops.scaled import product
from mst_fx.process import State
from mst_fx.torch_api.autograd import keep_through_backward


class _Parcel:
    """A gradient on its way, for one backward pass."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient: Tensor | None = gradient


class _PutDown(State):
    """The gradients on their way, by number."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)
        self.parcels: weakref.WeakValueDictionary[int, _Parcel] = weakref.WeakValueDictionary()

    def put(self, gradient: Tensor) -> int:
        number, parcel = next(self._numbers), _Parcel(gradient)
        keep_through_backward(parcel)
        self.parcels[number] = parcel
        return number

    def pick_up(self, number: int) -> Tensor:
        parcel = self.parcels.pop(number)
        gradient, parcel.gradient = parcel.gradient, None
        assert gradient is not None
        return gradient

    def reset(self) -> None:
        self.parcels.clear()


_PUT_DOWN = _PutDown()


def new_port() -> Tensor:
    # On the CPU: reading it must not wait for a GPU, nor may a CUDA graph replay what it once held.
    return torch.zeros((), dtype=torch.float64, device="cpu")


def enter_at_port(port: Tensor, hidden: Tensor) -> Tensor:
    """``hidden``, whose gradient goes through ``port``; to be called once a port."""
    return _Junction.apply(port, hidden)  # type: ignore[no-untyped-call, no-any-return]


def _pick_up(tangent: Tensor) -> Tensor | None:
    """The gradient whose number a port's tangent is."""
    number = int(tangent.item())
    return _PUT_DOWN.pick_up(number) if number else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _put(gradient: Tensor) -> Tensor:
    # Never compiled: a number must not become part of a graph.
    return torch.tensor(float(_PUT_DOWN.put(gradient)), dtype=torch.float64, device="cpu")


class _Junction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, port: Tensor, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _put(grad), None


@torch.library.custom_op(
    "mst_fx::add_port_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor? tangent, Tensor port) -> Tensor",
)
def add_port_gradient(gradient: Tensor, tangent: Tensor | None, port: Tensor) -> Tensor:
    """``gradient * tangent``, plus the gradient that came in by a port, if one did."""
    found = _pick_up(port)
    if tangent is None:
        return torch.zeros_like(gradient) if found is None else found.to(gradient.dtype, copy=True)
    with plain_mode():
        scaled_gradient = product(gradient, tangent)
    return scaled_gradient if found is None else scaled_gradient.add_(found)


@add_port_gradient.register_fake
def _(gradient: Tensor, tangent: Tensor | None, port: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)
