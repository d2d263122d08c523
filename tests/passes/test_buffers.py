"""Sines and cosines that become buffers, and those that stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.choices import InductorChoices

import mst_fx
import mst_fx.ops
from mst_fx.graph.fill import fill_values
from mst_fx.passes.buffers import buffer_waves
from mst_fx.torch_api.inductor import _Choices, _is_loop
from tests.models import ACCEPTED, inputs_of


def _buffers(function: object, *inputs: Tensor) -> int:
    gm = fx.symbolic_trace(function)  # type: ignore[arg-type]
    fill_values(gm, inputs)
    before = gm(*inputs)
    buffer_waves(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(*inputs), before)
    return sum(node.target is torch.ops.mst_fx.buffer.default for node in gm.graph.nodes)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    return x * torch.cos(angles).unsqueeze(1) + x * angles.sin().unsqueeze(1)


def test_what_all_heads_read_is_kept() -> None:
    assert _buffers(_rotated, torch.randn(1, 8, 4, 6), torch.randn(1, 4, 6)) == 2


def test_what_few_read_is_not_kept() -> None:
    assert _buffers(_rotated, torch.randn(1, 4, 4, 6), torch.randn(1, 4, 6)) == 0


def test_what_has_a_gradient_is_not_kept() -> None:
    assert _buffers(_rotated, torch.randn(1, 8, 4, 6), torch.randn(1, 4, 6, requires_grad=True)) == 0


def test_what_is_written_to_is_not_kept() -> None:
    def written(x: Tensor, angles: Tensor) -> Tensor:
        return x * angles.cos().mul_(2.0).unsqueeze(1)

    assert _buffers(written, torch.randn(1, 8, 4, 6), torch.randn(1, 4, 6)) == 0


def test_a_llama_keeps_its_rotary_embedding() -> None:
    model = ACCEPTED["llama"].build(num_attention_heads=8, num_key_value_heads=8)
    report = mst_fx.explain(model, {"chunk_rows": 16})(**inputs_of(ACCEPTED["llama"], 1, 48, torch.float32))
    assert report.after[0].count("mst_fx.buffer") == 2


class _Node:
    """A scheduler's node, as far as the heuristic looks."""

    def __init__(self, order: int, *before: str, operator: object = None, is_product: bool = False) -> None:
        self.min_order = self.max_order = order
        self.is_template = lambda: is_product
        self.ancestors = set(before)
        self.node = nn.Module()
        self.node.op_overload = operator  # type: ignore[assignment]

    def get_name(self) -> str:
        return f"op{self.min_order}"


class _Scheduler:
    nodes = (
        _Node(0),
        _Node(3, operator=torch.ops.mst_fx.loop_backward.default),
        _Node(6),
        _Node(8, is_product=True),
    )


@pytest.mark.parametrize(
    ("first", "second", "may"),
    [
        (_Node(1), _Node(2), True),
        (_Node(1), _Node(4), False),  # the loop stands between
        (_Node(4, "op3"), _Node(5), False),  # the second one does not wait for the loop
        (_Node(4, "op3"), _Node(5, "op3", "op1"), True),
        (_Node(7), _Node(9, "op8"), False),  # the product would come early
        (_Node(7), _Node(9), True),
        (_Node(9, "op8"), _Node(10, "op8"), True),
    ],
)
def test_nothing_is_fused_across_a_loop_or_a_product(
    first: _Node, second: _Node, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InductorChoices, "can_fuse_horizontal", lambda *_: True)
    assert _Choices.can_fuse_horizontal(_Scheduler(), first, second, 0) is may
    assert _Choices.can_fuse_horizontal(_Scheduler(), second, first, 0) is may


def test_what_is_a_loop() -> None:
    ops = torch.ops.mst_fx
    assert all(map(_is_loop, (ops.loop.default, ops.loop_backward.default, ops.attention.default)))
    assert not any(map(_is_loop, (ops.buffer.default, torch.ops.aten.mm.default, None)))
