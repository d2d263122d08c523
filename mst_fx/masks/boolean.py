"""The Boolean mask behind one that is added to scores, through the casts and dimensions in between."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.levels import Level
from mst_fx.graph.names import plain_name
from mst_fx.graph.sizes import expression, is_one
from mst_fx.graph.spelling import COPIES, EXPANDS, FLOAT_CASTS, operation
from mst_fx.graph.values import storage_key, tensor_value
from mst_fx.masks.constants import fill_of, number_in
from mst_fx.masks.reader import gives_heads, made_outside

aten = torch.ops.aten


class BooleanMask(NamedTuple):
    """What a mask says, behind what is made of it.

    Attributes:
        node: the Boolean mask; None: nothing is masked.
        fill: what is added to the score where it is false; 0: minus infinity, or the mask is Boolean.
        batch_first: it is [B, Q, K] where it has three dimensions.
    """

    node: fx.Node | None
    fill: float = 0.0
    batch_first: bool = False


def boolean_mask(
    node: fx.Node, level: Level, queries: Any, keys: Any, mutated: Collection[int]
) -> BooleanMask:
    """The Boolean mask behind a mask.

    ``where(mask, 0, fill)`` is what Hugging Face's eager attention adds; ``zeros`` is T5's bias of none.

    Raises:
        Refusal: if it is added otherwise, or its values were made outside.
    """
    node = level.resolve(node)
    fake = tensor_value(node)
    if fake is not None and fake.dtype == torch.bool:
        return BooleanMask(node)
    batch_first = False
    for step in _steps(node, level):
        batch_first |= gives_heads(node, step)
        node = step
        fake = tensor_value(node)
        if fake is not None and storage_key(fake) in mutated:
            raise Refusal(f"{node.name} ({plain_name(node)}), the mask, is written to in place", Cause.MASK)
    if fill_of(node, mutated) == 0:
        return BooleanMask(None)
    other = _beside_zeros(node, level, mutated)
    if other is not None:
        return boolean_mask(other, level, queries, keys, mutated)
    chosen = _chosen_by(node, mutated)
    if chosen is not None:
        return BooleanMask(*chosen, batch_first)
    outside = made_outside(node, level.resolve, queries, keys)
    if outside is not None:
        raise Refusal(*outside)
    raise Refusal(f"{node.name} ({plain_name(node)}) makes the mask", Cause.MASK)


def _beside_zeros(node: fx.Node, level: Level, mutated: Collection[int]) -> fx.Node | None:
    """The mask that zeros were added to."""
    if operation(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    parts = [level.resolve(part) for part in node.args if isinstance(part, fx.Node)]
    others = [part for part in parts if fill_of(where_of(part, level), mutated) != 0]
    if len(parts) != 2 or len(others) != 1 or _is_boolean(others[0]):  # a Boolean one is added as 0 and 1
        return None
    return others[0]


def _is_boolean(node: fx.Node) -> bool:
    fake = tensor_value(node)
    return fake is None or fake.dtype == torch.bool


def _chosen_by(node: fx.Node, mutated: Collection[int]) -> tuple[fx.Node, float] | None:
    """The condition of ``where(mask, 0, fill)``, and the fill."""
    if node.target not in (torch.where, aten.where.self, "where") or len(node.args) != 3:
        return None
    mask, zero, masked = node.args
    if node.op == "call_method":
        mask, zero = zero, mask
    fill = number_in(masked, mutated)
    is_zero = number_in(zero, mutated) == 0 or (isinstance(zero, fx.Node) and fill_of(zero, mutated) == 0)
    if not isinstance(mask, fx.Node) or not is_zero or fill is None or fill >= -1e4:
        return None
    return mask, 0.0 if fill == float("-inf") else fill


def _steps(node: fx.Node, level: Level | None) -> Iterator[fx.Node]:
    """A mask, and the nodes of which it is a cast or the whole, with more dimensions perhaps; back to the first."""
    yield node
    while operation(node) in _SAME or _is_whole_slice(node) or _adds_dimensions(node):
        node = node.args[0]  # type: ignore[assignment]
        node = node if level is None else level.resolve(node)
        yield node


def where_of(node: fx.Node, level: Level | None) -> fx.Node:
    """The first node of which a mask is a cast, or the whole."""
    *_, first = _steps(node, level)
    return first


def aligned_where_of(node: fx.Node, level: Level) -> fx.Node:
    """The same, as long as dimensions counted from the last one mean the same: not of ``[B, 1, Q, K]`` the ``[B, Q, K]``."""
    found = node
    for step in _steps(node, level):
        fake = tensor_value(step)
        if (
            step is not found
            and gives_heads(found, step)
            and not (fake is not None and is_one(fake.shape[0]))
        ):
            break
        found = step
    return found


_SAME = FLOAT_CASTS | COPIES
_ADD_DIMENSIONS = {"getitem", "unsqueeze", "view", "reshape"}


def _adds_dimensions(node: fx.Node) -> bool:
    """Whether a node is another with dimensions of size 1 in front (``x[None, None]``, ``x.unsqueeze(0)``), or
    for heads (``x[:, None]``), or that expanded."""
    name = operation(node)
    if name not in EXPANDS | _ADD_DIMENSIONS:
        return False
    source = node.args[0] if node.args else None
    fake, inner = tensor_value(node), tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or inner is None or fake.ndim < inner.ndim:
        return False
    if gives_heads(node, source):  # type: ignore[arg-type]
        return True
    sizes, wanted = _sizes(fake), _sizes(inner)
    wanted = [1] * (len(sizes) - len(wanted)) + wanted
    if name in _ADD_DIMENSIONS:
        return sizes == wanted
    return all(a == b or b == 1 for a, b in zip(sizes, wanted, strict=True)) and sizes[-2:] == wanted[-2:]


def _is_whole_slice(node: fx.Node) -> bool:
    if operation(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return False
    fake, source = tensor_value(node), tensor_value(node.args[0])
    return fake is not None and source is not None and _sizes(fake) == _sizes(source)


def _sizes(fake: Tensor) -> list[Any]:
    return [expression(size) for size in fake.shape]
