"""Collectives as functions of tensors, which stand in a compiled graph: Inductor leaves them in the order of the graph.

``torch.ops._c10d_functional`` is what ``torch.distributed._functional_collectives`` calls and Inductor knows; that module is
private, too. Base operators alone: torch 2.11 differentiates others than 2.13. Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

_OPS: Any = torch.ops._c10d_functional


def all_to_all(x: Tensor, gets: Sequence[int], sends: Sequence[int], group: str) -> Tensor:
    """``[sum(sends)]`` → ``[sum(gets)]``: so many elements to each rank, and from each."""
    return _OPS.wait_tensor(_OPS.all_to_all_single(x, gets, sends, group))  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks."""
    return _OPS.wait_tensor(_OPS.all_reduce(x, "sum", group))  # type: ignore[no-any-return]


def start_reduction(x: fx.Node, how: str, before: fx.Node, group: str) -> fx.Node:
    """A call that starts to add up a tensor over the ranks, in front of a node.

    Args:
        how: ``"sum"``, or ``"avg"`` with NCCL.
    """
    with x.graph.inserting_before(before):
        return _call(x, _OPS.all_reduce.default, x, how, group)


def start_gather(x: fx.Node, ranks: int, before: fx.Node, group: str) -> fx.Node:
    """A call that starts to gather the rows of all ranks, ``[n, …]`` → ``[ranks·n, …]``, in front of a node."""
    with x.graph.inserting_before(before):
        node = _call(x, _OPS.all_gather_into_tensor.default, x, ranks, group)
    mine = x.meta["val"]
    node.meta["val"] = mine.new_empty((ranks * mine.shape[0], *mine.shape[1:]))
    return node


def wait_for(started: fx.Node, before: fx.Node) -> fx.Node:
    """A call that gives what comes of a collective that was started."""
    with started.graph.inserting_before(before):
        return _call(started, _OPS.wait_tensor.default, started)


def _call(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = like.graph.call_function(target, args)
    node.meta["val"] = like.meta["val"]
    return node


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """``[n, …]`` → ``[ranks·n, …]``."""
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(x, ranks, group))  # type: ignore[no-any-return]
