"""Finds attention in a graph and in its checkpointed layers: fused, or written out.

    scaled_dot_product_attention(q, k, v, attn_mask=mask)
    matmul(softmax(matmul(q, k.transpose(2, 3)) * scale [capped] + mask), v)        # with sinks, as masks.sinks knows them, or without

A :class:`Site` is one attention, in a graph or in the :class:`~mst_fx.graph.levels.Level` of a checkpointed layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.levels import Level, placeholders_of
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.names import target_name
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import (
    ATTENTION,
    CHECKPOINTS,
    FLOAT_CASTS,
    MATMULS,
    SOFTMAXES,
    argument,
    is_identity_dropout,
    operation,
)
from mst_fx.graph.subgraphs import attribute, called_graph
from mst_fx.graph.values import tensor_value
from mst_fx.masks import sinks
from mst_fx.masks.biases import NOT_HIDDEN, Hidden, choice
from mst_fx.masks.constants import fill_of, number_of
from mst_fx.masks.scales import cast_for, factor, have_same_type, is_scaling, is_wide_cast, softcap_of
from mst_fx.masks.scores import is_of_scores, transposed
from mst_fx.masks.steps import Steps, is_written_between, readers, stepped


@dataclasses.dataclass
class Site:
    """One attention: ``softmax(scale * query @ keyᵀ + mask) @ value``.

    Attributes:
        out: the node whose value it is.
        inner: other nodes that go, if nobody else reads them.
        mask: None, Boolean, or to be added.
        causal: the node is causal already.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0: not.
        cap: a number that changes from step to step, by which the softcap is multiplied.
        scaling: a product of the scores with a number that changes from step to step, or is negative, which the
            query takes over.
        sinks: a score more for each query, as :mod:`mst_fx.masks.sinks` finds it in the graph.
        others: what else is added to the scores than ``mask``.
        hidden: what is done to the scores then.
        behind: a number by which the scores are multiplied with the mask in them; ``scale`` has it.
        steps: what is done to the scores, if it is no formula: all other attributes say nothing of it then.
        dtype: that in which all is computed, where queries and keys were cast to a wider one than the values (GPT-J), or the
            other way round; None: that of the output.
    """

    level: Level
    out: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    softcap: float = 0.0
    causal: bool = False
    inner: tuple[fx.Node, ...] = ()
    is_eager: bool = False
    dropout: float = 0.0
    scaling: fx.Node | None = None
    cap: fx.Node | None = None
    sinks: fx.Node | None = None
    others: tuple[fx.Node, ...] = ()
    hidden: Hidden = NOT_HIDDEN
    behind: float = 1.0
    steps: Steps | None = None
    dtype: torch.dtype | None = None

    def replace_operand(self, old: fx.Node, new: fx.Node) -> None:
        """Another node has the value of one that is no more."""
        for name in ("query", "key", "value"):
            if getattr(self, name) is old:
                setattr(self, name, new)
        if self.steps is not None:
            self.steps = self.steps.replaced(old, new)


def mask_of(site: Site) -> fx.Node | None:
    return site.level.resolve(site.mask) if site.mask is not None else None


def mask_bytes(site: Site) -> int:
    mask = tensor_value(site.mask) if site.mask is not None else None
    return hint(mask.numel()) * mask.element_size() if mask is not None else 0


def find_sites(level: Level, mutated: Collection[int]) -> Iterator[Site]:
    """The attentions of a graph and of its checkpointed layers.

    Args:
        mutated: the storages that some node of the program writes to.
    """
    calls: dict[str, list[fx.Node]] = {}
    nodes = outside_transforms(level.gm.graph)
    for node in nodes:
        if called_graph(level.gm, node) is not None:
            calls.setdefault(str(node.args[0].target), []).append(node)  # type: ignore[union-attr]
    for name, callers in calls.items():
        layer_graph = attribute(level.gm, name)
        is_plain = len(callers) == 1 and len(placeholders_of(layer_graph)) == len(callers[0].args) - 1
        if is_plain and target_name(callers[0]) in CHECKPOINTS:
            yield from find_sites(Level(layer_graph, callers[0], level), mutated)
    for node in nodes:
        is_fused = operation(node) in ATTENTION
        site = (
            _fused(level, node)
            if is_fused
            else _eager(level, node, mutated) or by_steps(level, node, mutated)
        )
        if site is not None:
            yield site


def by_steps(level: Level, out: fx.Node, mutated: Collection[int]) -> Site | None:
    """Written-out attention, whatever is done to its scores; None: something in it is not known."""
    found = stepped(out, mutated)
    if found is None:
        return None
    operands = (found.query, found.key, found.value)
    return Site(level, out, *operands, None, 1.0, inner=found.inner, is_eager=True, steps=found.steps)


def _fused(level: Level, node: fx.Node) -> Site | None:
    query, key, values = (argument(node, name) for name in ("query", "key", "value"))
    is_causal, scale = argument(node, "is_causal", False), argument(node, "scale")
    if not all(isinstance(x, fx.Node) for x in (query, key, values)) or isinstance(is_causal, fx.Node):
        return None
    fake, dropout = tensor_value(query), number_of(argument(node, "dropout_p", 0.0))
    assert fake is not None
    scale = hint(fake.shape[-1]) ** -0.5 if scale is None else number_of(scale)
    if scale is None:
        return None
    mask = argument(node, "attn_mask")
    return Site(
        level,
        node,
        query,
        key,
        values,
        mask,
        scale,
        causal=bool(is_causal),
        dropout=1.0 if dropout is None else dropout,
    )


@dataclasses.dataclass
class _Chain:
    """The nodes of a written-out attention from its end to its scores, peeled off one by one.

    Attributes:
        inner: what was peeled off. Nobody but the chain reads it.
        beside: those of it that stand beside the chain, and read a node of it a second time.
        sinks: what takes a part of the softmax besides.
        scores: what the softmax has to be of, where sinks were found behind it.
    """

    level: Level
    mutated: Collection[int]
    inner: list[fx.Node] = dataclasses.field(default_factory=list)
    beside: set[fx.Node] = dataclasses.field(default_factory=set)
    sinks: fx.Node | None = None
    scores: fx.Node | None = None

    def step(self, node: Any) -> fx.Node | None:
        """The node itself, if nobody but the chain reads it."""
        if not isinstance(node, fx.Node) or len(node.users.keys() - self.beside) > 1:
            return None
        self.inner.append(node)
        return node

    def take_beside(self, nodes: Sequence[fx.Node], end: fx.Node) -> bool:
        """Takes nodes in that lead from a node of the chain back to another one; False: somebody else reads one of them."""
        found = [end, *nodes]
        if any(readers(node) != {reader} for node, reader in zip(nodes, found, strict=False)):
            return False
        self.inner += nodes
        self.beside.update(nodes)
        return True

    def scaled(self, node: fx.Node) -> fx.Node | None:
        """The product of weights and values behind an output, which sinks may have scaled."""
        if operation(node) in MATMULS:
            return node
        found = sinks.scaling(node)
        if found is None or not self.take_beside(found.inner, node):
            return None
        self.sinks, self.scores = found.sinks, found.scores
        product = self.step(found.output)
        return product if product is not None and operation(product) in MATMULS else None

    def softmax(self, weights: Any) -> fx.Node | None:
        """What the softmax behind the weights is taken of that the values are multiplied with, through casts; without sinks."""
        current, column = self.step(weights), None
        while current is not None and operation(current) not in SOFTMAXES:
            dropped = sinks.dropped_column(current)
            if dropped is not None and column is None:
                column = dropped
            elif operation(current) not in FLOAT_CASTS and not is_identity_dropout(current):
                return None
            elif operation(current) == "type_as":  # may read the scores a second time, for their type
                self.beside.add(current)
            current = self.step(current.args[0])
        if current is None or not _is_last_dim(current):
            return None
        source = self._shifted(current.args[0])
        if self.scores not in (None, source):
            return None
        return source if column is None else self._without_sinks(source, column)

    def _shifted(self, source: Any) -> Any:
        """What the maximum of a row is subtracted from, or it is not."""
        found = sinks.less_its_maximum(source) if isinstance(source, fx.Node) else None
        if found is None or self.step(source) is None or not self.take_beside(found[1], source):
            return source
        return found[0]

    def _without_sinks(self, source: Any, column: str) -> fx.Node | None:
        """The scores of ``cat([scores, sinks], -1)``, of which one column is left out later."""
        current = self.step(source)
        while current is not None and operation(current) in FLOAT_CASTS:
            current = self.step(current.args[0])
        found = sinks.joined(current, column) if current is not None and self.sinks is None else None
        if found is None:
            return None
        self.sinks = found[1]
        return found[0]

    def mask(self, masked: Any) -> tuple[fx.Node | None, list[fx.Node], Hidden] | None:
        """The scores before masks and biases were added, what was added, and how they are hidden; None: a number was added."""
        added: list[fx.Node] = []
        while (
            isinstance(masked, fx.Node)
            and is_wide_cast(masked)
            and len(masked.users.keys() - self.beside) <= 1
        ):
            self.inner.append(masked)
            masked = masked.args[0]
        current, hidden = self._hidden(masked)
        while current is not None and operation(current) == "add" and not current.kwargs:
            left, right = current.args[:2]
            are_scores = [isinstance(x, fx.Node) and is_of_scores(x) for x in (left, right)]
            scores_first = isinstance(left, fx.Node) and len(left.users) == 1
            scores_first = are_scores[0] if are_scores[0] != are_scores[1] else scores_first
            other, scores = (right, left) if scores_first else (left, right)
            if not _is_nothing(self.level, current, other, scores, self.mutated):
                if not isinstance(other, fx.Node):
                    return None
                added.append(other)
            current = self.step(scores)
        return current, added[::-1], hidden

    def _hidden(self, masked: Any) -> tuple[fx.Node | None, Hidden]:
        """What is before ``masked_fill``, ``where`` with a number, or ``max`` with one, and that."""
        current, at_least = self.step(masked), None
        if current is not None and operation(current) in ("max", "maximum") and len(current.args) == 2:
            at_least = fill_of(current.args[1]) if isinstance(current.args[1], fx.Node) else None
            if at_least is None or current.kwargs or not have_same_type(current, current.args[0]):
                return None, NOT_HIDDEN
            return self.step(current.args[0]), Hidden(at_least=float(at_least))
        found = choice(current, self.mutated) if current is not None else None
        if found is None:
            return current, NOT_HIDDEN
        mask, scores, fill, negated = found
        return self.step(scores), Hidden(mask, fill, negated)

    def behind(self, masked: Any) -> tuple[Any, float]:
        """What is masked scores, before they are multiplied with a number, and that."""
        number = factor(masked) if isinstance(masked, fx.Node) else None
        if (
            number is None
            or number <= 0.0
            or operation(masked.args[0]) not in ("add", "masked_fill", "where")
        ):
            return masked, 1.0
        return (masked.args[0], number) if self.step(masked) is not None else (None, 1.0)

    def softcap(self, current: fx.Node | None) -> tuple[fx.Node | None, float, fx.Node | None] | None:
        """The scores before they were capped, and what :func:`softcap` says; None: somebody reads what is in between."""
        softcap, cap = softcap_of(current)
        if current is None or not softcap:
            return current, 0.0, None
        tanh = self.step(current.args[0])
        capped = self.step(tanh.args[0]) if tanh is not None else None
        return None if capped is None else (self.step(capped.args[0]), softcap, cap)

    def scale(self, current: fx.Node | None) -> tuple[fx.Node | None, float, fx.Node | None]:
        """The product of queries and keys, its scale, and the product with a number that the query takes over."""
        scaling = current if current is not None and is_scaling(current) else None
        scale = 1.0 if scaling is not None else factor(current)
        # A causal kernel's NaN: torch 2.13 scales minus infinity, on a CPU.
        if scale is not None and scale <= 0.0:
            scaling, scale = current, 1.0
        if scale is None or current is None:
            return current, 1.0, scaling
        return self.step(current.args[0]), scale, scaling


def _eager(level: Level, node: fx.Node, mutated: Collection[int]) -> Site | None:
    """``matmul(softmax(matmul(q, k.transpose(2, 3)) * scale [capped] + mask), v)``, in 4 dimensions."""
    if operation(node) not in MATMULS | {"mul"} or len(node.args) < 2:
        return None
    chain = _Chain(level, mutated)
    weighted = chain.scaled(node)
    masked = chain.softmax(weighted.args[0]) if weighted is not None and len(weighted.args) > 1 else None
    masked, behind = chain.behind(masked)
    unmasked = chain.mask(masked) if masked is not None else None
    uncapped = chain.softcap(unmasked[0]) if unmasked is not None else None
    if unmasked is None or uncapped is None:
        return None
    (_, added, hidden), (current, softcap, cap) = unmasked, uncapped
    product, scale, scaling = chain.scale(current)
    factors = _query_and_key(product)
    if factors is None or not _have_heads(*product.args[:2], weighted.args[1]):  # type: ignore[union-attr]
        return None
    if chain.sinks is not None:
        factors = tuple(sinks.before_widening(x, weighted.args[1]) for x in factors)  # type: ignore[assignment,union-attr]
    if (behind != 1.0 and (softcap or scaling is not None)) or _loses_gradient(chain, node, *factors):
        return None
    if is_written_between(chain.inner, node, (*factors, weighted.args[1])):  # type: ignore[union-attr,arg-type]
        return None
    return Site(
        level,
        node,
        *factors,
        weighted.args[1],  # type: ignore[arg-type,union-attr]
        added[0] if added else None,
        scale * behind,
        softcap,
        inner=tuple(chain.inner),
        is_eager=True,
        scaling=scaling,
        cap=cap,
        sinks=chain.sinks,
        others=tuple(added[1:]),
        hidden=hidden,
        behind=behind,
        dtype=cast_for(product, *factors, weighted.args[1], node),  # type: ignore[arg-type,union-attr]
    )


def _loses_gradient(chain: _Chain, out: fx.Node, *factors: fx.Node) -> bool:
    """Whether query or key have a gradient, and so has the output, but not what is in between: it is made under ``no_grad``."""
    wants = [fake.requires_grad for fake in map(tensor_value, factors) if fake is not None]
    fakes = [tensor_value(node) for node in (*chain.inner, out) if node not in chain.beside]
    made = [x.requires_grad for x in fakes if x is not None]
    return any(wants) and made[-1] and not all(made)


def _query_and_key(scores: fx.Node | None) -> tuple[Any, Any] | None:
    """``q`` and ``k`` of ``matmul(q, k.transpose(2, 3))``."""
    if scores is None or operation(scores) not in MATMULS:
        return None
    query, key = scores.args[0], transposed(scores.args[1])
    return None if key is None else (query, key)


def _have_heads(*operands: Any) -> bool:
    """Whether all are tensors ``[B, H, S, D]``."""
    fakes = [tensor_value(x) for x in operands if isinstance(x, fx.Node)]
    return len(fakes) == len(operands) and all(fake is not None and fake.ndim == 4 for fake in fakes)


def have_same_heads(site: Site) -> bool:
    """Whether each has its own: what torch would repeat (one head of scores for all of the values, say), our kernels do not."""
    fakes = map(tensor_value, (site.query, site.key, site.value, site.out))
    shapes = [[expression(size) for size in fake.shape] for fake in fakes if fake is not None]
    if any(len(shape) != 4 for shape in shapes):
        return False
    query, key, value, out = shapes
    return query[:3] == out[:3] and query[0] == key[0] == value[0] and key[1] == value[1]


def scaled_query(site: Site, query: fx.Node) -> fx.Node:
    """The query of a site, times the number that scaled its scores; at the graph's insertion point."""
    if site.scaling is None:
        return query
    target = torch.mul if operation(site.scaling) == "mul" else torch.div
    return add_call(site.level.gm.graph, target, query, site.scaling.args[1])


def sinks_of_heads(site: Site) -> fx.Node | None:
    """Of the sinks of a site what has one element a head; None: they may differ between queries."""
    query = tensor_value(site.query)
    return None if site.sinks is None or query is None else sinks.per_head(site.sinks, query.shape[1])


def _is_nothing(level: Level, total: fx.Node, added: Any, scores: Any, mutated: Collection[int]) -> bool:
    """Whether zeros are added, as T5 does to the scores of cross-attention."""
    if not isinstance(added, fx.Node) or not isinstance(scores, fx.Node):
        return False
    fake, source = tensor_value(total), tensor_value(scores)
    if fake is None or source is None or fake.dtype != source.dtype:
        return False
    same = [expression(size) for size in fake.shape] == [expression(size) for size in source.shape]
    return same and fill_of(level.resolve(added), mutated) == 0


def _is_last_dim(node: fx.Node) -> bool:
    return argument(node, "dim") in (-1, 3)
