"""``mst_fx.rewrite``: the passes alone, on graphs from anywhere."""

from __future__ import annotations

import re

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mst_fx
from tests.direct import DIRECT, results, worst
from tests.helpers import Attention, GatedMLP, PlainMLP, ToyLM, compile_mst, kinds, report_of, token_batch


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _same(new: fx.GraphModule, old: nn.Module, x: Tensor) -> None:
    """Equal results, and gradients for the parameters that both share or copy."""
    found, truth = results(new, [x], new), results(old, [x], old)
    assert len(found) > 2
    assert worst(found[:2], truth[:2]) <= 1e-9
    names = [name for name, p in old.named_parameters() if p.requires_grad]
    new_names = [name for name, p in new.named_parameters() if p.requires_grad]
    grads = dict(zip(new_names, found[2:], strict=True))
    for name, grad in zip(names, truth[2:], strict=True):
        assert worst([grads[name]], [grad]) <= 1e-9


@pytest.mark.parametrize("mlp", [PlainMLP, GatedMLP])
def test_symbolic_trace(mlp: type[nn.Module]) -> None:
    model, x = mlp(8, 24).double(), _x(2, 20, 8)
    gm = fx.symbolic_trace(model)
    new, report = mst_fx.rewrite(gm, [x], DIRECT)
    assert kinds(report) == {"mlp": 1}
    _same(new, model, x)


@pytest.mark.parametrize("mlp", [PlainMLP, GatedMLP])
def test_export(mlp: type[nn.Module]) -> None:
    model, x = mlp(8, 24).double(), _x(2, 20, 8)
    gm = torch.export.export(model, (x.detach(),)).module()
    assert isinstance(gm, fx.GraphModule)
    new, report = mst_fx.rewrite(gm, [x], DIRECT)
    assert kinds(report) == {"mlp": 1}
    _same(new, model, x)


def test_symbolic_trace_of_functions() -> None:
    """Weights as placeholders."""

    def block(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return x + torch.relu(x @ up) @ down

    args = [_x(40, 8), _x(8, 24), _x(24, 8)]
    new, report = mst_fx.rewrite(fx.symbolic_trace(block), args, DIRECT)
    assert kinds(report) == {"mlp": 1}
    assert worst(results(new, args), results(block, args)) <= 1e-9


def test_export_of_a_block_with_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention, self.mlp = nn.LayerNorm(8), Attention(8, 2), GatedMLP(8, 24)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm(x))
            return x + self.mlp(self.norm(x))

    model, x = Block(), _x(2, 20, 8)
    gm = torch.export.export(model, (x.detach(),)).module()
    assert isinstance(gm, fx.GraphModule)
    new, report = mst_fx.rewrite(gm, [x], DIRECT)
    assert kinds(report) == {"mlp": 1}
    _same(new, model, x)


def test_vocabulary_loss() -> None:
    def loss(h: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(h @ head, labels)

    args = [_x(40, 8), _x(8, 56), torch.randint(0, 56, (40,))]
    new, report = mst_fx.rewrite(fx.symbolic_trace(loss), args, DIRECT)
    assert kinds(report) == {"vocab": 1}
    assert worst(results(new, args), results(loss, args)) <= 1e-9


def test_logits_are_deferred_here_too() -> None:
    def loss(h: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ head
        return F.cross_entropy(logits, labels), logits

    args = [_x(40, 8), _x(8, 56), torch.randint(0, 56, (40,))]
    new, report = mst_fx.rewrite(fx.symbolic_trace(loss), args, DIRECT)
    assert kinds(report) == {"vocab": 1}
    logits = new(*args)[1]
    assert type(logits).__name__ == "DeferredLogits" and logits._value is None
    assert worst(results(new, args), results(loss, args)) <= 1e-9


def test_the_given_graph_is_not_changed() -> None:
    model, x = GatedMLP(8, 24).double(), _x(2, 20, 8)
    gm = fx.symbolic_trace(model)
    code, nodes = gm.code, [(n.name, dict(n.meta)) for n in gm.graph.nodes]
    new, _ = mst_fx.rewrite(gm, [x], DIRECT)
    assert new is not gm
    assert gm.code == code
    assert [n.name for n in gm.graph.nodes] == [name for name, _ in nodes]
    assert "mst_fx" not in str(gm.graph)


@pytest.mark.parametrize("rows", [1, 6, 7])
def test_short_graphs_are_returned_as_they_are(rows: int) -> None:
    """Rows that fit in one chunk: not a copy, the very graph."""
    gm = fx.symbolic_trace(GatedMLP(8, 24).double())
    new, report = mst_fx.rewrite(gm, [_x(1, rows, 8)], DIRECT)
    assert new is gm and not report.rewrites


@pytest.mark.slow
def test_short_models_reach_the_inner_compiler_as_dynamo_gave_them() -> None:
    """With the defaults, no graph of less than the least chunk is touched."""
    model, seen = ToyLM(layers=1), []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        code = gm.code
        new, report = mst_fx.rewrite(gm, example_inputs)
        seen.append((new is gm, gm.code == code, len(report.rewrites)))
        return new

    torch.compile(model, backend=backend)(**token_batch(2, 64))
    assert seen == [(True, True, 0)]
    assert not report_of(model, {"inner": "aot_eager"}, **token_batch(2, 64)).rewrites


def test_bodies_are_shared_by_layers() -> None:
    model = nn.Sequential(*(GatedMLP(8, 24) for _ in range(3))).double()
    _, report = mst_fx.rewrite(fx.symbolic_trace(model), [_x(2, 20, 8)], DIRECT)
    assert kinds(report) == {"mlp": 3}
    assert len({rewrite.body for rewrite in report.rewrites}) == len(report.bodies) == 1


def test_passes_can_be_chosen() -> None:
    gm = fx.symbolic_trace(GatedMLP(8, 24).double())
    new, report = mst_fx.rewrite(gm, [_x(2, 20, 8)], {**DIRECT, "passes": ("vocab",)})
    assert new is gm and not report.rewrites


def test_bad_options_are_errors() -> None:
    gm = fx.symbolic_trace(GatedMLP(8, 24).double())
    with pytest.raises(mst_fx.OptionError, match="chunk_row"):
        mst_fx.rewrite(gm, [_x(2, 20, 8)], {"chunk_row": 7})


def test_rewriting_twice_changes_nothing_more() -> None:
    gm, x = fx.symbolic_trace(GatedMLP(8, 24).double()), _x(2, 20, 8)
    new, _ = mst_fx.rewrite(gm, [x], DIRECT)
    again, report = mst_fx.rewrite(new, [x], DIRECT)
    assert again is new and not report.rewrites


def test_compiled_function_and_rewrite_agree() -> None:
    model, x = GatedMLP(8, 24).double(), _x(2, 20, 8)
    new, _ = mst_fx.rewrite(fx.symbolic_trace(model), [x], DIRECT)
    assert torch.equal(new(x), compile_mst(model, DIRECT)(x))


class TestGolden(expecttest.TestCase):
    """The text of a rewritten graph, bodies' keys left out."""

    def test_code(self) -> None:
        model = PlainMLP(8, 24)
        new, report = mst_fx.rewrite(fx.symbolic_trace(model), [torch.randn(2, 20, 8)], DIRECT)
        self.assertExpectedInline(
            _nodes(new, report),
            """\
%x : 'Tensor' [num_users=1] = placeholder[target=x]
%up_weight : [num_users=1] = get_attr[target=up.weight]
%up_bias : [num_users=1] = get_attr[target=up.bias]
%down_weight : [num_users=1] = get_attr[target=down.weight]
%down_bias : [num_users=1] = get_attr[target=down.bias]
%loop_default : [num_users=1] = call_function[target=torch.ops.mst_fx.loop.default](args = ([%x], [%up_weight, %up_bias, %down_weight, %down_bias], <body 0>, 7, 7, [0]), kwargs = {})
return loop_default""",
        )


def _nodes(gm: fx.GraphModule, report: mst_fx.Report) -> str:
    text = "\n".join(node.format_node() or node.name for node in gm.graph.nodes)
    for number, rewrite in enumerate(report.rewrites):
        text = text.replace(rewrite.body, f"<body {number}>")
    return re.sub(r"(?m) +$", "", text)
