"""What a call costs: floating-point operations, from torch's formulas and ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from mst_fx.bodies.body import Body, body_of
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import argument, operation
from mst_fx.masks import formula
from mst_fx.ops.experts import with_keys
from mst_fx.plan.inside import traced_rows
from mst_fx.plan.joint_graph import bytes_of, is_attention, is_read_whole, is_view, tensor_of
from mst_fx.torch_api.tensors import tree_leaves

_LOOPS = ("mst_fx::loop", "mst_fx::loop_list")
_EXPERTS = ("mst_fx::experts_loop", "mst_fx::experts_loop_backward")
_LOOPS_WITH_GRADIENTS = ("mst_fx::loop_backward", "mst_fx::loop_with_grad")  # they make the inside again, too


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some calls cost.

    Attributes:
        products: floating-point operations of products of matrices, and of loops.
        attention: those of attention.
        moved: bytes of the results of other calls that are written for one that is not fused.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: int = 0

    @property
    def flops(self) -> float:
        return self.products + self.attention

    def seconds(self, device: Device) -> float:
        return (
            self.products / device.products
            + self.attention / device.attention
            + self.moved / device.bandwidth
        )


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device reaches in a training step in bfloat16.

    Attributes:
        products, attention: operations a second.
        bandwidth: bytes a second that its memory takes.
        link: bytes a second of copies to the host's memory and back, each way.
    """

    products: float
    attention: float
    bandwidth: float
    link: float


# By a part of the name. H200's as measured in whole steps of 8 layers (benchmarks/h200.md); H100's and A100's from their data sheets, at the
# same shares of their peaks.
_DEVICES = {
    "H200": Device(740e12, 520e12, 3.2e12, 50e9),
    "H100": Device(740e12, 520e12, 2.2e12, 50e9),
    "A100": Device(235e12, 165e12, 1.3e12, 24e9),
}
# The ratios count: a plan is the same for a device that is slower in all of it.
_OTHER = Device(100e12, 80e12, 0.8e12, 12e9)


def known_devices() -> list[str]:
    """The devices whose figures are known."""
    return list(_DEVICES)


def device_of(name: str) -> Device:
    """The figures of a device, by its name (``torch.cuda.get_device_name()``)."""
    return next((found for known, found in _DEVICES.items() if known in name), _OTHER)


def plus(costs: Iterable[Cost]) -> Cost:
    """What calls cost one after the other."""
    costs = list(costs)
    return Cost(
        math.fsum(cost.products for cost in costs),
        math.fsum(cost.attention for cost in costs),
        sum(cost.moved for cost in costs),
    )


def cost_of(nodes: Iterable[fx.Node]) -> Cost:
    """What some calls cost together, sizes by hint."""
    return plus(map(cost_of_call, nodes))


def cost_of_call(node: fx.Node) -> Cost:
    """What a call costs, sizes by hint."""
    flops = flops_of(node)
    moved = bytes_of(node) if not flops and not is_view(node) and is_read_whole(node) else 0
    return Cost(attention=flops, moved=moved) if is_attention(node) else Cost(products=flops, moved=moved)


def flops_of(node: fx.Node) -> float:
    """Floating-point operations of a call, sizes by hint; a multiplication and an addition are two.

    Products of matrices, attention, and loops of them: the rest is bound by memory, and counts 0.
    """
    if node.op != "call_function":
        return 0.0
    if is_attention(node):
        return attention_flops(node)
    if operation(node) in (*_LOOPS, *_LOOPS_WITH_GRADIENTS, *_EXPERTS):
        return _flops_of_loop(node)
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args: Any = fx.map_arg(node.args, lambda n: n.meta.get("val"))
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: n.meta.get("val"))
    return float(hint(formula(*args, **kwargs, out_val=node.meta.get("val"))))


def _flops_of_loop(node: fx.Node) -> float:
    run, needs = body_of(str(argument(node, "body_key"))), argument(node, "needs")
    inside = sum(map(flops_of, run.forward.graph.nodes))
    if operation(node) in _EXPERTS:
        needs = None if needs is None else with_keys(run, needs)
        total = hint(_tensor(argument(node, "key")).numel())
    else:
        rows = _tensor(next(arg for arg in tree_leaves(node.args[0]) if isinstance(arg, fx.Node)))
        total = math.prod(map(hint, rows.shape[: rows.ndim - len(run.row_metas[0].shape)]))
    if needs is not None:
        inside += _flops_of_gradients(run, needs)  # type: ignore[arg-type]
    return inside * total / traced_rows(run)


def _tensor(node: Any) -> torch.Tensor:
    found = tensor_of(node)
    assert found is not None
    return found


def _flops_of_gradients(run: Body, needs: Sequence[bool]) -> float:
    """Of a body's products: as many as forward for each operand that depends on what needs a gradient."""
    _, *inputs = run.forward.graph.find_nodes(op="placeholder")  # behind the number of rows
    depends = {node for node, need in zip(inputs, needs, strict=True) if need}
    found = 0.0
    for node in run.forward.graph.nodes:
        if node.op == "call_function" and not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            is_grouped = operation(node) == "mst_fx::grouped_mm"
            factors = [f for f in (node.args[:2] if is_grouped else node.args[-2:]) if isinstance(f, fx.Node)]
            found += flops_of(node) * sum(factor in depends for factor in factors)
    return found


def attention_flops(node: fx.Node) -> float:
    """Of the two products of a forward kernel of attention, or of the one that a backward kernel belongs to."""
    query, key, value = (tensor_of(argument(node, name)) for name in ("query", "key", "value"))
    assert query is not None and key is not None and value is not None
    batch_heads, queries, keys = (
        math.prod(map(hint, query.shape[:2])),
        hint(query.shape[2]),
        hint(key.shape[2]),
    )
    mask = argument(node, "mask")
    if isinstance(mask, str):
        seen = _seen(formula.parse(mask), queries, keys)
    else:
        seen = queries * keys * (0.5 if argument(node, "is_causal") else 1.0)
    return 2.0 * batch_heads * seen * (hint(query.shape[3]) + hint(value.shape[3]))


def _seen(mask: formula.Mask, queries: int, keys: int) -> float:
    """How many pairs of a query and a key a mask lets through, by its comparisons of positions: what depends on data counts as seen."""
    compared = [part for part in formula.conjuncts(mask) if isinstance(part, formula.Compare)]
    is_causal = any(part.op in ("le", "lt") and part.offset == 0 for part in compared)
    widths = [-part.offset for part in compared if part.op in ("gt", "ge") and part.offset < 0]
    seen = queries * keys * (0.5 if is_causal else 1.0)
    if is_causal and widths and min(widths) < keys:
        width = min(widths)
        seen = queries * width - width * width / 2
    return seen
