"""Attention's backward pass over the memory of operands that nobody reads again: where it does so, the same bits, and where it must not."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mst_fx import compiling
from mst_fx.context import JointContext
from mst_fx.masks.formula import And, Compare, Mask, text
from mst_fx.ops import attention as ops
from mst_fx.ops import loop, loop_over
from mst_fx.plan.joint_graph import JointGraph, is_attention_backward
from mst_fx.plan.peak import calls_of, curve_of, held_by, scratch_of
from mst_fx.torch_api import attention, inductor, overwriting
from tests.helpers import SMALL_CHUNKS, compile_mst, relative_error, step, worst_error
from tests.models import ACCEPTED, inputs_of
from tests.plan.test_memory_plan import Chosen, _stages
from tests.plan.ways import PLAIN, Ways

mst = torch.ops.mst_fx

_CAUSAL = Compare("le", "k0", "q0", 0)
_MASKS: dict[str, Mask] = {"kernel": _CAUSAL, "chunks": And((_CAUSAL, Compare("eq", "k1", "q1", 0)))}


def _operands(groups: int = 2, size: int = 48, *, seed: int = 0) -> list[Tensor]:
    """Tangent, query, key and value ``[2, 4 or groups, size, 8]``, as projections give them."""
    torch.manual_seed(seed)
    heads = (4, 4, groups, groups)
    return [torch.randn(2, size, count, 8, dtype=torch.float64).transpose(1, 2) for count in heads]


def _call(mask: str, size: int, sinks: Tensor | None = None) -> tuple[Any, ...]:
    """The arguments of attention behind its operands."""
    place = torch.arange(size)[None]
    vectors = [place, (place // 11).contiguous()]
    form = _MASKS[mask]
    reaches = ops.mask_reach(vectors, vectors, [text(form)], size, size, 16, [False])
    return vectors, vectors, *reaches, [], text(form), 0, 16, 0.3, 0.0, 0.0, None, sinks


@pytest.mark.parametrize("mask", _MASKS)
@pytest.mark.parametrize("over", itertools.product([False, True], repeat=3))
@pytest.mark.parametrize("sinks", ["", "sinks", "a few heads at a time"])
def test_the_operator_writes_what_the_other_gives(
    mask: str, over: tuple[bool, bool, bool], sinks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tangent, query, key, value = _operands()
    if sinks == "a few heads at a time":
        monkeypatch.setattr("mst_fx.ops.attention._MOST_SCORES", 1)
    call = _call(mask, query.shape[2], torch.randn(4, dtype=torch.float64) if sinks else None)
    out, sums = ops.attention(query, key, value, *call)
    wanted = ops.attention_backward(tangent, out, sums, query, key, value, *call)
    before = [x.clone() for x in (tangent, key, value, query, out)]
    places = [x if taken else None for x, taken in zip((tangent, key, value), over, strict=True)]
    found = mst.attention_backward_over(tangent, out, sums, query, key, value, *call, *places)
    for given, gradient, place, want in zip(before, found, places, wanted, strict=False):
        assert torch.equal(gradient if place is None else place, want)
        assert place is None or (gradient.numel() == 0 and not torch.equal(given, want))
    for x, given, taken in zip((tangent, key, value, query, out), before, (*over, False, False), strict=True):
        assert taken or torch.equal(x, given)


def _kernel(*operands: Tensor) -> attention.Gradients:
    found: attention.Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *operands, 0.0, True, scale=0.3
    )
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "busy", [1, 100, 250, 450]
)  # 48 queries, a batch of two: 1 head at a time, 1, 3 groups, all
def test_heads_in_turns(groups: int, busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups: the same bits as all at once. Single heads of a group: the same to rounding. Written over operands: the same bits."""
    monkeypatch.setattr(attention, "_BUSY", busy)
    tangent, query, key, value = _operands(groups)
    out, sums = ops.attention(query, key, value, *_call("kernel", query.shape[2]))
    truth = _kernel(tangent, query, key, value, out, sums)
    calls: list[int] = []

    def run(*operands: Tensor) -> attention.Gradients:
        calls.append(operands[1].shape[1])
        return _kernel(*operands)

    found = attention._by_heads(run, tangent, query, key, value, out, sums, (None, None, None))
    at_once = attention.heads_at_once(2, 4, query.shape[2], groups)
    assert calls == [min(at_once, 4 - first) for first in range(0, 4, at_once)]
    for each, true in zip(found, truth, strict=True):
        assert torch.equal(each, true) if at_once >= 4 // groups else torch.allclose(each, true, 1e-12, 1e-12)
    over = attention._by_heads(run, tangent, query, key, value, out, sums, (tangent, key, value))
    assert all(x is y for x, y in zip(over, (tangent, key, value), strict=True))
    assert all(map(torch.equal, over, found))


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Heads in turns at few tokens. Gives, for each backward call that writes over operands, which it has written to in truth."""
    monkeypatch.setattr(attention, "_BUSY", 64)
    found: list[list[str]] = []
    plain = ops._gradients

    def gradients(
        call: Any, tangent: Tensor, out: Tensor, sums: Tensor, over: Sequence[Tensor | None]
    ) -> Any:
        if any(x is not None for x in over):
            operands = {"tangent": tangent, "key": call.key, "value": call.value}
            pairs = zip(operands.items(), over, strict=True)
            found.append([name for (name, x), y in pairs if y is not None and x.data_ptr() == y.data_ptr()])
        return plain(call, tangent, out, sums, over)

    monkeypatch.setattr(ops, "_gradients", gradients)
    yield found


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each backward pass of a loop that is to write over a tangent, whether it does in truth."""
    found: list[bool] = []
    plain = loop.gradients_of

    def gradients(*args: Any) -> list[Tensor]:
        (place,) = args[-1].values()
        found.append(any(x.data_ptr() == place.data_ptr() for x in args[2]))
        return plain(*args)

    monkeypatch.setattr(loop_over, "gradients_of", gradients)
    yield found


_LONG = {**SMALL_CHUNKS, "attention_chunk_rows": 16}
_BY_INDUCTOR = {**_LONG, "inner": "inductor", "inductor": {"force_disable_caches": True}}


def _model(layers: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    entry = ACCEPTED["llama"]
    return entry.build(num_hidden_layers=layers).train(), inputs_of(entry, 1, 96)


def _copies(graph: fx.Graph, own: Any = ()) -> None:
    """Leaves a graph as it is."""


@pytest.mark.parametrize("checkpointed", [True, False])
def test_by_inductor(
    checkpointed: bool, long: list[list[str]], loops: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointed layers: loops, and all three of attention. Without: what the forward pass has kept stays, and a second backward pass gives the same."""
    model, batch = _model(1)
    _, truth = step(model, lambda **b: model(**b), batch)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = Ways(monkeypatch, model, [PLAIN, PLAIN], _BY_INDUCTOR)
    loss, found = step(model, compiled.run, batch)
    assert long == [["tangent", "key", "value"] if checkpointed else ["tangent"]]
    assert loops == [True]
    assert worst_error(found, truth) < 1e-6  # float32 inside of its norms
    again = _two_backward_passes(compiled.run, model, batch)
    assert all(torch.equal(found[name], x) for each in again for name, x in each.items())
    count = len(long), len(loops)
    monkeypatch.setattr(inductor, "write_over_dead_operands", _copies)
    compiled.now = 1  # whose backward graph is compiled when it first runs
    plain = step(model, compiled.run, batch)
    assert (len(long), len(loops)) == count
    assert torch.equal(loss, plain[0]) and all(torch.equal(found[name], x) for name, x in plain[1].items())


def _two_backward_passes(run: Any, model: Any, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The gradients of two backward passes over one graph."""
    parameters = dict(model.named_parameters())
    loss = run(**batch).loss
    both = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for _ in range(2)]
    return [dict(zip(parameters, each, strict=True)) for each in both]


def test_a_wrong_analysis_costs_copies_and_no_numbers(
    long: list[list[str]], loops: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor has the last word: what is kept for a second backward pass is not written to, whatever ours says."""
    model, batch = _model(1)
    _, truth = step(model, lambda **b: model(**b), batch)
    monkeypatch.setattr(overwriting, "_is_dead", lambda *_: True)
    first, second = _two_backward_passes(compile_mst(model, _BY_INDUCTOR), model, batch)
    assert long == [["tangent"]] * 2 and loops == [True] * 2
    assert worst_error(first, truth) < 1e-6 and all(torch.equal(first[name], x) for name, x in second.items())


def test_lengths_that_change(long: list[list[str]]) -> None:
    """With symbolic sizes, too."""
    model, _ = _model(1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    run = compile_mst(model, _BY_INDUCTOR, dynamic=True)
    for size in (96, 80, 112):
        batch = inputs_of(ACCEPTED["llama"], 1, size)
        _, truth = step(model, lambda batch=batch, **_: model(**batch), batch)
        _, found = step(model, run, batch)
        assert worst_error(found, truth) < 1e-6
    assert long == [["tangent", "key", "value"]] * 3


Tweak = Callable[[fx.Graph, dict[str, fx.Node]], None]


def _outside(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    with graph.inserting_before(n["backward"]):
        given = graph.placeholder("given")
    given.meta = dict(n["tangent"].meta)
    n["backward"].replace_input_with(n["tangent"], given)


def _read(graph: fx.Graph, node: fx.Node, *views: Any) -> None:
    """A reader behind attention, of a node by way of views that are there before."""
    (backward,) = graph.find_nodes(op="call_function", target=mst.attention_backward.default)
    with graph.inserting_before(backward):
        for target, *args in views:
            node = graph.call_function(target, (node, *args))
    with graph.inserting_before(graph.output_node()):
        reader = graph.call_function(torch.ops.aten.neg.default, (node,))
    graph.output_node().args = ((*graph.output_node().args[0], reader),)  # type: ignore[misc]


def _given_out(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    graph.output_node().args = ((*graph.output_node().args[0], n["tangent"].args[0]),)  # type: ignore[misc]


def _twice(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    n["backward"].update_arg(1, n["tangent"])  # the output has the tangent's memory


def _as_query(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    n["backward"].update_arg(3, n["tangent"])


def _cast(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    n["tangent"].args[0].args[0].target = torch.ops.aten.clone.default  # type: ignore[union-attr]
    n["tangent"].args[0].args[0].args = (n["grad"],)  # type: ignore[union-attr]


def _kept(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    """A value of the forward pass, behind a gate."""
    with graph.inserting_before(n["backward"]):
        gate = graph.call_function(mst.gate.default, (n["key"], n["grad"]))
    gate.meta = dict(n["key"].meta)
    n["backward"].update_arg(4, gate)


def _other_layout(graph: fx.Graph, n: dict[str, fx.Node]) -> None:
    n["tangent"].meta["val"] = n["tangent"].meta["val"].contiguous()


_aten = torch.ops.aten
_BEHIND: dict[str, tuple[Tweak, list[int]]] = {
    "nothing": (lambda graph, n: None, [0]),
    "a tangent from outside": (_outside, []),
    "a reader of the product": (lambda graph, n: _read(graph, n["tangent"].args[0].args[0]), []),  # type: ignore[union-attr, arg-type]
    "a reader of a view": (lambda graph, n: _read(graph, n["tangent"], (_aten.select.int, 1, 0)), []),
    "a reader of a part": (
        lambda graph, n: _read(graph, n["tangent"], (_aten.split.Tensor, 2, 1), (operator.getitem, 0)),
        [],
    ),
    "a result": (_given_out, []),
    "another operand": (_twice, []),
    "the query": (_as_query, []),
    "a copy": (_cast, []),
    "kept, by a gate": (_kept, [0]),
    "another layout": (_other_layout, []),
}


@pytest.mark.parametrize("case", _BEHIND)
def test_what_is_left(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graph in which the tangent is a product, and keys and values are given."""
    monkeypatch.setattr(attention, "_BUSY", 64)
    tangent, query, key, value = (x.to("meta") for x in _operands())
    graph = fx.Graph()
    vals = {"grad": torch.empty(96, 32, device="meta", dtype=torch.float64), "query": query, "key": key}
    vals |= {"value": value, "out": query, "sums": query[..., 0]}
    n = {name: graph.placeholder(name) for name in vals}
    for name, x in vals.items():
        n[name].meta["val"] = x
    product = graph.call_function(_aten.mm.default, (n["grad"], n["grad"]))
    flat = graph.call_function(_aten.view.default, (product, [2, 48, 4, 8]))
    n["tangent"] = graph.call_function(_aten.transpose.int, (flat, 1, 2))
    for node, x in ((product, vals["grad"]), (flat, tangent.transpose(1, 2)), (n["tangent"], tangent)):
        node.meta["val"] = x
    rest: tuple[Any, ...] = ([], [], None, None, [0] * 6, text(_CAUSAL), 0, 16, 0.3, 0.0, 0.0, None, None)
    operands = (n["tangent"], n["out"], n["sums"], n["query"], n["key"], n["value"])
    n["backward"] = graph.call_function(mst.attention_backward.default, (*operands, *rest))
    n["backward"].meta["val"] = (query, key, value)
    graph.output((n["backward"],))
    tweak, left = _BEHIND[case]
    tweak(graph, n)
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = overwriting.dead_operands(n["backward"], order, lambda base: base.op != "call_function")
    assert list(found) == left


@pytest.mark.parametrize("kept", [False, True])
def test_peaks_know_it(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer that is made again, the gradients take no memory where they are written over the operands; of one whose keys and
    values are kept, those do."""
    model, batch = _model(2)
    seen: list[dict[str, Any]] = []

    class Looking(Chosen):
        def __call__(self, context: JointContext) -> None:
            super().__call__(context)
            for busy in (2**30, 64):
                monkeypatch.setattr(attention, "_BUSY", busy)
                joint = JointGraph(context.graph)
                calls, held = calls_of(joint), held_by(joint)
                at = max(i for i, node in enumerate(calls) if is_attention_backward(node))
                own = [each for each in held if each.node in calls[at].users]
                alive = curve_of(joint)[at] - scratch_of(calls[at])
                seen.append({"own": sum(each.bytes for each in own), "alive": alive})

    monkeypatch.setattr(compiling, "JOINT_STAGES", _stages(Looking(100 if kept else 0)))
    compile_mst(model, {**_LONG, "strict": True})(**batch, use_cache=False)  # which would be outputs
    apart, over = seen
    assert apart["own"] == 96 * (4 + 2 + 2) * 16 * 4
    assert over["own"] == (apart["own"] // 2 if kept else 0)
    assert over["alive"] - over["own"] == apart["alive"] - apart["own"]


@pytest.mark.slow
def test_arithmetic_that_is_put_off() -> None:
    """Inductor computes what reads a tangent where it is read; two MLPs side by side have one tangent, of which the last may not take
    the place."""
    torch.manual_seed(0)
    weights = [
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((16, 48), (48, 16), (16, 40), (40, 16))
    ]

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ up) @ down

    def inside(x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        out = mlp(rows, *weights[:2]) + mlp(rows, *weights[2:])
        return ((out - x.view_as(out)) ** 2).mean()

    def run(x: Tensor) -> Tensor:
        found: Tensor = torch.utils.checkpoint.checkpoint(inside, x, use_reentrant=False)
        return found

    compiled = compile_mst(run, {"chunk_rows": 7, "inductor": {"force_disable_caches": True}})
    x = torch.randn(3, 21, 16, dtype=torch.float64).requires_grad_()
    found, truth = (torch.autograd.grad(way(x), [x, *weights]) for way in (compiled, run))
    for mine, true in zip(found, truth, strict=True):
        assert relative_error(mine, true) <= 1e-12
