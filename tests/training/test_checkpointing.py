"""Activation checkpointing, whoever asks for it: the inside of an MLP is recomputed once, not twice."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mst_fx
from tests.helpers import (
    Block,
    GatedMLP,
    ToyLM,
    compile_mst,
    kinds,
    step,
    token_batch,
    worst_error,
)
from tests.models import ACCEPTED, inputs_of
from tests.operators import operators

_LLAMA = ACCEPTED["llama"]
Wrap = Callable[[nn.Module], nn.Module]


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """torchtitan's: matmuls are saved, the rest is recomputed."""
    is_matmul = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_matmul else CheckpointPolicy.PREFER_RECOMPUTE


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.inner, *args, **kwargs, **self.arguments)


def _each_block(model: Any, **arguments: Any) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = _Checkpointed(block, **arguments)
    return model


def _wrapper(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def _mlps_only(model: Any) -> nn.Module:
    for block in model.blocks:
        block.mlp = _Checkpointed(block.mlp, use_reentrant=False)
    return model


_SELECTIVE = functools.partial(create_selective_checkpoint_contexts, _policy)
WAYS: dict[str, Wrap] = {
    "none": lambda model: model,
    "torch": functools.partial(_each_block, use_reentrant=False),
    "reentrant": functools.partial(_each_block, use_reentrant=True),
    "checkpoint_wrapper": _wrapper,
    "selective": functools.partial(_each_block, use_reentrant=False, context_fn=_SELECTIVE),
    "mlps_only": _mlps_only,
}


_LOOPS = ("mst_fx::loop", "mst_fx::loop_backward", "mst_fx::loop_with_grad")


def _loops(run: Callable[[], Any]) -> collections.Counter[str]:
    """How often each kind of loop runs."""
    return collections.Counter(name for name, _ in operators(run) if name in _LOOPS)


def _check(model: nn.Module, batch: dict[str, Tensor], layers: int, again: int = 0) -> None:
    _, truth = step(model, model, batch)
    compiled = compile_mst(model)
    with mst_fx.watch() as report:
        _, found = step(model, compiled, batch)
    assert kinds(report) == {"mlp": layers, "vocab": 1}
    assert worst_error(found, truth) <= 1e-5
    # One forward loop and one backward loop, which recomputes the inside, for each MLP: layers that are
    # run again do not run the loops in them again.
    found_loops = _loops(lambda: step(model, compiled, batch))
    assert found_loops == dict(zip(_LOOPS, (layers + again, layers, 1), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_recomputed_once(way: str) -> None:
    torch.manual_seed(0)
    layers = 2 if way in ("torch", "reentrant") else 1
    _check(WAYS[way](ToyLM("pre", GatedMLP, layers)), token_batch(2, 33), layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hugging_face(reentrant: bool) -> None:
    """But for the last layer's forward loop: the hook that HF's checkpointing puts on the embedding breaks the
    graph, so the final norm is no part of the head's loop, and AOTAutograd keeps no value of a
    checkpointed layer for a reader that is not checkpointed."""
    model: Any = _LLAMA.build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _check(model, inputs_of(_LLAMA, 2, 35), 2, again=1)
