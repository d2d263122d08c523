"""Written-out attention in three dimensions, in four, with keys that are transposed: what the attention pass knows.

Before (XGLM, TrOCR; Bloom with ``baddbmm``), N = B·H::

    scores = bmm(q, k.transpose(1, 2))                                    # [N, Q, K]; or alibi.baddbmm(q, kᵀ, beta=…, alpha=…)
    scores = (scores.view(B, H, Q, K) + mask).view(N, Q, K)
    out = bmm(softmax(scores, -1), v)                                     # [N, Q, D]

After::

    scores = matmul(q.unflatten(0, (B, H)), k.unflatten(0, (B, H)).transpose(2, 3))       # [B, H, Q, K]; times alpha, plus alibi
    out = matmul(softmax(scores + mask, -1), v.unflatten(0, (B, H))).flatten(0, 1)

Where nothing says what H is, it is 1. Scores alone, too, if the softmax is in four dimensions already (GPT-NeoX Japanese). And keys that
were brought into the order of a product at once (OpenAI GPT)::

    scores = matmul(q, k.permute(0, 2, 3, 1))                             # [B, S, H, D] → [B, H, D, K]
    → matmul(q, k.permute(0, 2, 3, 1).transpose(2, 3).transpose(2, 3))

Left alone: where somebody else reads what is in between, or a node of it has dimensions as
arguments that are not known here.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, copy_provenance, replace_with
from mst_fx.graph.levels import Level, all_levels
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import expression, is_one, is_same
from mst_fx.graph.spelling import DROPOUTS, FLOAT_CASTS, RESHAPES, SOFTMAXES, argument, operation
from mst_fx.graph.values import tensor_value
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.masks.constants import fill_of
from mst_fx.masks.scores import is_of_scores, scores_of, transposed

_PRODUCTS = ("bmm", "baddbmm", "matmul")
_POINTWISE = (
    FLOAT_CASTS | DROPOUTS | {"add", "mul", "div", "masked_fill", "where", "max", "maximum", "contiguous"}
)


def run(context: PassContext) -> bool:
    """Rewrites all graphs of a program."""
    changed = False
    for level in all_levels(Level(context.gm)):
        for node in outside_transforms(level.gm.graph):
            chain = _chain_to(node)
            if chain is not None:
                _write(chain)
                changed = True
        for node in outside_transforms(level.gm.graph):
            if operation(node) in SOFTMAXES and _rank(node) == 4:
                changed |= _in_order(node)
    return changed


def _in_order(softmax: fx.Node) -> bool:
    """Scores in four dimensions, of a key that is transposed, where a softmax is in four."""
    changed, scores = False, scores_of(softmax)
    if scores is not None and _rank(scores) == 3 and len(scores.users) == 1:
        (view,) = scores.users
        if operation(view) in RESHAPES and _rank(view) == 4 and _splits_heads(view):
            scores = _split_scores(scores, view)
            changed = scores is not None
    if scores is None or operation(scores) != "matmul" or _rank(scores) != 4 or scores.kwargs:
        return changed
    query, key = scores.args
    if transposed(key) is not None or not isinstance(key, fx.Node) or _rank(key) != 4:
        return changed
    with scores.graph.inserting_before(scores):
        plain = add_call(scores.graph, torch.transpose, key, 2, 3)
        scores.args = (query, add_call(scores.graph, torch.transpose, plain, 2, 3))
    return True


def _split_scores(scores: fx.Node, view: fx.Node) -> fx.Node | None:
    """Scores ``[N, Q, K]`` as a product in four dimensions, in the place of their view; None: they are of something else."""
    fakes = [tensor_value(x) for x in (*_factors(scores), scores) if isinstance(x, fx.Node)]
    heads = tensor_value(view).shape[1]  # type: ignore[union-attr]
    if operation(scores) not in _PRODUCTS or len(fakes) != 3 or not isinstance(heads, int):
        return None
    if any(fake is None or fake.ndim != 3 or not is_same(fake.shape[0], fakes[2].shape[0]) for fake in fakes):  # type: ignore[union-attr]
        return None
    with scores.graph.inserting_before(view):
        new = _product(scores, heads)
    replace_with(view, new)
    scores.graph.erase_node(scores)
    return new


def _chain_to(out: fx.Node) -> list[fx.Node] | None:
    """The nodes from scores ``[N, Q, K]`` to the product with values; None: the node is no such product."""
    if operation(out) not in ("bmm", "matmul") or _rank(out) != 3 or len(out.args) != 2 or out.kwargs:
        return None
    chain, current, softmaxes = [out], out.args[0], 0
    while isinstance(current, fx.Node) and len(current.users) == 1 and not writes_in_place(current):
        chain.append(current)
        name = operation(current)
        if name in _PRODUCTS:
            is_known = softmaxes == 1 and _rank(current) == 3 and is_of_scores(current)
            return chain[::-1] if is_known and _are_products(chain) else None
        if name in SOFTMAXES and argument(current, "dim") in (-1, (_rank(current) or 0) - 1):
            softmaxes += 1
        elif not (_splits_heads(current) if name in RESHAPES else name in _POINTWISE):
            return None
        current = _source(current)
    return None


def _are_products(chain: list[fx.Node]) -> bool:
    """Whether queries and keys, and values, are ``[N, ·, ·]`` each, and all views in between ``[B, H, Q, K]``."""
    scores, out = chain[-1], chain[0]
    factors = (*_factors(scores), out.args[1])
    if not all(isinstance(x, fx.Node) and _rank(x) == 3 for x in factors):
        return False
    counts = {expression(x.shape[0]) for x in map(tensor_value, (scores, *factors)) if x is not None}
    splits = {
        tuple(map(expression, x.shape[:2])) for x in map(tensor_value, chain) if x is not None and x.ndim == 4
    }
    return len(counts) == 1 and len(splits) <= 1 and all(heads.is_number for _, heads in splits)


def _factors(scores: fx.Node) -> tuple[Any, Any]:
    if operation(scores) == "baddbmm":
        return argument(scores, "batch1"), argument(scores, "batch2")
    return argument(scores, "input", scores.args[0]), scores.args[1] if len(scores.args) > 1 else None


def _source(node: fx.Node) -> Any:
    """The operand of a node that is scores, or made of them."""
    operands = [x for x in node.all_input_nodes if tensor_value(x) is not None and is_of_scores(x)]
    if operation(node) in SOFTMAXES | RESHAPES | FLOAT_CASTS | DROPOUTS:
        return node.args[0] if node.args else None
    return operands[0] if len(operands) == 1 else (node.args[0] if not operands and node.args else None)


def _rank(node: Any) -> int | None:
    fake = tensor_value(node) if isinstance(node, fx.Node) else None
    return None if fake is None else fake.ndim


def _splits_heads(node: fx.Node) -> bool:
    """Whether a view is ``[B, H, Q, K]`` of ``[N, Q, K]``, or the other way round, or one of these as it is."""
    source = node.args[0] if node.args else None
    fakes = [tensor_value(node), tensor_value(source) if isinstance(source, fx.Node) else None]
    if any(fake is None or fake.ndim not in (3, 4) for fake in fakes):
        return False
    shapes = [[expression(size) for size in fake.shape] for fake in fakes]  # type: ignore[union-attr]
    if shapes[0] == shapes[1]:
        return True
    return len(shapes[0]) != len(shapes[1]) and shapes[0][-2:] == shapes[1][-2:]


def _write(chain: list[fx.Node]) -> None:
    scores, *links, out = chain
    graph, heads = out.graph, _heads_of(links)
    with graph.inserting_before(out):
        new = _product(scores, heads)
        for node in links:
            if operation(node) not in RESHAPES:
                new = _in_four(node, _source(node), new, heads)
        new = add_call(graph, torch.matmul, new, _split(out.args[1], heads))
        copy_provenance(out, new)
        flat = add_call(graph, torch.flatten, new, 0, 1)
    replace_with(out, flat)
    for node in reversed(chain[:-1]):
        graph.erase_node(node)


def _heads_of(links: list[fx.Node]) -> Any:
    """H, as a view in between says it; 1, if none does."""
    for node in links:
        fake = tensor_value(node)
        if fake is not None and fake.ndim == 4 and isinstance(fake.shape[1], int):
            return fake.shape[1]
    return 1


def _split(node: Any, heads: int) -> fx.Node:
    """``[B, H, …]`` of ``[N, …]``."""
    if heads == 1:  # which a mask is read through
        return add_call(node.graph, torch.unsqueeze, node, 1)
    return add_call(node.graph, "unflatten", node, 0, (-1, heads))


def _product(scores: fx.Node, heads: int) -> fx.Node:
    graph = scores.graph
    query, factor = _factors(scores)
    plain = transposed(factor)
    if plain is not None:
        key = _split(plain, heads)
    else:
        key = add_call(graph, torch.transpose, _split(factor, heads), 2, 3)
    new = add_call(graph, torch.matmul, _split(query, heads), add_call(graph, torch.transpose, key, 2, 3))
    copy_provenance(scores, new)
    if operation(scores) != "baddbmm":
        return new
    alpha, beta = argument(scores, "alpha", 1), argument(scores, "beta", 1)
    if alpha != 1:
        new = add_call(graph, operator.mul, new, alpha)
    if beta == 0 or fill_of(argument(scores, "input"), mutated_storages(graph)) == 0:
        return new
    added = _aligned(argument(scores, "input"), scores, heads)
    added = added if beta == 1 else add_call(graph, operator.mul, added, beta)
    return add_call(graph, operator.add, new, added)


def _in_four(node: fx.Node, source: fx.Node, new: fx.Node, heads: int) -> fx.Node:
    """A node, of scores in four dimensions."""

    def operand(x: fx.Node) -> fx.Node:
        return new if x is source else _aligned(x, node, heads)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
    if operation(node) in SOFTMAXES:
        args, kwargs = args[:1], {**kwargs, "dim": -1}
        types = argument(node, "dtype")
        kwargs = {"dim": -1} if types is None else {"dim": -1, "dtype": types}
        made = add_call(node.graph, torch.softmax, *args, **kwargs)
    else:
        made = add_call(node.graph, node.target, *args, **kwargs)
    copy_provenance(node, made)
    return made


def _aligned(operand: fx.Node, node: fx.Node, heads: int) -> fx.Node:
    """What is joined with scores: ``[N, Q, K]`` split as they are."""
    fake, at = tensor_value(operand), tensor_value(node)
    if fake is None or at is None or at.ndim == 4 or fake.ndim < 3 or is_one(fake.shape[0]):
        return operand
    return _split(operand, heads)
