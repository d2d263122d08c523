"""Experts that a table names by tokens (DeepSeek-V4's first layers): what gathers by the table's numbers bounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mst_fx
from tests.helpers import compile_mst, relative_error
from tests.passes.test_experts import _experts, _Stacks, _truth

_OPTIONS: dict[str, Any] = {"inner": "eager", "chunk_rows": 7}
_Router = Callable[[Tensor, Tensor], Tensor]  # scores [N, E or more], keys → weights


def _gathered(scores: Tensor, keys: Tensor) -> Tensor:
    return scores[:, :4].gather(1, keys)


def _of_more(scores: Tensor, keys: Tensor) -> Tensor:
    """There are five numbers to gather from, and four experts."""
    return scores.gather(1, keys)


def _by_others(scores: Tensor, keys: Tensor) -> Tensor:
    return scores[:, :4].gather(1, keys.flip(1).clone())


def _along_rows(scores: Tensor, keys: Tensor) -> Tensor:
    """Below the number of rows."""
    return scores.gather(0, keys)


@pytest.mark.parametrize(
    ("router", "is_rewritten"),
    [(_gathered, True), (_of_more, False), (_by_others, False), (_along_rows, False)],
)
def test_experts_by_a_table(router: _Router, is_rewritten: bool) -> None:
    torch.manual_seed(0)
    stacks, table, ids = _Stacks(4), torch.randint(4, (9, 2)), torch.randint(9, (40,))
    x, scores = (torch.rand(40, size, dtype=torch.float64, requires_grad=True) for size in (8, 5))

    def run(x: Tensor, scores: Tensor, table: Tensor, by: Any) -> Tensor:
        keys = table[ids].long()
        found: Tensor = by(stacks, x, router(scores, keys), keys)
        return found

    leaves = [x, scores, *stacks.parameters()]
    with mst_fx.watch() as report:
        found = compile_mst(lambda x, scores, table: run(x, scores, table, _experts), _OPTIONS)(
            x, scores, table
        )
    wanted = run(x, scores, table, _truth)
    assert relative_error(found, wanted) < 1e-12
    tangent = torch.randn(found.shape, dtype=torch.float64)
    grads, true = (torch.autograd.grad(out, leaves, tangent) for out in (found, wanted))
    assert max(map(relative_error, grads, true)) < 1e-12
    assert [r.kind for r in report.rewrites] == ["mlp"] * is_rewritten
    assert bool(report.refusals) != is_rewritten


def test_keys_out_of_bounds_fail() -> None:
    """As they do without mst-fx."""
    stacks, x = _Stacks(4), torch.rand(40, 8, dtype=torch.float64)

    def run(x: Tensor, scores: Tensor, keys: Tensor) -> Tensor:
        keys = keys + 0
        return _experts(stacks, x, _gathered(scores, keys), keys)

    with pytest.raises(RuntimeError, match="out of bounds"):
        compile_mst(run, _OPTIONS)(x, torch.rand(40, 5, dtype=torch.float64), torch.full((40, 2), 4))
