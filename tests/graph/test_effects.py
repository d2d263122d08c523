"""What keeps running statistics has an effect, whether its schema says so or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.graph.effects import has_effects

aten = torch.ops.aten

# Only read the statistics that they are given, or give new ones as results.
_READERS = {
    "_batch_norm_impl_index_backward", "_batch_norm_no_update", "_batch_norm_with_update_functional",
    "_fused_moving_avg_obs_fq_helper_functional", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "batch_norm_backward", "cudnn_batch_norm_backward",
    "miopen_batch_norm_backward", "native_batch_norm_backward",
}  # fmt: skip


def _statistics_writers() -> list[str]:
    """The ATen operators that are given running statistics and are not known to leave them alone."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")]
    names = {s.name.split("::")[1] for s in schemas if any("running_" in a.name for a in s.arguments)}
    return sorted(names - _READERS)


def _call(target: Any) -> fx.Node:
    graph = fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"),))
    node.meta["example_value"] = torch.ones(2)  # gives a tensor, so that this is no reason to keep it
    return node


@pytest.mark.parametrize("name", _statistics_writers())
def test_what_keeps_statistics_has_an_effect(name: str) -> None:
    packet = getattr(aten, name)
    spellings = [packet, *(getattr(packet, overload) for overload in packet.overloads())]
    spellings += [f for f in (getattr(torch, name, None), getattr(F, name, None)) if f is not None]
    assert [target for target in spellings if not has_effects(_call(target))] == []


def test_the_usual_ones_are_among_them() -> None:
    usual = {"batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
    assert usual <= set(_statistics_writers())


def test_what_only_reads_statistics_leaves_them() -> None:
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    aten._native_batch_norm_legit_no_training(x, None, None, mean, var, 0.1, 1e-5)
    aten._batch_norm_no_update(x, None, None, mean, var, 0.1, 1e-5)
    aten._native_batch_norm_legit_functional(x, None, None, mean, var, True, 0.1, 1e-5)
    aten._batch_norm_with_update_functional(x, None, None, mean, var, 0.1, 1e-5)
    assert not mean.any()
    assert (var == 1).all()
