"""Which operators of a backward are linear in the gradient that arrives.

A derivative is; what somebody wrote in its place may clip that gradient, or divide it by its norm. Ranks that work on one sequence give
an operator gradients of another scale than one process (:mod:`mst_fx.ranks.gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mst_fx.declared import DECLARED
from mst_fx.rows.labels import tensors
from mst_fx.torch_api.ops import schema_of

aten = torch.ops.aten

Depends = Callable[[Any], bool]

# Of one operand, or of several that all are gradients.
_SUMS = frozenset(
    {
        *(
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.alias.default,
            aten.clone.default,
        ),
        *(
            aten.t.default,
            aten.transpose.int,
            aten.permute.default,
            aten.expand.default,
            aten._to_copy.default,
        ),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.select.int, aten.slice.Tensor),
        *(
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.unbind.int,
            aten.cat.default,
            aten.stack.default,
        ),
        *(aten.sum.default, aten.sum.dim_IntList, aten.neg.default, aten.detach.default),
    }
)
# Of one operand; the others are factors.
_PRODUCTS = frozenset(
    {aten.mul.Tensor, aten.mul.Scalar, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
)
# Of the first operand alone.
_FIRST = frozenset(
    {
        *(aten.div.Tensor, aten.div.Scalar, aten.silu_backward.default, aten.gelu_backward.default),
        *(aten.threshold_backward.default, aten.sigmoid_backward.default, aten.tanh_backward.default),
    }
)
_PAIRS = frozenset({aten.add.Tensor, aten.sub.Tensor})


def is_linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], depends: Depends) -> bool:
    """Whether a call is linear in those of its operands, at least one, that depend on the gradient."""
    of_gradient = [x for x in tensors((args, kwargs)) if depends(x)]
    others = [x for x in tensors((args, kwargs)) if not depends(x)]
    if func in _SUMS:
        return not others
    if func in _PRODUCTS:
        return len(of_gradient) == 1
    if func in _FIRST:
        return len(of_gradient) == 1 and of_gradient[0] is args[0]
    if func in _PAIRS:
        return all(isinstance(x, torch.Tensor) for x in args[:2]) and not others
    return _is_declared(func, args, kwargs, depends)


def _is_declared(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], depends: Depends) -> bool:
    """By the word of who declared it: what a backward calls with a gradient in an argument that holds rows is linear in that."""
    said = DECLARED.of(func)
    if said is None:
        return False
    names = [x.name for x in schema_of(func).arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    found = [name for name, x in given.items() if isinstance(x, torch.Tensor) and depends(x)]
    return len(found) == 1 and found[0] in said.row_args
