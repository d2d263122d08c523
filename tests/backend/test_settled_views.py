"""Inductor's views of buffers whose strides are open: of the strides that the buffers get in the end."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V, ops

from mst_fx.torch_api.settled_views import settled_views

_SIZE = [2, 2, 101, 16]
_GIVEN = [3232, 16, 32, 1]  # heads behind rows, as a projection leaves them


def _strides(context: AbstractContextManager[None], pad: bool) -> tuple[list[int], list[int]]:
    """The strides of ``(-x).unsqueeze(2)``, without the new dimension, and those that ``-x`` has in the end."""
    graph = GraphLowering(fx.symbolic_trace(lambda x: x))
    with V.set_graph_handler(graph), context:
        device, dtype = torch.device("cpu"), torch.float32
        layout = ir.FixedLayout(device, dtype, _SIZE, _GIVEN)
        given = ir.TensorBox.create(ir.InputBuffer(name="given", layout=layout))
        graph.graph_inputs["given"] = given
        negative = ir.Pointwise.create(
            device=device,
            dtype=dtype,
            inner_fn=lambda index: ops.neg(given.make_loader()(index)),
            ranges=_SIZE,
        )
        negative.realize()
        if pad:
            negative.get_layout().pad_strides()
        view = ir.View.create(negative.data, [2, 2, 1, 101, 16])
        ir.as_storage_and_layout(negative)  # settles what is open
        strides = list(view.get_layout().stride)
        return strides[:2] + strides[3:], list(negative.get_layout().stride)


@pytest.mark.parametrize("pad", [False, True], ids=["", "padded"])
def test_views_have_the_strides_of_their_buffers(pad: bool) -> None:
    found, truth = _strides(settled_views(), pad)
    assert found == truth
