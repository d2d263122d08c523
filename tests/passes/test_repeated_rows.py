"""All rows given to every expert (Llama4, whose router has a sigmoid in float32): chunks of rows, as a dense MLP's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from tests.helpers import compile_mst, relative_error, report_of

OPTIONS = {"inner": "eager", "chunk_rows": 7}


def _llama4(top_k: int = 1) -> nn.Module:
    config = transformers.Llama4TextConfig(
        hidden_size=16, intermediate_size=24, intermediate_size_mlp=32, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=top_k,
    )  # fmt: skip
    torch.manual_seed(0)
    block = Llama4TextMoe(config).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def _rows(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 21, 16, dtype=torch.float64).to(dtype).requires_grad_()


def _values(run: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> list[Tensor]:
    """The loss, and the gradients of the rows and of all weights."""
    loss = run(x)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])]


def _loss(block: nn.Module, x: Tensor) -> Tensor:
    out, logits = block(x)
    found: Tensor = ((out - x.view_as(out)) ** 2).mean() + logits.square().mean()
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("batch", "chunk_rows"), [(1, 1), (3, 7), (3, 40)])
def test_llama4(batch: int, chunk_rows: int, top_k: int) -> None:
    block = _llama4(top_k)
    run, x, options = functools.partial(_loss, block), _rows(batch), {**OPTIONS, "chunk_rows": chunk_rows}
    report = report_of(run, options, x)
    assert not report.refusals
    assert {rewrite.kind for rewrite in report.rewrites} == {"mlp"} and len(report.rewrites) == 2
    assert all(rewrite.chunks == -(-batch * 21 // chunk_rows) for rewrite in report.rewrites)
    found, truth = _values(compile_mst(run, options), block, x), _values(run, block, x)
    assert all(relative_error(mine, true) < 1e-7 for mine, true in zip(found, truth, strict=True))


def test_checkpointed_under_inductor() -> None:
    block = _llama4()

    def run(x: Tensor) -> Tensor:
        found: Tensor = checkpoint(_loss, block, x, use_reentrant=False)
        return found

    options = {**OPTIONS, "inner": "inductor"}
    assert len(report_of(run, options, _rows(3)).rewrites) == 2
    found, truth = _values(compile_mst(run, options), block, _rows(3)), _values(run, block, _rows(3))
    assert all(relative_error(mine, true) < 1e-6 for mine, true in zip(found, truth, strict=True))


def test_bfloat16() -> None:
    """Against float64, no more than 1.1 times eager's error."""
    block, narrow = _llama4(), _llama4().bfloat16()
    block.load_state_dict(narrow.state_dict())
    x = _rows(3, torch.bfloat16)
    truth = _values(functools.partial(_loss, block), block, x.detach().double().requires_grad_())
    run = functools.partial(_loss, narrow)
    eager, found = _values(run, narrow, x), _values(compile_mst(run, OPTIONS), narrow, x)
    for mine, plain, true in list(zip(found, eager, truth, strict=True))[1:]:
        assert relative_error(mine, true) <= 1.1 * relative_error(plain, true)


# What is left as it is. E is 4; rows are [n, 16].


def _spread(rows: Tensor) -> Tensor:
    return rows.repeat(4, 1).view(4, -1, 16)


def _largest(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The sum is another one: not over the experts."""
    out: Tensor = torch.bmm(F.silu(torch.bmm(_spread(rows), up)), down).amax(0)
    return out


def _mixed(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A row's neighbours in the merged dimension."""
    wide = rows.repeat(4, 1).roll(1, 0).view(4, -1, 16)
    return torch.bmm(F.silu(torch.bmm(wide, up)), down).sum(0)


def _interleaved(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Each row four times in a row: what is viewed as an expert's is a quarter of the rows, four times."""
    wide = rows.repeat_interleave(4, 0).view(4, -1, 16)
    return torch.bmm(F.silu(torch.bmm(wide, up)), down).sum(0)


def _twice(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Repeated along the features too."""
    wide = rows[:, :8].repeat(4, 2).view(4, -1, 16)
    return torch.bmm(F.silu(torch.bmm(wide, up)), down).cumsum(1).sum(0)


def _partly_without_gradient(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    with torch.no_grad():
        wide = _spread(rows) * 2
    return torch.bmm(F.silu(torch.bmm(wide, up)), down).sum(0)


@pytest.mark.parametrize("function", [_largest, _mixed, _interleaved, _twice, _partly_without_gradient])
def test_others(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    up, down = (
        torch.randn(4, *shape, dtype=torch.float64).requires_grad_() for shape in ((16, 48), (48, 16))
    )
    x = torch.randn(40, 16, dtype=torch.float64).requires_grad_()
    report = report_of(function, OPTIONS, x, up, down)
    assert not report.rewrites
    ways = [function, compile_mst(function, OPTIONS)]
    truth, found = (
        torch.autograd.grad(
            (way(x, up, down) * torch.linspace(0, 1, 16)).sum(), [x, up, down], allow_unused=True
        )
        for way in ways
    )
    for mine, true in zip(found, truth, strict=True):
        assert (mine is None) == (true is None)
        assert true is None or relative_error(mine, true) < 1e-12
