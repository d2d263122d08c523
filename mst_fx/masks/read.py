"""What a mask says as it is read in a graph: a formula, and its vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.levels import Level
from mst_fx.graph.sizes import hint
from mst_fx.graph.values import tensor_value
from mst_fx.masks import formula, reach
from mst_fx.masks.biases import BooleanPart
from mst_fx.masks.boolean import boolean_mask
from mst_fx.masks.constants import evaluated
from mst_fx.masks.formula import Mask
from mst_fx.masks.reach import FULL, Vectors
from mst_fx.masks.reader import Reader


@dataclasses.dataclass(frozen=True)
class Read:
    """A mask as it was read in a graph.

    Attributes:
        formula: of the vectors ``k0``, … and ``q0``, …
        fill: what is added to a masked score; 0: masked scores do not count at all.
        keys, queries: the nodes of these vectors.
        vectors: their values, if all are constants.
        tables: those that were asked for, by all that they depend on: layers have a mask in common.
    """

    formula: Mask
    fill: float = 0.0
    keys: tuple[fx.Node, ...] = ()
    queries: tuple[fx.Node, ...] = ()
    vectors: Vectors | None = None
    tables: dict[tuple[int, int, int, bool], Tensor] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def is_finite(self) -> bool:
        """See :func:`mst_fx.masks.reach.reach_of`."""
        return self.fill != 0.0

    def table(self, queries: Any, keys: Any, chunk: int) -> Tensor | None:
        """Its :attr:`~mst_fx.masks.reach.Reach.table`, if vectors and sizes are constants."""
        if self.vectors is None or not isinstance(queries, int) or not isinstance(keys, int):
            return None
        wanted = (queries, keys, chunk, self.is_finite)
        if wanted not in self.tables:
            self.tables[wanted] = reach.reach_of(self.formula, self.vectors, *wanted).table
        return self.tables[wanted]


NO_MASK = Read(formula.TRUE, vectors=Vectors((), ()))


def read_mask(node: fx.Node, level: Level, queries: Any, keys: Any, mutated: Collection[int]) -> Read:
    """The formula of a mask.

    Parts that constants make true, such as "the same document" of one document, are left out.

    Raises:
        Refusal: if the mask is not understood.
    """
    fake = tensor_value(node)
    if fake is None or fake.requires_grad:
        raise Refusal(f"{node.name}: the mask has a gradient", Cause.MASK)
    boolean = boolean_mask(node, level, queries, keys, mutated)

    def found(reader: Reader) -> Mask:
        return formula.TRUE if boolean.node is None else reader.read(boolean.node)

    read = _read_formula(found, boolean.batch_first, node.name, level, queries, keys, mutated)
    return dataclasses.replace(read, fill=boolean.fill)


def read_parts(
    parts: Sequence[BooleanPart], level: Level, queries: Any, keys: Any, mutated: Collection[int]
) -> Read:
    """The formula of several masks, all of which must let a key through."""
    if not parts:
        return NO_MASK
    if len({part.batch_first for part in parts}) > 1:
        raise Refusal(f"{parts[0].node.name}: masks of different dimensions", Cause.MASK)

    def found(reader: Reader) -> Mask:
        masks = [(reader.read(part.node), part.negated) for part in parts]
        return formula.both(formula.negated(mask) if negated else mask for mask, negated in masks)

    read = _read_formula(found, parts[0].batch_first, parts[0].node.name, level, queries, keys, mutated)
    return dataclasses.replace(read, fill=parts[0].fill)


def _read_formula(
    of: Callable[[Reader], Mask],
    batch_first: bool,
    name: str,
    level: Level,
    queries: Any,
    keys: Any,
    mutated: Collection[int],
) -> Read:
    """What a reader finds, without the parts that constants make true.

    Args:
        name: the mask's, for a refusal.
    """
    known: dict[fx.Node, Any] = {}
    limit = 64 * (hint(queries) + hint(keys))

    def constant(node: fx.Node) -> Any:
        return evaluated(node, known, limit, mutated)

    reader = Reader(queries, keys, level.resolve, constant, mutated, batch_first)
    found = of(reader)
    nodes = _Nodes(tuple(reader.key_nodes), tuple(reader.query_nodes), constant)

    def is_true(part: Mask) -> bool:
        alone = nodes.read(part)
        table = alone.table(queries, keys, queries) if alone.keys or alone.queries else None
        return table is not None and int(table[0, 0]) == FULL

    read = nodes.read(formula.both(part for part in formula.conjuncts(found) if not is_true(part)))
    if read.formula == formula.FALSE:
        raise Refusal(f"{name}: the mask lets nothing through", Cause.MASK)
    return read


@dataclasses.dataclass(frozen=True)
class _Nodes:
    """The nodes that the vectors of a formula name, and their values where they are constants."""

    keys: tuple[fx.Node, ...]
    queries: tuple[fx.Node, ...]
    constant: Callable[[fx.Node], Any]

    def read(self, part: Mask) -> Read:
        """A part of the formula by itself, with its vectors numbered from 0."""
        used = set(formula.vectors_in(part))
        places = [
            [index for index in range(len(nodes)) if f"{kind}{index}" in used]
            for kind, nodes in (("k", self.keys), ("q", self.queries))
        ]
        new = {
            f"{kind}{old}": f"{kind}{i}"
            for kind, own in zip("kq", places, strict=True)
            for i, old in enumerate(own)
        }
        keys = tuple(self.keys[index] for index in places[0])
        queries = tuple(self.queries[index] for index in places[1])
        return Read(formula.renamed(part, new), 0.0, keys, queries, self._vectors(keys, queries))

    def _vectors(self, keys: Sequence[fx.Node], queries: Sequence[fx.Node]) -> Vectors | None:
        values = [[self.constant(node) for node in nodes] for nodes in (keys, queries)]
        if not all(isinstance(found, Tensor) for part in values for found in part):
            return None
        return Vectors([as_vector(x, True) for x in values[0]], [as_vector(x, False) for x in values[1]])


def as_vector(vector: Any, is_key: bool, then: Callable[..., Any] | None = None) -> Any:
    """``[b, 1, 1, K]`` or ``[b, 1, Q, 1]``, with fewer dimensions too, → ``[b, K]`` or ``[b, Q]``.

    Args:
        then: makes a graph's nodes instead of tensors.
    """
    run: Callable[..., Any] = then or (lambda function, *args: function(*args))
    fake = tensor_value(vector) if isinstance(vector, fx.Node) else vector
    assert fake is not None
    if fake.ndim == 1 or (fake.ndim == 2 and not is_key):
        flat = vector if fake.ndim == 1 else run(torch.flatten, vector, 0, 1)
        return run(torch.unsqueeze, flat, 0)
    if fake.ndim == 2:
        return vector
    return (
        run(torch.flatten, vector, 0, fake.ndim - 2)
        if is_key
        else run(torch.flatten, vector, 1, fake.ndim - 1)
    )
