"""Functions of each row that stand between a vocabulary head and what reads its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mst_fx.graph.edit import add_call, copy_provenance
from mst_fx.graph.spelling import CLASS_FUNCTIONS, FLATTENS, POINTWISE_LINKS, REORDERINGS, operation
from mst_fx.graph.values import tensor_value
from mst_fx.graph.writes import writes_in_place
from mst_fx.rows.labels import is_same_size


def order_of(node: fx.Node) -> tuple[int, ...] | None:
    """The order in which a transpose or permute puts the dimensions of its operand; None for other nodes."""
    fake, name = tensor_value(node), operation(node)
    if fake is None or node.kwargs or writes_in_place(node):
        return None
    is_attribute = node.target is getattr and node.args[1] in ("mT", "T")
    is_call = name in REORDERINGS and all(isinstance(x, (int, tuple, list)) for x in node.args[1:])
    if not is_attribute and not is_call:
        return None
    labelled = torch.empty(tuple(range(2, 2 + fake.ndim)), device="meta")
    moved = getattr(labelled, str(node.args[1]) if is_attribute else name)
    moved = moved if is_attribute else moved(*node.args[1:])
    return tuple(size - 2 for size in moved.shape)


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def permuted(graph: fx.Graph, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    if order == tuple(range(len(order))):
        return node
    return add_call(graph, "permute", node, order)


# Pointwise functions of rows: ``links`` between a head and what reads its logits.


def is_link(node: fx.Node, classes: int, rank: int = 0) -> bool:
    """Whether a node is a function of each row of its first operand, in any order of dimensions.

    Args:
        classes: the dimension of the classes in this node's value.
        rank: the most dimensions that its other operands have.
    """
    name, others = operation(node), node.all_input_nodes[1:]
    if any((fake := tensor_value(n)) is not None and fake.ndim > rank for n in others) or not node.args:
        return False
    if not isinstance(node.args[0], fx.Node) or writes_in_place(node):
        return False
    if name in CLASS_FUNCTIONS:
        dim, ndim = _dim_of(node), tensor_value(node).ndim  # type: ignore[union-attr]
        return dim is not None and dim % ndim == classes % ndim
    return name in POINTWISE_LINKS


def _dim_of(node: fx.Node) -> int | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim if isinstance(dim, int) else None


def linked(graph: fx.Graph, link: fx.Node, operand: fx.Node) -> fx.Node:
    """A link's function of another operand, the classes of which come last."""
    args, kwargs = link.args[1:], dict(link.kwargs)
    if operation(link) in CLASS_FUNCTIONS:
        args, kwargs = args[1:], {key: given for key, given in kwargs.items() if key != "dim"}
        args = (-1, *args)
    current = add_call(graph, link.target, operand, *args, **kwargs)
    copy_provenance(link, current)
    return current


def leaves_last_dim(node: fx.Node) -> bool:
    """Whether a reshape leaves the last dimension as it is, and says what becomes of the others."""
    if operation(node) not in FLATTENS or node.kwargs:
        return False
    fake, source = tensor_value(node), tensor_value(node.args[0])  # type: ignore[arg-type]
    if fake is None or source is None or not isinstance(fake.shape[-1], int):
        return False
    if not is_same_size(fake.shape[-1], source.shape[-1]):
        return False
    if operation(node) != "flatten":
        return len(sizes_of(node)) == fake.ndim
    end = node.args[2] if len(node.args) > 2 else -1
    return isinstance(end, int) and end % source.ndim != source.ndim - 1


def sizes_of(node: fx.Node) -> list[Any]:
    sizes: Any = node.args[1:]
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)
