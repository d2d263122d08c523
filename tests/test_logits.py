"""Deferred logits: there when somebody looks, and nowhere before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mst_fx.logits import DeferredLogits
from tests.helpers import (
    SMALL_CHUNKS,
    ToyLM,
    compile_mst,
    gradients,
    kinds,
    relative_error,
    report_of,
    token_batch,
)

_BAR = 1e-9
VOCAB, BATCH, LENGTH = 96, 2, 33


def _deferred(
    options: dict[str, Any] | None = None,
) -> tuple[ToyLM, dict[str, Tensor], Tensor, DeferredLogits]:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    loss, logits = compile_mst(model, options)(**inputs)
    assert type(logits) is DeferredLogits
    return model, inputs, loss, logits


def test_metadata_computes_nothing() -> None:
    _, _, _, logits = _deferred()
    assert logits.shape == (BATCH, LENGTH, VOCAB) and logits.size(-1) == VOCAB and logits.ndim == 3
    assert logits.dtype is torch.float64 and logits.is_floating_point()
    assert logits.device.type == "cpu" and not logits.is_cuda
    assert logits.requires_grad
    assert len(logits) == BATCH and logits.numel() == BATCH * LENGTH * VOCAB
    assert "DeferredLogits" in repr(logits) and "96" in repr(logits)
    assert isinstance(logits, Tensor)
    assert logits._value is None


def test_values_and_one_computation() -> None:
    model, inputs, loss, logits = _deferred()
    eager_loss, eager = model(**inputs)
    assert relative_error(loss, eager_loss) <= 1e-10
    assert relative_error(logits + 0, eager) <= _BAR
    assert logits._value is logits.materialize()
    assert "computed" in repr(logits)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.argmax(-1),
        lambda x: x[:, -1],
        lambda x: torch.softmax(x, -1),
        lambda x: x.detach(),
        lambda x: x.float(),
        lambda x: 2 * x,
        lambda x: torch.cat([x, x]),
        lambda x: x.view(-1, VOCAB),
        lambda x: torch.from_numpy(x.detach().numpy()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: x.clone(),
        lambda x: torch.stack(list(x)),
    ],
)
def test_any_use_gives_the_logits(use: Callable[[Tensor], Tensor]) -> None:
    model, inputs, _, logits = _deferred()
    found, truth = use(logits), use(model(**inputs)[1])
    assert type(found) is Tensor
    assert relative_error(found, truth) <= 1e-6


def _through_both(model: ToyLM, run: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss, logits = run(**inputs)
    (loss + logits[:, -1].logsumexp(-1).mean()).backward()
    return gradients(model)


def test_gradient_through_logits_and_loss() -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    truth, found = _through_both(model, model, inputs), _through_both(model, compile_mst(model), inputs)
    assert found.keys() == truth.keys()
    assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR


def test_gradient_through_logits_alone() -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    names = [name for name, _ in model.named_parameters()]
    truth = torch.autograd.grad(model(**inputs)[1].square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compile_mst(model)(**inputs)[1].square().sum(), list(model.parameters()))
    errors = {n: relative_error(f, t) for n, f, t in zip(names, found, truth, strict=True)}
    assert max(errors.values()) <= _BAR


def test_looking_after_an_optimizer_step_is_an_error() -> None:
    model, _, loss, logits = _deferred()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert logits.shape == (BATCH, LENGTH, VOCAB)
    with pytest.raises(RuntimeError, match="logits='keep'"):
        logits.argmax(-1)


def test_looking_before_an_optimizer_step_keeps_the_value() -> None:
    model, inputs, loss, logits = _deferred()
    truth = model(**inputs)[1].detach()
    logits.argmax(-1)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert relative_error(logits.detach(), truth) <= _BAR


def test_copies_are_ordinary_tensors() -> None:
    model, inputs, _, logits = _deferred()
    truth = model(**inputs)[1].detach()
    with torch.no_grad():
        detached = logits.detach()
    assert relative_error(pickle.loads(pickle.dumps(detached)), truth) <= _BAR
    assert relative_error(copy.deepcopy(detached), truth) <= _BAR


def test_pickle_of_deferred_logits() -> None:
    """Non-leaf tensors with a gradient cannot be deep-copied; they can be pickled, as in eager."""
    model, inputs, _, logits = _deferred()
    found = pickle.loads(pickle.dumps(logits))
    assert type(found) is Tensor
    assert relative_error(found, model(**inputs)[1]) <= _BAR


def test_keep() -> None:
    """``logits="keep"`` gives plain logits, and says why the head was left alone."""
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    options = {**SMALL_CHUNKS, "logits": "keep"}
    report = report_of(model, options, **inputs)
    assert kinds(report) == {"mlp": 1}
    assert ["output" in refused.reason for refused in report.refusals if refused.kind == "vocab"] == [True]
    loss, logits = compile_mst(model, options)(**inputs)
    assert type(logits) is Tensor
    eager_loss, eager = model(**inputs)
    assert relative_error(loss, eager_loss) <= 1e-10 and relative_error(logits, eager) <= _BAR


def test_no_loss_no_deferral() -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)

    def logits_of(ids: Tensor) -> Any:
        return model.head(model.norm(model.blocks[0](model.embed(ids))))

    report = report_of(logits_of, None, inputs["ids"])
    assert kinds(report) == {"mlp": 1}
    found = compile_mst(logits_of)(inputs["ids"])
    assert type(found) is Tensor
    assert relative_error(found, logits_of(inputs["ids"])) <= _BAR


@pytest.mark.parametrize("mode", ["auto", "defer"])
def test_deferred_without_gradients(mode: str) -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    with torch.no_grad():
        loss, logits = compile_mst(model, {**SMALL_CHUNKS, "logits": mode})(**inputs)
        assert type(logits) is DeferredLogits and not logits.requires_grad and not loss.requires_grad
    assert relative_error(logits + 0, model(**inputs)[1]) <= _BAR
    assert not (logits + 0).requires_grad


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tangent_for_logits_that_nobody_uses() -> None:
    """The backward pass makes no tensor of S×V elements; keeping the logits does."""
    model, inputs = ToyLM(layers=1), token_batch(4, 128)
    elements = {}
    for mode in ("auto", "keep"):
        compiled = compile_mst(model, {**SMALL_CHUNKS, "logits": mode})
        compiled(**inputs)[0].backward()  # compiles
        loss, logits = compiled(**inputs)
        with _Largest() as backward:
            loss.backward()
        elements[mode] = backward.elements
        assert mode == "keep" or logits._value is None
    wide = 4 * 128 * VOCAB
    assert 0 < elements["auto"] < wide <= elements["keep"]
