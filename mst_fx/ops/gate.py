"""``mst_fx::gate(x, after) -> x``: ``x``, not before ``after``.

What is made again in a backward pass reads what is kept of the forward pass through gates on the gradient that arrives there.
It so depends on that gradient: no common-subexpression elimination can merge it with the forward pass, no partitioner
can save it, and no scheduler can run it earlier. The result is ``x`` itself, by the schema too, so that Inductor
(``FallbackKernel``) keeps its memory. The pass that puts it in knows its strides: hence the tag.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mst_fx", "FRAGMENT")
_LIBRARY.define("gate(Tensor(a) x, Tensor after) -> Tensor(a)", tags=(torch.Tag.needs_fixed_stride_order,))


def _gate(x: Tensor, after: Tensor) -> Tensor:
    return x.view_as(x)


_LIBRARY.impl("gate", _gate, "CompositeExplicitAutograd")
torch.library.register_fake("mst_fx::gate", _gate, lib=_LIBRARY)
