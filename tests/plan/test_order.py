"""What is behind attention's backward pass: weights' gradients first, the same bits, fewer bytes at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.utils import run_and_get_code

from mst_fx import compiling
from mst_fx.context import JointContext
from mst_fx.plan import recompute
from mst_fx.plan.joint_graph import JointGraph, aten, is_attention, is_attention_backward, storage_of
from mst_fx.plan.order import weights_first
from mst_fx.plan.peak import calls_of, curve_of
from tests.helpers import SMALL_CHUNKS, compile_mst, step
from tests.models import ACCEPTED, inputs_of
from tests.plan.test_memory_plan import Chosen, _model, _stages
from tests.plan.ways import Ways


def _leave(joint: JointGraph) -> None:
    """No order of ours."""


def _behind(joint: JointGraph) -> list[tuple[bool, int]]:
    """Of each layer but the last, the six products behind attention: whether they are of weights' gradients, and how wide their
    operand is."""
    results = {storage_of(node) for node in joint.gradients if node is not None}
    found: list[tuple[bool, int]] = []
    left = 0
    for node in joint.graph.nodes:
        if is_attention_backward(node):
            left = 6
        elif left and node.target is aten.mm.default:
            left -= 1
            is_of_weight = node in results
            found.append((is_of_weight, node.args[0].meta["val"].shape[0 if is_of_weight else 1]))
    return found


def _highest(calls: list[fx.Node], curve: list[int]) -> Iterator[tuple[int, int]]:
    """The bytes alive at the highest moment from each attention up to the last of its six products, and up to the next attention."""
    for start, node in enumerate(calls):
        if is_attention_backward(node):
            products = [i for i in range(start, len(calls)) if calls[i].target is aten.mm.default]
            after = (i for i in range(start + 1, len(calls)) if is_attention(calls[i]))
            yield max(curve[start + 1 : products[5] + 1]), max(curve[start + 1 : next(after, len(calls))])


def test_weights_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query (64 wide), then value and key (32); up to the last product fewer bytes are alive, of long sequences."""
    model, _ = _model()
    batch = inputs_of(ACCEPTED["llama"], 1, 768)
    seen: list[Any] = []

    class Looking(Chosen):
        def __call__(self, context: JointContext) -> None:
            monkeypatch.setattr(recompute, "weights_first", _leave)
            super().__call__(context)
            for order in (_leave, weights_first):
                joint = JointGraph(context.graph)
                order(joint)
                context.graph.lint()
                calls, curve = calls_of(joint), curve_of(joint)
                seen.append((_behind(joint), list(_highest(calls, curve))))

    monkeypatch.setattr(compiling, "JOINT_STAGES", _stages(Looking(0)))
    compile_mst(model, {**SMALL_CHUNKS, "strict": True})(**batch, use_cache=False)
    (before, high), (after, low) = seen
    each = [(True, 64), (True, 32), (True, 32), (False, 64), (False, 32), (False, 32)]
    assert after == each * 3 and before != after
    assert all(now[0] < then[0] and now[1] <= then[1] for now, then in list(zip(low, high, strict=True))[:-1])


class _Ordered(Chosen):
    """A choice with the order of autograd, or ours."""

    def __init__(self, index: int, order: Callable[[JointGraph], None]) -> None:
        super().__init__(index)
        self.order = order

    def __call__(self, context: JointContext) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recompute, "weights_first", self.order)
            super().__call__(context)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 100])
def test_the_same_bits(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all made again, and with most kept."""
    model, batch = _model()
    orders = (_leave, weights_first)
    ways = [(_stages(_Ordered(index, order)), {"strict": True}) for order in orders]
    compiled = Ways(monkeypatch, model, ways)
    loss, truth = step(model, compiled.run, batch)
    compiled.now = 1
    found = step(model, compiled.run, batch)
    assert torch.equal(found[0], loss) and all(torch.equal(found[1][name], x) for name, x in truth.items())


def _of_two_layers() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A layer whose products have no boundary to the next one's: its MLP is no loop."""
    graph = fx.Graph()
    names = ("q", "k", "w1", "w2", "x", "tangents_1")
    n = {name: graph.placeholder(name) for name in names}
    rest = (n["q"], n["q"], n["q"], n["q"], n["q"], 0.0, True)
    n["call"] = graph.call_function(
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default, (n["tangents_1"], *rest)
    )
    n["dq"] = graph.call_function(operator.getitem, (n["call"], 0))
    n["rows"] = graph.call_function(aten.mm.default, (n["dq"], n["w1"]))
    n["weight"] = graph.call_function(aten.mm.default, (n["dq"], n["x"]))
    n["next"] = graph.call_function(aten.relu.default, (n["rows"],))
    n["next_rows"] = graph.call_function(aten.mm.default, (n["next"], n["w2"]))
    n["next_weight"] = graph.call_function(aten.mm.default, (n["next"], n["x"]))
    value = torch.empty(4, 4, device="meta")
    for node in graph.nodes:
        node.meta["val"] = value
    graph.output((n["x"], None, None, n["weight"], n["next_weight"], None))
    return graph, n


def test_products_of_the_next_layer_stay() -> None:
    graph, n = _of_two_layers()
    joint = JointGraph(graph)
    weights_first(joint)
    graph.lint()
    order = {node: index for index, node in enumerate(graph.nodes)}
    names = ("weight", "rows", "next_rows", "next_weight")
    assert sorted(names, key=lambda name: order[n[name]]) == list(names)


@pytest.mark.slow
def test_inductor_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's three products of weights, whose left operand is transposed, come first in the code: 96 rows are summed over."""
    model, batch = _model()
    monkeypatch.setattr(compiling, "JOINT_STAGES", _stages(Chosen(0)))
    options = {**SMALL_CHUNKS, "inner": "inductor", "strict": True, "attention_chunk_rows": 16}
    run = compile_mst(model, {**options, "inductor": {"force_disable_caches": True}})
    _, codes = run_and_get_code(lambda: step(model, run, {**batch, "use_cache": False}))
    (code,) = (code for code in codes if "attention_backward.default(" in code)
    parts = code.split("attention_backward.default(")[1:]
    for part in (part for part in parts if "extern_kernels.mm" in part):
        sums = [", 96), (1, " in line for line in part.splitlines() if "extern_kernels.mm(" in line]
        assert sums[:6] == [True, True, True, False, False, False]
