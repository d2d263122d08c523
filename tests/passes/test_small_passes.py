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
        _enter_autocast = _enter_autocast(cpu, torch.bfloat16, True, None)
        z = linear(x, w)
        float_1 = float(z)
        _exit_autocast = _exit_autocast(_enter_autocast)
        return float_1
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
        _enter_autocast = _enter_autocast(cpu, torch.bfloat16, True, None)
        linear = linear(x, w)
        z = float(linear)
        _exit_autocast = _exit_autocast(_enter_autocast)
        return z
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
        add = add(x, 1)
        return add
        """,
    ),
    "arguments by keyword": Case(
        positional.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        "return F.linear(input=x, weight=w)",
        """
        linear = linear(x, w)
        return linear
        """,
    ),
    "a trained 16-bit embedding": Case(
        embeddings.run,
        (LABELS, _trained(*WEIGHT, dtype=torch.bfloat16)),
        "return F.embedding(x, w)",
        """
        embedding_default = mst_fx.embedding(w, x, -1)
        return embedding_default
        """,
    ),
    "a float32 embedding stays": Case(
        embeddings.run,
        (LABELS, _trained(*WEIGHT)),
        "return F.embedding(x, w)",
        """
        embedding = embedding(x, w)
        return embedding
        """,
    ),
    "one-hots": Case(
        one_hots.run,
        (LABELS,),
        "return F.one_hot(x, 8)",
        """
        unsqueeze = unsqueeze(x, -1)
        expand = expand(unsqueeze, -1, -1, 8)
        zeros_like = zeros_like(expand)
        scatter = scatter(zeros_like, -1, unsqueeze, 1)
        return scatter
        """,
    ),
    "a pick of each row": Case(
        picks.run,
        (_trained(6, 8), LABELS[0]),
        "return x[torch.arange(6), w]",
        """
        arange = arange(6)
        lt = lt(w, 0)
        add = add(w, 8)
        where = where(lt, add, w)
        unsqueeze = unsqueeze(where, -1)
        gather = gather(x, -1, unsqueeze)
        squeeze = squeeze(gather, -1)
        return squeeze
        """,
    ),
    "a pick of other rows stays": Case(
        picks.run,
        (_trained(6, 8), LABELS[0]),
        "return x[torch.arange(6).flip(0), w]",
        """
        arange = arange(6)
        flip = flip(arange, 0)
        getitem = getitem(x, (flip, w))
        return getitem
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
        getitem_1 = getitem(x, (:, :-1))
        linear_1 = linear(getitem_1, w)
        float_2 = float(linear_1)
        exp = exp(float_2)
        return exp
        """,
    ),
    "a slice behind a sum over rows stays": Case(
        row_slices.run,
        (_trained(*HIDDEN), _trained(*WEIGHT)),
        "return F.linear(x, w).cumsum(1)[:, :-1]",
        """
        linear = linear(x, w)
        cumsum = cumsum(linear, 1)
        getitem = getitem(cumsum, (:, :-1))
        return getitem
        """,
    ),
    "a stack that is reduced": Case(
        stacks.run,
        (_trained(*HIDDEN),),
        "return torch.stack([x, x * 2], 0).mean(0)",
        """
        mul = mul(x, 2)
        stack_1 = stack((x, mul), -1)
        mean_1 = mean(stack_1, -1)
        return mean_1
        """,
    ),
    "a stack that is given away stays": Case(
        stacks.run,
        (_trained(*HIDDEN),),
        "return torch.stack([x, x * 2], 0)",
        """
        mul = mul(x, 2)
        stack = stack((x, mul), 0)
        return stack
        """,
    ),
    "a mean of losses": Case(
        sum_losses.run,
        (_trained(6, 4), _trained(*WEIGHT), LABELS[0]),
        "return F.cross_entropy(F.linear(x, w), y)",
        """
        linear = linear(x, w)
        cross_entropy_1 = cross_entropy(linear, y, reduction=none)
        ne = ne(y, -100)
        sum_1 = sum(ne)
        sum_2 = sum(cross_entropy_1, dtype=torch.float32)
        eq = eq(sum_1, 0)
        where = where(eq, 1, sum_1)
        div = div(sum_2, where)
        where_1 = where(eq, nan, div)
        return where_1
        """,
    ),
    "losses of rows stay": Case(
        sum_losses.run,
        (_trained(6, 4), _trained(*WEIGHT), LABELS[0]),
        "return F.cross_entropy(F.linear(x, w), y, reduction='none')",
        """
        linear = linear(x, w)
        cross_entropy = cross_entropy(linear, y, reduction=none)
        return cross_entropy
        """,
    ),
    "a dropout": Case(
        dropouts.put_in,
        (_trained(*HIDDEN),),
        "return F.dropout(x, 0.1)",
        """
        row_keys = row_keys((2, 6), cpu)
        dropout_rows = dropout_rows(x, row_keys, 0.1)
        return dropout_rows
        """,
    ),
    "a write in place": Case(
        functional.run,
        (LABELS,),
        """
        t = x.clone()
        t[t == -100] = 0
        return t.view(-1)
        """,
        """
        t = clone(x)
        eq = eq(t, -100)
        masked_fill = masked_fill(t, eq, 0)
        view = view(masked_fill, -1)
        return view
        """,
    ),
    "a write to an argument stays": Case(
        functional.run,
        (torch.ones(2, 3),),
        "return x.add_(1)",
        """
        add_ = add_(x, 1)
        return add_
        """,
    ),
    "cosines read for many heads": Case(
        buffers.run,
        (torch.ones(1, 6, 4), torch.ones(16, 6, 4)),
        "return x.cos() * w",
        """
        cos = cos(x)
        buffer_default = mst_fx.buffer(cos)
        mul = mul(buffer_default, w)
        return mul
        """,
    ),
    "cosines read a few times stay": Case(
        buffers.run,
        (torch.ones(1, 6, 4), torch.ones(2, 6, 4)),
        "return x.cos() * w",
        """
        cos = cos(x)
        mul = mul(cos, w)
        return mul
        """,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text(name: str) -> None:
    case = CASES[name]
    assert after(case.run, case.before, *case.inputs) == inspect.cleandoc(case.after)
