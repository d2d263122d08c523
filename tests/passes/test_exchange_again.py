"""Attention's output exchanged again (:mod:`mst_fx.passes.exchange_again`): where it is, and where not. Numbers: tests/training/test_sequence."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed  # the operators of collectives
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import mst_fx.ops.gate  # noqa: F401  (its operator)
from mst_fx.context import JointContext
from mst_fx.passes import exchange_again

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

_HEADS, _ROWS, _FEATURES = 2, 16, 8  # of one rank of two
_WIDTH = 2 * _HEADS * _FEATURES
_SHORT: dict[Any, str] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attention",
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "attention_backward",
    c10d.all_to_all_single.default: "send",
    c10d.wait_tensor.default: "wait",
    torch.ops.mst_fx.gate.default: "gate",
    aten.mm.default: "mm",
}

_RANDOM = (torch.Tag.pointwise, torch.Tag.nondeterministic_seeded)


@torch.library.custom_op("tests_exchange_again::noise", mutates_args=(), tags=_RANDOM)
def _noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


_noise.register_fake(torch.empty_like)

Step = Callable[[Tensor, Tensor], Tensor]


def _send(x: Tensor) -> Tensor:
    half = [x.numel() // 2] * 2
    return c10d.all_to_all_single(x.reshape(-1), half, half, "0")  # type: ignore[no-any-return]


def _graph(behind: Step, keeps_rows: bool = True) -> fx.Graph:
    """An attention between two exchanges, and a product, with their gradients, in the order in which ``overlap`` leaves them.

    Args:
        behind: what stands between the exchange and the product, of the rows and an input of their size; the gradient of it is left out.
        keeps_rows: whether the product's weight is trained.
    """

    def both(q: Tensor, k: Tensor, v: Tensor, w: Tensor, gate: Tensor, tangents: Tensor) -> list[Any]:
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        rows = behind(c10d.wait_tensor(_send(out)).view(_ROWS, _WIDTH), gate)
        y = rows @ w
        dx = tangents @ w.t()
        sent = _send(dx)
        dw = tangents.t() @ rows if keeps_rows else None
        come = c10d.wait_tensor(sent).view(out.shape)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(come, q, k, v, out, sums, 0.0, True)
        return [y, *grads, dw, None]

    of_heads, rows = (1, _HEADS, 2 * _ROWS, _FEATURES), (_ROWS, _WIDTH)
    shapes = [of_heads, of_heads, of_heads, (_WIDTH, _WIDTH), rows, rows]
    return make_fx(both, tracing_mode="fake")(*map(torch.empty, shapes)).graph


def _as_it_comes(rows: Tensor, gate: Tensor) -> Tensor:
    return rows


def _drawn(rows: Tensor, gate: Tensor) -> Tensor:
    return _noise(rows)


def _cast(rows: Tensor, gate: Tensor) -> Tensor:
    return rows.to(torch.bfloat16).float()


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    return rows * weight


def _gated(rows: Tensor, gate: Tensor) -> Tensor:
    return rows * gate.sigmoid()


def _calls(graph: fx.Graph) -> list[str]:
    return [_SHORT[node.target] for node in graph.nodes if node.target in _SHORT]


def _run(graph: fx.Graph, group: str = "0", **context: Any) -> bool:
    options: Any = SimpleNamespace(group=SimpleNamespace(name=group))
    changed = exchange_again.run(JointContext(graph, options, lambda plan: None, **context))
    graph.lint()
    return changed


_BEFORE = ["attention", "send", "wait", "mm", "mm", "send", "mm", "wait", "attention_backward"]


@pytest.mark.parametrize("behind", [_as_it_comes, _cast, _scaled])
def test_an_exchange_runs_beside_a_product(behind: Step) -> None:
    graph = _graph(behind)
    assert _calls(graph) == _BEFORE
    assert _run(graph)
    again = ["gate", "send", "mm", "send", "wait", "mm", "wait", "attention_backward"]
    assert _calls(graph) == ["attention", "send", "wait", "mm", *again]
    (gate,) = graph.find_nodes(op="call_function", target=torch.ops.mst_fx.gate.default)
    given, arrived = gate.args
    assert given.args[0].target is aten._scaled_dot_product_flash_attention_for_cpu.default
    assert "tangents" in arrived.target, "waits for what the product beside it waits for"
    first, _ = graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)[::2]
    assert not any(user.name == "mm_2" for user in first.users)
    assert not _run(graph), "once is enough"


@pytest.mark.parametrize(
    "graph",
    [_graph(_gated), _graph(_drawn), _graph(_as_it_comes, keeps_rows=False)],
    ids=["kept for a gate's gradient", "made with random numbers", "not read in the backward pass"],
)
def test_rows_that_are_kept_otherwise_or_not_at_all(graph: fx.Graph) -> None:
    before = str(graph)
    assert not _run(graph) and str(graph) == before


def test_a_layer_that_is_made_again_as_a_whole() -> None:
    graph = _graph(_as_it_comes)
    for node in graph.nodes:
        if "attention" in str(node.target):
            node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    assert not _run(graph) and _calls(graph) == _BEFORE


def test_ranks_whose_graphs_differ() -> None:
    graph = _graph(_as_it_comes)
    assert not _run(graph, are_alike=False) and _calls(graph) == _BEFORE


def test_exchanges_of_others() -> None:
    graph = _graph(_as_it_comes)
    assert not _run(graph, group="1") and _calls(graph) == _BEFORE


def test_a_plan_decides_itself() -> None:
    gm = fx.GraphModule({}, _graph(_as_it_comes))

    def is_wanted(**known: Any) -> bool:
        options: Any = SimpleNamespace(**known)
        return exchange_again.is_wanted(options, gm)

    group = object()
    assert is_wanted(group=group, memory=None)
    assert not is_wanted(group=group, memory="auto") and not is_wanted(group=None, memory=None)
