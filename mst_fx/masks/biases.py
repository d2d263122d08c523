"""What is added to the scores of an attention: a mask, and biases that are formulas of positions.

    scores + slopes[:, None, None] * k_positions                                 # Bloom, MPT: a number for each key
    scores + table[bucket(k_positions - q_positions)] + where(mask, 0, fill)     # T5
    scaled_dot_product_attention(…, attn_mask=where(mask, bias, fill))
    (scores + bias).masked_fill(~mask, fill)

:func:`split` takes such a sum apart. What nothing of S² is needed for: a number for each key is one already, and what depends on the
distance alone is one for each distance (:mod:`mst_fx.masks.distances`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import add_call
from mst_fx.graph.levels import Level
from mst_fx.graph.names import plain_name
from mst_fx.graph.sizes import is_one, is_same
from mst_fx.graph.spelling import operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value
from mst_fx.masks.boolean import aligned_where_of, boolean_mask
from mst_fx.masks.constants import number_in
from mst_fx.masks.distances import Distances, flat_heads, read_distances
from mst_fx.masks.formula import ADDS, AT_LEAST, BY_BIAS, NO_BIAS, NO_SCORE
from mst_fx.masks.hiding import may_hide

# No score comes near it, whatever the bias: one of a slope of 1 and a million tokens is -1e6.
_HIDES = -1e8


@dataclasses.dataclass(frozen=True)
class BooleanPart:
    """A Boolean mask among what is added.

    Attributes:
        node: where it is true a query may see a key; None: everywhere.
        fill: as :class:`mst_fx.masks.boolean.BooleanMask` has it.
        batch_first: likewise.
        negated: it is true where a query may not see a key.
    """

    node: fx.Node
    fill: float = 0.0
    batch_first: bool = False
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Biases:
    """The biases of an attention.

    Attributes:
        of_keys: nodes ``[.., 1, K]``.
        of_distances: those ``[.., Q, K]`` that depend on distances alone.
        hiding: see :mod:`mst_fx.ops.biased`.
    """

    of_keys: tuple[fx.Node, ...] = ()
    of_distances: tuple[Distances, ...] = ()
    hiding: str = ADDS

    @property
    def is_empty(self) -> bool:
        return not self.of_keys and not self.of_distances


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What is done to scores behind all that is added to them.

    Attributes:
        mask: ``scores.masked_fill(mask, fill)``, or ``where(mask, scores, fill)`` (``negated`` is False); None: nothing.
        fill: the number.
        negated: the mask is true where scores are hidden.
        at_least: ``max(scores, number)``; None: no such thing.
    """

    mask: fx.Node | None = None
    fill: float = 0.0
    negated: bool = True
    at_least: float | None = None


NO_BIASES, NOT_HIDDEN = Biases(), Hidden()


class Splitter:
    """Takes apart what is added.

    Attributes:
        masks: the Boolean masks.
        of_keys, of_distances, hiding: as of :class:`Biases`.
    """

    def __init__(self, level: Level, heads: Any, queries: Any, keys: Any, mutated: Collection[int]) -> None:
        self._level, self._heads, self._queries, self._keys = level, heads, queries, keys
        self._mutated = mutated
        self.masks: list[BooleanPart] = []
        self.of_keys: list[fx.Node] = []
        self.of_distances: list[Distances] = []
        self.hiding = ADDS

    def split(self, added: Sequence[fx.Node], hidden: Hidden, is_fused: bool) -> None:
        """Of all that is added.

        Args:
            is_fused: a Boolean mask is one; to written-out scores it is added as 0 and 1.

        Raises:
            Refusal: naming what is neither a mask nor a known bias.
        """
        if hidden.mask is not None:
            self._add_mask(hidden.mask, hidden.fill, NO_SCORE, hidden.negated)
        for node in added:
            fake = tensor_value(node)
            if is_fused and fake is not None and fake.dtype == torch.bool:
                self._add_mask(self._level.resolve(node), float("-inf"), ADDS)
            else:
                self._term(node)
        if hidden.at_least is None:
            return
        if hidden.mask is not None or len(self.masks) != 1 or self.masks[0].fill != hidden.at_least:
            raise Refusal(
                "scores are bounded below by another number than that which hides them", Cause.SCORES
            )
        self.hiding = AT_LEAST

    def _term(self, node: fx.Node) -> None:
        node = self._level.resolve(node)
        fake = tensor_value(node)
        if fake is None or not is_plain(fake) or not fake.is_floating_point():
            raise Refusal(f"{node.name} ({plain_name(node)}) is added to scores", Cause.MASK)
        if storage_key(fake) in self._mutated:
            raise Refusal(f"{node.name} ({plain_name(node)}), the mask, is written to in place", Cause.MASK)
        sizes = [1] * (4 - fake.ndim) + list(fake.shape)
        if is_one(sizes[2]) and is_same(sizes[3], self._keys):
            self.of_keys.append(node)
            return None
        if not fake.requires_grad and is_one(sizes[1]) and self._is_mask_alone(node):
            return None
        first = aligned_where_of(node, self._level)
        parts = [part for part in first.args if isinstance(part, fx.Node)]
        if operation(first) == "add" and len(first.args) == len(parts) == 2 and not first.kwargs:
            for part in parts:
                self._term(part)
            return None
        chosen = self._hidden_bias(first)
        if chosen is not None:
            return self._term(chosen)
        self.of_distances.append(read_distances(node, self._level, self._mutated))
        return None

    def _is_mask_alone(self, node: fx.Node) -> bool:
        """Takes a mask without a bias, ``where(mask, 0, fill)`` or ``where(mask, fill, 0)``, and zeros, of which nothing is left."""
        with contextlib.suppress(Refusal):  # no mask alone
            boolean = boolean_mask(node, self._level, self._queries, self._keys, self._mutated)
            if boolean.node is not None:
                self.masks.append(BooleanPart(boolean.node, boolean.fill, boolean.batch_first))
            return True
        found = choice(aligned_where_of(node, self._level), self._mutated)
        if found is None or number_in(found[1], self._mutated) != 0:
            return False
        mask, _, fill, negated = found
        self._add_mask(mask, fill, self.hiding, negated)
        return True

    def _hidden_bias(self, node: fx.Node) -> fx.Node | None:
        """The bias of ``where(mask, bias, fill)`` and ``bias.masked_fill(mask, fill)``, whose mask is taken; None: it is none."""
        found = choice(node, self._mutated)
        if found is None:
            return None
        mask, bias, fill, negated = found
        if self.hiding != ADDS:
            raise Refusal(f"{node.name}: a bias is hidden, and its score, too", Cause.MASK)
        self._add_mask(mask, fill, NO_BIAS, negated)
        return bias

    def _add_mask(self, node: fx.Node, fill: float, hiding: str, negated: bool = False) -> None:
        self.masks.append(BooleanPart(node, 0.0 if fill == float("-inf") else fill, negated=negated))
        self.hiding = hiding

    def biases(self) -> Biases:
        """What was found.

        Raises:
            Refusal: where it matters in which order scores are hidden, or a bias may outweigh the number that hides.
        """
        fills = [part.fill for part in self.masks]
        if len(fills) > 1 and any(fills):
            raise Refusal("two masks hide scores by numbers", Cause.MASK)
        parts = (*self.of_keys, *(each.bias for each in self.of_distances))
        if any(fill > _HIDES for fill in fills if fill) and parts:
            raise Refusal("a bias may outweigh the number that hides scores", Cause.MASK)
        if any(may_hide(part, self._level, self._heads, self._keys) for part in parts):
            if any(fills):
                raise Refusal("a bias may hide keys by a number, and a mask does", Cause.MASK)
            self.hiding = BY_BIAS
        if not parts and not any(fills) and self.hiding == NO_SCORE:
            self.hiding = ADDS  # minus infinity in the place of a score is minus infinity beside it
        return Biases(tuple(self.of_keys), tuple(self.of_distances), self.hiding)


def choice(node: fx.Node, mutated: Collection[int]) -> tuple[fx.Node, fx.Node, float, bool] | None:
    """Mask, value, fill of ``where(mask, value, fill)`` and ``value.masked_fill(mask, fill)``, and whether the mask hides; None: it is
    neither, or the fill hides nothing."""
    name = operation(node)
    if len(node.args) != 3 or node.kwargs or name not in ("where", "masked_fill"):
        return None
    mask, value, fill, negated = *node.args, False
    if name == "where" and node.op == "call_method":
        mask, value = value, mask
    if name == "masked_fill":
        value, mask, negated = mask, value, True
    elif not isinstance(value, fx.Node) or number_in(value, mutated) is not None:
        value, fill, negated = fill, value, True
    number = number_in(fill, mutated)
    if not isinstance(mask, fx.Node) or not isinstance(value, fx.Node) or number is None or number > _HIDES:
        return None
    fakes = [tensor_value(x) for x in (node, value)]
    if any(fake is None for fake in fakes) or fakes[0].dtype != fakes[1].dtype:  # type: ignore[union-attr]
        return None
    return mask, value, number, negated


def vectors_of(
    biases: Biases, level: Level, before: fx.Node, known: dict[fx.Node, fx.Node]
) -> tuple[fx.Node | None, fx.Node | None]:
    """``[b, h, K]`` and ``[b, h, Q + K - 1]``: nodes of a level's graph.

    Args:
        before: where their sums are put.
        known: what was made before; is added to.

    Raises:
        Refusal: if a bias depends on more than distances.
    """
    for node in biases.of_keys:
        if node not in known:
            with node.graph.inserting_before(_first_after(node)):
                known[node] = flat_heads(node)
    for distances in biases.of_distances:
        if distances.bias not in known:
            known[distances.bias] = distances.vector()
    return (
        _total([level.imported(known[node]) for node in biases.of_keys], before),
        _total([level.imported(known[each.bias]) for each in biases.of_distances], before),
    )


def _first_after(node: fx.Node) -> fx.Node:
    """Where a reader of a node may be put: behind it, and behind all placeholders."""
    while node.next.op == "placeholder":
        node = node.next
    return node.next


def _total(parts: list[fx.Node], before: fx.Node) -> fx.Node | None:
    total = None
    with before.graph.inserting_before(before):
        for part in parts:
            total = part if total is None else add_call(before.graph, torch.add, total, part)
    return total
