"""One sequence over two processes with gloo, in the forms in which people train: accelerate, PEFT, DDP that accumulates, distributed checkpoints,
operators of other libraries. All hold several steps against one process in eager mode, by losses and by the weights behind them.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import mst_fx
from mst_fx.declared import DECLARED
from tests import apart
from tests.helpers import SMALL_CHUNKS, ToyLM, kinds, loss_of, relative_error, token_batch, worst_error
from tests.models import ACCEPTED
from tests.operators import operators

_OPTIONS: dict[str, Any] = {
    **SMALL_CHUNKS,
    "chunk_rows": 8,
    "vocab_chunk_rows": 8,
    "attention_chunk_rows": 16,
}
_LENGTH = 61


def _compiled(model: nn.Module) -> nn.Module:
    """Over the ranks, where there are some; else as it is."""
    if dist.is_initialized():
        torch._dynamo.reset()
        model.compile(backend="mst", options={**_OPTIONS, "sequence_parallel": dist.group.WORLD})
    return model


def _trained(model: nn.Module, losses: Iterable[Tensor], report: mst_fx.Report | None) -> dict[str, Any]:
    """Of a model that was trained: its losses, and the weights that were."""
    found = torch.stack([loss.detach() for loss in losses])
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": found, "weights": weights, "kinds": kinds(report) if report is not None else {}}


def _agrees(of_ranks: list[dict[str, Any]], truth: dict[str, Any], bar: float) -> None:
    for found in of_ranks:
        assert relative_error(found["losses"], truth["losses"]) <= bar
        assert worst_error(found["weights"], truth["weights"]) <= bar


# accelerate, whose loader gives each rank other batches, and whose windows of accumulated gradients end with it

_ROWS = 16


def _accelerate() -> dict[str, Any]:
    torch.manual_seed(0)
    model = _compiled(ToyLM(layers=1))
    # The scheduler's and the loss' scale are those of one process; SGD, whose steps show the scale of gradients.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = token_batch(_ROWS, _LENGTH)
    rows = [{name: x[at] for name, x in batch.items()} for at in range(_ROWS)]
    losses = []
    if dist.is_initialized():
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3)
        )
        assert accelerator.num_processes == dist.get_world_size()
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
        assert isinstance(prepared, DistributedDataParallel)
        for given in mst_fx.shared_batches(loader, dist.group.WORLD):
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared(**given))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss)
        return _trained(model, losses, None)
    loader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    for at, given in enumerate(loader):
        loss = loss_of(model(**given))
        (loss / 3).backward()
        if at % 3 == 2 or at == len(loader) - 1:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
    return _trained(model, losses, None)


# LoRA, and DDP that averages every second time


def _lora() -> dict[str, Any]:
    torch.manual_seed(0)
    base: Any = ACCEPTED["llama"].build(use_cache=False, num_hidden_layers=1).double()
    settings = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted: Any = peft.get_peft_model(base, settings, autocast_adapter_dtype=False).double()
    model = _compiled(adapted)
    run = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    with mst_fx.watch() as report:
        for at in range(4):
            ids = torch.randint(3, 384, (1, _LENGTH), generator=torch.Generator().manual_seed(at))
            is_last = at % 2 == 1
            skipped = contextlib.nullcontext() if is_last or run is model else run.no_sync()  # type: ignore[operator]
            with skipped:
                loss = run(input_ids=ids, labels=ids).loss
                (loss / 2).backward()
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss)
    return _trained(model, losses, report if dist.is_initialized() else None)


# Checkpoints


def _checkpointed() -> dict[str, Any]:
    """Four steps of AdamW; over ranks the last two by a model and an optimizer that were made anew, and loaded."""

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = _compiled(ToyLM(layers=1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
        run = DistributedDataParallel(model) if dist.is_initialized() else model
        for at in steps:
            loss = loss_of(run(**token_batch(1, _LENGTH + at % 2)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)

    losses: list[Tensor] = []
    model, optimizer = made(0)
    train(model, optimizer, range(2))
    if dist.is_initialized():
        where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(where)
        weights, states = get_state_dict(model, optimizer)
        state_dict_saver.save({"model": weights, "optimizer": states}, checkpoint_id=where[0])
        model, optimizer = made(1)
        weights, states = get_state_dict(model, optimizer)
        loaded: dict[str, Any] = {"model": weights, "optimizer": states}
        state_dict_loader.load(loaded, checkpoint_id=where[0])
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
    train(model, optimizer, range(2, 4))
    return _trained(model, losses, None)


# Operators of other libraries


def _operator(name: str, backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """``x @ w.t()``, into which nobody can look, and its gradient, which is ATen's operators."""

    @torch.library.custom_op(f"tests_forms::{name}", mutates_args=())
    def linear(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()

    linear.register_fake(lambda x, w: x.new_empty((*x.shape[:-1], w.shape[0])))
    linear.register_autograd(
        lambda ctx, grad: backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return linear


def _true(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ w, grad.flatten(0, 1).t() @ x.flatten(0, 1)


def _clipped(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """By the largest gradient of all tokens."""
    return _true(grad / (1e-3 + grad.abs().amax((0, 1))), x, w)


def _clamped(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token alone, but not linear."""
    return _true(grad.clamp(-1e-4, 1e-4), x, w)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _clamped(grad, *ctx.saved_tensors)


@torch.library.custom_op("tests_forms::pair", mutates_args=())
def _pair(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and a sum over them."""
    y = x @ w.t()
    return y, y.square().sum((0, 1))


_pair.register_fake(lambda x, w: (x.new_empty((*x.shape[:-1], w.shape[0])), x.new_empty(w.shape[:1])))
_pair.register_autograd(
    lambda ctx, grad, of_sum: _true(
        grad + 2 * of_sum * (ctx.saved_tensors[0] @ ctx.saved_tensors[1].t()), *ctx.saved_tensors
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _paired(x: Tensor, w: Tensor) -> Tensor:
    y, total = _pair(x, w)
    return y + total / 1000


_LINEARS: dict[str, Any] = {
    "pair": _paired,
    "true": _operator("true", _true),
    "clipped": _operator("clipped", _clipped),
    "clamped": _operator("clamped", _clamped),
    "undeclared": _operator("undeclared", _clamped),
    "function": _Function.apply,
}


class Foreign(nn.Module):
    """A toy whose MLP has operators of another library."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lm, self.linear = ToyLM(layers=1), _LINEARS[name]
        self.up, self.down = nn.Parameter(torch.randn(40, 16)), nn.Parameter(torch.randn(16, 40) / 8)
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.lm.blocks[0](self.lm.embed(ids))
        x = x + self.linear(F.silu(self.linear(x, self.up)), self.down)
        return F.cross_entropy(self.lm.head(self.lm.norm(x)).flatten(0, 1), labels.flatten())


def _foreign(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _compiled(Foreign(name))
    if name in ("true", "clipped", "clamped"):
        mst_fx.declare_row_wise(_LINEARS[name], row_args="x")
    mst_fx.declare_row_wise(_pair, row_args="x", sums=1)
    with mst_fx.watch() as report:
        loss = model(**token_batch(2, _LENGTH))
        loss.backward()
    gradients: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    if dist.is_initialized():
        for grad in gradients.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    DECLARED.reset()
    refusals = [refused.reason for refused in report.refusals if refused.kind == "sequence"]
    return {"losses": loss.detach(), "weights": gradients, "kinds": kinds(report), "refusals": refusals}


def _foreigners() -> dict[str, Any]:
    return {name: _foreign(name) for name in _LINEARS}


# Bytes that are sent


class _Summed(nn.Module):
    """An operator that has its operand gathered, and whose gradient goes back the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 24), nn.Linear(24, 96)
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        return F.cross_entropy(self.head(x + x.cumsum(1)).flatten(0, 1), labels.flatten())


def _sizes(run: Callable[[], Any], name: str) -> int:
    """Elements of a rank's operands of a collective."""
    found = [shapes[0] for each, shapes in operators(run) if each == f"_c10d_functional::{name}"]
    return sum(map(math.prod, found))


def _sent() -> dict[str, list[int]]:
    """Elements in the forward and in the backward pass: those that a rank sends itself among them."""
    found = {}
    for is_checkpointed in (False, True):
        model: Any = ACCEPTED["llama"].build(use_cache=False, num_hidden_layers=2).double().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        _compiled(model)
        ids = torch.randint(3, 384, (1, 64))
        model(input_ids=ids, labels=ids).loss.backward()
        losses: list[Tensor] = []
        passes: list[Callable[[], Any]] = [
            lambda: losses.append(model(input_ids=ids, labels=ids).loss),  # noqa: B023
            lambda: losses[0].backward(),  # noqa: B023
        ]
        name = "checkpointed" if is_checkpointed else "kept"
        found[name] = [_sizes(each, "all_to_all_single") for each in passes]
    summed = _compiled(_Summed())
    batch = token_batch(1, 64)
    summed(**batch).backward()
    kept: list[Tensor] = []
    passes = [lambda: kept.append(summed(**batch)), lambda: kept[0].backward()]
    found["gathered"] = [_sizes(passes[0], "all_gather_into_tensor"), _sizes(passes[1], "all_to_all_single")]
    return found


# All of them, in one start of the ranks

_FORMS = (_accelerate, _lora, _checkpointed, _foreigners, _sent)


def _rank(rank: int) -> dict[str, Any]:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
    }  # fmt: skip
    torch._dynamo.config.optimize_ddp = False
    return {form.__name__: form() for form in _FORMS}


@pytest.fixture(scope="module")
def two() -> list[Any]:
    return apart.results_of_ranks(_rank)


def _of(form: Callable[[], Any], two: list[Any]) -> list[dict[str, Any]]:
    return [each[form.__name__] for each in two]


@pytest.mark.slow
def test_accelerate_accumulates(two: list[Any]) -> None:
    _agrees(_of(_accelerate, two), _accelerate(), 1e-10)


@pytest.mark.slow
def test_lora_accumulates(two: list[Any]) -> None:
    found = _of(_lora, two)
    _agrees(found, _lora(), 1e-6)
    assert all("lora" in name for name in found[0]["weights"])
    assert found[0]["kinds"] == {"attention": 1, "exchange": 1, "mlp": 1, "sequence": 1, "vocab": 1}


@pytest.mark.slow
def test_checkpoint_in_the_middle(two: list[Any]) -> None:
    _agrees(_of(_checkpointed, two), _checkpointed(), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", _LINEARS)
def test_operators_of_others(name: str, two: list[Any]) -> None:
    """Each rank runs them on its own rows if it is proved that their gradients are rows', and linear; else they run whole, and are as right."""
    found = [each[name] for each in _of(_foreigners, two)]
    _agrees(found, _foreign(name), 1e-10)
    (why,) = found[0]["refusals"] or [""]
    wanted = {
        "pair": "",
        "true": "",
        "clipped": "in the gradient of tests_forms.clipped.default: aten.abs.default is not known to be linear",
        "clamped": "in the gradient of tests_forms.clamped.default: aten.clamp.default is not known to be linear",
        "undeclared": "has effects",
        "function": "calls a graph, or a module",
    }
    assert wanted[name] in why and bool(wanted[name]) == bool(why)
    assert found[0]["kinds"]["mlp"] == (2 if name == "true" else 1)


@pytest.mark.slow
def test_bytes_are_those_of_the_docs(two: list[Any]) -> None:
    """docs/distributed.md: (P - 1)/P · l · D · (2H + 2K') · b a layer and pass; a checkpointed layer's once more, of another what attention gave. (P - 1) · l · E · b where rows are gathered."""
    config: Any = ACCEPTED["llama"].build().config
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    features = config.hidden_size // heads
    assert heads % 2 == keys % 2 == 0 != heads - keys
    tokens = 64 // 2
    # To the rank itself, too: P/(P - 1) times as many.
    layer, given = tokens * features * (2 * heads + 2 * keys), tokens * features * heads
    for found in _of(_sent, two):
        assert found["kept"] == [2 * layer, 2 * layer + 2 * given]
        assert found["checkpointed"] == [2 * layer, 4 * layer]
        assert found["gathered"] == [
            tokens * 24,
            64 * 24,
        ]  # to each other rank; a piece for each rank, itself among them
