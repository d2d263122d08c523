"""Heads of keys and values that are fewer than those of queries, and which kernel takes them."""

from __future__ import annotations

from torch import fx

from mst_fx.graph.spelling import operation
from mst_fx.graph.values import tensor_value
from mst_fx.masks.sites import Site
from mst_fx.torch_api.attention import is_fused


def is_ours(site: Site) -> bool:
    """Whether :mod:`mst_fx.ops.attention` runs the kernel that torch would run, and does better: on a GPU its
    backward pass takes a few heads at a time, and no random state is kept for dropout that is none."""
    query, value, out = map(tensor_value, (site.query, site.value, site.out))
    if query is None or value is None or out is None:
        return False
    return is_fused(query, value, site.dtype or out.dtype)


def is_grouped(site: Site) -> bool:
    """Whether a kernel can take fewer heads of keys and values than the call has."""
    return ungrouped(site) != (site.key, site.value)


def ungrouped(site: Site) -> tuple[fx.Node, fx.Node]:
    """Keys and values before ``repeat_kv``, where a kernel takes grouped heads; otherwise as they are."""
    key, values = _before_repeat(site.key), _before_repeat(site.value)
    query, wide, out = map(tensor_value, (site.query, values, site.out))
    if query is None or wide is None or out is None or not is_fused(query, wide, site.dtype or out.dtype):
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
