"""Attention without an S×S mask.

Before (Hugging Face under ``torch.compile``; eager attention likewise)::

    le = kv_indices <= q_indices; mask = le & same_document & padding        # [B, 1, S, S]
    k, v = repeat_kv(k), repeat_kv(v)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)

After, by what the mask says (:mod:`mst_fx.masks`)::

    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)   # causal; or no mask at all
    out = mst_fx.attention(q, k, v, key_vectors, query_vectors, reach, …)          # anything else

The second form is a loop over chunks of queries. Vectors that are constants are evaluated here; for others
(``attention_mask``, ``position_ids``, dynamic shapes) one op a step finds the keys in reach, and whether the
mask happens to be causal. The mask's construction has no reader any more, inside of checkpointed layers too.

Not supported, and refused: masks that are inputs of S² elements, masks with a gradient or that differ between
heads (relative position biases), dropout, and attention weights that somebody else reads.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from mst_fx import attention as _ops  # noqa: F401  (registers them)
from mst_fx.chunking import PassContext
from mst_fx.compiler import real_tensors
from mst_fx.errors import Refusal
from mst_fx.fold import (
    eliminate_dead_code,
    expression,
    is_identity_dropout,
    mutated_storages,
    writes_in_place,
)
from mst_fx.graph import (
    VALUE,
    add_call,
    attribute,
    call,
    fake_mode_of,
    hint,
    module_path,
    tensor_value,
    tensors_of,
    value,
)
from mst_fx.kernels import is_fused
from mst_fx.masks import (
    CAUSAL,
    FULL,
    TRUE,
    Mask,
    Reader,
    Vectors,
    describe,
    form_name,
    joined,
    names,
    native,
    op_name,
    reach,
    renamed,
)
from mst_fx.plan import plan_attention
from mst_fx.report import Rewrite

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
        operand = self.call.args[1 + _placeholders(self.gm).index(node)]
        return self.above.resolve(operand) if isinstance(operand, fx.Node) else node

    def imported(self, node: fx.Node) -> fx.Node:
        """The node in this graph that has the value of a node of a graph above."""
        if node.graph is self.gm.graph:
            return node
        assert self.call is not None and self.above is not None
        operand = self.above.imported(node)
        placeholders = _placeholders(self.gm)
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
        placeholders, found = _placeholders(self.gm), tensor_value(operand)
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


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
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


@dataclasses.dataclass
class Understood:
    """A site whose mask is a formula.

    Attributes:
        fill: what is added to a masked score; 0: masked scores do not count at all.
        known: what :func:`mst_fx.masks.reach` says, where all vectors are constants.
    """

    site: Site
    formula: Mask
    fill: float
    keys: list[fx.Node]
    queries: list[fx.Node]
    chunk: int
    known: Tensor | None
    form: str


def run(context: PassContext) -> None:
    """Rewrites every attention of a program, those of checkpointed layers included."""
    top = Level(context.gm)
    found: list[Understood] = []
    sites = list(_sites(top))
    mutated = {storage for level in _levels(top) for storage in mutated_storages(level.gm.graph)}
    for site in sites:
        name = module_path(site.out) or site.out.name
        try:
            understood = _understand(context, site, mutated)
        except Refusal as refusal:
            context.refuse("attention", name, str(refusal))
            continue
        if understood is not None:
            found.append(understood)
    _refuse_others(context, top, [site for site in sites if site.is_eager])
    reaches = _add_reaches(top, [u for u in found if u.known is None])
    counted: set[fx.Node] = set()
    for understood in found:
        _replace(context, understood, reaches, counted)
    for graph in {id(u.site.level.gm): u.site.level.gm for u in found}.values():
        _drop_unused_operands(top, graph)
    context.report.rewrites.reverse()  # the runner reverses: regions are found last first


def _refuse_others(context: PassContext, level: Level, eager: Sequence[Site]) -> None:
    """Notes softmaxes over Q×K scores that are part of no attention that was recognised."""
    claimed = {node for site in eager for node in site.inner}
    for each in _levels(level):
        for node in each.gm.graph.nodes:
            fake = tensor_value(node)
            if node.target not in _SOFTMAXES or node in claimed or fake is None or fake.ndim != 4:
                continue
            least = plan_attention(fake.device.type, context.options.attention_chunk_rows)
            if min(hint(fake.shape[2]), hint(fake.shape[3])) > least:
                name = module_path(node) or node.name
                context.refuse(
                    "attention", name, f"{node.name}: softmax of scores, but no attention known here"
                )


# Where attention is


def _sites(level: Level) -> Iterator[Site | Any]:
    calls: dict[str, list[fx.Node]] = {}
    for node in level.gm.graph.nodes:
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            body = node.args[0]
            if body.op == "get_attr" and isinstance(attribute(level.gm, str(body.target)), fx.GraphModule):
                calls.setdefault(str(body.target), []).append(node)
    for name, callers in calls.items():
        body = attribute(level.gm, name)
        is_plain = len(callers) == 1 and len(_placeholders(body)) == len(callers[0].args) - 1
        if is_plain and "checkpoint" in str(callers[0].target):
            yield from _sites(Level(body, callers[0], level))
    for node in level.gm.graph.nodes:
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
    scale, dropout = given.get("scale"), _number(given.get("dropout_p", 0.0))
    scale = hint(fake.shape[-1]) ** -0.5 if scale is None else _number(scale)
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
_SOFTMAXES = (F.softmax, torch.softmax, "softmax", aten.softmax.int)
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
    if current is None or current.target not in _SOFTMAXES or not _is_last_dim(current):
        return None
    mask = None
    current = step(current.args[0])
    adds = (torch.add, operator.add, "add", operator.iadd)
    if current is not None and current.target in adds and not current.kwargs:
        left, right = current.args[:2]
        scores_first = isinstance(left, fx.Node) and len(left.users) == 1
        mask, current = (right, step(left)) if scores_first else (left, step(right))
    softcap = 0.0
    factor = _factor(current)
    if current is not None and factor is not None and _is_tanh(current.args[0]):
        tanh = step(current.args[0])
        capped = step(tanh.args[0]) if tanh is not None else None
        divisor = _factor(capped)
        if divisor is None or capped is None or abs(divisor * factor - 1.0) > 1e-6:
            return None
        softcap, current = factor, step(capped.args[0])
    scale = _factor(current)
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
    )


def _factor(node: fx.Node | None) -> float | None:
    """``c`` of ``x * c`` and ``1 / c`` of ``x / c``."""
    if node is None or len(node.args) != 2:
        return None
    if node.target in (torch.mul, operator.mul, "mul", operator.imul):
        return _number(node.args[1])
    if node.target in (torch.div, operator.truediv, "div", operator.itruediv):
        divisor = _number(node.args[1])
        return None if not divisor else 1.0 / divisor
    return None


def _number(found: Any) -> float | None:
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


# What its mask says


def _understand(context: PassContext, site: Site, mutated: set[int]) -> Understood | None:
    """None: there is nothing to gain.

    Raises:
        Refusal: if the mask is not understood.
    """
    query, key = tensor_value(site.query), tensor_value(site.key)
    if query is None or key is None or query.ndim != 4 or key.ndim != 4:
        return None
    queries, keys = query.shape[2], key.shape[2]
    chunk = plan_attention(query.device.type, context.options.attention_chunk_rows)
    if hint(queries) <= chunk:
        return None
    types = {
        fake.dtype
        for fake in map(tensor_value, (site.query, site.key, site.value, site.out))
        if fake is not None
    }
    if len(types) > 1 and not _under_autocast(site):
        raise Refusal(f"{site.out.name}: query, key, value and output have different types")
    if site.dropout:
        if site.mask is None:
            return None
        raise Refusal(f"{site.out.name}: attention weights are dropped at random")
    is_static = isinstance(queries, int) and isinstance(keys, int)
    if site.causal and site.mask is None:
        if _ungrouped(site) == (site.key, site.value) and not _is_ours(site):
            return None
        return Understood(site, TRUE, 0.0, [], [], chunk, native(CAUSAL), "causal")
    if site.causal:
        return None
    if site.mask is None and not site.is_eager and _ungrouped(site) == (site.key, site.value):
        return None
    formula, fill, key_nodes, query_nodes, vectors = _formula(site, queries, keys, mutated)
    known = None
    if vectors is not None and is_static:
        known = reach(formula, vectors, queries, keys, chunk, fill != 0.0).rows
    elif formula == TRUE and not site.softcap:
        known = native(FULL)
    elif formula == TRUE:
        raise Refusal(f"{site.out.name}: capped scores without a mask, and the sequence is dynamic")
    inside = [node for node in (*key_nodes, *query_nodes) if node.graph is not site.level.top.gm.graph]
    if inside and not _is_native(site, known):
        raise Refusal(f"{inside[0].name} of the mask is computed inside of a checkpointed layer")
    form = form_name(formula, known, vectors if is_static else None, hint(queries))
    return Understood(site, formula, fill, key_nodes, query_nodes, chunk, known, form)


def _is_native(site: Site, known: Tensor | None) -> bool:
    """Whether torch's own kernel has the form of the mask."""
    return known is not None and int(known[0, 0]) in (CAUSAL, FULL) and not site.softcap


def _is_ours(site: Site) -> bool:
    """Whether :mod:`mst_fx.attention` runs the kernel that torch would run, and does better: on a GPU its
    backward pass takes a few heads at a time, and no random state is kept for dropout that is none."""
    query, value, out = map(tensor_value, (site.query, site.value, site.out))
    if query is None or value is None or out is None:
        return False
    return is_fused(query, value, out.dtype)


def _under_autocast(site: Site) -> bool:
    fake = tensor_value(site.out)
    assert fake is not None
    enters = torch.amp.autocast_mode._enter_autocast
    graphs = [level.gm.graph for level in _levels(site.level.top)]
    return torch.is_autocast_enabled(fake.device.type) or any(
        graph.find_nodes(op="call_function", target=enters) for graph in graphs
    )


def _formula(
    site: Site, queries: Any, keys: Any, mutated: set[int]
) -> tuple[Mask, float, list[fx.Node], list[fx.Node], Vectors | None]:
    """The formula of a mask, what is added where it is false, its vectors, and their values if all are constant.

    Parts that constants make true, such as "the same document" of one document, are left out.
    """
    if site.mask is None:
        return TRUE, 0.0, [], [], Vectors([], [])
    fake = tensor_value(site.mask)
    if fake is None or fake.requires_grad:
        raise Refusal(f"{site.mask.name}: the mask has a gradient")
    evaluated: dict[fx.Node, Any] = {}
    limit = 64 * (hint(queries) + hint(keys))

    def constant(node: fx.Node) -> Any:
        return _evaluate(node, evaluated, limit)

    reader = Reader(queries, keys, site.level.resolve, constant, mutated)
    mask, fill = _boolean(site)
    formula = reader.read(mask)
    nodes = {f"k{i}": node for i, node in enumerate(reader.key_nodes)}
    nodes |= {f"q{i}": node for i, node in enumerate(reader.query_nodes)}
    values = {name: constant(node) for name, node in nodes.items()}

    def of(names_: Sequence[str]) -> Vectors | None:
        if not all(isinstance(values[name], Tensor) for name in names_):
            return None
        return Vectors(
            [_as_rows(values[name], True) for name in names_ if name[0] == "k"],
            [_as_rows(values[name], False) for name in names_ if name[0] == "q"],
        )

    def numbered(part: Mask) -> tuple[Mask, list[str]]:
        """The formula with its vectors numbered from 0, and their names before."""
        used = [name for name in nodes if name in names(part)]
        ours = [name for name in used if name[0] == "k"], [name for name in used if name[0] == "q"]
        return renamed(part, {name: f"{name[0]}{i}" for group in ours for i, name in enumerate(group)}), used

    def is_true(part: Mask) -> bool:
        alone, used = numbered(part)
        vectors = of(used)
        if vectors is None or not used or not isinstance(queries, int) or not isinstance(keys, int):
            return False
        return int(reach(alone, vectors, queries, keys, queries, False).rows[0, 0]) == FULL

    parts = formula[1:] if formula[0] == "and" else (formula,)
    formula, used = numbered(joined("and", [part for part in parts if not is_true(part)]))
    if formula == ("constant", False):
        raise Refusal(f"{site.mask.name}: the mask lets nothing through")
    key_nodes = [nodes[name] for name in used if name[0] == "k"]
    return formula, fill, key_nodes, [nodes[name] for name in used if name[0] == "q"], of(used)


def _boolean(site: Site) -> tuple[fx.Node, float]:
    """The Boolean mask, and what is added to the score where it is false (0: minus infinity, or Boolean).

    ``where(mask, 0, fill)`` is what Hugging Face's eager attention adds.
    """
    assert site.mask is not None
    node = site.level.resolve(site.mask)
    fake = tensor_value(node)
    if fake is not None and fake.dtype == torch.bool:
        return node, 0.0
    while node.target in ("to", "contiguous", "type") or _is_whole_slice(node):
        node = site.level.resolve(node.args[0])  # type: ignore[arg-type]
    if node.target in (torch.where, aten.where.self) and len(node.args) == 3:
        mask, zero, masked = node.args
        fill = _number(masked) if not isinstance(masked, fx.Node) else _fill_of(masked)
        is_zero = zero == 0 if not isinstance(zero, fx.Node) else _fill_of(zero) == 0
        if isinstance(mask, fx.Node) and is_zero and fill is not None and fill < -1e4:
            return mask, 0.0 if fill == float("-inf") else fill
    raise Refusal(f"{node.name} ({getattr(node.target, '__name__', node.target)}) makes the mask")


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    fake, source = tensor_value(node), tensor_value(node.args[0])
    return fake is not None and source is not None and _sizes(fake) == _sizes(source)


def _sizes(fake: Tensor) -> list[Any]:
    return [expression(size) for size in fake.shape]


def _fill_of(node: fx.Node) -> float | None:
    """The number a constant tensor of one element holds."""
    found = _evaluate(node, {}, 1)
    return float(found) if isinstance(found, Tensor) and found.numel() == 1 else None


def _evaluate(node: fx.Node, known: dict[fx.Node, Any], limit: int) -> Any:
    """The value of a node on the CPU; None if it depends on an input, or is larger than ``limit`` elements."""
    if node in known:
        return known[node]
    fake = tensor_value(node)
    known[node] = None
    # Named one by one: a random number is no constant, and neither is what somebody writes to.
    is_known = node.op in ("call_function", "call_method") and op_name(node) in _CONSTANT
    is_large = fake is not None and hint(fake.numel()) > limit
    if (
        not is_known
        or is_large
        or isinstance(value(node), torch.SymInt)
        or any(map(writes_in_place, node.users))
    ):
        return None
    operands = {operand: _evaluate(operand, known, limit) for operand in node.all_input_nodes}
    if any(found is None for found in operands.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    try:
        with real_tensors():
            known[node] = call(node.op, node.target, args, kwargs)
    except Exception:  # not a constant then
        return None
    return known[node]


_NAMES_OF_CONSTANTS = """
    arange zeros ones full new_zeros new_ones new_full zeros_like ones_like tensor
    add sub mul floordiv floor_divide remainder mod neg abs clamp diff cumsum
    eq ne le lt ge gt and_ or_ invert logical_and logical_or logical_not where
    getitem unsqueeze squeeze expand view reshape flatten contiguous clone cat repeat repeat_interleave
    to bool int long float type size
"""
_CONSTANT = frozenset(_NAMES_OF_CONSTANTS.split())


def _as_rows(vector: Any, is_key: bool, then: Callable[..., Any] | None = None) -> Any:
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


# What comes in its place


@dataclasses.dataclass(frozen=True)
class _Reach:
    """Nodes of the program's graph: the vectors of a formula, what ``mask_reach`` gives, and the place in it."""

    keys: tuple[fx.Node, ...] = ()
    queries: tuple[fx.Node, ...] = ()
    rows: fx.Node | None = None
    starts: fx.Node | None = None
    which: int = 0

    def imported(self, level: Level) -> _Reach:
        """The same nodes in a graph below."""
        return dataclasses.replace(
            self,
            keys=tuple(map(level.imported, self.keys)),
            queries=tuple(map(level.imported, self.queries)),
            rows=level.imported(self.rows) if self.rows is not None else None,
            starts=level.imported(self.starts) if self.starts is not None else None,
        )


def _vector_nodes(
    top: Level, understood: Understood, before: fx.Node
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    graph = top.gm.graph

    def rows(node: fx.Node, is_key: bool) -> fx.Node:
        with graph.inserting_before(before):
            return _as_rows(node, is_key, lambda target, *args: add_call(graph, target, *args))  # type: ignore[no-any-return]

    return tuple(rows(n, True) for n in understood.keys), tuple(rows(n, False) for n in understood.queries)


def _key_of(understood: Understood) -> Any:
    fake, other = tensor_value(understood.site.query), tensor_value(understood.site.key)
    assert fake is not None and other is not None
    sizes = (str(fake.shape[2]), str(other.shape[2]))
    return (
        understood.formula,
        understood.fill != 0.0,
        sizes,
        tuple(understood.keys),
        tuple(understood.queries),
    )


def _add_reaches(top: Level, unknown: Sequence[Understood]) -> dict[Any, _Reach]:
    """Adds one op for all masks of equal size that are known at run time only."""
    groups: dict[Any, dict[Any, Understood]] = {}
    for understood in unknown:
        key = _key_of(understood)
        groups.setdefault((key[2], understood.chunk), {}).setdefault(key, understood)
    order = {node: index for index, node in enumerate(top.gm.graph.nodes)}
    found: dict[Any, _Reach] = {}
    for group in groups.values():
        first = min((u.site.level.at_top(u.site.out) for u in group.values()), key=order.__getitem__)
        together = [
            key
            for key, u in group.items()
            if all(order.get(node, -1) < order[first] for node in (*u.keys, *u.queries))
        ]
        for keys in (together, *([key] for key in group if key not in together)):
            if keys:
                found |= _add_reach(top, {key: group[key] for key in keys}, order)
    return found


def _add_reach(top: Level, group: dict[Any, Understood], order: dict[fx.Node, int]) -> dict[Any, _Reach]:
    graph = top.gm.graph
    before = min((u.site.level.at_top(u.site.out) for u in group.values()), key=order.__getitem__)
    keys: list[fx.Node] = []
    queries: list[fx.Node] = []
    masks, finite = [], []
    members: dict[Any, tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]] = {}
    for key, understood in group.items():
        mine = _vector_nodes(top, understood, before)
        new = {f"k{i}": f"k{len(keys) + i}" for i in range(len(mine[0]))}
        new |= {f"q{i}": f"q{len(queries) + i}" for i in range(len(mine[1]))}
        keys += mine[0]
        queries += mine[1]
        masks.append(repr(renamed(understood.formula, new)))
        finite.append(understood.fill != 0.0)
        members[key] = mine
    site = next(iter(group.values())).site
    fake, other = tensor_value(site.query), tensor_value(site.key)
    assert fake is not None and other is not None
    with graph.inserting_before(before):
        sizes = [_size_node(graph, size, (*keys, *queries)) for size in (fake.shape[2], other.shape[2])]
        chunk = next(iter(group.values())).chunk
        node = add_call(
            graph, torch.ops.mst_fx.mask_reach.default, keys, queries, masks, *sizes, chunk, finite
        )
        rows, starts = (add_call(graph, operator.getitem, node, i) for i in range(2))
    return {key: _Reach(*members[key], rows, starts, index) for index, key in enumerate(members)}


def _size_node(graph: fx.Graph, size: Any, vectors: Sequence[fx.Node]) -> Any:
    if isinstance(size, int):
        return size
    for node in vectors:
        fake = tensor_value(node)
        if fake is not None and expression(fake.shape[1]) == expression(size):
            return add_call(graph, "size", node, 1)
    raise Refusal(f"no vector of the mask has the dynamic size {size}")


def _ungrouped(site: Site) -> tuple[fx.Node, fx.Node]:
    """Keys and values before ``repeat_kv``: ``x[:, :, None].expand(…).reshape(…)``."""

    def source(node: fx.Node) -> fx.Node:
        if node.target in ("reshape", torch.reshape) and isinstance(node.args[0], fx.Node):
            expanded = node.args[0]
            if expanded.target in ("expand", torch.Tensor.expand) and isinstance(expanded.args[0], fx.Node):
                indexed = expanded.args[0]
                if indexed.target is operator.getitem and isinstance(indexed.args[0], fx.Node):
                    inner, index = indexed.args
                    fake, out, wide = (tensor_value(n) for n in (inner, node, expanded))  # type: ignore[arg-type]
                    full = slice(None, None, None)
                    is_repeat = tuple(index) == (full, full, None, full, full)  # type: ignore[arg-type]
                    if is_repeat and fake is not None and out is not None and wide is not None:
                        heads = fake.shape[1] * wide.shape[2] == out.shape[1] and fake.ndim == 4 == out.ndim
                        rest = [fake.shape[i] for i in (0, 2, 3)] == [out.shape[i] for i in (0, 2, 3)]
                        if heads and rest:
                            return inner  # type: ignore[return-value]
        return node

    key, values = source(site.key), source(site.value)
    query, wide, out = map(tensor_value, (site.query, values, site.out))
    if query is None or wide is None or out is None or not is_fused(query, wide, out.dtype):
        return site.key, site.value
    fakes = [tensor_value(key), tensor_value(values)]
    if fakes[0] is None or fakes[1] is None or fakes[0].shape[1] != fakes[1].shape[1]:
        return site.key, site.value
    return key, values


# What does not ask for contiguous values: a view would.
_ANY_STRIDES = (
    "transpose",
    "permute",
    "reshape",
    "contiguous",
    torch.transpose,
    torch.permute,
    torch.reshape,
)


def _replace(
    context: PassContext, understood: Understood, reaches: dict[Any, _Reach], counted: set[fx.Node]
) -> None:
    site, level = understood.site, understood.site.level
    graph = level.gm.graph
    out = tensor_value(site.out)
    query, mask = tensor_value(site.query), site.mask
    assert out is not None and query is not None
    key, values = _ungrouped(site)
    known = understood.known
    is_native = _is_native(site, known)
    top = level.top
    before = site.out.format_node() or site.out.name
    parts = [site.query, key, values]
    fakes = [tensor_value(part) for part in parts]
    grouped = fakes[0].shape[1] != fakes[1].shape[1]  # type: ignore[union-attr]
    vectors = _Reach()
    if known is None:
        vectors = reaches[_key_of(understood)].imported(level)
    elif not is_native and (understood.keys or understood.queries):
        vectors = _Reach(*_vector_nodes(top, understood, level.at_top(site.out))).imported(level)
    with graph.inserting_before(site.out):
        # Under autocast the fused call casts; the eager one has cast where it multiplied.
        cast = [
            part if fake is not None and fake.dtype == out.dtype else add_call(graph, "to", part, out.dtype)
            for part, fake in zip(parts, fakes, strict=True)
        ]
        if is_native and not _is_ours(site):
            assert known is not None
            kwargs: dict[str, Any] = {"is_causal": int(known[0, 0]) == CAUSAL, "scale": site.scale}
            if grouped:
                kwargs["enable_gqa"] = True
            new = add_call(graph, F.scaled_dot_product_attention, *cast, **kwargs)
        else:
            both = add_call(
                graph,
                torch.ops.mst_fx.attention.default,
                *cast,
                list(vectors.keys),
                list(vectors.queries),
                vectors.rows,
                vectors.starts,
                known.flatten().tolist() if known is not None else [],
                repr(understood.formula),
                vectors.which,
                understood.chunk,
                site.scale,
                site.softcap,
                understood.fill,
            )
            new = add_call(graph, operator.getitem, both, 0)
        after = new.format_node() or new.name
        fake = tensor_value(new)
        is_safe = all(user.target in _ANY_STRIDES for user in site.out.users)
        if not is_safe and fake is not None and out.is_contiguous() and not fake.is_contiguous():
            new = add_call(graph, "contiguous", new)
    for meta in ("nn_module_stack", "stack_trace"):
        if meta in site.out.meta:
            new.meta[meta] = site.out.meta[meta]
    site.out.replace_all_uses_with(new)
    graph.erase_node(site.out)
    for node in site.inner:
        if not node.users:
            graph.erase_node(node)
    rows, chunk = hint(query.shape[2]), understood.chunk
    made = 0
    if mask is not None and level.resolve(mask) not in counted:  # layers share a mask
        counted.add(level.resolve(mask))
        fake = tensor_value(mask)
        assert fake is not None
        made = hint(fake.numel()) * fake.element_size()
    if site.is_eager:  # the scores and their softmax
        other = tensor_value(site.key)
        assert other is not None
        made += 2 * math.prod(map(hint, query.shape[:3])) * hint(other.shape[2]) * query.element_size()
    chunks = 1 if is_native else -(-rows // chunk)
    context.report.rewrites.append(
        Rewrite(
            kind="attention",
            name=module_path(new) or new.name,
            rows=rows,
            chunk_rows=rows if is_native else chunk,
            chunks=chunks,
            intermediate_bytes=made,
            chunk_bytes=0 if is_native else made // chunks,
            gradient="native" if is_native else "recompute",
            deferred=False,
            body="",
            why=f"the mask is {describe(understood.formula)}",
            before=(before,),
            after=(after,),
            form=understood.form,
        )
    )


def _drop_unused_operands(top: Level, body: fx.GraphModule) -> None:
    """Removes dead nodes of a checkpointed body, and the operands that nobody in it reads any more."""
    eliminate_dead_code(body.graph)
    for level in _levels(top):
        if level.gm is not body or level.call is None:
            continue
        placeholders = _placeholders(body)
        kept = [index for index, node in enumerate(placeholders) if node.users]
        level.call.args = (level.call.args[0], *(level.call.args[1 + index] for index in kept))
        for node in placeholders:
            if not node.users:
                body.graph.erase_node(node)
        body.recompile()


def _levels(level: Level) -> Iterator[Level]:
    yield level
    for node in level.gm.graph.nodes:
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            body = node.args[0]
            if body.op == "get_attr":
                child = attribute(level.gm, str(body.target))
                if isinstance(child, fx.GraphModule):
                    yield from _levels(Level(child, node, level))
