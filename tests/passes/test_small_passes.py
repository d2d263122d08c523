"""Passes that exchange a few nodes: the graph before, as code, and after, a line a node. That numbers stay is asserted elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mst_fx.passes import (
    buffers,
    casts,
    dead_code,
    dropouts,
    embeddings,
    functional,
    one_hots,
    picks,
    positional,
    row_slices,
    stacks,
    sum_losses,
)
from tests.passes.texts import after

HIDDEN, WEIGHT, LABELS = (2, 6, 4), (8, 4), torch.arange(12).view(2, 6) % 8


def _trained(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


@dataclasses.dataclass(frozen=True)
class Case:
    run: Callable[[Any], Any]
    inputs: tuple[Tensor, ...]
    before: str
    after: str


CASES = {
    "a cast behind autocast": Case(
        casts.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        """
        with torch.autocast("cpu", torch.bfloat16):
            z = F.linear(x, w)
        return z.float()
        """,
        """
        _enter_autocast_0 = _enter_autocast(cpu, torch.bfloat16, True, None)
        linear_0 = linear(x, w)
        float_0 = float(linear_0)
        _exit_autocast_0 = _exit_autocast(_enter_autocast_0)
        return float_0
        """,
    ),
    "a cast before its end stays": Case(
        casts.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        """
        with torch.autocast("cpu", torch.bfloat16):
            z = F.linear(x, w).float()
        return z
        """,
        """
        _enter_autocast_0 = _enter_autocast(cpu, torch.bfloat16, True, None)
        linear_0 = linear(x, w)
        float_0 = float(linear_0)
        _exit_autocast_0 = _exit_autocast(_enter_autocast_0)
        return float_0
        """,
    ),
    "what nobody reads": Case(
        dead_code.run,
        (_trained(*HIDDEN),),
        """
        unread = x.exp()
        return x + 1
        """,
        """
        add_0 = add(x, 1)
        return add_0
        """,
    ),
    "arguments by keyword": Case(
        positional.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        "return F.linear(input=x, weight=w)",
        """
        linear_0 = linear(x, w)
        return linear_0
        """,
    ),
    "a trained 16-bit embedding": Case(
        embeddings.run,
        (LABELS, _trained(*WEIGHT, dtype=torch.bfloat16)),
        "return F.embedding(x, w)",
        """
        embedding_0 = mst_fx.embedding(w, x, -1)
        return embedding_0
        """,
    ),
    "a float32 embedding stays": Case(
        embeddings.run,
        (LABELS, _trained(*WEIGHT)),
        "return F.embedding(x, w)",
        """
        embedding_0 = embedding(x, w)
        return embedding_0
        """,
    ),
    "one-hots": Case(
        one_hots.run,
        (LABELS,),
        "return F.one_hot(x, 8)",
        """
        unsqueeze_0 = unsqueeze(x, -1)
        expand_0 = expand(unsqueeze_0, -1, -1, 8)
        zeros_like_0 = zeros_like(expand_0)
        scatter_0 = scatter(zeros_like_0, -1, unsqueeze_0, 1)
        return scatter_0
        """,
    ),
    "a pick of each row": Case(
        picks.run,
        (_trained(6, 8), LABELS[0]),
        "return x[torch.arange(6), w]",
        """
        arange_0 = arange(6)
        lt_0 = lt(w, 0)
        add_0 = add(w, 8)
        where_0 = where(lt_0, add_0, w)
        unsqueeze_0 = unsqueeze(where_0, -1)
        gather_0 = gather(x, -1, unsqueeze_0)
        squeeze_0 = squeeze(gather_0, -1)
        return squeeze_0
        """,
    ),
    "a pick of other rows stays": Case(
        picks.run,
        (_trained(6, 8), LABELS[0]),
        "return x[torch.arange(6).flip(0), w]",
        """
        arange_0 = arange(6)
        flip_0 = flip(arange_0, 0)
        getitem_0 = getitem(x, (flip_0, w))
        return getitem_0
        """,
    ),
    "a slice of logits": Case(
        row_slices.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        """
        logits = F.linear(x, w).float()
        return logits[:, :-1].exp()
        """,
        """
        getitem_0 = getitem(x, (:, :-1))
        linear_0 = linear(getitem_0, w)
        float_0 = float(linear_0)
        exp_0 = exp(float_0)
        return exp_0
        """,
    ),
    "a slice behind a sum over rows stays": Case(
        row_slices.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        "return F.linear(x, w).cumsum(1)[:, :-1]",
        """
        linear_0 = linear(x, w)
        cumsum_0 = cumsum(linear_0, 1)
        getitem_0 = getitem(cumsum_0, (:, :-1))
        return getitem_0
        """,
    ),
    "a stack that is reduced": Case(
        stacks.run,
        (_trained(*HIDDEN),),
        "return torch.stack([x, x * 2], 0).mean(0)",
        """
        mul_0 = mul(x, 2)
        stack_0 = stack((x, mul_0), -1)
        mean_0 = mean(stack_0, -1)
        return mean_0
        """,
    ),
    "a stack that is given away stays": Case(
        stacks.run,
        (_trained(*HIDDEN),),
        "return torch.stack([x, x * 2], 0)",
        """
        mul_0 = mul(x, 2)
        stack_0 = stack((x, mul_0), 0)
        return stack_0
        """,
    ),
    "a mean of losses": Case(
        sum_losses.run,
        (_trained(6, 4), _trained(*WEIGHT), LABELS[0]),
        "return F.cross_entropy(F.linear(x, w), y)",
        """
        linear_0 = linear(x, w)
        cross_entropy_0 = cross_entropy(linear_0, y, reduction=none)
        ne_0 = ne(y, -100)
        sum_0 = sum(ne_0)
        sum_1 = sum(cross_entropy_0, dtype=torch.float32)
        eq_0 = eq(sum_0, 0)
        where_0 = where(eq_0, 1, sum_0)
        div_0 = div(sum_1, where_0)
        where_1 = where(eq_0, nan, div_0)
        return where_1
        """,
    ),
    "losses of rows stay": Case(
        sum_losses.run,
        (_trained(6, 4), _trained(*WEIGHT), LABELS[0]),
        "return F.cross_entropy(F.linear(x, w), y, reduction='none')",
        """
        linear_0 = linear(x, w)
        cross_entropy_0 = cross_entropy(linear_0, y, reduction=none)
        return cross_entropy_0
        """,
    ),
    "a dropout": Case(
        dropouts.put_in,
        (_trained(*HIDDEN),),
        "return F.dropout(x, 0.1)",
        """
        row_keys_0 = row_keys((2, 6), cpu)
        dropout_rows_0 = dropout_rows(x, row_keys_0, 0.1)
        return dropout_rows_0
        """,
    ),
    "a write in place": Case(
        functional.run,
        (LABELS,),
        """
        t = x.clone()
        t[t.eq(-100)] = 0
        return t.view(-1)
        """,
        """
        clone_0 = clone(x)
        eq_0 = eq(clone_0, -100)
        masked_fill_0 = masked_fill(clone_0, eq_0, 0)
        view_0 = view(masked_fill_0, -1)
        return view_0
        """,
    ),
    "a write to an argument stays": Case(
        functional.run,
        (torch.ones(2, 3),),
        "return x.add_(1)",
        """
        add__0 = add_(x, 1)
        return add__0
        """,
    ),
    "cosines read for many heads": Case(
        buffers.run,
        (torch.ones(1, 6, 4), torch.ones(16, 6, 4)),
        "return x.cos() * w",
        """
        cos_0 = cos(x)
        buffer_0 = mst_fx.buffer(cos_0)
        mul_0 = mul(buffer_0, w)
        return mul_0
        """,
    ),
    "cosines read a few times stay": Case(
        buffers.run,
        (torch.ones(1, 6, 4), torch.ones(2, 6, 4)),
        "return x.cos() * w",
        """
        cos_0 = cos(x)
        mul_0 = mul(cos_0, w)
        return mul_0
        """,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text(name: str) -> None:
    case = CASES[name]
    assert after(case.run, case.before, *case.inputs) == inspect.cleandoc(case.after)
