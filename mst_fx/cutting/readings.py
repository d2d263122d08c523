"""How a node may read its operands so that it works on each rank's own tokens alone, and the node that does.

A reading says for each tensor operand where its tokens lie, or that it is read whole. It is a guess, made of sizes; the proof
is asked whether it holds, and is right whatever was guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.cutting.values import Share, add_copy, local_shape, shape_of
from mst_fx.errors import Refusal
from mst_fx.graph.edit import add_call
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.modes import Context
from mst_fx.graph.sizes import settled
from mst_fx.graph.spelling import EXPANDS, RESHAPES, argument, dropout_probability, operation
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.group import Group
from mst_fx.ops.dropout import dropout_rows, rank_key, row_keys
from mst_fx.rows.tokens import Found, Prover, Tokens, moved

Reading = Mapping[fx.Node, Sequence[Tokens | None]]
_MOST = 64  # readings that are tried of one node


def is_reshape(node: fx.Node) -> bool:
    """Whether a node gives its operand another shape, the elements in their order."""
    if operation(node) not in RESHAPES or tensor_value(node) is None or not node.args:
        return False
    return not any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))


def is_expand(node: fx.Node) -> bool:
    return operation(node) in EXPANDS and tensor_value(node) is not None


def joined_with_nothing(node: fx.Node) -> fx.Node | None:
    """What an operand is joined with that has no elements (a cache's first keys), so that it stays as it is."""
    fakes = {operand: tensor_value(operand) for operand in node.all_input_nodes}
    if operation(node) != "cat" or any(fake is None for fake in fakes.values()):
        return None
    some = [operand for operand, fake in fakes.items() if fake is not None and fake.numel()]
    if len(some) != 1 or sum(part is some[0] for part in argument(node, "tensors", ())) != 1:
        return None
    (source,), (out,) = tensors_of(some[0]), tensors_of(node)
    return some[0] if shape_of(some[0]) == shape_of(node) and source.dtype == out.dtype else None


def sources(node: fx.Node) -> list[fx.Node]:
    """The operands that hold tensors; of a view as another tensor is, the first alone."""
    if is_reshape(node) or is_expand(node):
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    return [operand for operand in node.all_input_nodes if tensors_of(operand)]


def labels(node: fx.Node, reading: Reading, prover: Prover, context: Context) -> list[Found]:
    """The labels of what a node gives under a reading.

    Raises:
        Refusal: if it is not proved that each token of it depends on the same token of its operands.
    """
    if is_reshape(node) or is_expand(node):
        ((source, (place,)),) = reading.items()
        assert place is not None
        to, shape = shape_of(node), shape_of(source)
        found = moved(place, shape, to) if is_reshape(node) else _expanded(place, shape, to)
        if found is None:
            raise Refusal(f"mixes rows with other dimensions ({shape} to {to})")
        return [found]
    if dropout_probability(node) is not None and not _is_in_place(node):
        return [reading[sources(node)[0]][0]]
    return prover.prove(node, reading, context)


def _expanded(place: Tokens, shape: tuple[int, ...], to: tuple[int, ...]) -> Tokens | None:
    dim = place.dim + len(to) - len(shape)
    return dataclasses.replace(place, dim=dim) if to[dim] == shape[place.dim] else None


def _is_in_place(node: fx.Node) -> bool:
    return bool(node.kwargs.get("inplace")) or any(arg is True for arg in node.args[3:])


def write(
    graph: fx.Graph,
    node: fx.Node,
    given: Callable[[fx.Node], Any],
    place: Tokens | None,
    group: Group,
    context: Context,
) -> fx.Node:
    """The node on this rank's tokens, at the graph's insertion point.

    Args:
        given: what stands for its operands.
        place: where the tokens of its one result lie.
    """
    if place is not None and dropout_probability(node):
        return _add_dropout(graph, node, given(sources(node)[0]), group)
    if place is not None and (is_reshape(node) or is_expand(node)):
        shape = local_shape(place, shape_of(node), Share.of(group, place.count))
        target = torch.reshape if is_reshape(node) else "expand"
        return add_copy(graph, node, target, (given(node.args[0]), shape), {}, context)  # type: ignore[arg-type]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
    return add_copy(graph, node, node.target, args, kwargs, context)


def _add_dropout(graph: fx.Graph, node: fx.Node, x: fx.Node, group: Group) -> fx.Node:
    """A dropout that drops other elements on each rank, also where all of them have the same seed."""
    fake = tensor_value(x)
    assert fake is not None
    lead = [int(size) for size in settled(fake.shape[:-1])]
    with fake_mode_of([fake]) or contextlib.nullcontext():
        keys = add_call(graph, row_keys, lead, fake.device)
    mine = add_call(graph, torch.bitwise_xor, keys, rank_key(group.me))
    new = add_call(graph, dropout_rows, x, mine, dropout_probability(node))
    new.meta = {**node.meta, **new.meta}
    return new


def places_in(operand: fx.Node, count: int) -> list[Tokens]:
    """Where the tokens of sequences of so many may lie in a value that all ranks have whole."""
    fake = tensor_value(operand)
    sizes = settled(fake.shape) if fake is not None else ()
    found = [(dim, int(size)) for dim, size in enumerate(sizes) if int(size) >= count > 1]
    return [Tokens(dim, size // count, count) for dim, size in found if size % count == 0]


def choices(known: Reading, free: Sequence[fx.Node], count: int) -> Iterator[dict[fx.Node, Any]]:
    """Readings of all operands: some known, of others each whole or with tokens where its sizes allow some."""
    options: list[list[Sequence[Tokens | None]]] = []
    for operand in free:
        whole = (None,) * len(tensors_of(operand))
        options.append([whole, *((place,) for place in places_in(operand, count))])
    for chosen in itertools.islice(itertools.product(*options), _MOST):
        yield {**known, **dict(zip(free, chosen, strict=True))}
