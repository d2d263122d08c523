"""Writes that no version counts: to deferred logits, and to what they are computed from.

What is read afterwards is what eager logits would give, or an error says that it cannot be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mst_fx
from mst_fx.logits.snapshot import snapshot
from mst_fx.logits.tensor import DeferredLogits
from tests.helpers import (
    SMALL_CHUNKS,
    ToyLM,
    compile_mst,
    gradients,
    relative_error,
    token_batch,
    worst_error,
)


def _array(x: Tensor) -> None:
    array = x.detach().numpy()
    array *= 2


def _storage(x: Tensor) -> None:
    # What the storage's other owner sees of it, wherever it begins.
    torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).mul_(2)


def _twice(x: Tensor) -> None:
    x.data.mul_(2)


dlpack: Any = torch.utils.dlpack

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "data": _twice,
    "data, an element": lambda x: x.data[0, 0].fill_(5),
    "numpy": _array,
    "dlpack": lambda x: dlpack.from_dlpack(x.detach()).mul_(2),
    "storage": _storage,
    "detached": lambda x: x.detach().mul_(2),
    "a view's data": lambda x: _twice(x[..., :5]),
    "a view": lambda x: x.detach()[..., :5].mul_(2),
    "rows' data": lambda x: _twice(x[:, 3:5]),
    "rows' array": lambda x: _array(x[:, -1]),
    "a view of rows": lambda x: x.detach()[:, -1][..., :3].zero_(),
    "a view of rows' array": lambda x: _array(x[:, -1, :3]),
    "rows with a new dimension": lambda x: _twice(x[:, -1, None]),
    "a copy": lambda x: _array(x.clone()),
    "a copy's rows": lambda x: _twice(x.float()[:, -1]),
}


def _used(x: Tensor) -> Tensor:
    _ = x + 0
    return x


# What is there when the write comes.
KEPT: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "nothing": lambda x: [],
    "rows": lambda x: [x[:, 3:5]],
    "used rows": lambda x: [_used(x[:, 3:5])],
    "a cast": lambda x: [x.float()],
    "a copy of rows": lambda x: [x[:, -1].clone(), x[:, -1]],
    "a view of rows": lambda x: [x[:, -1][..., :3]],
    "a cast of rows of used logits": lambda x: (lambda rows: [_used(x)[0], rows.float()])(x[:, 3:5]),
}


@functools.cache
def _models() -> tuple[ToyLM, Callable[..., Any]]:
    """A model, and its rewritten graph, which runs without an outer compiler."""
    torch.manual_seed(0)
    model, inputs = ToyLM(layers=1), tuple(token_batch(2, 33).values())
    exported: Any = torch.export.export(model, inputs).module()
    rewritten, report = mst_fx.rewrite(exported, inputs, SMALL_CHUNKS)
    assert any(rewrite.deferred for rewrite in report.rewrites)
    return model, rewritten


def _outcome(
    run: Any, write: Callable[[Tensor], Any], kept: str, grad: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What is read after a write, and the gradients of it and the loss."""
    run.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(grad):
        loss, logits = run(*token_batch(2, 33).values())
        others = KEPT[kept](logits)
        write(logits)
        found = [
            loss,
            logits[:, -1] * 1,
            *[x * 1 for x in others],
            logits[torch.tensor([0]), [3]],
            logits * 1,
        ]
    total = sum((x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in found if x.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    return [x.detach() for x in found], gradients(run)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("write", WRITES)
def test_what_is_read_after_a_write(write: str) -> None:
    """Never another number than eager's; no error where nothing was kept and the logits themselves are written."""
    model, rewritten = _models()
    for kept in KEPT:
        for grad in (True, False):
            truth, true_gradients = _outcome(model, WRITES[write], kept, grad)
            try:
                found, found_gradients = _outcome(rewritten, WRITES[write], kept, grad)
            except (RuntimeError, ValueError) as error:
                assert (
                    "of deferred logits" in str(error)
                    or "deferred logits are" in str(error)
                    or "read-only" in str(error)
                )
                assert kept != "nothing" or "rows" in write, (kept, error)
                assert write != "a copy", kept
                continue
            errors = [relative_error(f, t) for f, t in zip(found, truth, strict=True)]
            assert max(errors) <= 1e-6, (kept, grad, errors)
            if grad:
                assert worst_error(found_gradients, true_gradients) <= 1e-6, kept


def test_reading_memory_is_no_error() -> None:
    """What may be written to and is not: then everything goes on as before, and rows are computed alone."""
    model, rewritten = _models()
    _, truth = model(*token_batch(2, 33).values())
    with torch.no_grad():
        _, logits = rewritten(*token_batch(2, 33).values())
        rows, cast = logits[:, 3:5], logits.float()
        view = logits[:, -1, :3]
        assert rows.detach().numpy().shape == rows.data.shape and rows.data_ptr() and view.data_ptr()
        assert isinstance(logits, DeferredLogits) and logits._value is None, "rows are computed alone"
        array = logits.numpy()  # while there is a view of other rows: to read
        assert relative_error(torch.tensor(array), truth) <= 1e-6
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
        with pytest.raises(RuntimeError, match="data gives out the memory of deferred logits"):
            _ = logits.data
        for found, true in (
            (rows, truth[:, 3:5]),
            (cast, truth.float()),
            (logits, truth),
            (view, truth[:, -1, :3]),
        ):
            assert relative_error(found * 1, true) <= 1e-6
        del view, rows, found
        logits.data.mul_(2)
        assert relative_error(logits * 1, 2 * truth) <= 1e-6


def test_casts_of_computed_logits_have_the_modes_they_were_made_in() -> None:
    for grad in (True, False):
        found = []
        for run in _models():
            logits = run(*token_batch(2, 33).values())[1]
            rows = logits[:, 3:5]
            _used(logits)
            with torch.set_grad_enabled(grad):
                cast = rows.float()
            found.append(cast)
        assert found[0].requires_grad == found[1].requires_grad == grad
        assert relative_error(*found) <= 1e-6


def test_rows_are_let_go_of() -> None:
    """Rows that were known outside are held until they were looked at, no longer; changes of others do no harm."""
    _, rewritten = _models()
    _, logits = rewritten(*token_batch(2, 33).values())
    with torch.no_grad():
        for start in range(0, 32, 4):
            logits.detach()[:, start : start + 4].view(-1, logits.shape[-1]).div_(
                2
            )  # each chunk's temperature
            assert len(logits._source.apart) <= 1 + start // 4
            assert all(apart._value is None for apart in logits._source.apart[:-1]), "storages are held"
        assert logits[:, 32].shape == (2, logits.shape[-1])
        with pytest.raises(RuntimeError, match="computed alone and changed in place"):
            _ = logits * 1


def test_no_address_of_nothing() -> None:
    """C++ that asks for memory and no Python: an error, where memory at 0 would be read."""
    logits = _models()[1](*token_batch(2, 33).values())[1].detach()
    with pytest.raises(RuntimeError, match="data pointer"):
        dlpack.to_dlpack(logits)


def test_hooks_on_nodes_are_errors() -> None:
    logits = _models()[1](*token_batch(2, 33).values())[1]
    for x in (logits, logits[:, -1], logits.double()):
        for name in ("register_hook", "register_prehook"):
            with pytest.raises(RuntimeError, match="would not be called"):
                getattr(x.grad_fn, name)(print)


# What logits are computed from


def _step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()


def _put(weight: nn.Parameter) -> None:
    weight.data = torch.zeros_like(weight)


SOURCES: dict[str, Callable[[Tensor, Any, Tensor], Any]] = {
    "weight.data": lambda h, w, b: w.data.mul_(2),
    "weight.data, negative": lambda h, w, b: w.data.neg_(),
    "weight.data, one number": lambda h, w, b: w.data[3, 4].fill_(9),
    "weight.data, permuted rows": lambda h, w, b: w.data.copy_(w.data.flip(0)),
    "weight.data, permuted columns": lambda h, w, b: w.data.copy_(w.data.flip(1)),
    "another weight.data": lambda h, w, b: _put(w),
    "weight's array": lambda h, w, b: _array(w),
    "weight by dlpack": lambda h, w, b: dlpack.from_dlpack(w.detach()).mul_(2),
    "weight's storage": lambda h, w, b: _storage(w),
    "an optimizer": lambda h, w, b: _step(w),
    "bias.data": lambda h, w, b: b.data.mul_(2),
    "hidden.data": lambda h, w, b: h.data.mul_(2),
    "hidden's array": lambda h, w, b: _array(h),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_logits_are_computed_from(dtype: torch.dtype) -> None:
    """Eager logits were made before; a write of the same numbers, or to the labels, changes nothing here either."""
    torch.manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(*size, dtype=dtype)) for size in ((128, 64), (128,)))
    first, labels = torch.randn(66, 64, dtype=dtype), torch.randint(128, (66,))

    def head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, labels), logits

    compiled = compile_mst(head)
    kept = weight.detach().clone(), bias.detach().clone()
    for write in ("nothing", *SOURCES):
        hidden, given = first.clone().requires_grad_(), labels.clone()
        weight.data, bias.data = kept[0].clone(), kept[1].clone()
        truth = head(hidden, weight, bias, given)[1].detach()
        loss, logits = compiled(hidden, weight, bias, given)
        loss.backward()
        if write == "nothing":
            given.data.fill_(3)
            weight.data.copy_(weight.data.clone())
            assert relative_error(logits[3:5], truth[3:5]) <= 1e-5
            assert relative_error(logits * 1, truth) <= 1e-5
            continue
        SOURCES[write](hidden, weight, bias)
        for use in (lambda x: x[3:5] * 1, lambda x: x * 1):
            with pytest.raises(RuntimeError, match="after what they are computed from"):
                use(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_snapshots_of_large_tensors(dtype: torch.dtype) -> None:
    """By sums of bits, also where the sums of plain powers of two would come to 0."""
    x = torch.randint(-8, 8, (128, 64)).to(dtype)
    layouts = {
        "plain": x,
        "transposed": x.t(),
        "sliced": x[:, 1:],
        "rows": x.view(4, 32, 64),
        "flat": x.view(-1),
    }
    for name, y in layouts.items():
        known = snapshot(y, is_exposed=True)
        assert known.bits is not None and known.is_of(y), name
        for change in (
            lambda: x.data.mul_(2), lambda: x.data.neg_(), lambda: x.data.copy_(x.data.roll(1, 0)),
            lambda: x.data[5, 6].add_(1),
        ):  # fmt: skip
            before = x.clone()
            change()
            assert not known.is_of(y), name
            x.data.copy_(before)
            assert known.is_of(y), name
