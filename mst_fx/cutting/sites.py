"""Attention between two exchanges.

Before::

    out = attention(q, k, v, …)                        # q [B, H, S, D], on each rank with the tokens [B, H, S/P, D]

After::

    (q,) = mst_fx.rows_to_heads([q], …)                # [B, H/P, S, D]
    k, v = mst_fx.rows_to_heads([k, v], …)
    out = mst_fx.heads_to_rows(attention(q, k, v, …))  # [B, H, S/P, D]

The mask is what it was: a formula, or a tensor, of all tokens. What differs between heads (sinks, biases by key or distance, a mask of
each head) is cut by heads. Left alone, so that all ranks run it whole: fewer heads than ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.cutting.values import Leaf, Share, Standing, add_copy, shape_of
from mst_fx.errors import Refusal
from mst_fx.graph.edit import add_call
from mst_fx.graph.spelling import argument
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.ranks.shares import Heads, firsts_of
from mst_fx.rows.tokens import Tokens

if TYPE_CHECKING:
    from mst_fx.cutting.program import Cutter

_ATTENTION = torch.ops.mst_fx.attention.default
_BIASED = torch.ops.mst_fx.biased_attention.default
_MASKED = torch.ops.mst_fx.masked_attention.default


def is_site(node: fx.Node) -> bool:
    return node.target in (_ATTENTION, _BIASED, _MASKED, F.scaled_dot_product_attention)


def exchange(cutter: Cutter, node: fx.Node) -> None:
    """Writes an attention between its exchanges.

    Raises:
        Refusal: if it has not the form that this needs.
    """
    parts = [argument(node, name) for name in ("query", "key", "value")]
    if not all(isinstance(part, fx.Node) and part in cutter.now for part in parts):
        raise Refusal("has queries, keys or values that all ranks have whole")
    leaves = [cutter.now[part].leaves[0] for part in parts]
    shapes = [shape_of(leaf.node) for leaf in leaves]
    if any(leaf.place is None or (leaf.place.dim, leaf.place.batch) != (2, 1) for leaf in leaves):
        raise Refusal("has its tokens in other dimensions than [B, H, S, D]")
    if any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
        raise Refusal("has queries, keys and values of several batches")
    if shapes[1][2] != shapes[2][2]:
        raise Refusal("has not as many keys as values")
    if shapes[1][1] != shapes[2][1] or shapes[0][1] % shapes[1][1]:
        raise Refusal("has heads that are not grouped evenly")
    if shapes[0][1] < cutter.group.ranks:
        raise Refusal(f"has {shapes[0][1]} heads for {cutter.group.ranks} ranks")
    if argument(node, "dropout_p", 0.0):
        raise Refusal("drops scores, which ranks would draw alike for their heads")
    heads = Heads(shapes[0][1], shapes[1][1], cutter.group.ranks)
    graph = cutter.graph
    with graph.inserting_before(node):
        local = _to_heads(cutter, heads, leaves)
        new = _attention(cutter, node, heads, dict(zip(parts, local, strict=True)))
        outs = cutter.leaves_of(new, [None] * len(tensors_of(node)))
        share = Share.of(cutter.group, leaves[0].place.count)  # type: ignore[union-attr]
        rest = (heads.shares, list(share.rows_of), share.me, cutter.group.name)
        back = add_call(graph, torch.ops.mst_fx.heads_to_rows.default, outs[0].node, *rest)
    place = Tokens(2, 1, leaves[0].place.count)  # type: ignore[union-attr]
    cutter.now[node] = Standing((Leaf(back, place), *outs[1:]), tensor_value(node) is None)


def _to_heads(cutter: Cutter, heads: Heads, leaves: list[Leaf]) -> list[fx.Node]:
    """All tokens of this rank's heads, of queries, keys and values: keys and values by one exchange, if they are of one type.

    (Queries come by one of their own: it can be under way while keys and values are computed, :mod:`mst_fx.passes.overlap`.)
    """
    firsts = [firsts_of(heads.shares), heads.key_firsts, heads.key_firsts]
    shares = [heads.shares, heads.key_shares, heads.key_shares]
    of_type = [(min(part, 1), tensors_of(leaf.node)[0].dtype) for part, leaf in enumerate(leaves)]
    found: dict[int, fx.Node] = {}
    for each in dict.fromkeys(of_type):
        some = [part for part in range(3) if of_type[part] == each]
        place = leaves[some[0]].place
        assert place is not None
        moved = add_call(
            cutter.graph,
            torch.ops.mst_fx.rows_to_heads.default,
            [leaves[part].node for part in some],
            firsts[some[0]],
            shares[some[0]],
            list(Share.of(cutter.group, place.count).rows_of),
            cutter.group.me,
            cutter.group.name,
        )
        parts = cutter.leaves_of(moved, [None] * len(some))
        found |= {part: leaf.node for part, leaf in zip(some, parts, strict=True)}
    query, key, value = (found[part] for part in range(3))
    repeats = heads.repeats(cutter.group.me)
    if repeats:
        repeat = torch.ops.mst_fx.repeat_heads.default
        key, value = (add_call(cutter.graph, repeat, x, repeats) for x in (key, value))
    return [query, key, value]


def _attention(cutter: Cutter, node: fx.Node, heads: Heads, local: dict[fx.Node, fx.Node]) -> fx.Node:
    """The attention of this rank's heads."""
    me = cutter.group.me
    first, size = firsts_of(heads.shares)[me], heads.shares[me]
    dims = {
        id(operand): dim for operand, dim in _by_heads(node) if shape_of(operand)[dim] == heads.queries > 1
    }
    swapped = dict(local)
    for operand in node.all_input_nodes:
        if operand in swapped:
            continue
        whole: Any = cutter.whole(operand)
        if id(operand) in dims:
            whole = add_call(cutter.graph, "narrow", whole, dims[id(operand)], first, size)
        swapped[operand] = whole
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), swapped.__getitem__)
    if node.target is F.scaled_dot_product_attention:
        query, key = (shape_of(local[argument(node, name)])[1] for name in ("query", "key"))
        kwargs = {**kwargs, "enable_gqa": query != key}
    return add_copy(cutter.graph, node, node.target, args, kwargs, cutter.modes[node])


def _by_heads(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The operands that may differ between heads, beside queries, keys and values, and the dimension of the heads."""
    found: list[tuple[Any, int]] = []
    if node.target is _ATTENTION:
        found = [(node.args[-1], 0)]
    elif node.target is _BIASED:
        found = [(node.args[3], 1), (node.args[4], 1)]
    else:  # [B, H, Q, K] with fewer dimensions before
        masks: Any = node.args[3] if node.target is _MASKED else [argument(node, "attn_mask")]
        ranks = [len(shape_of(mask)) if isinstance(mask, fx.Node) else 0 for mask in masks]
        found = [(mask, rank - 3) for mask, rank in zip(masks, ranks, strict=True) if rank >= 3]
    return [(operand, dim) for operand, dim in found if isinstance(operand, fx.Node)]
