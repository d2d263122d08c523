"""Attention whose mask or bias no formula describes: it is run as it is given, and the scores of all heads are not made.

scores + mask                                      # keys that scored highest, a mask or a bias that the graph is given
where(buffer[:, :, :Q, :K], scores, fill) + mask   # GPT-Neo
scaled_dot_product_attention(…, attn_mask=mask)    # where no kernel of torch's takes it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.names import plain_name
from mst_fx.graph.values import is_plain, storage_key, tensor_value
from mst_fx.masks.formula import SHOW, SOFTMAX, WITH_NUMBER, WITH_TENSOR
from mst_fx.masks.sites import Site, by_steps, have_same_heads
from mst_fx.masks.steps import Step, Steps, is_spread
from mst_fx.torch_api.attention import is_fused_with_mask


def as_given(site: Site, mutated: Collection[int], under_autocast: bool) -> Site | None:
    """The site as its steps; None: they are not all known, or there is nothing to gain.

    Args:
        mutated: the storages that some node of the program writes to.
    """
    if site.is_eager:
        return by_steps(site.level, site.out, mutated)
    query, key, value, out = map(tensor_value, (site.query, site.key, site.value, site.out))
    mask = tensor_value(site.mask) if site.mask is not None else None
    if query is None or key is None or value is None or out is None or mask is None:
        return None
    is_read_as_it_is = mask.dtype == torch.bool or (mask.dtype == query.dtype and not under_autocast)
    is_plain_call = not site.dropout and not site.causal and have_same_heads(site)
    scores = [*query.shape[:3], key.shape[2]]
    if (
        not is_plain_call
        or not is_read_as_it_is
        or not is_spread(mask, scores)
        or not _gains(query, key, value, mask)
    ):
        return None
    how = SHOW if mask.dtype == torch.bool else WITH_TENSOR["add"]
    steps = (Step(WITH_NUMBER["mul"], None, site.scale), Step(how, site.mask, float("-inf")), Step(SOFTMAX))
    return dataclasses.replace(site, mask=None, steps=Steps(steps, out.dtype, is_fused=True))


def _gains(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether torch's fused attention would make something of the size of all scores that is not there already."""
    return not is_fused_with_mask(query, key, value, mask)


def check_given(site: Site, mutated: Collection[int]) -> None:
    """Refuses what a later chunk, or the backward pass, might read otherwise than it was, and heads that are repeated.

    Raises:
        Refusal: naming it.
    """
    assert site.steps is not None
    if not have_same_heads(site):
        raise Refusal(f"{site.out.name}: query, key and value have other batches or heads", Cause.SCORES)
    for node in site.steps.tensors:
        for fake in map(tensor_value, (node, site.level.resolve(node))):
            if fake is None or not is_plain(fake) or storage_key(fake) in mutated:
                raise Refusal(
                    f"{node.name} ({plain_name(node)}), which scores are changed by, is written to in place",
                    Cause.MASK,
                )
