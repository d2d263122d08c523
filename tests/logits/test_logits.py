"""Deferred logits: there when somebody looks, and nowhere before."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mst_fx
from mst_fx.graph.fill import fill_values
from mst_fx.logits.take_out import inputs_with_rows
from mst_fx.logits.tensor import DeferredLogits
from mst_fx.ops import port
from tests.helpers import (
    SMALL_CHUNKS,
    Exponential,
    ToyLM,
    compile_mst,
    gradients,
    kinds,
    relative_error,
    report_of,
    token_batch,
)

pytestmark = pytest.mark.shares_compiled
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
    assert (found.shape, found.dtype) == (truth.shape, truth.dtype)
    assert type(found + 0) is Tensor
    assert relative_error(found + 0, truth) <= 1e-6


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


_DERIVED: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x[:, -1],
    lambda x: x[:, 2:9, :],
    lambda x: x[0],
    lambda x: x[..., :-1, :],
    lambda x: x.select(1, 4),
    lambda x: x.narrow(-2, 3, 5),
    lambda x: x.split(10, 1)[2],
    lambda x: next(iter(x)),
    lambda x: x.float(),
    lambda x: x.bfloat16().to(torch.float64),
    lambda x: x.to("cpu", torch.float32)[1].type_as(x),
    lambda x: x.detach(),
    lambda x: x.detach()[:, 1:].half(),
    lambda x: x.clone()[:, ::2].contiguous(),
    lambda x: x[:, 4:][1:, -3:][0, 1],
    lambda x: x.cpu().contiguous().double(),
]


@pytest.mark.parametrize("derive", _DERIVED)
def test_looking_after_an_optimizer_step_is_an_error(derive: Callable[[Tensor], Tensor]) -> None:
    model, _, loss, logits = _deferred()
    derived = derive(logits)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert logits.shape == (BATCH, LENGTH, VOCAB)
    for late in (derived, derive(logits)):
        with pytest.raises(RuntimeError, match=r"changed in place, as an optimizer step does.*logits='keep'"):
            late.argmax(-1)
    with pytest.raises(RuntimeError, match="logits='keep'"):
        logits[torch.tensor([0]), torch.tensor([1])]


def test_looking_after_an_optimizer_step_at_weights_that_are_attributes() -> None:
    model, inputs = ToyLM(layers=1), tuple(token_batch(BATCH, LENGTH).values())
    exported: Any = torch.export.export(model, inputs).module()
    rewritten, _ = mst_fx.rewrite(exported, inputs, SMALL_CHUNKS)
    logits = rewritten(*inputs)[1]
    with torch.no_grad():
        rewritten.get_parameter("head.weight").mul_(2)
    with pytest.raises(RuntimeError, match="logits='keep'"):
        logits.argmax(-1)


@pytest.mark.parametrize("derive", _DERIVED)
def test_what_stays_deferred(derive: Callable[[Tensor], Tensor]) -> None:
    model, inputs, _, logits = _deferred()
    truth = derive(model(**inputs)[1])
    found = derive(logits)
    assert type(found) is DeferredLogits
    assert (found.shape, found.dtype, found.requires_grad) == (truth.shape, truth.dtype, truth.requires_grad)
    assert (found.is_leaf, found.grad_fn is None) == (truth.is_leaf, truth.grad_fn is None)
    assert "computed" not in repr(found) and f"{found}" == repr(found)
    assert found._value is None and logits._value is None
    assert relative_error(found + 0, truth) <= 1e-9
    assert found is logits or found.numel() == logits.numel() or logits._value is None, "computed all rows"
    if truth.requires_grad:
        weights = torch.randn_like(truth)
        gradient = torch.autograd.grad((found * weights).sum(), list(model.parameters()))
        true_gradient = torch.autograd.grad((truth * weights).sum(), list(model.parameters()))
        bar = 1e-2 if truth.dtype != torch.float64 or derive is _DERIVED[10] else 1e-9
        assert max(relative_error(f, t) for f, t in zip(gradient, true_gradient, strict=True)) <= bar


def test_parts_computed_before_an_optimizer_step_stay() -> None:
    model, inputs, loss, logits = _deferred()
    truth = model(**inputs)[1].detach()
    last, cast = logits[:, -1], logits[:, 2:4].detach().float()
    assert relative_error(last * 1, truth[:, -1]) <= _BAR and relative_error(cast * 1, truth[:, 2:4]) <= 1e-6
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert relative_error(last.detach() * 1, truth[:, -1]) <= _BAR
    assert relative_error(cast * 1, truth[:, 2:4]) <= 1e-6
    assert relative_error(last[0].detach() * 1, truth[0, -1]) <= _BAR
    with pytest.raises(RuntimeError, match="logits='keep'"):
        logits.argmax(-1)


# Addresses, strides, histories; factors that are not unique; errors that are ours.
_NOT_COMPARED = {"data_ptr", "const_data_ptr", "grad_fn", "stride", "storage_offset", "is_contiguous"}
_NOT_COMPARED |= {"geqrf", "lu", "qr", "svd", "retain_grad", "set_"}


def _members() -> Iterator[str]:
    for name in dir(torch.Tensor):
        if not name.startswith("_") and name not in _NOT_COMPARED and "sparse" not in name:
            yield name


@functools.cache
def _fast() -> tuple[ToyLM, Callable[..., Any]]:
    model, inputs = ToyLM(layers=1), tuple(token_batch(BATCH, LENGTH).values())
    exported: Any = torch.export.export(model, inputs).module()
    return model, mst_fx.rewrite(exported, inputs, SMALL_CHUNKS)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [False, True])
def test_every_member_of_a_tensor_without_arguments(rows: bool) -> None:
    """Its value, or the type of its error, is that of eager logits."""
    model, run = _fast()
    inputs = tuple(token_batch(BATCH, LENGTH).values())

    def look(logits: Tensor, name: str) -> tuple[Any, list[Any]]:
        torch.manual_seed(0)
        logits = logits[:, 3:5] if rows else logits
        try:
            found = getattr(logits, name)
            found = found() if callable(found) else found
        except Exception as error:
            return type(error), []
        found = torch.tensor(found) if name == "tolist" else found
        leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        facts = [(leaf.shape, leaf.dtype, leaf.requires_grad, leaf.is_leaf) for leaf in leaves]
        return (facts or found), [leaf.detach() * 1 for leaf in leaves]

    compared, wrong = 0, []
    for name in _members():
        (found, values), (truth, true_values) = look(run(*inputs)[1], name), look(model(*inputs)[1], name)
        same = type(found) is type(truth) and (
            found == truth or not isinstance(found, (int, str, list, type))
        )
        if not same or any(
            not torch.allclose(value, true, equal_nan=True)
            for value, true in zip(values, true_values, strict=True)
        ):
            wrong.append(name)
        compared += not isinstance(truth, type)
    assert not wrong
    assert compared > 150


def test_rows_of_a_graph_with_sizes_in_it() -> None:
    """Where nothing proves that rows may be computed alone, all are."""
    head = nn.Linear(16, VOCAB).double()

    def lm(x: Tensor, labels: Tensor) -> Any:
        logits = head(x.view(-1, 16))
        return F.cross_entropy(logits, labels.flatten()), logits.view(BATCH, LENGTH, VOCAB)

    x, labels = torch.randn(BATCH, LENGTH, 16).double(), token_batch(BATCH, LENGTH)["labels"]
    _, logits = compile_mst(lm)(x, labels)
    assert type(logits) is DeferredLogits
    assert type(logits[:, -1]) is Tensor
    assert relative_error(logits[:, -1], lm(x, labels)[1][:, -1]) <= _BAR


@pytest.mark.parametrize(
    "after",
    [
        lambda logits, x: torch.tanh(logits / 5) * 5,
        lambda logits, x: logits * 0.3,
        lambda logits, x: logits.float(),
        lambda logits, x: logits + x.mean(-1, keepdim=True),
        lambda logits, x: logits.cumsum(0),
        lambda logits, x: torch.softmax(logits, 0),
        lambda logits, x: logits * torch.arange(float(LENGTH))[None, :, None],
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_comes_after_the_head(after: Callable[[Tensor, Tensor], Tensor], batch: int) -> None:
    """Softcap, scale and cast are part of the logits; what mixes rows is not computed on slices."""
    head = nn.Linear(16, VOCAB).double()

    def lm(x: Tensor, labels: Tensor) -> Any:
        logits = after(head(x), x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    x = torch.randn(batch, LENGTH, 16).double()
    labels = token_batch(batch, LENGTH)["labels"]
    run = compile_mst(lm)
    truth = lm(x, labels)[1]
    for index in ((0, -1), (slice(None), slice(5, 9)), (torch.arange(batch), torch.arange(batch) + 3)):
        found = run(x, labels)[1][index]
        assert relative_error(found * 1, truth[index]) <= 1e-6
        found, wanted = (torch.autograd.grad(y.square().sum(), head.weight)[0] for y in (found, truth[index]))
        truth = lm(x, labels)[1]
        assert relative_error(found, wanted) <= 1e-5


def test_rows_that_are_not_independent() -> None:
    """No pass makes such a graph of logits; if one did, its rows would not be computed alone."""
    inputs = (torch.randn(BATCH, LENGTH, 16), torch.randn(VOCAB, 16))
    functions: dict[Callable[..., Tensor], Any] = {
        lambda h, w: torch.tanh(F.linear(h, w)) * 2: (True, False),
        lambda h, w: torch.tanh(F.linear(h, w).cumsum(1)) * 2: None,
        lambda h, w: F.linear(torch.softmax(h, 0), w) * 2: None,
        lambda h, w: F.linear(h - h.mean(1, keepdim=True), w) * 2: None,
        lambda h, w: F.linear(h.view(-1, 16), w).view(BATCH, LENGTH, VOCAB): None,
    }
    for function, rows in functions.items():
        graph = torch.fx.symbolic_trace(function)
        fill_values(graph, inputs)
        assert inputs_with_rows(graph, {}) == rows


class _Capped(nn.Module):
    """A loss, the logits that it reads, and those that they are computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, VOCAB).double()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        raw = self.head(x.cumsum(1))
        capped = torch.tanh(raw / 5) * 5
        return F.cross_entropy(capped.flatten(0, 1), labels.flatten()), capped, raw


def test_two_logits_of_one_head() -> None:
    """One is computed from the other; both are outputs, and neither is in memory."""
    lm = _Capped()
    x = torch.randn(BATCH, LENGTH, 16).double().requires_grad_()
    labels = token_batch(BATCH, LENGTH)["labels"]
    leaves = [x, *lm.parameters()]
    truth = torch.autograd.grad(sum(y.square().sum() for y in lm(x, labels)), leaves)
    out = compile_mst(lm)(x, labels)
    assert [type(y) for y in out] == [Tensor, DeferredLogits, DeferredLogits]
    assert all(x.shape[-1] == 16 for y in out[1:] for x in y._source.inputs if x.ndim > 1)
    found = torch.autograd.grad(sum(y.square().sum() for y in out), leaves)
    assert max(relative_error(f, t) for f, t in zip(found, truth, strict=True)) <= _BAR


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast_is_part_of_the_logits(where: str) -> None:
    head = nn.Linear(16, VOCAB)

    def lm(x: Tensor, labels: Tensor) -> Any:
        logits = head(x)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), logits

    def cast(x: Tensor, labels: Tensor, run: Callable[..., Any] = lm) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x, labels)

    x, labels = torch.randn(BATCH, LENGTH, 16), token_batch(BATCH, LENGTH)["labels"]
    if where == "inside":
        _, logits = compile_mst(cast)(x, labels)
    else:
        _, logits = cast(x, labels, compile_mst(lm))
    truth = cast(x, labels)[1]
    assert type(logits) is DeferredLogits and logits.dtype is torch.bfloat16
    assert (logits * 1).dtype is torch.bfloat16 and logits[:, 0].clone().dtype is torch.bfloat16
    assert relative_error(logits * 1, truth) <= 1e-2


def test_rows_changed_in_place_after_they_were_handed_out() -> None:
    _, _, _, logits = _deferred()
    rows = logits[:, 3:5].unsqueeze(1)  # an ordinary view of rows that were computed alone
    with pytest.raises(RuntimeError, match="after some of their rows were computed alone"):
        logits.mul_(2)
    rows.mul_(2)
    with pytest.raises(RuntimeError, match="computed alone and changed in place since"):
        logits.sum()
    assert rows.shape == (BATCH, 1, 2, VOCAB)


def test_a_copy_of_logits_that_a_view_of_them_changed() -> None:
    _, _, _, logits = _deferred()
    cast = logits.float()
    logits.view(-1, VOCAB).mul_(2)
    with pytest.raises(RuntimeError, match="a copy of deferred logits is used for the first time after"):
        cast.sum()


def test_writes_that_no_name_tells_of() -> None:
    model, inputs, _, logits = _deferred()
    truth = model(**inputs)[1]
    last, all_of_it = (x[:, -1] for x in (logits, truth))
    F.relu(logits, True)
    F.relu(truth, True)
    assert relative_error(logits * 1, truth) <= _BAR
    assert relative_error(last * 1, all_of_it) <= _BAR


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, logits: logits.retain_grad(),
        lambda loss, logits: logits.register_hook(lambda grad: grad),
        lambda loss, logits: torch.autograd.grad(loss, logits),
        lambda loss, logits: torch.autograd.grad(logits.sum(), inputs=[logits]),
    ],
)
def test_the_whole_gradient_of_logits_is_an_error(ask: Callable[[Tensor, Tensor], Any]) -> None:
    """The loss does not come by the logits: their gradient would lack its part."""
    _, _, loss, logits = _deferred()
    with pytest.raises(
        RuntimeError, match=r"the loss of their forward pass was computed without them.*'keep'"
    ):
        ask(loss, logits)


def test_a_gradient_that_rows_went_past_is_an_error() -> None:
    _, _, _, logits = _deferred()
    copied = logits.clone()
    total = copied[:, 1].sum()
    with pytest.raises(RuntimeError, match="some of their rows were computed without them"):
        torch.autograd.grad(total, copied)


# The gradient's way through the port


def _alone(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    return [run(**inputs)[0]]


def _logits_alone(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    return [run(**inputs)[1].square().sum()]


def _both(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    loss, logits = run(**inputs)
    parts = logits[:, -1].exp().sum() + logits[:, 3:9].sum() + logits.float().sum() + logits[0, 1].sum()
    return [3 * loss + parts]


def _one_after_the_other(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    loss, logits = run(**inputs)
    return [loss, logits[:, -1].square().sum(), loss + logits.sum(), loss, logits[:, 0].sum()]


def _two_batches(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    (loss, logits), (other_loss, other) = run(**inputs), run(**inputs)
    return [loss + logits[0].sum() + 2 * other_loss + (other * logits).sum(), other.sum()]


_LOSSES = [_alone, _logits_alone, _both, _one_after_the_other, _two_batches]


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("losses", _LOSSES)
@pytest.mark.parametrize("in_thread", [False, True])
def test_gradients_through_the_port(losses: Callable[..., list[Tensor]], inner: str, in_thread: bool) -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)

    def train(run: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for loss in losses(run, inputs):  # gradients add up
            if in_thread:
                thread = threading.Thread(target=functools.partial(loss.backward, retain_graph=True))
                thread.start()
                thread.join()
            else:
                loss.backward(retain_graph=True)
        return gradients(model)

    truth, found = train(model), train(compile_mst(model, {**SMALL_CHUNKS, "inner": inner}))
    assert found.keys() == truth.keys()
    assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR
    assert not port._PUT_DOWN.parcels, "a gradient was not picked up"


class _Interrupted(RuntimeError):
    pass


def _interrupt(_: Tensor) -> None:
    raise _Interrupted  # as running out of memory would


def _used(run: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The compiled graph's loss, and one that its logits have a part in."""
    loss, logits = run(**inputs)
    return loss, loss + logits.square().mean()


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("retain", [False, True])
def test_a_backward_pass_that_raises_leaves_nothing_in_the_port(inner: str, retain: bool) -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    _, total = _used(model, inputs)
    total.backward()
    truth = gradients(model)
    compiled = compile_mst(model, {**SMALL_CHUNKS, "inner": inner})
    model.zero_grad()
    loss, total = _used(compiled, inputs)
    hook = loss.register_hook(_interrupt)  # behind the junction, before the loop
    for _ in range(3):
        with pytest.raises(_Interrupted):
            total.backward(retain_graph=True)
        assert not port._PUT_DOWN.parcels
    assert not gradients(model)
    hook.remove()
    if not retain:
        loss, total = _used(compiled, inputs)
    total.backward(retain_graph=retain)
    found = gradients(model)
    assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR
    assert not port._PUT_DOWN.parcels


def test_a_backward_pass_that_raises_beside_others() -> None:
    """Two models in one loss, one pass inside of another, one in another thread: each keeps its own."""
    models, inputs = [ToyLM(layers=1), ToyLM(layers=1)], token_batch(BATCH, LENGTH)
    truths = []
    for model in models:
        _used(model, inputs)[1].backward()
        truths.append(gradients(model))
        model.zero_grad()
    torch._dynamo.reset()
    options: Any = SMALL_CHUNKS
    compiled = [torch.compile(model, backend="mst", options=options) for model in models]
    first, second = (_used(run, inputs) for run in compiled)

    def others(_: Tensor) -> None:
        assert len(port._PUT_DOWN.parcels) >= 1  # of the pass that is under way
        with torch.enable_grad():
            failing = _used(compiled[1], inputs)
        failing[0].register_hook(_interrupt)
        with pytest.raises(_Interrupted):
            failing[1].backward()
        thread = threading.Thread(target=second[1].backward)
        thread.start()
        thread.join()

    first[0].register_hook(others)
    first[1].backward()
    for model, truth in zip(models, truths, strict=True):
        found = gradients(model)
        assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR
    both = sum(_used(run, inputs)[1] for run in compiled)
    assert isinstance(both, Tensor)
    both.backward()
    for model, truth in zip(models, truths, strict=True):
        found = gradients(model)
        assert max(relative_error(found[name], 2 * truth[name]) for name in truth) <= _BAR
    assert not port._PUT_DOWN.parcels


def test_the_port_is_there_and_numbers_do_not_add_up() -> None:
    """All uses of both logits of a head go through one junction."""
    lm = _Capped()
    x = torch.randn(BATCH, LENGTH, 16).double().requires_grad_()
    _, capped, raw = compile_mst(lm)(x, token_batch(BATCH, LENGTH)["labels"])
    first, second = (
        next(i for i in y._source.inputs if i.shape[-1] == 16 and i.ndim == 3) for y in (capped, raw)
    )
    assert first is second
    assert type(first.grad_fn).__name__ == "_JunctionBackward"


@pytest.mark.parametrize("shift", ["logits", "hidden"])
def test_without_a_port(shift: str) -> None:
    """The loss reads other rows than the logits: their gradient comes in as the rows' own tangent."""
    head = nn.Linear(16, VOCAB).double()

    def lm(x: Tensor, labels: Tensor) -> Any:
        x = x * 2
        logits = head(x)
        for_loss = logits[:, :-1] if shift == "logits" else head(x[:, :-1])
        return F.cross_entropy(for_loss.flatten(0, 1), labels[:, 1:].flatten()), logits

    x = torch.randn(BATCH, LENGTH, 16).double().requires_grad_()
    labels = token_batch(BATCH, LENGTH)["labels"]
    leaves = [x, *head.parameters()]

    def total(run: Callable[..., Any]) -> Tensor:
        loss, logits = run(x, labels)
        return loss + logits[:, -1].square().sum() + logits.exp().sum()  # type: ignore[no-any-return]

    found, truth = (torch.autograd.grad(total(run), leaves) for run in (compile_mst(lm), lm))
    assert max(relative_error(f, t) for f, t in zip(found, truth, strict=True)) <= _BAR


@pytest.mark.slow
def test_frozen_rows_and_frozen_head() -> None:
    for frozen in ("head", "rows"):
        model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(("head" in name) == (frozen == "rows"))
        truth, found = _through_both(model, model, inputs), _through_both(model, compile_mst(model), inputs)
        assert found.keys() == truth.keys() and truth
        assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR


# Compiled code and DDP


@pytest.mark.parametrize(
    "use", [lambda x: x[:, -1].exp().sum(), lambda x: torch.softmax(x, -1).square().sum()]
)
@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_code_after_a_graph_break(use: Callable[[Tensor], Tensor], inner: str) -> None:
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)

    def train(ids: Tensor, labels: Tensor) -> Any:
        loss, logits = model(ids, labels)
        torch._dynamo.graph_break()
        return loss + use(logits), logits

    truth = _through_both(model, train, inputs)
    found = _through_both(model, compile_mst(train, {**SMALL_CHUNKS, "inner": inner}), inputs)
    assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._run = [run]

    def forward(self, **inputs: Tensor) -> Any:
        return self._run[0](**inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_outputs_of_ddp(how: dict[str, bool]) -> None:
    """Deferred logits go through DDP's sink, used or not."""
    model, inputs = ToyLM(layers=1), token_batch(BATCH, LENGTH)
    uses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda loss, logits: loss,
        lambda loss, logits: loss + logits[:, -1].exp().sum(),
        lambda loss, logits: logits.square().sum(),
        lambda loss, logits: loss + Exponential.apply(logits).sum(),  # type: ignore[no-untyped-call]
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ddp", rank=0, world_size=1)
        try:
            for number, use in enumerate(uses):
                model.zero_grad(set_to_none=True)
                use(*model(**inputs)).backward()
                truth = gradients(model)
                ddp = nn.parallel.DistributedDataParallel(_Wrapped(model, compile_mst(model)), **how)  # type: ignore[arg-type]
                for _ in range(2):
                    model.zero_grad(set_to_none=True)
                    loss, logits = ddp(**inputs)
                    assert type(logits) is DeferredLogits
                    use(loss, logits).backward()
                    found = gradients(model)
                    assert max(relative_error(found[name], truth[name]) for name in truth) <= _BAR
                    assert number > 1 or logits._value is None, "all logits were computed"
        finally:
            torch.distributed.destroy_process_group()


# What the backend defers, and when


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


@pytest.mark.slow
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


def test_without_a_loss_nothing_is_deferred() -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_dynamic_lengths() -> None:
    """One compilation; rows of each length are computed alone, their gradient comes by the port."""
    model = ToyLM(layers=1)
    compiled = compile_mst(model, dynamic=True)
    for batch, length in ((2, 33), (3, 47), (2, 61)):
        inputs = token_batch(batch, length)
        loss, logits = compiled(**inputs)
        assert type(logits) is DeferredLogits and logits.shape == (batch, length, VOCAB)
        total = loss + logits[:, -1].square().sum() + logits[0, 3:9].exp().sum()
        assert logits._value is None
        eager_loss, eager = model(**inputs)
        truth = eager_loss + eager[:, -1].square().sum() + eager[0, 3:9].exp().sum()
        found, wanted = (torch.autograd.grad(y, list(model.parameters())) for y in (total, truth))
        assert max(relative_error(f, t) for f, t in zip(found, wanted, strict=True)) <= _BAR
        assert any(type(x.grad_fn).__name__ == "_JunctionBackward" for x in logits._source.inputs)
