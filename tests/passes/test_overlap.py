"""The order of exchanges in a joint graph (:mod:`mst_fx.passes.overlap`): text in, text out."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.distributed  # the operators of collectives
from torch import fx

import mst_fx.ops.attention  # noqa: F401  (its operators)
from mst_fx.context import JointContext
from mst_fx.options import Options
from mst_fx.passes import overlap

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

_CALLS: dict[str, Any] = {
    "mm": aten.mm.default,
    "neg": aten.neg.default,
    "view": aten.view.default,
    "split": aten.split.Tensor,
    "item": operator.getitem,
    "rand": aten.rand_like.default,
    "send": c10d.all_to_all_single.default,
    "wait": c10d.wait_tensor.default,
    "attention": torch.ops.mst_fx.attention.default,
}


def _graph(text: str) -> fx.Graph:
    """Lines ``name = call operand …``; operands that no line makes are inputs."""
    graph = fx.Graph()
    lines = [line.split() for line in text.strip().splitlines()]
    made = {line[0] for line in lines}
    inputs = dict.fromkeys(operand for line in lines for operand in line[3:] if operand not in made)
    nodes = {name: graph.placeholder(name) for name in inputs}
    for name, _, call, *operands in lines:
        nodes[name] = graph.create_node(
            "call_function", _CALLS[call], tuple(nodes[x] for x in operands), name=name
        )
    graph.output(tuple(nodes[name] for name in nodes if not nodes[name].users))
    return graph


def _ordered(text: str) -> str:
    graph = _graph(text)
    overlap.run(JointContext(graph, Options(), lambda plan: None))
    graph.lint()
    return " ".join(node.name for node in graph.nodes if node.op == "call_function")


def test_an_exchange_is_under_way_while_other_products_run() -> None:
    assert (
        _ordered(
            """
            q = mm h wq
            k = mm h wk
            v = mm h wv
            turned_q = neg q
            turned_k = neg k
            sent_q = send turned_q
            here_q = wait sent_q
            heads_q = view here_q
            sent_k = send turned_k v
            here_k = wait sent_k
            parts = split here_k
            heads_k = item parts
            out = attention heads_q heads_k
            """
        )
        == "q turned_q sent_q k v turned_k sent_k here_q heads_q here_k parts heads_k out"
    )


def test_a_weights_gradient_comes_behind_what_is_sent() -> None:
    assert (
        _ordered(
            """
            before = mm g w1
            dw = mm before x
            dx = mm before w
            rows = view dx
            sent = send rows
            here = wait sent
            out = attention here
            """
        )
        == "before dx rows sent dw here out"
    )


def test_gathers_of_parameters_and_random_numbers_stay() -> None:
    text = """
        a = mm x w1
        b = mm a w2
        sent = send shard
        here = wait sent
        c = mm b here
        """
    assert _ordered(text) == "a b sent here c"
    text = """
        a = mm x w1
        noise = rand x
        b = mm noise w2
        sent = send a
        here = wait sent
        c = mm b here
        """
    assert _ordered(text) == "a noise b sent here c"


def test_exchanges_keep_their_order() -> None:
    text = """
        a = mm x w1
        b = mm x w2
        sent_b = send b
        sent_a = send a
        here_a = wait sent_a
        here_b = wait sent_b
        c = mm here_a here_b
        """
    assert _ordered(text) == "b sent_b a sent_a here_a here_b c"


def test_exchanges_of_the_forward_pass_stay_in_it() -> None:
    """Behind the first call that reads an arriving gradient torch's partitioner would put a wait that nobody reads, and the exchange, into the
    backward pass as well: on those ranks alone that can make again what is sent."""
    text = """
        y = mm x w
        sent = send y
        loss = wait sent
        dy = mm tangents_1 w
        dx = neg dy
        """
    assert _ordered(text) == "y sent loss dy dx"
    text = """
        y = mm x w
        z = mm x w2
        dy = mm tangents_1 w
        sent = send dy
        here = wait sent
        """
    assert _ordered(text) == "y z dy sent here"


def test_a_graph_without_exchanges_is_left_alone() -> None:
    graph = _graph("a = mm x w\nb = neg a")
    before = str(graph)
    assert overlap.run(JointContext(graph, Options(), lambda plan: None)) is False
    assert str(graph) == before
