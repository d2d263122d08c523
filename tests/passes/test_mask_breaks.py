"""A mask that is made in one graph and read in others: it crosses the break as vectors, and is not made."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.errors import Cause
from mst_fx.masks.formula import Compare
from mst_fx.masks.tensor import DeferredMask, MaskForm, made_mask
from mst_fx.passes import mask_breaks
from tests import apart
from tests.helpers import (
    check_parity,
    compile_mst,
    gradients,
    kinds,
    relative_error,
    step,
    worst_error,
)
from tests.models import ACCEPTED, ATTENTION_SEQ, OTHERS, attention_batch
from tests.operators import operators

SEQ = 41
OPTIONS: dict[str, Any] = {
    "inner": "aot_eager",
    "attention_chunk_rows": 8,
    "chunk_rows": 16,
    "vocab_chunk_rows": 20,
}
ALONE: dict[str, Any] = {
    **OPTIONS,
    "inner": "eager",
    "passes": ("attention",),
}  # AOTAutograd is not the point
Make = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys' places [K], queries' [Q, 1], a mark for each token


def _added(mask: Tensor, fill: float = float("-inf"), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), fill, dtype=dtype))


MASKS: dict[str, tuple[Make, str]] = {
    "causal": (lambda k, q, marks: (k <= q)[None, None], "causal"),
    "constant": (lambda k, q, marks: torch.arange(SEQ) <= torch.arange(SEQ)[:, None], "causal"),
    "window": (lambda k, q, marks: ((k <= q) & (k > q - 9))[None, None], "window 9"),
    "documents": (
        lambda k, q, marks: (k <= q) & (marks[:, None, None, :] == marks[:, None, :, None]),
        "documents",
    ),
    "padding": (lambda k, q, marks: (k <= q) & (marks > 0)[:, None, None, :], "causal + padding"),
    "prefix": (lambda k, q, marks: (k <= q)[None, None] | (k < 5), "general: k0 <= q0 or k1"),
    "not": (lambda k, q, marks: ~((k > q) | (marks == 1)[:, None, None, :]), "general: k0 <= q0 and not k1"),
    "expanded": (lambda k, q, marks: (k <= q)[None, None].expand(marks.shape[0], 1, -1, -1), "causal"),
    "two dimensions": (lambda k, q, marks: k <= q, "causal"),
    "added": (lambda k, q, marks: _added(k <= q)[None, None], "causal"),
    "added and padded": (
        lambda k, q, marks: _added((k <= q) & (marks > 0)[:, None, None, :], -1e9),
        "causal + padding",
    ),
    "cast": (lambda k, q, marks: _added((k <= q)[None, None], -3e38, torch.float32).double(), "causal"),
}


class Layer(nn.Module):
    """Args: inside: run on the mask in its graph; recompute: the layer is checkpointed, in its graph."""

    def __init__(self, inside: Callable[[Tensor], Any] | None = None, recompute: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.inside, self.recompute = inside, recompute
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return checkpoint(self.block, x, mask, use_reentrant=False) if self.recompute else self.block(x, mask)

    def block(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, size, _ = x.shape
        query, key, value = self.qkv(x).view(batch, size, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.inside is not None:
            self.inside(mask)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.out(out.transpose(1, 2).reshape(batch, size, 16))


class Model(nn.Module):
    """Makes a mask, and breaks the graph before each layer as a hook would; returns a number.

    Args:
        between: code that is not compiled, run on the mask before each layer.
        layers: how many.
    """

    def __init__(
        self,
        make: Make,
        layer: Callable[[], nn.Module] = Layer,
        between: Callable[[Tensor], Any] | None = None,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.make, self.between = make, between
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        mask = self.make(place, place[:, None], marks)
        for layer in self.layers:
            _break(self.between, mask)
            x = layer(x, mask)
        return x.square().sum()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _break(between: Callable[[Tensor], Any] | None, mask: Tensor) -> None:
    if between is not None:
        between(mask)


def _batch(size: int = SEQ, batch: int = 2) -> dict[str, Tensor]:
    marks = torch.arange(size).div(11, rounding_mode="floor").repeat(batch, 1)
    marks[0, 7:] += 1
    marks[:, -3:] = 0
    marks[:, 0] = 1
    return {"x": torch.randn(batch, size, 16, dtype=torch.float64), "marks": marks}


def _forms(report: mst_fx.Report, kind: str = "attention") -> set[str]:
    return {rewrite.form for rewrite in report.rewrites if rewrite.kind == kind}


@pytest.mark.parametrize("name", MASKS)
def test_vectors_cross(name: str) -> None:
    make, form = MASKS[name]
    model, batch = Model(make), _batch()
    report = check_parity(model, batch, 1e-12, 1e-10, ALONE)
    assert _forms(report, "mask") == {form}
    assert _forms(report) == {
        form if name != "not" else "causal + padding"
    }  # a vector is negated, not the mask
    assert not report.refusals
    # What the maker knows of the reach is not found out again: a mask of constants needs no operator at all.
    reaches = "\n".join(report.after).count("mst_fx.mask_reach.default(")
    assert name == "not" or reaches == (0 if name == "constant" else 1)
    if name == "constant":
        assert {r.gradient for r in report.rewrites if r.kind == "attention"} == {"native"}


def test_a_defect_leaves_masks_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tensors like others then, and right."""

    def fail(*args: Any) -> Any:
        raise IndexError("a defect")

    monkeypatch.setattr(mask_breaks, "_open_inputs", fail)
    for name in ("padding", "added"):
        model = Model(MASKS[name][0], layers=1)
        report = check_parity(model, _batch(), 1e-12, 1e-10, {**ALONE, "passes": ()})
        report = check_parity(model, _batch(), 1e-12, 1e-10, ALONE)
        assert "attention" not in kinds(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "padding", "documents", "added and padded"])
def test_dynamic_lengths(name: str) -> None:
    model = Model(MASKS[name][0], layers=1)
    run = compile_mst(model, OPTIONS)
    with mst_fx.watch() as report:
        for size in (SEQ, 30, 56, 19, 77):
            batch = _batch(size, 1 + size % 3)
            (loss, grads), (found_loss, found) = step(model, model, batch), step(model, run, batch)
            assert relative_error(found_loss, loss) <= 1e-12 and worst_error(found, grads) <= 1e-10
    assert not report.refusals and kinds(report)["attention"] >= 2


def _square(run: Callable[[], Any], size: int) -> list[Any]:
    """The operators of a step with an operand of ``size`` x ``size`` elements."""
    return [(name, shape) for name, shapes in operators(run) for shape in shapes if shape.count(size) > 1]


def _parity(
    model: nn.Module, batch: dict[str, Tensor], loss_bar: float, gradient_bar: float, options: dict[str, Any]
) -> tuple[Callable[..., Any], mst_fx.Report]:
    """As ``check_parity``; with what was compiled."""
    (loss, grads), run = step(model, model, batch), compile_mst(model, options)
    with mst_fx.watch() as report:
        found_loss, found = step(model, run, batch)
    assert relative_error(found_loss, loss) <= loss_bar and worst_error(found, grads) <= gradient_bar
    return run, report


@pytest.mark.parametrize(
    ("name", "recompute"), [("padding", False), ("causal", True), ("added and padded", True)]
)
def test_nothing_of_square_size_is_made(name: str, recompute: bool) -> None:
    model, batch = Model(MASKS[name][0], lambda: Layer(recompute=recompute)), _batch()
    run, _ = _parity(model, batch, 1e-12, 1e-10, OPTIONS)
    assert _square(lambda: model(**batch).backward(), SEQ), "eager makes the mask"
    assert not _square(lambda: run(**batch).backward(), SEQ)


HF = [
    ("llama", 2, "right", "eager"),
    ("gemma2", 2, "right", "eager"),
    ("gemma3", 1, "packed", "sdpa"),
]


@pytest.mark.parametrize(("name", "batch", "variant", "way"), HF)
def test_hugging_face(name: str, batch: int, variant: str, way: str) -> None:
    more = {"sliding_window": 16} if name != "llama" else {"num_hidden_layers": 1}
    model = {**ACCEPTED, **OTHERS}[name].build(**more)
    model.config.use_cache = False  # type: ignore[union-attr]
    model.set_attn_implementation(way)  # type: ignore[operator]
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
    inputs = attention_batch(name, batch, variant)
    run, report = _parity(model, inputs, 3e-6, 3e-6, ALONE)
    assert not [r for r in report.refusals if r.kind == "attention"]
    assert kinds(report)["mask"] == (2 if name.startswith("gemma") else 1)
    assert report.graphs > 1 and kinds(report)["attention"] >= 1
    assert not _square(lambda: run(**inputs).loss.backward(), ATTENTION_SEQ)


@pytest.mark.slow
def test_inductor() -> None:
    for name in ("padding", "added"):
        model = Model(MASKS[name][0], layers=1)
        check_parity(model, _batch(), 1e-12, 1e-10, {**OPTIONS, "inner": "inductor"})


# Who else may have the mask


def _read(mask: Tensor) -> list[Any]:
    copied, ones = io.BytesIO(), torch.ones(2, 1, SEQ, 4)
    torch.save(mask, copied)
    copied.seek(0)
    return [
        mask + 0,
        mask[0, 0].clone(),
        torch.tensor(mask.tolist()),
        torch.load(copied),
        copy.deepcopy(mask),
        mask.detach().to(torch.int8),
        mask.any(-1),
        mask.shape,
        mask.dtype,
        F.scaled_dot_product_attention(ones, ones, ones, attn_mask=mask),
    ]


def test_eager_code_reads_the_values(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    types: list[type] = []

    def read(mask: Tensor) -> None:
        seen.append(_read(mask))
        types.append(type(mask))

    model, batch = Model(MASKS["padding"][0], between=read), _batch()
    with caplog.at_level(logging.INFO, "mst_fx"):
        report = check_parity(model, batch, 1e-12, 1e-10, ALONE)
    assert types == [Tensor, Tensor, DeferredMask, DeferredMask]
    for truth, found in zip(seen[0], seen[2], strict=True):
        assert torch.equal(truth, found) if isinstance(truth, Tensor) else truth == found
    told = [r.getMessage() for r in caplog.records if "deferred mask" in r.getMessage()]
    assert len(told) == 1 and "test_mask_breaks.py" in told[0], "once a place"
    assert _forms(report) == {"causal + padding"}


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "an element": lambda mask: mask.__setitem__((0, 0, 5, 3), False),
    "all": lambda mask: mask.logical_or_(torch.ones_like(mask).tril(3)),
    "a view": lambda mask: mask[:, :, :4, 1:3].fill_(True),
    "a detached one": lambda mask: mask.detach()[:, :, 6].fill_(True),
    "a view that was kept": lambda mask: [view.zero_() for view in [mask[:, :, :, 2:4]] if mask.any()],
    "output": lambda mask: torch.logical_and(mask, torch.ones_like(mask).triu(-3), out=mask),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("where", ["eager", "compiled"])
def test_changes_in_place_are_seen(name: str, where: str) -> None:
    """In eager code between the layers, and in the graph of a layer: by it and by later ones."""
    if where == "eager":
        model, options = Model(MASKS["padding"][0], between=CHANGES[name]), ALONE
    else:
        model, options = Model(MASKS["padding"][0], layer=lambda: Layer(CHANGES[name])), OPTIONS
    check_parity(model, _batch(), 1e-12, 1e-10, options)


def _set_data(mask: Tensor) -> None:
    mask.data = mask.logical_and(torch.arange(SEQ) != 3)


def _through_its_storage(mask: Tensor) -> None:
    alias = torch.empty(0, dtype=mask.dtype).set_(mask.untyped_storage(), 0, mask.shape, mask.stride())
    alias[:, :, 5:, 3] = False


# What no version counter of the mask sees, or several tensors at once.
UNCOUNTED: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda mask: mask.data.__setitem__((slice(None), 0, slice(5, None), 3), False),
    "other data": _set_data,
    "NumPy": lambda mask: mask.numpy().__setitem__((slice(None), 0, slice(5, None), 3), False),
    "an array": lambda mask: np.asarray(mask).__setitem__((slice(None), 0, slice(5, None), 3), False),
    "DLPack": lambda mask: torch.utils.dlpack.from_dlpack(mask).__setitem__(
        (slice(None), 0, slice(5, None), 3), False
    ),
    "storage": _through_its_storage,
    "none": lambda mask: (
        torch.equal(torch.from_numpy(mask.numpy()), mask.clone()) or pytest.fail("other values")
    ),
    "a list": lambda mask: torch._foreach_copy_([mask], [mask.logical_and(torch.arange(SEQ) != 3)]),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_changes_past_autograd_are_seen(name: str) -> None:
    change = UNCOUNTED[name]
    model = Model(MASKS["padding"][0], between=change)
    check_parity(model, _batch(), 1e-12, 1e-10, ALONE)


def test_another_formula_is_another_graph() -> None:
    """The form of a mask is guarded: a layer that was compiled for a window is not run on another."""

    class Either(Model):
        width = 9

        def forward(self, x: Tensor, marks: Tensor) -> Tensor:
            width = self.width
            self.make = lambda k, q, marks: ((k <= q) & (k > q - width))[None, None]
            return super().forward(x, marks)

    model, batch = Either(MASKS["causal"][0]), _batch()
    run = compile_mst(model, ALONE)
    for width in (9, 5, 9, 30):
        model.width = width
        (loss, grads), (found_loss, found) = step(model, model, batch), step(model, run, batch)
        assert relative_error(found_loss, loss) <= 1e-12 and worst_error(found, grads) <= 1e-10


def test_inference_mode() -> None:
    model, batch = Model(MASKS["padding"][0]), _batch()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            truth, found = model(**batch), compile_mst(model, ALONE)(**batch)
        assert relative_error(found, truth) <= 1e-12


def test_what_the_user_gets_is_made() -> None:
    """A compiled function's own results are plain, and so are masks that no formula is known of."""

    def masks(x: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(x.shape[1])
        return (place <= place[:, None])[None, None], (place <= place[:, None]).roll(1, 0)[None, None]

    found = compile_mst(masks, ALONE)(torch.ones(1, SEQ))
    assert [type(x) for x in found] == [Tensor, Tensor]
    model = Model(lambda k, q, marks: (k <= q).roll(1, 0)[None, None])
    report = check_parity(model, _batch(), 1e-12, 1e-10, ALONE)
    assert "mask" not in kinds(report)
    refused = next(r for r in report.refusals if r.kind == "attention")
    assert refused.cause is Cause.MASK_INPUT
    assert "the mask is an input of this graph" in refused.reason and "made outside of it" in refused.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", ["min", "-inf", "-1e5"])
def test_casts_keep_values(dtype: torch.dtype, fill: str) -> None:
    """FSDP2's mixed precision casts what a layer is given."""
    number = torch.finfo(torch.float32).min if fill == "min" else float(fill)
    form = MaskForm(Compare("le", "k0", "q0", 0), torch.float32, number, 8)
    vectors = {"k0": torch.arange(6)[None], "q0": torch.arange(6)[None]}
    mask = DeferredMask(vectors, form, (1, 1, 6, 6))
    truth = made_mask(form, vectors, (1, 1, 6, 6)).to(dtype)
    cast = mask.to(dtype)
    assert isinstance(cast, DeferredMask) or dtype == torch.float32
    assert torch.equal(cast + 0, truth) and cast.dtype == dtype


# Two processes


class Unbroken(Model):
    """FSDP2 breaks its graph at each layer."""

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        mask = self.make(place, place[:, None], marks)
        for layer in self.layers:
            x = layer(x, mask)
        return x.square().sum()


def _whole() -> tuple[Unbroken, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Unbroken(MASKS["padding"][0]), _batch()


def _rank(rank: int) -> tuple[Any, ...]:
    from torch.distributed.fsdp import fully_shard

    model, inputs = _whole()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.compile(backend="mst", options=OPTIONS)
    with mst_fx.watch() as report:
        loss = model(**inputs)
        loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    model.zero_grad()
    square = _square(lambda: model(**inputs).backward(), SEQ)
    return loss.detach(), grads, kinds(report), len(report.refusals), report.graphs, square


@pytest.mark.slow
def test_fully_shard() -> None:
    """FSDP2 on layers and root breaks the graph at each layer; both ranks have the same batch."""
    results = apart.results_of_ranks(_rank)
    model, inputs = _whole()
    truth = model(**inputs)
    truth.backward()
    for loss, grads, found, refused, graphs, square in results:
        assert relative_error(loss, truth) <= 1e-12 and worst_error(grads, gradients(model)) <= 1e-10
        assert found["mask"] == 1 and found["attention"] >= 1 and not refused and not square
        assert graphs > 1
