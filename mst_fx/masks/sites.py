"""Finds attention in a graph and in its checkpointed layers: fused, or written out.

    scaled_dot_product_attention(q, k, v, attn_mask=mask)
    matmul(softmax(matmul(q, k.transpose(2, 3)) * scale [capped] + mask), v)

A :class:`Level` is a graph with the call that runs it; a :class:`Site` one attention in it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.graph.edit import add_call
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import is_identity_dropout
from mst_fx.graph.subgraphs import attribute, called_graph
from mst_fx.graph.values import VALUE, tensor_value, tensors_of, value
from mst_fx.graph.writes import mutated_storages
from mst_fx.masks.formula import fill_of

aten = torch.ops.aten

_SDPA = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)


@dataclasses.dataclass(frozen=True)
class Level:
    """A graph, and the call in the graph above that runs it (None for the program's graph)."""

    gm: fx.GraphModule
    call: fx.Node | None = None
    above: Level | None = None

    @property
    def top(self) -> Level:
        return self if self.above is None else self.above.top

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node a placeholder stands for, as far up as there is one."""
        if (
            self.call is None
            or self.above is None
            or node.op != "placeholder"
            or node.graph is not self.gm.graph
        ):
            return node
        operand = self.call.args[1 + placeholders_of(self.gm).index(node)]
        return self.above.resolve(operand) if isinstance(operand, fx.Node) else node

    def imported(self, node: fx.Node) -> fx.Node:
        """The node in this graph that has the value of a node of a graph above."""
        if node.graph is self.gm.graph:
            return node
        assert self.call is not None and self.above is not None
        operand = self.above.imported(node)
        placeholders = placeholders_of(self.gm)
        for known, argument in zip(placeholders, self.call.args[1:], strict=True):
            if argument is operand:
                return known
        with self.gm.graph.inserting_after(placeholders[-1]):
            new = self.gm.graph.placeholder(f"{operand.name}_mst")
        new.meta[VALUE] = self._fake_inside(operand)
        self.call.args = (*self.call.args, operand)
        return new

    def _fake_inside(self, operand: fx.Node) -> Any:
        """A fake like an operand's in this graph's own mode, with its own symbols for dynamic sizes."""
        placeholders, found = placeholders_of(self.gm), tensor_value(operand)
        mode = fake_mode_of(tensors_of(placeholders[0]))
        if mode is None or found is None:
            return value(operand)
        assert self.call is not None
        sizes: dict[Any, Any] = {}
        for placeholder, argument in zip(placeholders, self.call.args[1:], strict=False):
            outer = tensor_value(argument) if isinstance(argument, fx.Node) else None
            inner = tensor_value(placeholder)
            if outer is not None and inner is not None:
                sizes |= {expression(a): b for a, b in zip(outer.shape, inner.shape, strict=True)}
        unknown = [s for s in found.shape if isinstance(s, torch.SymInt) and expression(s) not in sizes]
        if unknown:
            raise Refusal(
                f"{operand.name} has the dynamic size {unknown[0]}, unknown in a checkpointed layer"
            )
        shape = [sizes[expression(s)] if isinstance(s, torch.SymInt) else s for s in found.shape]
        with mode:
            return torch.empty(shape, dtype=found.dtype, device=found.device)

    def at_top(self, node: fx.Node) -> fx.Node:
        """The node of the program's graph that runs a node of this one."""
        return node if self.call is None or self.above is None else self.above.at_top(self.call)


def placeholders_of(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


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


def find_sites(level: Level) -> Iterator[Site | Any]:
    calls: dict[str, list[fx.Node]] = {}
    nodes = outside_transforms(level.gm.graph)
    for node in nodes:
        if called_graph(level.gm, node) is not None:
            calls.setdefault(str(node.args[0].target), []).append(node)  # type: ignore[union-attr]
    for name, callers in calls.items():
        body = attribute(level.gm, name)
        is_plain = len(callers) == 1 and len(placeholders_of(body)) == len(callers[0].args) - 1
        if is_plain and "checkpoint" in str(callers[0].target):
            yield from find_sites(Level(body, callers[0], level))
    for node in nodes:
        site = _fused(level, node) if node.target in _SDPA else _eager(level, node)
        if site is not None:
            yield site


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _fused(level: Level, node: fx.Node) -> Site | None:
    given: dict[str, Any] = {**dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, values = given["query"], given["key"], given["value"]
    if not all(isinstance(x, fx.Node) for x in (query, key, values)) or isinstance(
        given.get("is_causal"), fx.Node
    ):
        return None
    fake = tensor_value(query)
    assert fake is not None
    scale, dropout = given.get("scale"), number_of(given.get("dropout_p", 0.0))
    scale = hint(fake.shape[-1]) ** -0.5 if scale is None else number_of(scale)
    if scale is None:
        return None
    return Site(
        level,
        node,
        query,
        key,
        values,
        given.get("attn_mask"),
        scale,
        causal=bool(given.get("is_causal")),
        dropout=1.0 if dropout is None else dropout,
    )


_MATMULS = (torch.matmul, operator.matmul, "matmul", torch.bmm, aten.matmul.default)
SOFTMAXES = (F.softmax, torch.softmax, "softmax", aten.softmax.int)
_PRODUCTS = (*_MATMULS, "bmm", "baddbmm", torch.baddbmm, torch.einsum, aten.bmm.default, aten.baddbmm.default)
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16")


def _eager(level: Level, node: fx.Node) -> Site | None:
    """``matmul(softmax(matmul(q, k.transpose(2, 3)) * scale [capped] + mask), v)``, in 4 dimensions."""
    if node.target not in _MATMULS or len(node.args) < 2:
        return None
    inner: list[fx.Node] = []

    def step(current: Any) -> fx.Node | None:
        """The node itself, if nobody but the chain reads it."""
        if not isinstance(current, fx.Node) or len(current.users) != 1:
            return None
        inner.append(current)
        return current

    current = step(node.args[0])
    while current is not None and (current.target in _CASTS or is_identity_dropout(current)):
        current = step(current.args[0])
    if current is None or current.target not in SOFTMAXES or not _is_last_dim(current):
        return None
    mask = None
    current = step(current.args[0])
    while current is not None and current.target in _ADDS and not current.kwargs:
        left, right = current.args[:2]
        scores_first = isinstance(left, fx.Node) and len(left.users) == 1
        added, scores = (right, left) if scores_first else (left, right)
        if not _is_nothing(level, current, added, scores):
            if mask is not None:
                return None
            mask = added
        current = step(scores)
    softcap, cap = 0.0, None
    if current is not None and current.args and _is_tanh(current.args[0]):
        softcap, cap = _softcap(current)
    if current is not None and softcap:
        tanh = step(current.args[0])
        capped = step(tanh.args[0]) if tanh is not None else None
        if capped is None:
            return None
        current = step(capped.args[0])
    scaling = current if current is not None and _is_scaling(current) else None
    scale = 1.0 if scaling is not None else _factor(current)
    # A causal kernel's NaN: torch 2.13 scales minus infinity, on a CPU.
    if scale is not None and scale <= 0.0:
        scaling, scale = current, 1.0
    if scale is not None and current is not None:
        current = step(current.args[0])
    if current is None or current.target not in _MATMULS:
        return None
    query, transposed = current.args[:2]
    if not isinstance(transposed, fx.Node) or transposed.target not in ("transpose", torch.transpose):
        return None
    fakes = [tensor_value(x) for x in (query, transposed, node.args[1]) if isinstance(x, fx.Node)]
    if {x % 4 for x in transposed.args[1:3] if isinstance(x, int)} != {2, 3}:
        return None
    if len(fakes) != 3 or any(fake is None or fake.ndim != 4 for fake in fakes):
        return None
    if mask is not None and not isinstance(mask, fx.Node):
        return None
    return Site(
        level,
        node,
        query,  # type: ignore[arg-type]
        transposed.args[0],  # type: ignore[arg-type]
        node.args[1],  # type: ignore[arg-type]
        mask,
        1.0 if scale is None else scale,
        softcap,
        inner=tuple(inner),
        is_eager=True,
        scaling=scaling,
        cap=cap,
    )


def _softcap(product: fx.Node) -> tuple[float, fx.Node | None]:
    """The softcap of ``tanh(scores / softcap) * softcap``, and the number that changes by which it is multiplied; 0, None: none."""
    tanh = product.args[0]
    inner = tanh.args[0] if isinstance(tanh, fx.Node) and tanh.args else None
    if not isinstance(inner, fx.Node):
        return 0.0, None
    changing = [_is_scaling(node) for node in (product, inner)]
    if any(changing):  # no value of it may be written down, nor two be compared
        is_cap = all(changing) and product.args[1] is inner.args[1]
        is_cap = is_cap and product.target in _SCALES and inner.target in _QUOTIENTS
        return (1.0, product.args[1]) if is_cap else (0.0, None)  # type: ignore[return-value]
    factor, divisor = _factor(product), _factor(inner)
    is_softcap = factor is not None and divisor is not None and abs(divisor * factor - 1.0) <= 1e-6
    return (factor or 0.0, None) if is_softcap else (0.0, None)


def _is_scaling(node: fx.Node) -> bool:
    """Whether a node is ``x * c`` or ``x / c`` with a number that changes: no value of it may be written down."""
    number = value(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], fx.Node) else None
    is_scaled = node.target in (*_SCALES, *_QUOTIENTS)
    return is_scaled and isinstance(number, torch.SymFloat) and not number.node.expr.is_number


def scaled_query(site: Site, query: fx.Node) -> fx.Node:
    """The query of a site, times the number that scaled its scores; at the graph's insertion point."""
    if site.scaling is None:
        return query
    target = torch.mul if site.scaling.target in _SCALES else torch.div
    return add_call(site.level.gm.graph, target, query, site.scaling.args[1])


_SCALES = (torch.mul, operator.mul, "mul", operator.imul)
_QUOTIENTS = (torch.div, operator.truediv, "div", operator.itruediv)


_ADDS = (torch.add, operator.add, "add", operator.iadd)


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
    name = getattr(node.target, "__name__", str(node.target))
    return node.target in _PRODUCTS or name in ("bmm", "baddbmm", "einsum")


def is_of_scores(node: fx.Node) -> bool:
    """Whether a softmax, or a product itself, is that of a product of two activations, ``[.., Q, D]`` and ``[.., D, K]``, and not of
    logits, whose one factor is a matrix."""
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
            factors = [x for x in map(tensor_value, current.all_input_nodes[-2:]) if x is not None]
            return len(factors) == 2 and all(x.ndim > 2 for x in factors)
        stack += current.all_input_nodes
    return False


def _factor(node: fx.Node | None) -> float | None:
    """``c`` of ``x * c`` and ``1 / c`` of ``x / c``."""
    if node is None or len(node.args) != 2:
        return None
    if node.target in _SCALES:
        return number_of(node.args[1])
    if node.target in _QUOTIENTS:
        divisor = number_of(node.args[1])
        return None if not divisor else 1.0 / divisor
    return None


def number_of(found: Any) -> float | None:
    """A Python number; of Dynamo's dynamic floats the value at capture, guarded."""
    if isinstance(found, fx.Node):
        found = value(found)
    if isinstance(found, torch.SymFloat):
        return float(found.node.guard_float("", 0))
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return float(found) if is_number else None


def _is_tanh(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (torch.tanh, "tanh", aten.tanh.default)


def _is_last_dim(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim in (-1, 3)


def all_levels(level: Level) -> Iterator[Level]:
    yield level
    for node in level.gm.graph.nodes:
        child = called_graph(level.gm, node)
        if child is not None:
            yield from all_levels(Level(child, node, level))
