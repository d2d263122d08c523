"""Attention without an S×S mask.

Before (Hugging Face under ``torch.compile``; eager attention likewise)::

    le = kv_indices <= q_indices; mask = le & same_document & padding        # [B, 1, S, S]
    k, v = repeat_kv(k), repeat_kv(v)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)

After, by what the mask says (:mod:`mst_fx.masks.formula`)::

    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)   # causal; or no mask at all
    out = mst_fx.attention(q, k, v, key_vectors, query_vectors, reach, …)          # anything else, and with sinks
    out = mst_fx.biased_attention(q, k, v, of_keys, of_distances, …)               # and with ALiBi, or a bias by distance
    out = mst_fx.masked_attention(q, k, v, [mask], ["add", "softmax"], …)          # with a tensor that no formula describes

All but the first are a loop over chunks of queries. Vectors that are constants are evaluated here; for others
(``attention_mask``, ``position_ids``, dynamic shapes) one op a step finds the keys in reach, and whether the
mask happens to be causal. The mask's construction has no reader any more, inside of checkpointed layers too; but for
the last one, which saves the scores of all heads and not their mask (:mod:`mst_fx.masks.given`).

Not supported, and refused: dropout, and attention weights that somebody else reads.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_fx.chunk_rows import queries_a_chunk
from mst_fx.context import PassContext
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.changing import changes
from mst_fx.graph.edit import add_call, eliminate_dead_code, replace_with
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.levels import Level, all_levels, placeholders_of
from mst_fx.graph.names import module_path
from mst_fx.graph.numbers import number_as_tensor
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import SOFTMAXES, operation
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.graph.writes import mutated_storages
from mst_fx.masks import formula
from mst_fx.masks.biases import vectors_of
from mst_fx.masks.grouped import is_ours, ungrouped
from mst_fx.masks.reach import CAUSAL
from mst_fx.masks.read import as_vector
from mst_fx.masks.scores import is_of_block, is_of_scores, is_product
from mst_fx.masks.sinks import has_own_sinks
from mst_fx.masks.sites import Site, find_sites, mask_bytes, mask_of, scaled_query, sinks_of_heads
from mst_fx.masks.understand import Known, Understood, understand
from mst_fx.report import Rewrite


def run(context: PassContext) -> bool:
    """Rewrites every attention of a program, those of checkpointed layers included."""
    top = Level(context.gm)
    found: list[Understood] = []
    vectors: dict[fx.Node, fx.Node] = {}
    known: Known = {}
    mutated = {storage for level in all_levels(top) for storage in mutated_storages(level.gm.graph)}
    sites = list(find_sites(top, mutated))
    for site in sites:
        name = module_path(site.out) or site.out.name
        try:
            understood = _understood(context, site, mutated, vectors, known)
        except Refusal as refusal:
            context.refuse("attention", name, str(refusal), refusal.cause)
            continue
        if understood is not None:
            found.append(understood)
    _refuse_others(context, top, [site for site in sites if site.is_eager])
    reaches = _add_reaches(top, [u for u in found if u.table is None])
    masks = collections.Counter(mask_of(understood.site) for understood in found)
    counted: set[fx.Node] = set()
    for understood in found:
        old = understood.site.out
        new = _replace(context, understood, reaches, masks, counted)
        for other in found:
            other.site.replace_operand(old, new)
    for graph in {id(u.site.level.gm): u.site.level.gm for u in found}.values():
        _drop_unused_operands(top, graph)
    return bool(found)


def _understood(
    context: PassContext, site: Site, mutated: set[int], vectors: dict[fx.Node, fx.Node], known: Known
) -> Understood | None:
    """What the mask of a site says; None: there is nothing to gain.

    Args:
        vectors: of the biases so far; is added to.
        known: of the masks so far; is added to.

    Raises:
        Refusal: if the mask is not understood.
    """
    query, key = tensor_value(site.query), tensor_value(site.key)
    if query is None or key is None or query.ndim != 4 or key.ndim != 4:
        return None
    queries = query.shape[2]
    chunk = queries_a_chunk(query.device.type, context.options.attention_chunk_rows)
    if hint(queries) <= chunk and not changes(queries):
        return None
    found = understand(site, chunk, mutated, known)
    if found is not None and found.is_biased:
        found = dataclasses.replace(found, vectors=vectors_of(found.biases, site.level, site.out, vectors))
    # Asked last: a guard that gains nothing would compile longer batches anew.
    return None if found is None or context.shared.bounds.fits(queries, chunk) else found


def _refuse_others(context: PassContext, level: Level, eager: Sequence[Site]) -> None:
    """Notes Q×K scores, with a softmax or without, that are part of no attention that was recognised."""
    claimed = {node for site in eager for node in (site.out, *site.inner)}

    def is_large(fake: Tensor | None) -> bool:
        if fake is None or fake.ndim < 3:
            return False
        least = queries_a_chunk(fake.device.type, context.options.attention_chunk_rows)
        return min(hint(fake.shape[-2]), hint(fake.shape[-1])) > least

    refused = {refusal.name for refusal in context.report.refusals}
    for each in all_levels(level):
        for node in each.gm.graph.nodes:
            fake = tensor_value(node)
            name = module_path(node) or node.name
            if node in claimed or not is_large(fake):
                continue
            assert fake is not None
            if operation(node) in SOFTMAXES and (fake.ndim == 4 or is_of_scores(node)):
                refused.add(name)
                rest = "and of sinks that may differ between queries" if has_own_sinks(node) else ""
                rest = rest or "but no attention known here"
                rest = f"of {fake.ndim} dimensions, {rest}" if fake.ndim > 4 else rest
                reason = f"{node.name}: softmax of scores, {rest}"
                context.refuse("attention", name, reason, Cause.SCORES)
            elif (
                is_product(node) and name not in refused and not is_of_block(node) and _without_softmax(node)
            ):
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
            if operation(user) in SOFTMAXES:
                return False
            is_weighing |= is_product(user)
            if fake is not None and user not in seen and expression(fake.numel()) == expression(size):
                seen.add(user)
                stack.append(user)
    return is_weighing


# What comes in its place


@dataclasses.dataclass(frozen=True)
class _ReachNodes:
    """Nodes of the program's graph that tell a mask's reach.

    Attributes:
        keys, queries: the vectors of its formula.
        tables, starts: what ``mask_reach`` gives; None where the table is known already.
        index: the mask's place in them.
    """

    keys: tuple[fx.Node, ...] = ()
    queries: tuple[fx.Node, ...] = ()
    tables: fx.Node | None = None
    starts: fx.Node | None = None
    index: int = 0

    def imported(self, level: Level) -> _ReachNodes:
        """The same nodes in a graph below."""
        return dataclasses.replace(
            self,
            keys=tuple(map(level.imported, self.keys)),
            queries=tuple(map(level.imported, self.queries)),
            tables=level.imported(self.tables) if self.tables is not None else None,
            starts=level.imported(self.starts) if self.starts is not None else None,
        )


def _vector_nodes(
    top: Level, understood: Understood, before: fx.Node
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    graph = top.gm.graph

    def flat(node: fx.Node, is_key: bool) -> fx.Node:
        with graph.inserting_before(before):
            return as_vector(node, is_key, lambda target, *args: add_call(graph, target, *args))  # type: ignore[no-any-return]

    return tuple(flat(n, True) for n in understood.mask.keys), tuple(
        flat(n, False) for n in understood.mask.queries
    )


def _add_reaches(top: Level, unknown: Sequence[Understood]) -> dict[Any, _ReachNodes]:
    """Adds one op for all masks of equal size that are known at run time only."""
    groups: dict[Any, dict[Any, Understood]] = {}
    found: dict[Any, _ReachNodes] = {}
    for understood in unknown:
        key = understood.reach_key
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
            if all(order.get(node, -1) < order[first] for node in (*u.mask.keys, *u.mask.queries))
        ]
        for keys in (together, *([key] for key in group if key not in together)):
            if keys:
                found |= _add_reach(top, {key: group[key] for key in keys}, order)
    return found


def _given_reach(top: Level, understood: Understood) -> _ReachNodes:
    """The reach that came with the vectors: inputs of the graph."""
    assert understood.given is not None
    inputs = {node.name: node for node in placeholders_of(top.gm)}
    tables, starts = (inputs[name] for name in understood.given.reach)
    before = max((*understood.mask.keys, *understood.mask.queries), key=list(top.gm.graph.nodes).index).next
    return _ReachNodes(*_vector_nodes(top, understood, before), tables, starts)


def _add_reach(top: Level, group: dict[Any, Understood], order: dict[fx.Node, int]) -> dict[Any, _ReachNodes]:
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
        masks.append(formula.text(formula.renamed(understood.mask.formula, new)))
        finite.append(understood.mask.is_finite)
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
        tables, starts = (add_call(graph, operator.getitem, node, i) for i in range(2))
    return {key: _ReachNodes(*members[key], tables, starts, index) for index, key in enumerate(members)}


def _size_node(graph: fx.Graph, size: Any, vectors: Sequence[fx.Node]) -> Any:
    if isinstance(size, int):
        return size
    for node in vectors:
        fake = tensor_value(node)
        if fake is not None and expression(fake.shape[1]) == expression(size):
            return add_call(graph, "size", node, 1)
    raise Refusal(f"no vector of the mask has the dynamic size {size}", Cause.MASK)


# What does not ask for contiguous values: a view would.
_ANY_STRIDES = {"transpose", "permute", "reshape", "contiguous"}


def _replace(
    context: PassContext,
    understood: Understood,
    reaches: dict[Any, _ReachNodes],
    masks: collections.Counter[fx.Node | None],
    counted: set[fx.Node],
) -> fx.Node:
    """Puts a fused call in the place of a site, and into the report; its output.

    Args:
        reaches: of the masks whose values are not known yet.
        masks: how many sites read each.
        counted: the masks whose bytes are in the report.
    """
    site, graph = understood.site, understood.site.level.gm.graph
    before = site.out.format_node() or site.out.name
    with graph.inserting_before(site.out):
        call = _fused_call(understood, reaches)
        if site.dtype not in (None, tensor_value(site.out).dtype):  # type: ignore[union-attr]
            call = add_call(graph, "to", call, tensor_value(site.out).dtype)  # type: ignore[union-attr]
        new = _with_strides_of(site.out, call)
    replace_with(site.out, new)
    for node in site.inner:
        if not node.users:
            graph.erase_node(node)
    query = tensor_value(site.query)
    assert query is not None
    is_native, rows = understood.is_native, hint(query.shape[2])
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
            why=f"the mask is {understood.why or formula.describe(understood.mask.formula)}",
            before=(before,),
            after=(call.format_node() or call.name,),
            form=understood.form,
            shared_bytes=mask_bytes(site) if masks[mask_of(site)] > 1 else 0,
        )
    )
    return new


def _fused_call(understood: Understood, reaches: dict[Any, _ReachNodes]) -> fx.Node:
    """The call of torch's fused attention, or of :mod:`mst_fx.ops.attention`, at the graph's insertion point."""
    site, mask, table, level = understood.site, understood.mask, understood.table, understood.site.level
    graph, out = level.gm.graph, tensor_value(understood.site.out)
    assert out is not None
    key, values = ungrouped(site)
    parts = [site.query, key, values]
    fakes = [tensor_value(part) for part in parts]
    # Under autocast the fused call casts; the eager one has cast where it multiplied.
    of_scores = site.steps.dtype if site.steps is not None else site.dtype or out.dtype
    types = (of_scores, of_scores, out.dtype if site.steps is not None else of_scores)
    cast = [
        part if fake is not None and fake.dtype == dtype else add_call(graph, "to", part, dtype)
        for part, fake, dtype in zip(parts, fakes, types, strict=True)
    ]
    if site.steps is not None:
        return site.steps.attend(cast, understood.chunk)
    cast[0] = scaled_query(site, cast[0])
    if understood.is_native and not is_ours(site):
        assert table is not None
        kwargs: dict[str, Any] = {"is_causal": int(table[0, 0]) == CAUSAL, "scale": site.scale}
        if fakes[0].shape[1] != fakes[1].shape[1]:  # type: ignore[union-attr]
            kwargs["enable_gqa"] = True
        return add_call(graph, F.scaled_dot_product_attention, *cast, **kwargs)
    vectors = _ReachNodes()
    if table is None:
        vectors = reaches[understood.reach_key].imported(level)
    elif not understood.is_native and (mask.keys or mask.queries):
        vectors = _ReachNodes(*_vector_nodes(level.top, understood, level.at_top(site.out))).imported(level)
    operands = (
        list(vectors.keys),
        list(vectors.queries),
        vectors.tables,
        vectors.starts,
        table.flatten().tolist() if table is not None else [],
        formula.text(mask.formula),
        vectors.index,
        understood.chunk,
        site.scale,
        site.softcap,
        mask.fill,
    )
    if understood.is_biased:
        biased, hiding = torch.ops.mst_fx.biased_attention.default, understood.biases.hiding
        both = add_call(graph, biased, *cast, *understood.vectors, *operands, hiding)
    else:
        more = (_cap_tensor(site), _sinks_vector(site))
        both = add_call(graph, torch.ops.mst_fx.attention.default, *cast, *operands, *more)
    return add_call(graph, operator.getitem, both, 0)


def _cap_tensor(site: Site) -> fx.Node | None:
    """A softcap that changes, as a tensor: written down, it would be a compilation a value."""
    if site.cap is None:
        return None
    with fake_mode_of(tensors_of(site.query)) or contextlib.nullcontext():
        return number_as_tensor(site.level.gm.graph, site.cap, torch.float64)[-1]


def _sinks_vector(site: Site) -> fx.Node | None:
    """``[H]``: the score of each head's sink."""
    found = sinks_of_heads(site)
    return None if found is None else add_call(site.level.gm.graph, torch.flatten, found)


def _with_strides_of(old: fx.Node, new: fx.Node) -> fx.Node:
    """``new``, or a contiguous copy of it where a user of ``old`` may count on that."""
    was, fake = tensor_value(old), tensor_value(new)
    is_safe = all(operation(user) in _ANY_STRIDES for user in old.users)
    if is_safe or was is None or fake is None or fake.is_contiguous() or not was.is_contiguous():
        return new
    return add_call(old.graph, "contiguous", new)


def _square_bytes(site: Site, counted: set[fx.Node]) -> int:
    """Bytes of what is S x S and no longer made: the mask, which layers share, and eager scores."""
    made, mask = 0, mask_of(site)
    if mask is not None and mask not in counted:
        counted.add(mask)
        made = mask_bytes(site)
    if site.is_eager or site.steps is not None:  # the scores and their softmax
        query, key = tensor_value(site.query), tensor_value(site.key)
        assert query is not None and key is not None
        made += 2 * math.prod(map(hint, query.shape[:3])) * hint(key.shape[2]) * query.element_size()
    return made


def _drop_unused_operands(top: Level, layer_graph: fx.GraphModule) -> None:
    """Removes dead nodes of a checkpointed layer, and the operands that nobody in it reads any more."""
    eliminate_dead_code(layer_graph.graph)
    for level in all_levels(top):
        if level.gm is not layer_graph or level.call is None:
            continue
        placeholders = placeholders_of(layer_graph)
        used = [index for index, node in enumerate(placeholders) if node.users]
        level.call.args = (level.call.args[0], *(level.call.args[1 + index] for index in used))
        for node in placeholders:
            if not node.users:
                layer_graph.graph.erase_node(node)
        layer_graph.recompile()
