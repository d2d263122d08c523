"""Where graphs repeat themselves, and that one graph called in place of equal stretches gives the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import mst_fx.ops  # noqa: F401  (registers the operators)
from mst_fx.graph.repetitions import Repetition, find_repetitions, sink_free_calls
from mst_fx.repeated_parts import _is_free
from mst_fx.torch_api import called_graphs
from mst_fx.torch_api.called_graphs import call_repetitions

aten = torch.ops.aten
_CALL = torch.ops.higher_order.invoke_subgraph
_SIZE = 6


def _traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    sink_free_calls(gm.graph, _is_free)
    gm.graph.lint()
    return gm


def _found(
    gm: fx.GraphModule, mark: Any = aten.mm.default, tied: Any = None, held: Any = None
) -> list[Repetition]:
    def is_mark(node: fx.Node) -> bool:
        return node.target is mark

    found = find_repetitions(
        gm.graph,
        is_mark,
        lambda _: False,
        lambda node: node.target is tied,
        lambda node: node.target is not held,
    )
    return list(found)


def _inputs(count: int) -> list[Tensor]:
    return list(torch.randn(count, _SIZE, _SIZE, dtype=torch.float64).unbind())


def _check(function: Callable[..., Any], inputs: Sequence[Tensor], counts: Sequence[int]) -> list[Repetition]:
    """What is found has so many stretches, and calls of them give the same bits."""
    gm = _traced(function, *inputs)
    found = _found(gm)
    assert [len(each.stretches) for each in found] == list(counts)
    call_repetitions(gm, found, lambda _: None)
    assert len(gm.graph.find_nodes(op="call_function", target=_CALL)) == sum(counts)
    for mine, true in zip(gm(*inputs), function(*inputs), strict=True):
        assert torch.equal(mine, true)
    return found


def _layer(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return x + (x.sin() @ w).t() * scale.exp()


def test_equal_layers() -> None:
    """Cut where one value is alive between two of them; what all read is one input."""

    def run(x: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        x = x.cos()
        for w in weights:
            x = _layer(x, w, scale)
        return [x.sum()]

    (found,) = _check(run, _inputs(6), [4])
    assert len(found.inputs[0]) == 3 and [len(each) for each in found.outputs] == [1] * 4
    assert [inputs[1:] for inputs in found.inputs] != [found.inputs[0][1:]] * 4


def test_values_that_the_rest_reads() -> None:
    """A gradient of each layer, of one layer alone, and a view."""

    def run(x: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        given = []
        for index, w in enumerate(weights):
            made = x.sin() @ w
            given.append(made)
            if index == 1:
                given.append(x.t())
            x = x + made * scale
        return [x, *given]

    _check(run, _inputs(5), [3])


def test_layers_of_two_kinds_in_turn() -> None:
    def run(x: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        for index, w in enumerate(weights):
            x = _layer(x, w, scale) if index % 2 else x - (x.cos() @ w)
        return [x]

    (found,) = _check(run, _inputs(8), [3])
    assert sum(node.target is aten.mm.default for node in found.stretches[0]) == 2


def test_two_repetitions() -> None:
    """Of which the second reads what the first gives."""

    def run(x: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        early = x
        for index, w in enumerate(weights):
            x = _layer(x, w, scale) if index < 3 else x - (x.cos() @ w) * early
            early = x if index == 1 else early
        return [x]

    _check(run, _inputs(8), [3, 3])


def test_what_two_read_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second repetition is given what the first makes, and so is somebody else: nobody may write over it."""

    def run(x: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        for w in weights[:4]:
            x = (_layer(x, w, scale) + x.cos() * x) @ w
        between = x
        for w in weights[4:]:
            x = x - (x.cos() @ w) * scale
        return [x, between]

    dead: list[str] = []
    find = called_graphs._dead_inputs

    def watched(stretch: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> tuple[int, ...]:
        found = find(stretch, inputs)
        dead.extend(inputs[slot].name for slot in found)
        return found

    monkeypatch.setattr(called_graphs, "_dead_inputs", watched)
    gm = _traced(run, *_inputs(9))
    given = [x.name for x in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    found = _found(gm)
    assert [len(each.stretches) for each in found] == [4, 3]
    assert given[1] in {x.name for each in found for x in each.inputs[0]}
    call_repetitions(gm, found, lambda _: None)
    assert dead and given[1] not in dead


@pytest.mark.parametrize("other", ["constant", "type", "operands", "size"])
def test_what_differs_is_left(other: str) -> None:
    """The last of three: by a constant, a type, by what it reads of its own, by its sizes."""

    def run(x: Tensor, scale: Tensor, *weights: Tensor) -> list[Tensor]:
        for index, w in enumerate(weights):
            a, b = x.sin(), x.sin()
            is_other = index == 2
            if is_other and other == "operands":
                a, b = b, a
            if is_other and other == "type":
                w, a, b, x = w.float(), a.float(), b.float(), x.float()
            if is_other and other == "size":
                a, b, x = (each[: _SIZE // 2] for each in (a, b, x))
            x = x + (a @ w) * (b * 2 if not is_other or other != "constant" else b * 3)
        return [x]

    _check(run, _inputs(5), [2])


def test_one_is_no_repetition() -> None:
    _check(lambda x, w: [_layer(x, w, x)], _inputs(2), [])


def test_no_stretch_without_a_mark() -> None:
    gm = _traced(lambda x: [x.sin().exp().sin().exp().sin().exp()], *_inputs(1))
    assert not _found(gm) and _found(gm, mark=aten.exp.default)


def test_no_list_is_cut() -> None:
    """Of an operator that gives several tensors they are taken in the same stretch."""

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        for w in weights:
            values, _ = torch.sort(x @ w)
            x = values.exp()
        return [x]

    (found,) = _check(run, _inputs(5), [4])
    assert all(isinstance(x.meta["val"], Tensor) for inputs in found.inputs for x in inputs)


def test_what_is_tied_is_not_cut() -> None:
    """Nothing is cheaper than in front of exp: but it may not be cut off there."""

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        for w in weights:
            x = ((x @ w).sum(1, keepdim=True).exp() + w).sin()
        return [x]

    gm = _traced(run, *_inputs(5))
    free, tied = _found(gm), _found(gm, tied=aten.exp.default)
    assert free[0].stretches[0][0].target is aten.exp.default
    assert tied[0].stretches[0][0].target is not aten.exp.default
    assert all(node.target is not aten.exp.default or at > 0 for at, node in enumerate(tied[0].stretches[0]))


def test_what_may_not_cross_is_not_given() -> None:
    """What is read by one stretch of another, and behind all of them."""

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        before = x
        for w in weights:
            total = (x @ w).sum(0)
            x = (x + before) * total
            before = total.sin()
        return [x]

    gm = _traced(run, *_inputs(5))
    assert _found(gm) and not _found(
        _traced(lambda x, w, v: [(x @ w).exp(), ((x + w) @ v).exp()], *_inputs(3)), held=aten.exp.default
    )
    (found,) = _found(gm, held=aten.sin.default)
    crossing = {found.stretches[0][at].target for at in found.outputs[0]} | {
        x.target for x in found.inputs[1]
    }
    assert aten.sin.default not in crossing


@settings(deadline=None)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Layers of random calls, some of them other than the rest, with values that are read behind: the same bits."""
    size = data.draw(st.integers(2, 6))
    operands = st.integers(-4, -1)
    steps = data.draw(
        st.lists(st.tuples(st.sampled_from("+*@vtn"), operands, operands), min_size=size, max_size=size)
    )
    count = data.draw(st.integers(2, 5))
    read = data.draw(st.sets(st.integers(0, count * (size + 1) + 3), max_size=3))
    odd = data.draw(st.integers(0, 2 * count))

    def run(*inputs: Tensor) -> list[Tensor]:
        values = list(inputs[count:])
        for layer in range(count):
            for kind, a, b in steps:
                x, y = values[a], values[b]
                match kind:
                    case "+":
                        x = x + y
                    case "*":
                        x = x * y.sigmoid()
                    case "@":
                        x = (x @ y).tanh()
                    case "v":
                        x = x.unsqueeze(0).squeeze(0)
                    case "t":
                        x = x.t()
                    case "n":
                        x = x.sin() if layer != odd else x.cos()
                values.append(x)
            values.append((values[-1] @ inputs[layer]).tanh())
        return [values[-1], *(values[at].clone() for at in sorted(read) if at < len(values))]

    inputs = _inputs(count + 4)
    gm = _traced(run, *inputs)
    whole = copy.deepcopy(gm)
    found = _found(gm)
    are_equal = not any(kind in "tv" or (kind == "n" and odd < count) for kind, *_ in steps)
    is_read = all(node.users for node in gm.graph.nodes if node.op == "call_function")
    assert found or not are_equal or not is_read  # of a view, the layer that reads it has a part
    call_repetitions(gm, found, lambda _: None)
    for mine, true in zip(gm(*inputs), whole(*inputs), strict=True):
        assert torch.equal(mine, true)
