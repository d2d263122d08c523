"""Equal layers of a program with a memory plan are traced once: the graph of both passes is what tracing each of them gives, call by call."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_inductor_cache

from mst_fx.bodies.write_out import renumbered, write_out
from mst_fx.equal_stretches import fold_equal_stretches
from mst_fx.graph.names import module_path
from mst_fx.graph.values import storage_key
from mst_fx.listeners import on_plan
from mst_fx.options import bytes_in, make_options
from mst_fx.plan.joint_graph import tensor_of
from mst_fx.torch_api.overwriting import memory_of
from tests.helpers import SMALL_CHUNKS, GatedMLP, ToyLM, compile_mst, step, token_batch, worst_error
from tests.models import ACCEPTED, OTHERS, inputs_of

_PLANNED = {**SMALL_CHUNKS, "memory": "1GiB", "strict": True, "inner": "inductor"}


class _Seen(BaseException):
    """The graph of both passes was seen: it need not be compiled."""


def _text(graph: fx.Graph) -> list[str]:
    """A graph, call by call: up to the names of its nodes."""
    place = {node: f"%{at}" for at, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        found = node.meta.get("val")
        values = found if isinstance(found, (list, tuple)) else [found]
        kinds = [
            (tuple(x.shape), x.stride(), x.storage_offset(), x.dtype, x.device)
            if isinstance(x, Tensor)
            else type(x)
            for x in values
        ]
        operands = fx.node.map_arg((node.args, node.kwargs), place.__getitem__)  # type: ignore[arg-type]
        target: Any = node.target if node.op == "call_function" else ""
        if node.op == "get_attr":
            target = getattr(graph.owning_module, str(node.target)).tolist()
        known = node.meta.get("partitioner_tag"), module_path(node)
        lines.append(f"{node.op} {target} {operands} {kinds} {known}")
    return lines


def _share_what_they_show(graph: fx.Graph) -> bool:
    """Whether values share memory that are views of the same, and no others."""
    pairs = {
        (storage_key(found), memory_of(node))
        for node in graph.nodes
        if (found := tensor_of(node)) is not None and node.op == "call_function"
    }
    return len(pairs) == len({storage for storage, _ in pairs}) == len({owner for _, owner in pairs})


def _both_passes(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, batch: dict[str, Any], **options: Any
) -> tuple[int, bool, list[str]]:
    """How many layers of a program were traced once, and its graph of both passes."""
    found: list[tuple[int, bool, list[str]]] = []

    def seen(graph: fx.Graph) -> int:
        count = write_out(graph)
        found.append((count, _share_what_they_show(graph), _text(graph)))
        raise _Seen

    with monkeypatch.context() as patch:
        patch.setattr("mst_fx.joint.write_out", seen)
        with pytest.raises(_Seen):
            compile_mst(model, {**_PLANNED, **options})(**batch)
    return found[0]


def _toy(order: str = "pre", layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return ToyLM(order, layers=layers)


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = {**ACCEPTED, **OTHERS}[name].build(num_hidden_layers=4).train()
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


class _Constants(nn.Module):
    """Layers with constants of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(16), "mlp": GatedMLP(16, 32)}) for _ in range(8)
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            q = layer["norm"](x).tanh().exp().cos()
            x = x + F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True)
            x = x + layer["mlp"](x) * torch.tensor([0.5 + index // 4], dtype=torch.float64)
        return x.square().sum()


_X = torch.linspace(-1, 1, 2 * 48 * 16, dtype=torch.float64).view(2, 48, 16)
_TRACED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pre": (_toy, 3),
    "post": (lambda: _toy("post"), 3),
    "parallel": (lambda: _toy("parallel"), 4),
    "llama": (lambda: _model("llama"), 3),
    "gemma2": (lambda: _model("gemma2"), 3),
    "gpt_neox": (lambda: _model("gpt_neox"), 4),
    "mixtral": (lambda: _model("mixtral"), 4),
    "constants": (_Constants, 5),
}


@pytest.mark.parametrize("name", _TRACED)
def test_the_graph_is_that_of_layers_traced_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And values share the memory that they show, as far as AOTAutograd's do. (The last layer's loop has the norm behind it: it is another.)"""
    make, layers = _TRACED[name]
    if name in ACCEPTED:
        batch = inputs_of(ACCEPTED[name], 1, 96)
    else:
        batch = {"x": _X} if name == "constants" else token_batch(2, 48)
    count, share, found = _both_passes(monkeypatch, make(), batch)
    _, would_share, expected = _both_passes(monkeypatch, make(), batch, layers="each")
    assert count == layers and (share or not would_share)
    assert found == expected


class _Cast(nn.Module):
    """A model that computes in 16 bits, by a region of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch)


@pytest.mark.parametrize("is_inside", [False, True])
def test_the_graph_under_autocast(is_inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _toy().float(), token_batch(2, 48)
    model = _Cast(model) if is_inside else model
    found = []
    for options in ({}, {"layers": "each"}):
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_inside):
            found.append(_both_passes(monkeypatch, model, batch, **options))
    assert (found[0][0], found[1][0]) == (4, 0) and found[0][2] == found[1][2]
    assert any("torch.bfloat16" in line for line in found[0][2])


@pytest.mark.slow
def test_numbers_of_a_tight_plan(caplog: pytest.LogCaptureFixture) -> None:
    """Layers that keep different things are written out from one that was traced."""
    model, batch = _toy(), token_batch(2, 96)
    _, truth = step(model, model, batch)
    options = _PLANNED
    with pytest.raises(Exception, match="BudgetError") as error:
        step(model, compile_mst(model, {**options, "memory": 1}), batch)
    missing = re.search(r"needs ([\d.]+ [KM]iB) more", str(error.value))
    assert missing is not None
    plans: list[Any] = []
    with caplog.at_level(logging.INFO, "mst_fx"), on_plan.listening(plans.append):
        least = int(1.3 * (bytes_in(missing[1]) or 0))
        _, found = step(model, compile_mst(model, {**options, "memory": least}), batch)
    assert "3 equal parts of" in caplog.text and "calls are traced once" in caplog.text
    assert len(plans[0].layers) > 1 and any(each.flops for each in plans[0].layers)
    assert worst_error(found, truth) < 1e-12


def test_a_defect_leaves_the_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: fx.Graph) -> int:
        graph.erase_node(graph.output_node())
        raise RuntimeError("on purpose")

    model, batch = _toy(), token_batch(2, 48)
    _, truth = step(model, model, batch)
    monkeypatch.setattr("mst_fx.joint.write_out", broken)
    with fresh_inductor_cache():
        _, found = step(model, compile_mst(model, {**_PLANNED, "strict": False}), batch)
    assert worst_error(found, truth) < 1e-12
    assert "plans nothing inside of layers that were traced once" in caplog.text


# What is left as it is


class _Dropping(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


class _Writing(GatedMLP):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count: Tensor
        self.count.add_(1)
        return super().forward(x)


_LEFT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no plan": (_toy, {"memory": None}, "there is no memory plan"),
    "each": (_toy, {"layers": "each"}, "the option layers says so"),
    "aot_eager": (_toy, {"inner": "aot_eager"}, "inner is aot_eager"),
    "one": (lambda: _toy(layers=1), {}, "there are no equal ones"),
    "dropout": (lambda: ToyLM(mlp=_Dropping, layers=4), {}, "draws random numbers"),
    "writes": (lambda: ToyLM(mlp=_Writing, layers=4), {}, "writes to what it is given"),
    "a joint pass": (
        _toy,
        {"inductor": {"joint_custom_pre_pass": lambda graph: None}},
        "a joint pass of the user's",
    ),
}


def _folded(model: nn.Module, batch: Any, options: dict[str, Any], dynamic: bool | None = None) -> int:
    """The operators of layers in the captured graph of a model, which is not compiled."""
    found: list[int] = []
    checked = make_options({**_PLANNED, **options})

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        before = str(gm.graph)
        new, layers = fold_equal_stretches(gm, checked, checked.inductor)
        assert str(gm.graph) == before and (new is gm) == (not layers)
        found.append(len(new.graph.find_nodes(op="call_function", target=torch.ops.mst_fx.layer.default)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(**batch)
    return found[-1]


@pytest.mark.parametrize("name", _LEFT)
def test_what_is_left(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, options, reason = _LEFT[name]
    with caplog.at_level(logging.INFO, "mst_fx"):
        assert not _folded(make(), token_batch(2, 48), options)
    assert re.search(f"layers are traced one by one: .*{reason}", caplog.text)


def test_sizes_that_change(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mst_fx"):
        assert not _folded(_toy(), token_batch(2, 48), {}, dynamic=True)
    assert "layers are traced one by one: the sizes change" in caplog.text


def test_layers_that_differ() -> None:
    """In what is trained."""
    model: Any = _toy(layers=5)
    assert _folded(model, token_batch(2, 48), {}) == 5
    changed = copy.deepcopy(model)
    changed.blocks[4].requires_grad_(False)
    assert _folded(changed, token_batch(2, 48), {}) == 4


def test_names_of_modules() -> None:
    assert renumbered("layers.0.mlp", "layers.0.norm", "layers.3.norm") == "layers.3.mlp"
    assert renumbered("layers.1.norm", "layers.0.norm", "layers.3.norm") == "layers.4.norm"
    for path in ("", "norm", "others.0.mlp", "layers"):
        assert renumbered(path, "layers.0.norm", "layers.3.norm") == path
    assert renumbered("layers.0.mlp", "layers.0.norm", "layers.0.norm") == "layers.0.mlp"
