"""Finds attention in a graph and in its checkpointed layers: fused, or written out.

    scaled_dot_product_attention(q, k, v, attn_mask=mask)
    matmul(softmax(matmul(q, k.transpose(2, 3)) * scale [capped] + mask), v)        # with sinks, as masks.sinks knows them, or without

A :class:`Site` is one attention, in a graph or in the :class:`~mst_fx.graph.levels.Level` of a checkpointed layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.levels import Level, all_levels, placeholders_of
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
from mst_fx.graph.values import tensor_value, value
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.masks import sinks
from mst_fx.masks.constants import fill_of, number_of
from mst_fx.torch_api.attention import is_fused


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


def find_sites(level: Level) -> Iterator[Site]:
    calls: dict[str, list[fx.Node]] = {}
    nodes = outside_transforms(level.gm.graph)
    for node in nodes:
        if called_graph(level.gm, node) is not None:
            calls.setdefault(str(node.args[0].target), []).append(node)  # type: ignore[union-attr]
    for name, callers in calls.items():
        layer_graph = attribute(level.gm, name)
        is_plain = len(callers) == 1 and len(placeholders_of(layer_graph)) == len(callers[0].args) - 1
        if is_plain and target_name(callers[0]) in CHECKPOINTS:
            yield from find_sites(Level(layer_graph, callers[0], level))
    for node in nodes:
        site = _fused(level, node) if operation(node) in ATTENTION else _eager(level, node)
        if site is not None:
            yield site


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


_PRODUCTS = MATMULS | {"baddbmm", "einsum"}


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
    inner: list[fx.Node] = dataclasses.field(default_factory=list)
    beside: set[fx.Node] = dataclasses.field(default_factory=set)
    sinks: fx.Node | None = None
    scores: fx.Node | None = None

    def step(self, node: Any) -> fx.Node | None:
        """The node itself, if nobody but the chain reads it."""
        if not isinstance(node, fx.Node) or len(node.users.keys() - self.beside) != 1:
            return None
        self.inner.append(node)
        return node

    def take_beside(self, nodes: Sequence[fx.Node], end: fx.Node) -> bool:
        """Takes nodes in that lead from a node of the chain back to another one; False: somebody else reads one of them."""
        readers = [end, *nodes]
        if any(_readers(node) != {reader} for node, reader in zip(nodes, readers, strict=False)):
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

    def mask(self, masked: Any) -> tuple[fx.Node | None, Any] | None:
        """The scores before a mask was added, and the mask, if there is one; None: two are added."""
        mask = None
        current = self.step(masked)
        while current is not None and operation(current) == "add" and not current.kwargs:
            left, right = current.args[:2]
            scores_first = isinstance(left, fx.Node) and len(left.users) == 1
            added, scores = (right, left) if scores_first else (left, right)
            if not _is_nothing(self.level, current, added, scores):
                if mask is not None:
                    return None
                mask = added
            current = self.step(scores)
        return current, mask

    def softcap(self, current: fx.Node | None) -> tuple[fx.Node | None, float, fx.Node | None] | None:
        """The scores before they were capped, and what :func:`_softcap` says; None: somebody reads what is in between."""
        softcap, cap = _softcap(current)
        if current is None or not softcap:
            return current, 0.0, None
        tanh = self.step(current.args[0])
        capped = self.step(tanh.args[0]) if tanh is not None else None
        return None if capped is None else (self.step(capped.args[0]), softcap, cap)

    def scale(self, current: fx.Node | None) -> tuple[fx.Node | None, float, fx.Node | None]:
        """The product of queries and keys, its scale, and the product with a number that the query takes over."""
        scaling = current if current is not None and _is_scaling(current) else None
        scale = 1.0 if scaling is not None else _factor(current)
        # A causal kernel's NaN: torch 2.13 scales minus infinity, on a CPU.
        if scale is not None and scale <= 0.0:
            scaling, scale = current, 1.0
        if scale is None or current is None:
            return current, 1.0, scaling
        return self.step(current.args[0]), scale, scaling


def _readers(node: fx.Node) -> set[fx.Node]:
    """The readers of a node but for results of it that nobody reads: in the graph of a checkpointed layer Dynamo leaves those."""
    return {user for user in node.users if user.users or operation(user) != "getitem"}


def _eager(level: Level, node: fx.Node) -> Site | None:
    """``matmul(softmax(matmul(q, k.transpose(2, 3)) * scale [capped] + mask), v)``, in 4 dimensions."""
    if operation(node) not in MATMULS | {"mul"} or len(node.args) < 2:
        return None
    chain = _Chain(level)
    weighted = chain.scaled(node)
    masked = chain.softmax(weighted.args[0]) if weighted is not None and len(weighted.args) > 1 else None
    unmasked = chain.mask(masked) if masked is not None else None
    uncapped = chain.softcap(unmasked[0]) if unmasked is not None else None
    if unmasked is None or uncapped is None:
        return None
    mask, (current, softcap, cap) = unmasked[1], uncapped
    product, scale, scaling = chain.scale(current)
    factors = _query_and_key(product)
    if factors is None or not _have_heads(*product.args[:2], weighted.args[1]):  # type: ignore[union-attr]
        return None
    if mask is not None and not isinstance(mask, fx.Node):
        return None
    if chain.sinks is not None:
        factors = tuple(sinks.before_widening(x, weighted.args[1]) for x in factors)  # type: ignore[assignment,union-attr]
    return Site(
        level,
        node,
        *factors,
        weighted.args[1],  # type: ignore[arg-type,union-attr]
        mask,
        scale,
        softcap,
        inner=tuple(chain.inner),
        is_eager=True,
        scaling=scaling,
        cap=cap,
        sinks=chain.sinks,
    )


def _query_and_key(scores: fx.Node | None) -> tuple[Any, Any] | None:
    """``q`` and ``k`` of ``matmul(q, k.transpose(2, 3))``."""
    if scores is None or operation(scores) not in MATMULS:
        return None
    query, transposed = scores.args[:2]
    if not isinstance(transposed, fx.Node) or operation(transposed) != "transpose":
        return None
    if writes_in_place(transposed):  # and so would the key be transposed that is read in its place
        return None
    dims = {x % 4 for x in transposed.args[1:3] if isinstance(x, int)}
    return (query, transposed.args[0]) if dims == {2, 3} else None


def _have_heads(*operands: Any) -> bool:
    """Whether all are tensors ``[B, H, S, D]``."""
    fakes = [tensor_value(x) for x in operands if isinstance(x, fx.Node)]
    return len(fakes) == len(operands) and all(fake is not None and fake.ndim == 4 for fake in fakes)


def _softcap(product: fx.Node | None) -> tuple[float, fx.Node | None]:
    """The softcap of ``tanh(scores / softcap) * softcap``, and the number that changes by which it is multiplied; 0, None: none."""
    tanh = product.args[0] if product is not None and product.args else None
    inner = tanh.args[0] if _is_tanh(tanh) and tanh.args else None  # type: ignore[union-attr]
    if product is None or not isinstance(inner, fx.Node):
        return 0.0, None
    changing = [_is_scaling(node) for node in (product, inner)]
    if any(changing):  # no value of it may be written down, nor two be compared
        is_cap = all(changing) and product.args[1] is inner.args[1]
        is_cap = is_cap and (operation(product), operation(inner)) == ("mul", "div")
        return (1.0, product.args[1]) if is_cap else (0.0, None)  # type: ignore[return-value]
    factor, divisor = _factor(product), _factor(inner)
    is_softcap = factor is not None and divisor is not None and abs(divisor * factor - 1.0) <= 1e-6
    return (factor or 0.0, None) if is_softcap else (0.0, None)


def _is_scaling(node: fx.Node) -> bool:
    """Whether a node is ``x * c`` or ``x / c`` with a number that changes: no value of it may be written down."""
    number = value(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], fx.Node) else None
    is_scaled = operation(node) in ("mul", "div") and not node.kwargs
    return is_scaled and isinstance(number, torch.SymFloat) and not expression(number).is_number


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


def _is_nothing(level: Level, total: fx.Node, added: Any, scores: Any) -> bool:
    """Whether zeros are added, as T5 does to the scores of cross-attention."""
    if not isinstance(added, fx.Node) or not isinstance(scores, fx.Node):
        return False
    fake, source = tensor_value(total), tensor_value(scores)
    if fake is None or source is None or fake.dtype != source.dtype:
        return False
    zeros = level.resolve(added)
    written = {storage for each in all_levels(level.top) for storage in mutated_storages(each.gm.graph)}
    same = [expression(size) for size in fake.shape] == [expression(size) for size in source.shape]
    return same and fill_of(zeros, written) == 0


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, or stacks of them."""
    return operation(node) in _PRODUCTS


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is a parameter, or made of one alone: transposed, cast."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return isinstance(value(node), torch.nn.Parameter)


def is_of_scores(node: fx.Node) -> bool:
    """Whether a softmax, or a product itself, is that of a product of two activations, ``[.., Q, D]`` and ``[.., D, K]``, and not of
    logits, whose one factor is a matrix, or of experts', whose one factor is a stack of them."""
    fake = tensor_value(node)
    assert fake is not None
    count, stack, seen = expression(fake.numel()), [node], set()
    while stack:
        current = stack.pop()
        found = tensor_value(current)
        if current in seen or found is None or expression(found.numel()) != count:
            continue
        seen.add(current)
        if is_product(current):
            factors = current.all_input_nodes[-2:]
            fakes = [x for x in map(tensor_value, factors) if x is not None]
            return len(fakes) == 2 and all(x.ndim > 2 for x in fakes) and not any(map(_is_weight, factors))
        stack += current.all_input_nodes
    return False


def _factor(node: fx.Node | None) -> float | None:
    """``c`` of ``x * c`` and ``1 / c`` of ``x / c``."""
    if node is None or len(node.args) != 2 or node.kwargs:
        return None
    if operation(node) == "mul":
        return number_of(node.args[1])
    if operation(node) == "div":
        divisor = number_of(node.args[1])
        return None if not divisor else 1.0 / divisor
    return None


def _is_tanh(node: Any) -> bool:
    return isinstance(node, fx.Node) and operation(node) == "tanh"


def _is_last_dim(node: fx.Node) -> bool:
    return argument(node, "dim") in (-1, 3)


def is_ours(site: Site) -> bool:
    """Whether :mod:`mst_fx.ops.attention` runs the kernel that torch would run, and does better: on a GPU its
    backward pass takes a few heads at a time, and no random state is kept for dropout that is none."""
    query, value, out = map(tensor_value, (site.query, site.value, site.out))
    if query is None or value is None or out is None:
        return False
    return is_fused(query, value, out.dtype)


def is_grouped(site: Site) -> bool:
    """Whether a kernel can take fewer heads of keys and values than the call has."""
    return ungrouped(site) != (site.key, site.value)


def ungrouped(site: Site) -> tuple[fx.Node, fx.Node]:
    """Keys and values before ``repeat_kv``, where a kernel takes grouped heads; otherwise as they are."""
    key, values = _before_repeat(site.key), _before_repeat(site.value)
    query, wide, out = map(tensor_value, (site.query, values, site.out))
    if query is None or wide is None or out is None or not is_fused(query, wide, out.dtype):
        return site.key, site.value
    fakes = [tensor_value(key), tensor_value(values)]
    if fakes[0] is None or fakes[1] is None or fakes[0].shape[1] != fakes[1].shape[1]:
        return site.key, site.value
    return key, values


def _before_repeat(node: fx.Node) -> fx.Node:
    """``x`` of ``x[:, :, None].expand(…).reshape(…)``; the node itself, if it is no such thing."""
    expanded = _source(node, "reshape")
    indexed = _source(expanded, "expand")
    inner = _source(indexed, "getitem")
    full = slice(None, None, None)
    if indexed is None or inner is None or indexed.args[1] != (full, full, None, full, full):
        return node
    fake, out, wide = (tensor_value(n) for n in (inner, node, expanded))  # type: ignore[arg-type]
    if fake is None or out is None or wide is None:
        return node
    heads = fake.shape[1] * wide.shape[2] == out.shape[1] and fake.ndim == 4 == out.ndim
    rest = [fake.shape[i] for i in (0, 2, 3)] == [out.shape[i] for i in (0, 2, 3)]
    return inner if heads and rest else node


def _source(node: fx.Node | None, name: str) -> fx.Node | None:
    """The first operand of an operation."""
    source = node.args[0] if node is not None and operation(node) == name else None
    return source if isinstance(source, fx.Node) else None
