"""A body by hand: rows times a scalar of another type, which Inductor makes one pass over their memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_fx.bodies.body import Body, BodyConfig, OutputMeta, TensorMeta
from mst_fx.torch_api.fakes import make_fx
from mst_fx.torch_api.symbolic_rows import symbolic_rows


def product_body(dtype: torch.dtype, tangent_dtype: torch.dtype, device: torch.device) -> Body:
    """``(x * tangent).to(x.dtype)`` of rows of one element."""

    def multiplied(n: Any, x: Tensor, tangent: Tensor) -> list[Tensor]:
        return [(x * tangent).to(x.dtype)]

    row_meta, shared_meta = TensorMeta((), (), dtype, device), TensorMeta((1,), (1,), tangent_dtype, device)
    mode, n = symbolic_rows()
    with mode:
        forward = make_fx(multiplied)(n, row_meta.empty(n), shared_meta.empty())
    output = OutputMeta(False, (), dtype, device)
    return Body(forward, [row_meta], [shared_meta], [output], BodyConfig("inductor", "auto"), set())
