"""The ops of a checkpointed layer that stands several times in a graph, and is compiled once.

``mst_fx::layer(inputs, key) -> outputs`` saves inputs only, those that are read again; its derivative is
``mst_fx::layer_backward(saved, tangents, key) -> gradients``, of the inputs that get one, which runs the layer again.

They live from the captured graph to Inductor, which gets calls of the layer's graphs in their place (:mod:`mst_fx.torch_api.called_graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mst_fx.bodies.layer import LAYERS
from mst_fx.ops.chunks import plain_mode


def _fakes(like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in like]


@torch.library.custom_op("mst_fx::layer", mutates_args=(), schema="(Tensor[] inputs, str key) -> Tensor[]")
def layer(inputs: list[Tensor], key: str) -> list[Tensor]:
    with plain_mode():
        return list(LAYERS[key].forward_graph(*inputs))


@layer.register_fake
def _(inputs: list[Tensor], key: str) -> list[Tensor]:
    return _fakes(LAYERS[key].outputs)


@torch.library.custom_op(
    "mst_fx::layer_backward",
    mutates_args=(),
    schema="(Tensor[] saved, Tensor[] tangents, str key) -> Tensor[]",
)
def layer_backward(saved: list[Tensor], tangents: list[Tensor], key: str) -> list[Tensor]:
    with plain_mode():
        return list(LAYERS[key].backward_graph(*saved, *tangents))


@layer_backward.register_fake
def _(saved: list[Tensor], tangents: list[Tensor], key: str) -> list[Tensor]:
    return _fakes(LAYERS[key].gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, ctx.key = inputs
    known = LAYERS[ctx.key]
    ctx.needs = known.needs
    ctx.save_for_backward(*(operands[index] for index in known.reads))


def _backward(ctx: Any, tangents: Sequence[Tensor]) -> tuple[Any, ...]:
    if any(asked and not need for asked, need in zip(ctx.needs_input_grad[0], ctx.needs, strict=True)):
        raise RuntimeError("mst-fx: a layer was captured as one whose input gets no gradient, and it does")
    found = iter(layer_backward(list(ctx.saved_tensors), list(tangents), ctx.key))
    return [next(found) if need else None for need in ctx.needs], None


layer.register_autograd(_backward, setup_context=_setup)
