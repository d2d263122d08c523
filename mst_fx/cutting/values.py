"""What stands for a value in a graph that is cut, and the nodes that make a part of a value."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.fill import call
from mst_fx.graph.modes import Context, in_context
from mst_fx.graph.sizes import settled
from mst_fx.graph.values import VALUE, tensors_of, value
from mst_fx.group import Group
from mst_fx.ranks.shares import firsts_of, shares_of
from mst_fx.rows.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor: the node that makes it, and where its tokens lie; None: all ranks have all of it."""

    node: fx.Node
    place: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class Standing:
    """What stands for a node: one leaf, or those of a tuple."""

    leaves: tuple[Leaf, ...]
    is_tuple: bool = False

    @property
    def places(self) -> tuple[Tokens | None, ...]:
        return tuple(leaf.place for leaf in self.leaves)

    @property
    def is_cut(self) -> bool:
        return any(leaf.place is not None for leaf in self.leaves)


@dataclasses.dataclass(frozen=True)
class Share:
    """This rank's share of sequences of so many tokens."""

    rows_of: tuple[int, ...]
    me: int

    @staticmethod
    def of(group: Group, count: int) -> Share:
        return Share(tuple(shares_of(count, group.ranks)), group.me)

    @property
    def first(self) -> int:
        return firsts_of(self.rows_of)[self.me]

    @property
    def size(self) -> int:
        return self.rows_of[self.me]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's one tensor."""
    (fake,) = tensors_of(node)
    return tuple(map(int, settled(fake.shape)))


def local_shape(place: Tokens, shape: tuple[int, ...], share: Share) -> tuple[int, ...]:
    return tuple(map(int, place.sized(shape, share.size)))


def local_fake(fake: torch.Tensor, place: Tokens | None, share: Share | None) -> torch.Tensor:
    """A fake like another one, of this rank's tokens."""
    if place is None or share is None:
        return fake
    with torch.no_grad():
        new = fake.new_empty(local_shape(place, tuple(map(int, settled(fake.shape))), share))
    return new.requires_grad_(fake.requires_grad)


def add_narrow(graph: fx.Graph, node: fx.Node, place: Tokens, share: Share) -> fx.Node:
    """This rank's tokens of a value that all ranks have, at the graph's insertion point."""
    if place.batch == 1:
        return add_call(graph, "narrow", node, place.dim, share.first, share.size)
    parts = add_call(graph, "unflatten", node, place.dim, (place.batch, place.count))
    mine = add_call(graph, "narrow", parts, place.dim + 1, share.first, share.size)
    return add_call(graph, "flatten", mine, place.dim, place.dim + 1)


def add_gather(graph: fx.Graph, leaf: Leaf, group: Group) -> fx.Node:
    """The tokens of all ranks, at the graph's insertion point."""
    assert leaf.place is not None
    share = Share.of(group, leaf.place.count)
    gather = torch.ops.mst_fx.gather_rows.default
    place = leaf.place
    return add_call(
        graph, gather, leaf.node, place.dim, place.batch, list(share.rows_of), share.me, group.name
    )


def add_copy(
    graph: fx.Graph, node: fx.Node, target: Any, args: Any, kwargs: Any, context: Context
) -> fx.Node:
    """A node like another one with other arguments, at the graph's insertion point."""
    op = "call_method" if isinstance(target, str) else "call_function"
    with in_context(context):
        fakes, fake_kwargs = fx.node.map_arg((args, kwargs), value)
        found = call(op, target, fakes, fake_kwargs)
    new = graph.create_node(op, target, tuple(args), dict(kwargs))
    new.meta = {**node.meta, VALUE: found}
    new.meta.pop("val", None)
    return new
