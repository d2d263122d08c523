"""Equal checkpointed layers are compiled once: that they are, that the numbers stay, and which layers are left as they are.

Numbers with real Inductor, since no other compiler gets such layers; what is left alone is told by the captured graph.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mst_fx import compiling, equal_layers
from mst_fx.bodies.layer import LayerGraph
from mst_fx.options import Options, make_options
from mst_fx.torch_api import called_graphs, inductor
from tests.helpers import GatedMLP, worst_error

WIDTH = 8
_OPERATOR = torch.ops.mst_fx.layer.default
SMALL = {"chunk_rows": 8, "vocab_chunk_rows": 8}


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH, inner: int = 24) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), GatedMLP(width, inner)

    def forward(self, x: Tensor) -> Any:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Checkpointed layers in float64, one after the other, and something behind them."""

    def __init__(self, *layers: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(layers)
        self.arguments = {"use_reentrant": False, **arguments}
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, **self.arguments)
        return x.sin().sum()


def _x(length: int = 32) -> Tensor:
    return torch.linspace(-1, 1, 2 * length * WIDTH, dtype=torch.float64).reshape(2, length, WIDTH)


class Folded:
    """What was folded: how many operators stand for layers, and the graphs that Inductor got in their place, by compilation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operators: list[int] = []
        self.graphs: list[int] = []
        fold, call = equal_layers.fold_equal_layers, called_graphs.call_layers

        def watched_fold(*args: Any) -> Any:
            new, known = fold(*args)
            self.operators.append(len(new.graph.find_nodes(op="call_function", target=_OPERATOR)))
            return new, known

        def watched_call(gm: fx.GraphModule, *args: Any) -> None:
            call(gm, *args)
            self.graphs.append(sum(name.startswith("layer_graph") for name, _ in gm.named_children()))

        monkeypatch.setattr(compiling, "fold_equal_layers", watched_fold)
        monkeypatch.setattr(inductor, "call_layers", watched_call)


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> Folded:
    return Folded(monkeypatch)


def _gradients(
    model: nn.Module, run: Callable[..., Any], *inputs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = run(*inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="mst", options={**SMALL, **options}, fullgraph=True)


def _check(model: nn.Module, *inputs: Tensor) -> None:
    """The numbers of a step are eager's, and those of layers that are compiled one by one."""
    loss, truth = _gradients(model, model, *inputs)
    found_loss, found = _gradients(model, _compiled(model), *inputs)
    assert abs(found_loss - loss) <= 1e-12 * abs(loss)
    assert worst_error(found, truth) <= 1e-12


def test_three_layers_are_one_graph(folded: Folded) -> None:
    with fresh_inductor_cache():
        _check(Stack(*(Layer() for _ in range(3))), _x())
    assert folded.operators == [3] and folded.graphs == [1, 1]


def test_layers_of_two_kinds(folded: Folded) -> None:
    """In turn, as layers with and without a window of attention are."""
    _check(Stack(Layer(), Layer(inner=40), Layer(), Layer(inner=40), Layer(inner=56)), _x())
    assert folded.operators == [4]


class _TwoStreams(nn.Module):
    """Both gradients that a layer gives are one tensor, or one shows the other; the layer before must not write over it."""

    def __init__(self, is_view: bool) -> None:
        super().__init__()
        self.is_view = is_view
        self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Layer() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.first(x).cos()
        if self.is_view:
            b = b.flatten(0, 1)

        def run(layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            both = a + b.view_as(a)
            return layer(both), both.cos().view(b.shape)

        for layer in self.layers:
            a, b = checkpoint(run, layer, a, b, use_reentrant=False)
        return (a * b.view_as(a)).sum()


@pytest.mark.parametrize("is_view", [False, True])
def test_gradients_that_share_memory(folded: Folded, is_view: bool) -> None:
    _check(_TwoStreams(is_view), _x())
    assert folded.operators == [3]


class _Shared(nn.Module):
    """All layers read a value that gets a gradient; a layer is frozen in parts; the result is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Layer() for _ in range(3))
        self.layers.requires_grad_(False)
        for layer in self.layers:
            layer.mlp.up.weight.requires_grad_()  # type: ignore[operator, union-attr]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, scale = self.first(x).cos(), self.first(x)
        between = []
        for layer in self.layers:
            h = checkpoint(
                lambda layer, h, scale: layer(h) * scale.sigmoid(), layer, h, scale, use_reentrant=False
            )
            between.append(h.mean())
        return h.sin().sum() + sum(between)


def test_values_that_others_read_too(folded: Folded) -> None:
    _check(_Shared(), _x())
    assert folded.operators == [3]


class _Adds(nn.Module):
    """Layers that add what the backward pass does not read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Layer() for _ in range(3))
        self.double()

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        h = self.first(x)
        for index, layer in enumerate(self.layers):
            other = (more + index) @ more[0, :WIDTH]  # a product, which nobody makes again
            h = checkpoint(
                lambda layer, h, other: layer.norm(h).sin() + other, layer, h, other, use_reentrant=False
            )
        return h.sin().sum()


def test_what_is_not_read_again_is_not_kept(folded: Folded) -> None:
    model, x = _Adds(), _x()
    _check(model, x, x.cos())
    assert folded.operators == [3]
    saved = _saved(lambda: _compiled(model)(x, x.cos()))
    each = _saved(lambda: _compiled(model, layers="each")(x, x.cos()))
    # What the last layer gives is read by what is not checkpointed: AOTAutograd runs that layer once more, or keeps it.
    assert saved <= each + x.nbytes


def _saved(run: Callable[[], Any]) -> int:
    """Bytes that are kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = run()
    assert loss.requires_grad
    return sum(kept.values())


def test_a_second_backward_pass() -> None:
    model = Stack(*(Layer() for _ in range(3)))
    loss = _compiled(model)(_x())
    weights = list(model.parameters())
    once = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(map(torch.equal, once, again))


class _Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=index < 3):
                x = checkpoint(layer, x, use_reentrant=False)
        return x.sin().sum()


def test_layers_under_autocast(folded: Folded) -> None:
    """Of equal layers some run with 16 bits. (The first is another one: what it is given gets no gradient.)"""
    model, x = _Autocast(), _x().float()
    loss, truth = _gradients(model, model, x)
    found_loss, found = _gradients(model, _compiled(model), x)
    assert folded.operators == [5]
    found_apart, apart = _gradients(model, _compiled(model, layers="each"), x)
    assert abs(found_loss - found_apart) <= 1e-2 * abs(loss)
    whole = copy.deepcopy(model).double()
    _, truth_64 = _gradients(whole, functools.partial(_plain, whole), x.double())
    assert (
        1e-4
        < worst_error(found, truth_64)
        <= 1.1 * max(worst_error(each, truth_64) for each in (truth, apart))
    )


def _plain(model: Any, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
    return x.sin().sum()


def test_without_gradients(folded: Folded) -> None:
    model = Stack(*(Layer() for _ in range(3)))
    with torch.no_grad():
        found = _compiled(model)(_x())
        assert torch.allclose(found, model(_x()), rtol=1e-12)
    assert folded.operators == [3]


# What is folded, and what is not


def _folded(function: Any, *inputs: Any, options: Any = None, **settings: Any) -> dict[str, LayerGraph]:
    """The layers that are folded in the graph of a function, which is captured and not compiled."""
    found: list[dict[str, LayerGraph]] = []
    checked = options if isinstance(options, Options) else make_options(options)

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        before = str(gm.graph)
        new, known = equal_layers.fold_equal_layers(gm, checked, settings.get("patches", {}))
        assert str(gm.graph) == before and (new is gm) == (not known)
        found.append(known)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=settings.get("dynamic"))(*inputs)
    return found[-1]


def _three(make: Callable[[], nn.Module], **arguments: Any) -> Stack:
    return Stack(*(make() for _ in range(3)), **arguments)


def test_what_is_folded() -> None:
    assert len(_folded(_three(Layer), _x())) == 1
    assert len(_folded(_three(Layer, use_reentrant=True), _x())) == 1
    assert len(_folded(_three(Layer, preserve_rng_state=False), _x())) == 1


class _Constant(Layer):
    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([self.constant], dtype=torch.float64)


def test_layers_of_other_constants(folded: Folded) -> None:
    """A constant has a name in the code of a graph, the same whatever it is."""
    with fresh_inductor_cache():
        _check(Stack(*(_Constant(constant) for constant in (0.5, 0.5, 0.7, 0.7))), _x())
    assert folded.operators == [4] and folded.graphs == [2, 2]


class _Drops(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


class _Counts(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count: Tensor
        self.count.add_(1)
        return super().forward(x) + self.count


class _Gives(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, WIDTH).view(x.shape)


class _GivesMore(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.argmax(-1, keepdim=True).double()


class _Nested(Layer):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = functools.partial(create_selective_checkpoint_contexts, _policy)
OTHERS: dict[str, Callable[[], Stack]] = {
    "one": lambda: Stack(Layer()),
    "of other sizes": lambda: Stack(Layer(), Layer(inner=40)),
    "of other epsilons": lambda: _with(
        Stack(Layer(), Layer()), lambda m: setattr(m.layers[1].norm, "eps", 1e-3)
    ),
    "one frozen": lambda: _with(Stack(Layer(), Layer()), lambda m: m.layers[1].requires_grad_(False)),
    "dropout": lambda: _three(_Drops),
    "writes": lambda: _three(_Counts),
    "gives what it is given": lambda: _three(_Gives),
    "selective": lambda: _three(Layer, context_fn=_SELECTIVE),
    "nested": lambda: _three(_Nested),
}


def _with(model: Stack, change: Callable[[Any], Any]) -> Stack:
    change(model)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_are_left(name: str) -> None:
    assert not _folded(OTHERS[name](), _x())


OPTIONS: dict[str, dict[str, Any]] = {
    "each": {"options": {"layers": "each"}},
    "aot_eager": {"options": {"inner": "aot_eager"}},
    "eager": {"options": {"inner": "eager"}},
    "a plan": {"options": {"memory": "1GiB"}},
    "CUDA graphs": {"patches": {"triton.cudagraphs": True}},
    "C++": {"patches": {"cpp_wrapper": True}},
    "freezing": {"patches": {"freezing": True}},
    "sizes that change": {"dynamic": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_settings_that_leave_all(name: str) -> None:
    assert not _folded(_three(Layer), _x(), **OPTIONS[name])


def test_a_parameter_at_an_odd_address(folded: Folded) -> None:
    """Kernels that count on an even one are not given it: another graph is called."""
    model = Stack(Layer(), Layer(), Layer(), Layer())
    for layer in model.layers[2:]:
        whole = torch.randn(WIDTH * 24 + 1, dtype=torch.float64)
        layer.mlp.up.weight = nn.Parameter(whole[1:].view(24, WIDTH))  # type: ignore[union-attr]
    with fresh_inductor_cache():
        _check(model, _x())
    assert folded.operators == [4] and folded.graphs == [2, 2]


def test_keys_are_those_of_another_process() -> None:
    """No address is in them, so that caches on disk know the graph."""
    first, second = _folded(_three(Layer), _x()), _folded(_three(Layer), _x())
    assert first.keys() == second.keys() and len(first) == 1
    assert first.keys() != _folded(_three(lambda: Layer(inner=40)), _x()).keys()
