"""Experts in a loop over sorted slots: it fires, the numbers agree with a loop over experts, it does not fire where it must not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import transformers.integrations.moe  # registers its operator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.errors import Cause
from tests.helpers import compile_mst, relative_error, report_of, step, worst_error
from tests.models import ACCEPTED, inputs_of
from tests.operators import operators
from tools.meters.cpu import call_metered

_EAGER = {"inner": "eager", "chunk_rows": 7}
_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "hidden_act": "silu"}
_BLOCKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": (
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssMLP", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3MoE",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 12,
        },
    ),
}


def _block(name: str, experts: str, **more: Any) -> nn.Module:
    """A library's block with random weights."""
    config_name, class_name, sizes = _BLOCKS[name]
    config = getattr(transformers, config_name)(**{**_SIZES, **sizes, **more})
    config._experts_implementation = experts
    module = getattr(transformers.models, _MODULES[name])
    block: nn.Module = getattr(getattr(module, f"modeling_{_MODULES[name]}"), class_name)(config)
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.double()


_MODULES = {"mixtral": "mixtral", "qwen3": "qwen3_moe", "gpt_oss": "gpt_oss", "deepseek_v3": "deepseek_v3"}


class _Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(x)
        return ((x + (found[0] if isinstance(found, tuple) else found)) ** 2).mean()


def _agree(name: str, batch: int, options: dict[str, Any], bar: float, **more: Any) -> mst_fx.Diagnosis:
    """A block's loss and all its gradients, that of the rows too, against a loop over experts."""
    model, other = _Residual(_block(name, "grouped_mm", **more)), _Residual(_block(name, "eager", **more))
    other.load_state_dict(model.state_dict())
    x = torch.randn(batch, 21, 16, dtype=torch.float64, requires_grad=True)
    _, truth = step(other, other, {"x": x})
    truth, x.grad = {**truth, "x": x.grad.clone()}, None  # type: ignore[union-attr]
    with mst_fx.watch() as report:
        _, found = step(model, compile_mst(model, options), {"x": x})
    assert worst_error({**found, "x": x.grad}, truth) < bar  # type: ignore[dict-item]
    return report


@pytest.mark.parametrize("name", list(_BLOCKS))
@pytest.mark.parametrize(("batch", "chunk_rows"), [(1, 1), (3, 7)])
def test_blocks(name: str, batch: int, chunk_rows: int) -> None:
    """DeepSeek-V3's router is in float32 by itself."""
    report = _agree(
        name, batch, {**_EAGER, "chunk_rows": chunk_rows}, 1e-6 if name == "deepseek_v3" else 1e-10
    )
    assert not report.refusals
    first = report.rewrites[0]
    assert (first.kind, first.name, first.gradient) == ("mlp", "block.experts", "recompute")
    assert first.chunks == math.ceil(batch * 21 / chunk_rows)


def test_one_slot_a_row() -> None:
    assert _agree("qwen3", 3, _EAGER, 1e-10, num_experts_per_tok=1).rewrites


def test_under_inductor() -> None:
    assert _agree("gpt_oss", 3, {"inner": "inductor", "chunk_rows": 7}, 1e-10).rewrites


@pytest.mark.parametrize("first", [0, 2])
def test_skewed_routing(first: int) -> None:
    """All rows go to two experts, of which neither fits into a chunk; none to the others."""
    weights, key = torch.rand(40, 2, dtype=torch.float64), (torch.arange(2) + first).repeat(40, 1)
    _check_spelled(_experts, 4, weights, key, is_rewritten=True)


# One spelling after the other, with keys that an inner top-k gives.


class _Stacks(nn.Module):
    def __init__(self, experts: int, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ups = nn.Parameter(torch.randn(experts, width, inner, dtype=torch.float64))
        self.downs = nn.Parameter(torch.randn(experts, inner, width, dtype=torch.float64))


def _grouped(x: Tensor, stack: Tensor, offs: Tensor) -> Tensor:
    """As a library's operator: in every type, on every device."""
    grouped: Tensor = torch.ops.transformers.grouped_mm_fallback(x, stack, offs=offs)
    return grouped


def _ends(keys: Tensor, experts: int) -> Tensor:
    return torch.histc(keys.float(), bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)


def _experts(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    keys, perm = torch.sort(key.reshape(-1))
    rows = x[perm // 2]
    out = _grouped(F.silu(_grouped(rows, m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    out = out * weights.reshape(-1)[perm, None]
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0])
    return out[inverse].view(-1, 2, x.shape[1]).sum(1)


def _added_by_index(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    order = key.flatten().argsort(stable=True)
    keys, rows = key.flatten()[order], x.index_select(0, torch.div(order, 2, rounding_mode="floor"))
    out = _grouped(F.silu(_grouped(rows, m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    out = out * weights.flatten()[order].unsqueeze(1)
    return torch.zeros_like(x).index_add(0, order // 2, out)


def _weighted_behind(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Sorted back by the order of the order, and weighted then; counts by rows of one-hot."""
    order = key.flatten().argsort()
    ends = F.one_hot(key.flatten(), 4).sum(0).cumsum(0).to(torch.int32)
    out = _grouped(F.silu(_grouped(x[order // 2], m.ups, ends)), m.downs, ends)
    slots = out[order.argsort()].view(-1, 2, x.shape[1])
    return (slots * weights[..., None]).sum(dim=1)


def _picked_matrices(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    of, rows = key.flatten(), x.repeat_interleave(2, dim=0)
    inner = F.silu(torch.bmm(rows.unsqueeze(1), m.ups[of]))
    out = (
        torch.bmm(m.downs[of].transpose(1, 2), inner.transpose(1, 2)).squeeze(-1) * weights.flatten()[:, None]
    )
    return out.view(-1, 2, x.shape[1]).sum(1)


Spelled = Callable[[_Stacks, Tensor, Tensor, Tensor], Tensor]


def _truth(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Each row for itself."""
    outs = [
        sum((w * (F.silu(row @ m.ups[e]) @ m.downs[e]) for w, e in zip(ws, es, strict=True)), torch.zeros(()))
        for row, ws, es in zip(x, weights, key, strict=True)
    ]
    return torch.stack([torch.as_tensor(out) for out in outs])


def _check_spelled(
    function: Spelled,
    bound: int,
    weights: Tensor,
    key: Tensor,
    is_rewritten: bool,
    truth: Spelled | None = None,
) -> mst_fx.Diagnosis:
    """Numbers of a function whose keys a ``topk`` over ``bound`` numbers gives, which are ``key``."""
    stacks, x = _Stacks(4), torch.randn(len(key), 8, dtype=torch.float64, requires_grad=True)
    scores = torch.zeros(len(key), bound).scatter(1, key, torch.tensor([2.0, 1.0]).expand(len(key), 2))

    def run(x: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
        return function(stacks, x, weights, scores.topk(2).indices)

    weights.requires_grad_()
    leaves = [x, weights, *stacks.parameters()]
    with mst_fx.watch() as report:
        found = compile_mst(run, _EAGER)(x, weights, scores)
    wanted = (truth or _truth)(stacks, x, weights, key)
    tangent = torch.randn(found.shape, dtype=torch.float64)
    assert relative_error(found, wanted) < 1e-12
    grads, true = (torch.autograd.grad(out, leaves, tangent) for out in (found, wanted))
    assert max(map(relative_error, grads, true)) < 1e-12
    assert [r.kind for r in report.rewrites] == ["mlp"] * is_rewritten
    return report


def _routed(rows: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(rows, 2, dtype=torch.float64), torch.rand(rows, 4).topk(2).indices


@pytest.mark.parametrize("function", [_experts, _added_by_index, _weighted_behind, _picked_matrices])
def test_spellings(function: Spelled) -> None:
    assert not _check_spelled(function, 4, *_routed(), is_rewritten=True).refusals


# What is no expert layer, or not proved to be one.


def _wrong_bins(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Keys of a choice among five, of which the fifth has no matrix."""
    return _experts(m, x, weights, key)


def _rolled(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    keys, perm = torch.sort(key.reshape(-1))
    inner = F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4))).roll(1, 0)
    out = _grouped(inner, m.downs, _ends(keys, 4)) * weights.reshape(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // 2, out)


def _descending(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    keys, perm = torch.sort(key.reshape(-1), descending=True)
    out = _grouped(F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    return torch.zeros_like(x).index_add(0, perm // 2, out * weights.reshape(-1)[perm, None])


def _of_other_keys(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Offsets of other keys than those that are sorted."""
    _, perm = torch.sort(key.reshape(-1))
    ends = _ends(((x[:, 0:4] * 3).topk(2).indices).reshape(-1), 4)
    out = _grouped(F.silu(_grouped(x[perm // 2], m.ups, ends)), m.downs, ends)
    return torch.zeros_like(x).index_add(0, perm // 2, out * weights.reshape(-1)[perm, None])


def _of_three(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Rows of other slots than those that are added up."""
    keys, perm = torch.sort(key.reshape(-1))
    out = _grouped(F.silu(_grouped(x[perm // 3], m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    return torch.zeros_like(x).index_add(0, perm // 2, out * weights.reshape(-1)[perm, None])


def _mixed_orders(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Weights in the order of the slots, beside slots in that of their keys."""
    keys, perm = torch.sort(key.reshape(-1))
    out = _grouped(F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    return torch.zeros_like(x).index_add(0, perm // 2, out * weights.reshape(-1)[:, None])


def _normed(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """By the mean of all slots."""
    keys, perm = torch.sort(key.reshape(-1))
    inner = F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4)))
    out = _grouped(inner - inner.mean(0), m.downs, _ends(keys, 4)) * weights.reshape(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // 2, out)


def _read_outside(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    keys, perm = torch.sort(key.reshape(-1))
    inner = F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4)))
    out = _grouped(inner, m.downs, _ends(keys, 4)) * weights.reshape(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // 2, out) + inner.mean()


def _shuffled(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Slots added to the rows of others."""
    keys, perm = torch.sort(key.reshape(-1))
    out = _grouped(F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    index = (perm // 2)[:, None][torch.arange(perm.shape[0]).flip(0)].expand(-1, x.shape[1])
    return torch.zeros_like(x).scatter_add(0, index, out * weights.reshape(-1)[perm, None])


def _fewer_rows(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Rows of four slots each, of which two and two are added up."""
    keys, perm = torch.sort(key.reshape(-1))
    rows = x[: x.shape[0] // 2]
    out = _grouped(F.silu(_grouped(rows[perm // 4], m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    return torch.zeros_like(x).index_add(0, perm // 2, out * weights.reshape(-1)[perm, None])


def _other_table(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """A table that other keys than those of the matrices look up."""
    of, rows = key.flatten(), x.repeat_interleave(2, dim=0)
    other = (x[:, :4] * 3).topk(2).indices.flatten()
    inner = torch.bmm(rows.unsqueeze(1), m.ups[of]).squeeze(1) + m.ups.sum(1)[other]
    out = torch.bmm(F.silu(inner).unsqueeze(1), m.downs[of]).squeeze(1) * weights.flatten()[:, None]
    return out.view(-1, 2, x.shape[1]).sum(1)


def _picked_without_gradient(m: _Stacks, x: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    """Weights that are picked under no_grad have no gradient from there."""
    keys, perm = torch.sort(key.reshape(-1))
    out = _grouped(F.silu(_grouped(x[perm // 2], m.ups, _ends(keys, 4))), m.downs, _ends(keys, 4))
    with torch.no_grad():
        picked = weights.reshape(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // 2, out * picked) + 0 * weights.sum()


@pytest.mark.parametrize(
    ("function", "bound", "reason"),
    [
        (_shuffled, 4, ""),
        (_fewer_rows, 4, "other rows"),
        (_other_table, 4, "other keys"),
        (_picked_without_gradient, 4, "without gradients"),
        (_wrong_bins, 5, "not proved to be those of keys below 4"),
        (_rolled, 4, "roll"),
        (_descending, 4, ""),
        (_of_other_keys, 4, "something else than the key"),
        (_of_three, 4, ""),
        (_mixed_orders, 4, ""),
        (_normed, 4, "mean"),
        (_read_outside, 4, "a value of each slot"),
    ],
)
def test_refusals(function: Spelled, bound: int, reason: str) -> None:
    """Nothing is rewritten, the numbers are eager's, and the reason names what is in the way."""
    report = _check_spelled(function, bound, *_routed(), is_rewritten=False, truth=function)
    assert {r.cause for r in report.refusals} <= {
        Cause.EXPERTS,
        Cause.UNPROVED,
        Cause.NO_GRAD,
    } and report.refusals
    assert reason in report.refusals[0].reason


# Routing


@pytest.mark.slow
def test_routing_is_computed_once() -> None:
    """Under checkpointing, whose backward pass would choose again, and might choose otherwise."""
    entry = ACCEPTED["mixtral"]
    model = entry.build(num_hidden_layers=1).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    batch = inputs_of(entry, 1, 40, torch.float32)
    run = compile_mst(model, {"inner": "aot_eager", "chunk_rows": 16, "vocab_chunk_rows": 16})
    step(model, run, batch)
    ran = [name for name, _ in operators(lambda: step(model, run, batch))]
    assert ran.count("aten::topk") == 1 == ran.count("mst_fx::experts_loop_backward")


def test_ties() -> None:
    """Pairs of experts score the same, also at the last place: each row stays with those that the forward pass took."""
    model, other = (_Residual(_block("qwen3", how)) for how in ("grouped_mm", "eager"))
    for each in (model, other):
        gate = each.get_parameter("block.gate.weight").data
        gate[1::2] = gate[::2]
    x = torch.randn(3, 21, 16, dtype=torch.float64, requires_grad=True)
    run = compile_mst(
        functools.partial(checkpoint, model, use_reentrant=False), {**_EAGER, "inner": "aot_eager"}
    )
    _, truth = step(other, other, {"x": x})
    _, found = step(model, run, {"x": x})
    assert worst_error(found, truth) < 1e-10


def test_without_gradients() -> None:
    model = _Residual(_block("mixtral", "grouped_mm"))
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    with torch.no_grad(), mst_fx.watch() as report:
        found = compile_mst(model, _EAGER)(x)
    other = _Residual(_block("mixtral", "eager"))
    assert relative_error(found, other(x)) < 1e-12
    assert [r.gradient for r in report.rewrites] == ["none"]


def test_lengths_that_change() -> None:
    """One graph for all of them, but for those that fit into a chunk."""
    model, other = _Residual(_block("qwen3", "grouped_mm")), _Residual(_block("qwen3", "eager"))
    run = compile_mst(model, {**_EAGER, "chunk_rows": 16}, dynamic=True)
    with mst_fx.watch() as report:
        for length in (40, 57, 33):
            x = torch.randn(2, length, 16, dtype=torch.float64)
            assert relative_error(run(x), other(x)) < 1e-12
    assert len(report.rewrites) == 1


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3"])
def test_bfloat16(name: str) -> None:
    """Against a truth in float64, no more than 1.1 times as far as a loop over experts."""
    errors = []
    for experts in ("eager", "grouped_mm"):
        more = {"moe_intermediate_size": 16} if name == "qwen3" else {}  # the kernel takes whole 16 bytes
        truth, low = (_Residual(_block(name, how, **more)) for how in ("eager", experts))
        low.bfloat16()
        truth.load_state_dict(low.state_dict())
        torch.manual_seed(3)
        x = torch.randn(4, 64, 16).bfloat16()
        _, exact = step(truth, truth, {"x": x.double()})
        run = compile_mst(low, {**_EAGER, "chunk_rows": 40}) if experts == "grouped_mm" else low
        _, found = step(low, run, {"x": x})
        errors.append({key: relative_error(found[key], exact[key]) for key in exact if "router" not in key})
    for key, error in errors[1].items():
        assert error <= 1.1 * errors[0][key] + 1e-4, (key, error, errors[0][key])


# Memory


def _peak(way: str) -> int:
    """Bytes above what is there before, and above results, of one forward and backward pass (call it in a metered process)."""
    from tools.meters.cpu import measure_cpu

    config = transformers.Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4
    )
    config._experts_implementation = "grouped_mm"
    block = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 4096, 128, requires_grad=True)
    run = block if way == "eager" else compile_mst(block, {"inner": "aot_eager"})
    for _ in range(2):
        block.zero_grad(set_to_none=True)
        x.grad = None
        with measure_cpu() as measured:
            out = run(x)
            out.sum().backward()
    results = sum(p.numel() for p in block.parameters()) + 2 * x.numel()
    return measured.peak_bytes - 4 * results


@pytest.mark.slow
def test_memory() -> None:
    """A fifth of what eager's inside takes, with all experts trained."""
    assert call_metered(_peak, "mst") < 0.2 * call_metered(_peak, "eager")


def test_what_is_said() -> None:
    model = _Residual(_block("mixtral", "grouped_mm"))
    report = report_of(model, _EAGER, torch.randn(1, 21, 16, dtype=torch.float64))
    assert "block.experts" in str(report)
    assert "grouped_mm" in report.bodies[report.rewrites[0].body]
