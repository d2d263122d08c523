"""Two processes with gloo under FSDP2 and tensor parallelism: losses and gradients are those of one process.

FSDP2 puts a hook on every output of a sharded module, frees gathered weights behind the back of whoever holds
them, and breaks the graph at each sharded module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import mst_fx
from mst_fx.logits.tensor import DeferredLogits
from tests import apart
from tests.helpers import (
    DYNAMO_COMPILES_CHECKPOINTED_LAYERS,
    SMALL_CHUNKS,
    ToyLM,
    kinds,
    loss_of,
    relative_error,
    token_batch,
    worst_error,
)
from tests.models import ACCEPTED

_OPTIONS = {**SMALL_CHUNKS, "attention_chunk_rows": 16}
_STEPS, _LENGTH = 2, 33


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in float64, how it is spread over the ranks, compiled and used.

    What comes after Dynamo is the point of each way to spread once: the others go without AOTAutograd.

    Attributes:
        model: "toy", or "llama", whose norms and loss pass through float32.
        spread: "layers" and root, "root" alone, "ddp", or "tensors" (tensor parallelism).
        compiled: "before" or "after" that in place, "around" it, as a "function" that returns the loss alone, or in
            "parts": layer by layer, and the head with its loss.
        rewritten: the number of rewrites by kind.
        use: of the logits: "none", or their last "row" is added to the loss, or makes the loss "alone".
    """

    model: str
    spread: str
    compiled: str
    rewritten: dict[str, int]
    use: str = "none"
    checkpointing: bool = False
    inner: str = "aot_eager"

    @property
    def bar(self) -> float:
        return 1e-9 if self.model == "toy" and self.inner != "inductor" else 1e-6

    def __str__(self) -> str:
        more = ("checkpointing",) * self.checkpointing + (self.use,) * (self.use != "none") + (self.inner,)
        return "-".join((self.model, self.spread, self.compiled, *more))


# FSDP2 breaks the graph at each layer it shards; the mask of attention crosses the breaks as vectors.
_TORN = {
    "mask": 1,
    "vocab": 1,
    **((DYNAMO_COMPILES_CHECKPOINTED_LAYERS and {"attention": 1, "mlp": 1}) or {}),
}
_ONE = {"attention": 1, "mlp": 1, "vocab": 1}
_CASES = (
    Case("llama", "layers", "after", _TORN, use="row", checkpointing=True, inner="eager"),
    Case("llama", "layers", "parts", _ONE),
    Case("toy", "root", "around", _ONE),
    Case("llama", "tensors", "before", {"attention": 1, "vocab": 1}),
    Case("toy", "root", "before", _ONE, use="alone"),
    Case("toy", "root", "function", _ONE, inner="eager"),
    Case("toy", "ddp", "before", _ONE),
    Case("toy", "root", "after", _ONE, inner="inductor"),
)


class Parts(nn.Module):
    """A Llama whose head and loss are a module of their own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.trunk: Any = model.model
        self.head = Head(model.lm_head)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.head(self.trunk(input_ids=input_ids).last_hidden_state, labels)


class Head(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.projection(hidden)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten()), logits


def _build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.model == "toy":
        return ToyLM(layers=1)
    model = ACCEPTED["llama"].build(use_cache=False, num_hidden_layers=1).double()
    if case.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return Parts(model) if case.compiled == "parts" else model


def _batch(case: Case, rank: int) -> dict[str, Tensor]:
    is_one_size = case.spread == "tensors" or case.inner == "inductor"  # whose ranks share kernels
    batch = token_batch(2, _LENGTH + (0 if is_one_size else rank))
    if case.inner == "inductor":
        batch = {name: ids.roll(rank, 1) for name, ids in batch.items()}
    return batch if case.model == "toy" else {"input_ids": batch["ids"], "labels": batch["labels"]}


def _layers(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, Parts):
        return [*model.trunk.layers, model.head]  # type: ignore[union-attr, misc]
    return list(model.blocks if isinstance(model, ToyLM) else model.model.layers)  # type: ignore[arg-type, union-attr]


def _spread(case: Case, model: nn.Module) -> Callable[..., Any]:
    """Spreads a model in place; what is called in its place."""
    if case.spread == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if case.spread == "tensors":
        columns = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
        plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
        rows = {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        return parallelize_module(model, init_device_mesh("cpu", (2,)), {**plan, **rows})
    for layer in _layers(model) if case.spread == "layers" else []:
        fully_shard(layer)
    sharded: Any = fully_shard(model)
    return sharded  # type: ignore[no-any-return]


def _compiled(case: Case, model: nn.Module) -> Callable[..., Any]:
    options: Any = {**_OPTIONS, "inner": case.inner}
    if case.compiled == "before":
        model.compile(backend="mst", options=options)
    run = _spread(case, model)
    if case.compiled == "parts":
        for layer in _layers(model):
            layer.compile(backend="mst", options=options)
    if case.compiled == "after":
        model.compile(backend="mst", options=options)
    if case.compiled == "function":
        return torch.compile(lambda **batch: loss_of(model(**batch)), backend="mst", options=options)
    return torch.compile(run, backend="mst", options=options) if case.compiled == "around" else run


def _total(case: Case, out: Any) -> tuple[Tensor, Tensor | None]:
    """What a step minimises, and the logits."""
    loss = loss_of(out)
    logits = None if isinstance(out, Tensor) else out[1] if isinstance(out, tuple) else out.logits
    if case.use != "none":
        assert logits is not None
        loss = logits[:, -1].square().mean() + (loss if case.use == "row" else 0)
    return loss, logits


def _full(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def _train(case: Case, rank: int) -> dict[str, Any]:
    """Two steps of a rank on its own batches: the last loss and gradients, and what was seen."""
    torch._dynamo.reset()
    model = _build(case)
    run, optimizer = _compiled(case, model), torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Any] = {"late": []}
    before: Any = None
    with mst_fx.watch() as report:
        for _ in range(_STEPS):
            optimizer.zero_grad()
            loss, logits = _total(case, run(**_batch(case, rank)))
            if found["late"]:
                found["late"].append(_error(before))
            loss.backward()
            gradients = {name: _full(p.grad) for name, p in model.named_parameters()}
            optimizer.step()
            found["deferred"] = (
                None if logits is None else isinstance(logits, DeferredLogits) and logits._value is None
            )
            if case.spread == "root" and logits is not None:
                found["late"].append(_error(logits))
            before = logits
    refusals = {(refused.kind, refused.name, refused.cause.value) for refused in report.refusals}
    return {
        **found,
        "loss": loss.detach(),
        "gradients": gradients,
        "kinds": kinds(report),
        "refusals": refusals,
    }


def _error(logits: Any) -> str:
    try:
        logits.sum()
    except RuntimeError as error:
        return str(error)
    return "none"


def _rank(rank: int) -> list[Any]:
    return [_train(case, rank) for case in _CASES]


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """What each rank found in each case."""
    return apart.results_of_ranks(_rank)


def _truth(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The last losses of the ranks' batches and the means of their gradients, from one process."""
    model = _build(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        losses = [_total(case, model(**_batch(case, rank)))[0] for rank in range(2)]
        torch.stack(losses).mean().backward()
        gradients = {name: _full(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
    return losses, gradients


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_as_one_process(case: Case, results: list[Any]) -> None:
    losses, gradients = _truth(case)
    for rank in range(2):
        found = results[rank][_CASES.index(case)]
        assert relative_error(found["loss"], losses[rank]) <= case.bar
        assert worst_error(found["gradients"], gradients) <= case.bar
        assert found["kinds"] == case.rewritten
        assert found["deferred"] is (None if case.compiled == "function" else True)


@pytest.mark.slow
def test_mlps_of_dtensors_are_refused(results: list[Any]) -> None:
    """And nothing else is: attention runs on local heads, the head has a plain weight."""
    (case,) = [case for case in _CASES if case.spread == "tensors"]
    refusals = results[0][_CASES.index(case)]["refusals"]
    assert refusals == {("mlp", "model.layers.0.mlp", "not-plain")}


@pytest.mark.slow
def test_logits_whose_weights_were_freed(results: list[Any]) -> None:
    """FSDP2 frees weights after a step and fills them with others in the next, at the same version."""
    cases = [
        case
        for case in _CASES
        if case.spread == "root" and case.compiled != "function" and case.use == "none"
    ]
    for case in cases:
        freed, other, again = results[0][_CASES.index(case)]["late"]
        assert "was freed, as FSDP does after the backward pass" in freed and freed == again
        assert "was changed in place, as an optimizer step does" in other
