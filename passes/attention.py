"""Attention without an S×S mask.

Before (Hugging Face under ``torch.compile``; eager attention likewise)::

    le = kv_indices <= q_indices; mask = le & same_document & padding        # [B, 1, S, S]
    k, v = repeat_kv(k), repeat_kv(v)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)

After, by what the mask says (:mod:`mst_fx.masks.formula`)::

    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)   # causal; or no mask at all
    out = mst_fx.attention(q, k, v, key_vectors, query_vectors, reach, …)          # anything else

The second form is a loop over chunks of queries. Vectors that are constants are evaluated here; for others
(``attention_mask``, ``position_ids``, dynamic shapes) one op a step finds the keys in reach, and whether the
mask happens to be causal. The mask's construction has no reader any more, inside of checkpointed layers too.

Not supported, and refused: masks that are inputs of S² elements, masks with a gradient or that differ between
heads (relative position biases), dropout, and attention weights that somebody else reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from mst_fx.chunk_rows import plan_attention
from mst_fx.chunking import PassContext
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.changing import changes
from mst_fx.graph.edit import add_call, eliminate_dead_code
from mst_fx.graph.fill import call, fake_mode_of
from mst_fx.graph.names import module_path
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.values import storage_key, tensor_value, tensors_of, value
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.masks.formula import (
    CAUSAL,
    FULL,
    GIVEN,
    TRUE,
    Given,
    Mask,
    Reader,
    Vectors,
    describe,
    fill_of,
    form_name,
    gives_heads,
    joined,
    made_outside,
    names,
    native,
    op_name,
    reach,
    renamed,
)
from mst_fx.masks.sites import (
    SOFTMAXES,
    Level,
    Site,
    all_levels,
    find_sites,
    is_of_scores,
    is_product,
    number_of,
    placeholders_of,
    scaled_query,
)
from mst_fx.ops import attention as _ops  # noqa: F401  (registers them)
from mst_fx.passes.scalars import number_as_tensor
from mst_fx.report import Rewrite
from mst_fx.torch_api.attention import is_fused
from mst_fx.torch_api.inductor import real_tensors

aten = torch.ops.aten


@dataclasses.dataclass
class Understood:
    """A site whose mask is a formula.

    Attributes:
        fill: what is added to a masked score; 0: masked scores do not count at all.
        known: what :func:`mst_fx.masks.formula.reach` says, where all vectors are constants.
        given: what the graph that made the mask says of it.
    """

    site: Site
    formula: Mask
    fill: float
    keys: list[fx.Node]
    queries: list[fx.Node]
    chunk: int
    known: Tensor | None
    form: str
    given: Given | None = None


def run(context: PassContext) -> None:
    """Rewrites every attention of a program, those of checkpointed layers included."""
    top = Level(context.gm)
    found: list[Understood] = []
    sites = list(find_sites(top))
    mutated = {storage for level in all_levels(top) for storage in mutated_storages(level.gm.graph)}
    for site in sites:
        name = module_path(site.out) or site.out.name
        try:
            understood = _understand(context, site, mutated)
        except Refusal as refusal:
            context.refuse("attention", name, str(refusal), refusal.cause)
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
    """Notes Q×K scores, with a softmax or without, that are part of no attention that was recognised."""
    claimed = {node for site in eager for node in site.inner}

    def is_large(fake: Tensor | None) -> bool:
        if fake is None or fake.ndim < 3:
            return False
        least = plan_attention(fake.device.type, context.options.attention_chunk_rows)
        return min(hint(fake.shape[-2]), hint(fake.shape[-1])) > least

    refused = {refusal.name for refusal in context.report.refusals}
    for each in all_levels(level):
        for node in each.gm.graph.nodes:
            fake = tensor_value(node)
            name = module_path(node) or node.name
            if node in claimed or not is_large(fake):
                continue
            assert fake is not None
            if node.target in SOFTMAXES and (fake.ndim == 4 or is_of_scores(node)):
                refused.add(name)
                reason = f"{node.name}: softmax of scores, but no attention known here"
                context.refuse("attention", name, reason, Cause.SCORES)
            elif is_product(node) and name not in refused and _without_softmax(node):
                refused.add(name)
                reason = f"{node.name}: scores without a softmax, and no attention known here"
                context.refuse("attention", name, reason, Cause.SCORES)


def _without_softmax(scores: fx.Node) -> bool:
    """Whether a product of two activations goes into another one, through values of its size and no softmax."""
    if not is_of_scores(scores):
        return False
    size = tensor_value(scores).numel()  # type: ignore[union-attr]
    seen, stack, is_weighing = {scores}, [scores], False
    while stack:
        for user in stack.pop().users:
            fake = tensor_value(user)
            if user.target in SOFTMAXES:
                return False
            is_weighing |= is_product(user)
            if fake is not None and user not in seen and expression(fake.numel()) == expression(size):
                seen.add(user)
                stack.append(user)
    return is_weighing


# What its mask says


def _understand(context: PassContext, site: Site, mutated: set[int]) -> Understood | None:
    """None: there is nothing to gain.

    Raises:
        Refusal: if the mask is not understood.
    """
    query, key = tensor_value(site.query), tensor_value(site.key)
    if query is None or key is None or query.ndim != 4 or key.ndim != 4:
        return None
    queries = query.shape[2]
    chunk = plan_attention(query.device.type, context.options.attention_chunk_rows)
    if hint(queries) <= chunk and not changes(queries):
        return None
    found = _read_site(site, queries, key.shape[2], chunk, mutated)
    # Asked last: a guard that gains nothing would compile longer batches anew.
    return None if found is None or context.shared.bounds.fits(queries, chunk) else found


def _read_site(site: Site, queries: Any, keys: Any, chunk: int, mutated: set[int]) -> Understood | None:
    """:func:`_understand`, whatever the number of queries."""
    if site.scale <= 0.0:  # torch's causal kernels give NaN (2.13, on a CPU), where with a mask they do not
        raise Refusal(f"{site.out.name}: the scale {site.scale} is not positive")
    types = {
        fake.dtype
        for fake in map(tensor_value, (site.query, site.key, site.value, site.out))
        if fake is not None
    }
    if len(types) > 1 and not _under_autocast(site):
        raise Refusal(f"{site.out.name}: query, key, value and output have different types", Cause.SCORES)
    if site.dropout:
        if site.mask is None:
            return None
        raise Refusal(f"{site.out.name}: attention weights are dropped at random", Cause.SCORES)
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
        raise Refusal(
            f"{site.out.name}: capped scores without a mask, and the sequence is dynamic", Cause.SCORES
        )
    given = _given(site, formula, fill, (*key_nodes, *query_nodes), chunk)
    if known is None and given is not None and given.known:
        known = torch.tensor(given.known).view(-1, 3)
    inside = [node for node in (*key_nodes, *query_nodes) if node.graph is not site.level.top.gm.graph]
    if inside and not _is_native(site, known):
        raise Refusal(f"{inside[0].name} of the mask is computed inside of a checkpointed layer", Cause.MASK)
    form = form_name(formula, known, vectors if is_static else None, hint(queries))
    return Understood(site, formula, fill, key_nodes, query_nodes, chunk, known, form, given)


def _given(site: Site, formula: Mask, fill: float, vectors: Sequence[fx.Node], chunk: int) -> Given | None:
    """What is known of a mask that another graph has made, if the site's is that one and the whole of it."""
    names_ = tuple(node.name for node in vectors)
    is_here = all(node.graph is site.level.top.gm.graph for node in vectors)
    for given in site.level.top.gm.meta.get(GIVEN, ()):
        same = (given.formula, given.is_finite, given.vectors, given.chunk)
        if is_here and same == (formula, fill != 0.0, names_, chunk):
            return given  # type: ignore[no-any-return]
    return None


def _is_native(site: Site, known: Tensor | None) -> bool:
    """Whether torch's own kernel has the form of the mask."""
    return known is not None and int(known[0, 0]) in (CAUSAL, FULL) and not site.softcap


def _is_ours(site: Site) -> bool:
    """Whether :mod:`mst_fx.ops.attention` runs the kernel that torch would run, and does better: on a GPU its
    backward pass takes a few heads at a time, and no random state is kept for dropout that is none."""
    query, value, out = map(tensor_value, (site.query, site.value, site.out))
    if query is None or value is None or out is None:
        return False
    return is_fused(query, value, out.dtype)


def _under_autocast(site: Site) -> bool:
    fake = tensor_value(site.out)
    assert fake is not None
    enters = torch.amp.autocast_mode._enter_autocast
    graphs = [level.gm.graph for level in all_levels(site.level.top)]
    return torch.is_autocast_enabled(fake.device.type) or any(
        graph.find_nodes(op="call_function", target=enters) for graph in graphs
    )


def _formula(
    site: Site, queries: Any, keys: Any, mutated: set[int]
) -> tuple[Mask, float, list[fx.Node], list[fx.Node], Vectors | None]:
    if site.mask is None:
        return TRUE, 0.0, [], [], Vectors([], [])
    return formula_of(site.mask, site.level, queries, keys, mutated)


def formula_of(
    node: fx.Node, level: Level, queries: Any, keys: Any, mutated: set[int]
) -> tuple[Mask, float, list[fx.Node], list[fx.Node], Vectors | None]:
    """The formula of a mask, what is added where it is false, its vectors, and their values if all are constant.

    Parts that constants make true, such as "the same document" of one document, are left out.

    Raises:
        Refusal: if the mask is not understood.
    """
    fake = tensor_value(node)
    if fake is None or fake.requires_grad:
        raise Refusal(f"{node.name}: the mask has a gradient", Cause.MASK)
    evaluated: dict[fx.Node, Any] = {}
    limit = 64 * (hint(queries) + hint(keys))

    def constant(node: fx.Node) -> Any:
        return _evaluate(node, evaluated, limit)

    mask, fill, batch_first = _boolean(node, level, queries, keys, mutated)
    reader = Reader(queries, keys, level.resolve, constant, mutated, batch_first)
    formula = TRUE if mask is None else reader.read(mask)
    nodes = {f"k{i}": node for i, node in enumerate(reader.key_nodes)}
    nodes |= {f"q{i}": node for i, node in enumerate(reader.query_nodes)}
    values = {name: constant(node) for name, node in nodes.items()}

    def of(names_: Sequence[str]) -> Vectors | None:
        if not all(isinstance(values[name], Tensor) for name in names_):
            return None
        return Vectors(
            [as_rows(values[name], True) for name in names_ if name[0] == "k"],
            [as_rows(values[name], False) for name in names_ if name[0] == "q"],
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
        raise Refusal(f"{node.name}: the mask lets nothing through", Cause.MASK)
    key_nodes = [nodes[name] for name in used if name[0] == "k"]
    return formula, fill, key_nodes, [nodes[name] for name in used if name[0] == "q"], of(used)


def _boolean(
    node: fx.Node, level: Level, queries: Any, keys: Any, mutated: set[int]
) -> tuple[fx.Node | None, float, bool]:
    """The Boolean mask (None: nothing is masked), what is added to the score where it is false (0: minus infinity,
    or Boolean), and whether it is [B, Q, K] where it has three dimensions.

    ``where(mask, 0, fill)`` is what Hugging Face's eager attention adds; ``zeros`` is T5's bias of none.
    """
    node = level.resolve(node)
    fake = tensor_value(node)
    if fake is not None and fake.dtype == torch.bool:
        return node, 0.0, False
    batch_first = False
    for step in _steps(node, level):
        batch_first |= gives_heads(node, step)
        node = step
        fake = tensor_value(node)
        if fake is not None and storage_key(fake) in mutated:
            raise Refusal(f"{node.name} ({op_name(node)}), the mask, is written to in place", Cause.MASK)
    if fill_of(node, mutated) == 0:
        return None, 0.0, False
    if op_name(node) in ("add", "iadd") and len(node.args) == 2 and not node.kwargs:
        parts = [level.resolve(part) for part in node.args if isinstance(part, fx.Node)]
        others = [part for part in parts if fill_of(where_of(part, level), mutated) != 0]
        if len(parts) == 2 and len(others) == 1:
            return _boolean(others[0], level, queries, keys, mutated)
    if node.target in (torch.where, aten.where.self) and len(node.args) == 3:
        mask, zero, masked = node.args
        fill = _number_in(masked)
        is_zero = _number_in(zero) == 0 or (isinstance(zero, fx.Node) and fill_of(zero, mutated) == 0)
        if isinstance(mask, fx.Node) and is_zero and fill is not None and fill < -1e4:
            return mask, 0.0 if fill == float("-inf") else fill, batch_first
    outside = made_outside(node, level.resolve, queries, keys)
    if outside is not None:
        raise Refusal(*outside)
    raise Refusal(f"{node.name} ({op_name(node)}) makes the mask", Cause.MASK)


def _number_in(found: Any) -> float | None:
    return _fill_of(found) if isinstance(found, fx.Node) else number_of(found)


def _steps(node: fx.Node, level: Level | None) -> Iterator[fx.Node]:
    """A mask, and the nodes of which it is a cast or the whole, with more dimensions perhaps; back to the first."""
    yield node
    while op_name(node) in _SAME or _is_whole_slice(node) or _adds_dimensions(node):
        node = node.args[0]  # type: ignore[assignment]
        node = node if level is None else level.resolve(node)
        yield node


def where_of(node: fx.Node, level: Level | None) -> fx.Node:
    """The first node of which a mask is a cast, or the whole."""
    *_, first = _steps(node, level)
    return first


_SAME = (
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "detach",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
)


def _adds_dimensions(node: fx.Node) -> bool:
    """Whether a node is another with dimensions of size 1 in front (``x[None, None]``, ``x.unsqueeze(0)``), or
    for heads (``x[:, None]``), or that expanded."""
    name = op_name(node)
    if name not in ("getitem", "unsqueeze", "expand", "expand_as", "broadcast_to", "view", "reshape"):
        return False
    source = node.args[0] if node.args else None
    fake, inner = tensor_value(node), tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or inner is None or fake.ndim < inner.ndim:
        return False
    if gives_heads(node, source):  # type: ignore[arg-type]
        return True
    sizes, wanted = _sizes(fake), _sizes(inner)
    wanted = [1] * (len(sizes) - len(wanted)) + wanted
    if name in ("view", "reshape", "getitem", "unsqueeze"):
        return sizes == wanted
    return all(a == b or b == 1 for a, b in zip(sizes, wanted, strict=True)) and sizes[-2:] == wanted[-2:]


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


def as_rows(vector: Any, is_key: bool, then: Callable[..., Any] | None = None) -> Any:
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
            return as_rows(node, is_key, lambda target, *args: add_call(graph, target, *args))  # type: ignore[no-any-return]

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
    found: dict[Any, _Reach] = {}
    for understood in unknown:
        key = _key_of(understood)
        if understood.given is not None:
            if key not in found:
                found[key] = _given_reach(top, understood)
            continue
        groups.setdefault((key[2], understood.chunk), {}).setdefault(key, understood)
    order = {node: index for index, node in enumerate(top.gm.graph.nodes)}
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


def _given_reach(top: Level, understood: Understood) -> _Reach:
    """The reach that came with the vectors: inputs of the graph."""
    assert understood.given is not None
    inputs = {node.name: node for node in placeholders_of(top.gm)}
    rows, starts = (inputs[name] for name in understood.given.reach)
    before = max((*understood.keys, *understood.queries), key=list(top.gm.graph.nodes).index).next
    return _Reach(*_vector_nodes(top, understood, before), rows, starts)


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
    raise Refusal(f"no vector of the mask has the dynamic size {size}", Cause.MASK)


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
    """Puts a fused call in the place of a site, and into the report.

    Args:
        reaches: of the masks whose values are not known yet.
        counted: the masks whose bytes are in the report.
    """
    site, graph = understood.site, understood.site.level.gm.graph
    before = site.out.format_node() or site.out.name
    with graph.inserting_before(site.out):
        call = _fused_call(understood, reaches)
        new = _with_strides_of(site.out, call)
    for meta in ("nn_module_stack", "stack_trace"):
        if meta in site.out.meta:
            new.meta[meta] = site.out.meta[meta]
    site.out.replace_all_uses_with(new)
    graph.erase_node(site.out)
    for node in site.inner:
        if not node.users:
            graph.erase_node(node)
    query = tensor_value(site.query)
    assert query is not None
    is_native, rows = _is_native(site, understood.known), hint(query.shape[2])
    chunk = rows if is_native else understood.chunk
    chunks = -(-rows // chunk)
    made = _square_bytes(site, counted)
    context.report.rewrites.append(
        Rewrite(
            kind="attention",
            name=module_path(new) or new.name,
            rows=rows,
            chunk_rows=chunk,
            chunks=chunks,
            intermediate_bytes=made,
            chunk_bytes=0 if is_native else made // chunks,
            gradient="native" if is_native else "recompute",
            deferred=False,
            body="",
            why=f"the mask is {describe(understood.formula)}",
            before=(before,),
            after=(call.format_node() or call.name,),
            form=understood.form,
        )
    )


def _fused_call(understood: Understood, reaches: dict[Any, _Reach]) -> fx.Node:
    """The call of torch's fused attention, or of :mod:`mst_fx.ops.attention`, at the graph's insertion point."""
    site, known, level = understood.site, understood.known, understood.site.level
    graph, out = level.gm.graph, tensor_value(understood.site.out)
    assert out is not None
    key, values = _ungrouped(site)
    parts = [site.query, key, values]
    fakes = [tensor_value(part) for part in parts]
    # Under autocast the fused call casts; the eager one has cast where it multiplied.
    cast = [
        part if fake is not None and fake.dtype == out.dtype else add_call(graph, "to", part, out.dtype)
        for part, fake in zip(parts, fakes, strict=True)
    ]
    cast[0] = scaled_query(site, cast[0])
    is_native = _is_native(site, known)
    if is_native and not _is_ours(site):
        assert known is not None
        kwargs: dict[str, Any] = {"is_causal": int(known[0, 0]) == CAUSAL, "scale": site.scale}
        if fakes[0].shape[1] != fakes[1].shape[1]:  # type: ignore[union-attr]
            kwargs["enable_gqa"] = True
        return add_call(graph, F.scaled_dot_product_attention, *cast, **kwargs)
    vectors = _Reach()
    if known is None:
        vectors = reaches[_key_of(understood)].imported(level)
    elif not is_native and (understood.keys or understood.queries):
        vectors = _Reach(*_vector_nodes(level.top, understood, level.at_top(site.out))).imported(level)
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
        _cap_tensor(site),
    )
    return add_call(graph, operator.getitem, both, 0)


def _cap_tensor(site: Site) -> fx.Node | None:
    """A softcap that changes, as a tensor: written down, it would be a compilation a value."""
    if site.cap is None:
        return None
    with fake_mode_of(tensors_of(site.query)) or contextlib.nullcontext():
        return number_as_tensor(site.level.gm.graph, site.cap, torch.float64)


def _with_strides_of(old: fx.Node, new: fx.Node) -> fx.Node:
    """``new``, or a contiguous copy of it where a user of ``old`` may count on that."""
    was, fake = tensor_value(old), tensor_value(new)
    is_safe = all(user.target in _ANY_STRIDES for user in old.users)
    if is_safe or was is None or fake is None or fake.is_contiguous() or not was.is_contiguous():
        return new
    return add_call(old.graph, "contiguous", new)


def _square_bytes(site: Site, counted: set[fx.Node]) -> int:
    """Bytes of what is S x S and no longer made: the mask, which layers share, and eager scores."""
    made, level = 0, site.level
    if site.mask is not None and level.resolve(site.mask) not in counted:
        counted.add(level.resolve(site.mask))
        mask = tensor_value(site.mask)
        assert mask is not None
        made = hint(mask.numel()) * mask.element_size()
    if site.is_eager:  # the scores and their softmax
        query, key = tensor_value(site.query), tensor_value(site.key)
        assert query is not None and key is not None
        made += 2 * math.prod(map(hint, query.shape[:3])) * hint(key.shape[2]) * query.element_size()
    return made


def _drop_unused_operands(top: Level, body: fx.GraphModule) -> None:
    """Removes dead nodes of a checkpointed body, and the operands that nobody in it reads any more."""
    eliminate_dead_code(body.graph)
    for level in all_levels(top):
        if level.gm is not body or level.call is None:
            continue
        placeholders = placeholders_of(body)
        kept = [index for index, node in enumerate(placeholders) if node.users]
        level.call.args = (level.call.args[0], *(level.call.args[1 + index] for index in kept))
        for node in placeholders:
            if not node.users:
                body.graph.erase_node(node)
        body.recompile()
