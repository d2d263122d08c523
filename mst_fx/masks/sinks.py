"""Attention sinks in written-out attention: one more score for each query of a head, which takes a part of the softmax and gives nothing.

    both = cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, Q, 1)], -1)        # gpt-oss
    weights = softmax(both - both.max(-1, keepdim=True).values, -1)[..., :-1]

    out = matmul(softmax(scores, -1), v) * sigmoid(logsumexp(scores, -1) - sinks.view(1, -1, 1)).unsqueeze(-1)        # Granite

The functions say what a node is, and nothing about who else reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import EXPANDS, FLOAT_CASTS, argument, operation
from mst_fx.graph.values import tensor_value
from mst_fx.torch_api.tensors import SIXTEEN_BITS

FIRST, LAST = "first", "last"
_LAST_DIM = (-1, 3)


def _is_last(dims: Any) -> bool:
    """Whether a reduction is along the last of four dimensions alone."""
    return dims in _LAST_DIM or (isinstance(dims, (list, tuple)) and list(dims) in ([-1], [3]))


def dropped_column(node: fx.Node) -> str | None:
    """Which column of ``[B, H, Q, K + 1]`` a node leaves out: of ``x[..., :-1]`` and ``x[..., 1:]``; None: it is no such slice."""
    found, source = tensor_value(node), _tensor_of(node.args[0]) if node.args else None
    if found is None or source is None or found.ndim != 4 or source.ndim != 4:
        return None
    sizes = [[expression(size) for size in x.shape] for x in (found, source)]
    if sizes[0] != [*sizes[1][:-1], sizes[1][-1] - 1]:
        return None
    return {None: LAST, 0: LAST, 1: FIRST}.get(_start_of(node))


def _start_of(node: fx.Node) -> Any:
    """Where a slice along the last dimension alone starts; -1: it is none."""
    if operation(node) == "narrow":
        start = argument(node, "start")
        return start if argument(node, "dim") in _LAST_DIM and isinstance(start, int) else -1
    index = node.args[1] if operation(node) == "getitem" and len(node.args) == 2 else None
    if not isinstance(index, tuple) or not index or not isinstance(index[-1], slice):
        return -1
    whole = slice(None, None, None)
    rest = [x for x in index[:-1] if x is not Ellipsis]
    is_whole = all(x == whole for x in rest) and (Ellipsis in index[:-1] or len(rest) == 3)
    start, step = index[-1].start, index[-1].step
    if not is_whole or step not in (None, 1) or not (start is None or isinstance(start, int)):
        return -1
    return start


def less_its_maximum(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """``x`` of ``x - x.max(-1, keepdim=True).values``, which no softmax sees, and the nodes of the maximum; None: it is no such thing."""
    if operation(node) != "sub" or len(node.args) != 2 or node.kwargs:
        return None
    source, maximum = node.args
    if not isinstance(source, fx.Node) or not isinstance(maximum, fx.Node):
        return None
    inner = [maximum]
    while operation(inner[-1]) == "detach":
        inner.append(inner[-1].args[0])  # type: ignore[arg-type]
    if operation(inner[-1]) == "getitem" and inner[-1].args[1] == 0:
        inner.append(inner[-1].args[0])  # type: ignore[arg-type]
    last = inner[-1]
    is_maximum = operation(last) in ("max", "amax") and last.args[0] is source
    dims = argument(last, "dim")
    is_of_rows = _is_last(dims)
    if not is_maximum or not is_of_rows or argument(last, "keepdim", False) is not True:
        return None
    return source, tuple(inner)


def joined(node: fx.Node, column: str) -> tuple[fx.Node, fx.Node] | None:
    """The scores and the sinks ``[B, H, Q, 1]`` of ``cat([scores, sinks], -1)``.

    Args:
        column: where the sinks are, by what was left out later.
    """
    parts = argument(node, "tensors") if operation(node) == "cat" else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or argument(node, "dim", 0) not in _LAST_DIM:
        return None
    scores, sinks = parts if column == LAST else reversed(parts)
    fakes = [_tensor_of(scores), _tensor_of(sinks)]
    if any(fake is None or fake.ndim != 4 for fake in fakes) or fakes[1].shape[-1] != 1:  # type: ignore[union-attr]
        return None
    return scores, sinks


class Scaling(NamedTuple):
    """What scales the output of attention: ``sigmoid(logsumexp(scores) - sinks)``.

    Attributes:
        output: of the attention without sinks.
        scores: of which the logarithm of the sum is taken.
        sinks: ``[1, H, 1]``, or ``[B, H, Q]``, or either with a 1 more.
        inner: the nodes in between, from the last to the first.
    """

    output: fx.Node
    scores: fx.Node
    sinks: fx.Node
    inner: tuple[fx.Node, ...]


def scaling(node: fx.Node) -> Scaling | None:
    """What an output multiplied by a sigmoid is made of; None: it is no such thing."""
    if operation(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    for output, factor in (node.args, reversed(node.args)):
        if isinstance(output, fx.Node) and isinstance(factor, fx.Node):
            found = _difference(factor)
            if found is not None:
                return Scaling(output, *found)
    return None


def _difference(factor: fx.Node) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """Scores and sinks of ``sigmoid(logsumexp(scores, -1) - sinks)[..., None]``, and the nodes in between."""
    inner: list[fx.Node] = []

    def source(node: Any, *names: str) -> Any:
        """The operand of a call of one of these names, through casts."""
        while isinstance(node, fx.Node) and _is_cast(node):
            inner.append(node)
            node = node.args[0]
        if not isinstance(node, fx.Node) or operation(node) not in names:
            return None
        inner.append(node)
        return node

    factor_fake = tensor_value(factor)
    last = source(factor, "unsqueeze", "sigmoid")
    if last is not None and operation(last) == "unsqueeze":
        is_at_end = argument(last, "dim") in _LAST_DIM
        last = source(last.args[0], "sigmoid") if is_at_end else None
    difference = source(last.args[0], "sub") if last is not None else None
    if difference is None or len(difference.args) != 2 or difference.kwargs:
        return None
    sums, sinks = difference.args
    found, fakes = source(sums, "logsumexp"), [_tensor_of(sums), _tensor_of(sinks)]
    if found is None or factor_fake is None or any(fake is None for fake in fakes):
        return None
    if fakes[0].ndim != fakes[1].ndim:  # one dimension stands for another otherwise
        return None
    dims = argument(found, "dim")
    is_of_rows = _is_last(dims)
    is_column = factor_fake.ndim == 4 and factor_fake.shape[-1] == 1
    scores = found.args[0]
    return (scores, sinks, tuple(inner)) if is_of_rows and is_column and isinstance(scores, fx.Node) else None


def per_head(sinks: fx.Node, heads: Any) -> fx.Node | None:
    """What sinks ``[B, H, Q, 1]`` are the expansion of, ``[1, H, 1, 1]``, or with fewer dimensions in front; ``[B, H, Q]`` likewise.
    None: they may differ between sequences or queries.

    Args:
        heads: H.
    """
    node, rank = sinks, None
    while True:
        fake = tensor_value(node)
        if fake is None:
            return None
        rank = fake.ndim if rank is None else rank
        sizes = [*[1] * (rank - fake.ndim), *map(expression, fake.shape)]
        if sizes == [1, expression(heads), *[1] * (rank - 2)]:
            return node
        if operation(node) not in EXPANDS | {"repeat"} and not _is_cast(node):
            return None
        node = node.args[0]  # type: ignore[assignment]


def has_own_sinks(softmax: fx.Node) -> bool:
    """Whether a softmax is of scores and of a column that is no number a head: each query's own sink."""
    source: Any = softmax.args[0] if softmax.args else None
    while isinstance(source, fx.Node):
        found = less_its_maximum(source)
        if found is None and not _is_cast(source):
            break
        source = found[0] if found is not None else source.args[0]
    parts = [joined(source, column) for column in (LAST, FIRST)] if isinstance(source, fx.Node) else []
    sinks = [found[1] for found in parts if found is not None]
    return any(per_head(each, tensor_value(each).shape[1]) is None for each in sinks)  # type: ignore[union-attr]


def before_widening(factor: fx.Node, values: Any) -> fx.Node:
    """``x`` of ``x.float()`` where the values have the 16 bits of ``x``: kernels, and chunks with sinks, do not round its products either."""
    source = factor.args[0] if operation(factor) in FLOAT_CASTS and factor.args else None
    if not isinstance(source, fx.Node):
        return factor
    fakes = [_tensor_of(x) for x in (factor, source, values)]
    types = [None if fake is None else fake.dtype for fake in fakes]
    is_widened = types[0] == torch.float32 and types[1] in SIXTEEN_BITS and types[1] == types[2]
    return source if is_widened else factor


def _is_cast(node: fx.Node) -> bool:
    fakes = [tensor_value(node), _tensor_of(node.args[0]) if node.args else None]
    return operation(node) in FLOAT_CASTS and all(x is not None and x.is_floating_point() for x in fakes)


def _tensor_of(found: Any) -> Any:
    return tensor_value(found) if isinstance(found, fx.Node) else None
