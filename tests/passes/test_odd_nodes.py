"""Odd nodes cost themselves and not the graph: values that are no plain tensors, and nodes run for their effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_sliding_window_causal_mask

from mst_fx.errors import Cause
from mst_fx.graph.values import is_plain, storage_key
from mst_fx.graph.writes import mutated_storages, writes_in_place
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.region import RegionFinder
from tests.direct import check
from tests.helpers import check_parity, compile_mst, kinds, relative_error, worst_error
from tests.helpers import step as step_of

_seen: list[float] = []


@torch.library.custom_op("mst_test::note", mutates_args=())
def _note(x: Tensor) -> None:
    _seen.append(float(x.sum()))


@_note.register_fake
def _(x: Tensor) -> None:
    return None


@torch.library.custom_op("mst_test::noted", mutates_args=())
def _noted(x: Tensor) -> Tensor:
    _seen.append(float(x.sum()))
    return x.clone()


@_noted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mst_test::put", mutates_args=("out",))
def _put(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


class _Model(nn.Module):
    """An MLP, something odd, the MLP again, and a head with its loss: float64, width 16."""

    def __init__(self, odd: Callable[[_Model, Tensor], Tensor], layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd, self.layers = odd, layers
        self.embed, self.head = nn.Embedding(96, 16), nn.Linear(16, 96)
        self.up, self.down, self.norm = nn.Linear(16, 40), nn.Linear(40, 16), nn.BatchNorm1d(16)
        self.double()

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.layers - 1):
            x = x + self.mlp(x)
        x = x + self.odd(self, x)
        x = x + self.mlp(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


_IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
_WHOLE = {"mlp": 2, "vocab": 1}


def _transforms(model: _Model, x: Tensor) -> Tensor:
    """Every transform one after the other."""
    x = torch.vmap(lambda row: (row * 2).sin())(x)
    x = torch.vmap(torch.vmap(lambda row: row.softmax(0)), in_dims=1, out_dims=1)(x)
    x = torch.func.grad(lambda y: (y * y * y).sum())(x)
    x = torch.func.jvp(lambda y: y.sin(), (x,), (x,))[1]
    return torch.func.vjp(lambda y: y.cos(), x)[1](x)[0]


@pytest.mark.slow
def test_everything_around_transforms_is_rewritten() -> None:
    assert kinds(check(_Model(_transforms), (_IDS,))) == _WHOLE


@pytest.mark.slow
def test_a_scan_keeps_its_levels_under_an_outer_compiler() -> None:
    """Mamba-1's: nothing reads the nodes that begin and end a level."""
    model = _Model(lambda m, x: associative_scan(lambda a, b: a * 0.5 + b, x, 1, combine_mode="generic"))
    truth = step_of(model, model, {"ids": _IDS})
    loss, grads = step_of(model, compile_mst(model), {"ids": _IDS})
    assert relative_error(loss, truth[0]) <= 1e-12 and worst_error(grads, truth[1]) <= 1e-10


def test_a_transform_in_a_checkpointed_layer() -> None:
    def odd(model: _Model, x: Tensor) -> Tensor:
        layer = lambda y: torch.vmap(torch.sin)(y) + model.mlp(y)  # noqa: E731
        return checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]

    assert kinds(check(_Model(odd), (_IDS,))) == {"mlp": 3, "vocab": 1}


_INSIDE: dict[str, Callable[[_Model, Tensor], Tensor]] = {
    "an MLP": lambda m, x: torch.vmap(m.mlp)(x),
    "its activation": lambda m, x: m.down(torch.vmap(F.gelu)(m.up(x))),
    "an MLP's gradient": lambda m, x: torch.func.grad(lambda y: m.mlp(y).pow(2).sum())(x),
    "an MLP of plain values": lambda m, x: torch.vmap(lambda y: y.sum() + m.mlp(x).sum())(x).sum() * x,
    "dropout, an embedding": lambda m, x: m.mlp(
        torch.vmap(lambda i: F.dropout(F.embedding(i, m.embed.weight), 0.0).sin())(_IDS)
    ),
}


@pytest.mark.parametrize("name", _INSIDE)
def test_nothing_inside_of_a_transform_is_touched(name: str) -> None:
    """Places that would be bulges outside of it are refused, each with its reason; the rest is rewritten."""
    report = check(_Model(_INSIDE[name], layers=1), (_IDS,))
    if name.startswith("dropout"):
        assert kinds(report) == _WHOLE and not report.refusals
        return
    assert kinds(report) == {"mlp": 1, "vocab": 1}
    assert {refused.cause for refused in report.refusals} == {Cause.NOT_PLAIN}
    assert all("torch.func transform" in refused.reason for refused in report.refusals)


@pytest.mark.slow
def test_a_teacher_in_inference_mode() -> None:
    """It is chunked too; but autograd would not save what it made for the loop of what reads that."""

    def odd(model: _Model, x: Tensor) -> Tensor:
        with torch.inference_mode():
            target = model.mlp(x.detach())
        return model.mlp(x) * target.clone()

    assert kinds(check(_Model(odd), (_IDS,))) == {"mlp": 4, "vocab": 1}
    model = _Model(odd)
    truth, found = step_of(model, model, {"ids": _IDS}), step_of(model, compile_mst(model), {"ids": _IDS})
    assert worst_error(found[1], truth[1]) <= 1e-10


def test_a_loss_inside_of_vmap_is_refused() -> None:
    class PerSequence(_Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x = x + self.mlp(x)
            return torch.vmap(lambda row, labels: F.cross_entropy(self.head(row), labels))(x, ids).mean()

    report = check(PerSequence(_transforms), (_IDS,))
    assert kinds(report) == {"mlp": 1}
    assert [refused.cause for refused in report.refusals] == [Cause.NOT_PLAIN]


def _with_effects(model: _Model, x: Tensor) -> Tensor:
    """Nodes that nobody reads, all run for something else."""
    torch._check(x.shape[0] > 0)
    torch._assert_async((x > -1e9).all())
    _note(x.detach())
    torch.ops.mst_test.note(x.detach())
    _noted(x.detach())
    model.norm(x.flatten(0, 1))
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        x.detach().sin()
    return x * 2


def test_nodes_with_effects_stay() -> None:
    """Custom operators with and without a result, running statistics, asserts, modes."""
    eager, model = _Model(_with_effects), _Model(_with_effects)
    _seen.clear()
    eager(_IDS)
    once, statistics = list(_seen), eager.norm.running_mean.clone()  # type: ignore[union-attr,operator]
    model.load_state_dict(_Model(_with_effects).state_dict())
    _seen.clear()
    assert kinds(check(model, (_IDS,))) == _WHOLE  # eager, then rewritten
    assert len(once) == 3 and _seen == pytest.approx(once * 2, abs=1e-9)
    twice = 0.9 * statistics + statistics  # momentum 0.1, the same batch
    assert torch.allclose(model.norm.running_mean, twice, atol=1e-12)  # type: ignore[arg-type]


def test_an_assertion_still_fires() -> None:
    def odd(model: _Model, x: Tensor) -> Tensor:
        torch._assert_async((x > 1e9).all(), "too small")
        return x

    with pytest.raises(RuntimeError, match="too small"):
        compile_mst(_Model(odd), {"inner": "aot_eager", "chunk_rows": 7})(_IDS)


def test_code_without_effects_goes() -> None:
    """Logits of which only the size is read, and a second loss that nobody returns, are not in the way."""

    class Dead(_Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            logits = self.head(x)
            F.cross_entropy(logits.flatten(0, 1), ids.flatten()).mean()
            rows = logits.size(0) * logits.size(1)
            return F.cross_entropy(logits.view(rows, -1), ids.flatten())

    torch._dynamo.config.assume_static_by_default, before = (
        False,
        torch._dynamo.config.assume_static_by_default,
    )
    try:
        assert kinds(check(Dead(_transforms), (_IDS,))) == {"vocab": 1}
    finally:
        torch._dynamo.config.assume_static_by_default = before


def test_what_a_custom_operator_writes_is_known() -> None:
    """The second operand, by whatever name the operator is called; and what is written inside of vmap."""

    def graph_of(fn: Any, *args: Any) -> fx.Graph:
        graphs: list[fx.Graph] = []
        torch._dynamo.reset()

        def keep(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
            graphs.append(gm.graph)
            return gm

        torch.compile(fn, backend=keep)(*args)
        return graphs[0]

    x = torch.zeros(3, 4)
    for op in (_put, torch.ops.mst_test.put, torch.ops.mst_test.put.default):

        def write(x: Tensor, out: Tensor, op: Any = op) -> Tensor:
            op(x, out)
            return out + 1

        graph = graph_of(write, x, torch.ones(3, 4))
        given, out = graph.find_nodes(op="placeholder")
        assert any(map(writes_in_place, graph.nodes))
        found = mutated_storages(graph)
        assert storage_key(out.meta["example_value"]) in found, op
        assert storage_key(given.meta["example_value"]) not in found
    assert not mutated_storages(graph_of(lambda x: torch.ops.aten.index(x, [torch.tensor([0])]) + 1, x))
    graph = graph_of(lambda x: torch.vmap(lambda row: row.mul_(2).sum())(x), x)
    (given,) = graph.find_nodes(op="placeholder")
    assert storage_key(given.meta["example_value"]) in mutated_storages(graph)


def test_odd_tensors_are_not_plain() -> None:
    x = torch.randn(3, 4)
    found: list[Tensor] = [x.to_sparse(), torch.nested.nested_tensor([x]), x.to_mkldnn()]
    torch.vmap(lambda row: found.append(row) or row)(x)  # type: ignore[func-returns-value]
    torch.func.grad(lambda y: (found.append(y) or y).sum())(x)  # type: ignore[func-returns-value,union-attr]
    assert is_plain(x) and not any(map(is_plain, found))
    assert [storage_key(each) is None for each in found] == [True, False, True, True, True]


@pytest.mark.parametrize("where", ["analysis", "region"])
def test_an_exception_of_ours_costs_one_place(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method = (RowAnalysis, "_run_known") if where == "analysis" else (RegionFinder, "_cut")
    right: Callable[..., Any] = getattr(owner, method)

    def fail(self: Any, node: fx.Node, *rest: Any) -> Any:
        if torch.relu in [n.target for n in ((node,) if where == "analysis" else node.users)]:
            raise ZeroDivisionError("a fault of ours")
        return right(self, node, *rest)

    monkeypatch.setattr(owner, method, fail)
    report = check(_Model(lambda m, x: m.down(torch.relu(m.up(x)))), (_IDS,))
    assert kinds(report) == {"mlp": 2, "vocab": 1}
    assert [(refused.kind, refused.cause) for refused in report.refusals] == [("mlp", Cause.DEFECT)]
    assert "a fault of ours" in report.refusals[0].reason


@pytest.mark.slow
def test_a_mamba_step() -> None:
    """Its scan is a chain of vmaps; logits go through float32."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "vocab_size": 96,
        "state_size": 4,
        "time_step_rank": 2,
    }
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(**sizes, **tokens, use_cache=False)
    ).double()
    ids = _IDS[:, :4]
    report = check_parity(
        model,
        {"input_ids": ids, "labels": ids},
        loss_bar=1e-6,
        gradient_bar=2e-6,
        options={"inner": "aot_eager", "vocab_chunk_rows": 3},
    )
    assert kinds(report) == {"vocab": 1}


class _Masked(_Model):
    """Attention with a mask that transformers makes with vmap, as for Gemma3's images."""

    def forward(self, ids: Tensor) -> Tensor:
        def same_image(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (ids[batch, query] == ids[batch, key]) & (ids[batch, query] > 90)

        x = self.embed(ids)
        config = transformers.Gemma3TextConfig(sliding_window=6)
        config._attn_implementation = "sdpa"
        mask: Any = create_sliding_window_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            or_mask_function=same_image,
        )
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        x = x + mixed.transpose(1, 2).flatten(2)
        x = x + self.mlp(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_a_mask_made_with_vmap_costs_nothing_else() -> None:
    report = check(_Masked(_transforms), (_IDS,), options={"attention_chunk_rows": 7})
    done = kinds(report)
    done.pop("attention", None)  # whoever learns to read such masks may
    assert done == {"mlp": 1, "vocab": 1}
    assert done != kinds(report) or [refused.kind for refused in report.refusals] == ["attention"]
