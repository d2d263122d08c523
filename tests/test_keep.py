"""Sines and cosines that become buffers, and those that stay."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import mst_fx
from mst_fx.compiler import _Choices, _is_loop
from mst_fx.graph import fill_values
from mst_fx.keep import keep_waves
from tests.models import ACCEPTED, inputs_of


def _kept(function: object, *inputs: Tensor) -> int:
    gm = fx.symbolic_trace(function)  # type: ignore[arg-type]
    fill_values(gm, inputs)
    before = gm(*inputs)
    keep_waves(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(*inputs), before)
    return sum(node.target is torch.ops.mst_fx.kept.default for node in gm.graph.nodes)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    return x * torch.cos(angles).unsqueeze(1) + x * angles.sin().unsqueeze(1)


def test_what_all_heads_read_is_kept() -> None:
    assert _kept(_rotated, torch.randn(1, 8, 4, 6), torch.randn(1, 4, 6)) == 2


def test_what_few_read_is_not_kept() -> None:
    assert _kept(_rotated, torch.randn(1, 4, 4, 6), torch.randn(1, 4, 6)) == 0


def test_what_has_a_gradient_is_not_kept() -> None:
    assert _kept(_rotated, torch.randn(1, 8, 4, 6), torch.randn(1, 4, 6, requires_grad=True)) == 0


def test_what_is_written_to_is_not_kept() -> None:
    def written(x: Tensor, angles: Tensor) -> Tensor:
        return x * angles.cos().mul_(2.0).unsqueeze(1)

    assert _kept(written, torch.randn(1, 8, 4, 6), torch.randn(1, 4, 6)) == 0


def test_a_llama_keeps_its_rotary_embedding() -> None:
    model = ACCEPTED["llama"].build(num_attention_heads=8, num_key_value_heads=8)
    report = mst_fx.explain(model, {"chunk_rows": 16})(**inputs_of(ACCEPTED["llama"], 1, 48, torch.float32))
    assert report.after[0].count("mst_fx.kept") == 2


class _Node:
    """A scheduler's node, as far as the heuristic looks."""

    def __init__(self, order: int, operator: object = None) -> None:
        self.min_order = self.max_order = order
        self.node = nn.Module()
        if operator is not None:
            self.node.op_overload = operator  # type: ignore[assignment]


def test_nothing_is_fused_across_a_loop() -> None:
    loop = torch.ops.mst_fx.loop_backward.default
    assert _is_loop(loop) and not _is_loop(torch.ops.mst_fx.kept.default) and not _is_loop(None)

    class Scheduler:
        nodes = (_Node(0), _Node(1, loop), _Node(2))

        def are_long_distant_nodes(self, *_: object) -> bool:
            return False

    def may_fuse(*orders: int) -> bool:
        first, second = map(_Node, orders)
        return _Choices.can_fuse_horizontal(Scheduler(), first, second, 10**9)

    assert not may_fuse(0, 2) and not may_fuse(2, 0)
