"""Lengths that go up and down: chunked where they are long, few graphs, and no more memory than a fresh process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mst_fx
from mst_fx.chunk_rows import vocab_chunk_size
from tests.helpers import compile_mst, kinds, relative_error, step, worst_error
from tools.meters.cpu import measure_cpu

WIDTH, INNER, VOCAB = 16, 64, 96
CHUNKS = {"inner": "aot_eager", "chunk_rows": 24, "vocab_chunk_rows": 32, "attention_chunk_rows": 16}
EAGER_CHUNKS = {**CHUNKS, "inner": "eager"}  # where another case of the test goes through AOTAutograd
LENGTHS = (64, 4096, 100, 8192)


class Layer(nn.Module):
    """Attention, an MLP and a head, in float64 by default; the mask lets padding out."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.norm = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.up, self.down, self.head = (
            nn.Linear(WIDTH, INNER),
            nn.Linear(INNER, WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )
        self.to(dtype)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embed(ids)
        query, key, value = self.qkv(x).view(batch, length, 3, 1, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        at = torch.arange(length, device=ids.device)
        mask = (at[None, :] <= at[:, None])[None, None] & keep[:, None, None, :]
        x = x + F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def batch_of(length: int, batch: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(length)
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[0, length - 3 :] = False
    return {"ids": torch.randint(0, VOCAB, (batch, length)), "keep": keep}


def marked(run: Callable[..., Any], **ranges: int) -> Callable[..., Any]:
    """Calls a compiled function with inputs whose length is marked as dynamic."""

    def call(ids: Tensor, keep: Tensor) -> Any:
        for x in (ids, keep):
            torch._dynamo.mark_dynamic(x, 1, **ranges)
        return run(ids=ids, keep=keep)

    return call


def _peak(model: nn.Module, run: Callable[..., Tensor], length: int) -> int:
    given = batch_of(length)
    step(model, run, given)  # compiles
    model.zero_grad(set_to_none=True)
    with measure_cpu() as found:
        run(**given).backward()
    return found.peak_bytes


@pytest.mark.slow
def test_peak_is_that_of_a_fresh_process_at_each_length() -> None:
    model, options = Layer(torch.float32), {"inner": "aot_eager"}
    compiled = compile_mst(model, options)
    counters.clear()
    peaks = {length: _peak(model, compiled, length) for length in LENGTHS}
    assert counters["stats"]["unique_graphs"] == 2
    for length in LENGTHS[1:]:  # the first is what a fresh process compiles
        fresh = _peak(model, compile_mst(model, options, dynamic=False), length)
        assert peaks[length] <= 1.1 * fresh, length


@pytest.mark.slow
@pytest.mark.parametrize("first", ["automatic", "dynamic=True", "mark_dynamic", "a promised range"])
def test_short_batches_first_and_long_ones_after(first: str) -> None:
    model = Layer()
    is_marked = first in (
        "mark_dynamic",
        "a promised range",
    )  # there no guard of a compiler may narrow anything
    options = CHUNKS if is_marked else EAGER_CHUNKS
    compiled = compile_mst(model, options, dynamic=True if first == "dynamic=True" else None)
    run = {
        "mark_dynamic": functools.partial(marked, compiled),
        "a promised range": functools.partial(marked, compiled, min=2, max=512),
    }.get(first, lambda: compiled)()
    counters.clear()
    with mst_fx.watch() as report:
        for length in (12, 60, 14, 80):
            given = batch_of(length)
            loss, grads = step(model, model, given)
            found_loss, found = step(model, run, given)
            assert relative_error(found_loss, loss) < 1e-10 and worst_error(found, grads) < 1e-9
    # A range is a promise that no guard may narrow: loops from the start.
    assert counters["stats"]["unique_graphs"] == (1 if first == "a promised range" else 2)
    assert kinds(report) == {"attention": 1, "mlp": 1, "vocab": 1}
    assert all(
        r.chunks == (1 if first == "a promised range" else -(-60 // r.chunk_rows)) for r in report.rewrites
    )


@pytest.mark.slow
def test_each_bound_is_one_more_graph() -> None:
    """Attention in chunks from 17 queries on, the MLP from 25 rows, the head from 33."""
    model = Layer()
    compiled = compile_mst(model, EAGER_CHUNKS, dynamic=True)
    counters.clear()
    found = []
    for length in (12, 15, 20, 22, 30, 28, 40, 200, 13, 18, 26, 50):
        with mst_fx.watch() as report:
            compiled(**batch_of(length))
        found.append("".join(kinds(report)))
    assert found == ["", "", "attention", "", "attentionmlp", "", "attentionmlpvocab", "", "", "", "", ""]
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
def test_bounds_of_sizes_that_change_apart_do_not_multiply() -> None:
    """With batch and length dynamic, rows may be many where queries are few, and the other way round."""
    model, chunks = Layer(), {"attention_chunk_rows": 8, "chunk_rows": 24, "vocab_chunk_rows": 40}
    compiled = compile_mst(model, {"inner": "eager", **chunks}, dynamic=True)
    counters.clear()
    with torch.no_grad():
        for length, batch in ((6, 2), (6, 5), (6, 8), (10, 2), (15, 2), (30, 3)):  # each way to fit or not
            given = batch_of(length, batch)
            assert relative_error(compiled(**given), model(**given)) < 1e-10
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["auto", "defer"])
def test_deferred_logits_of_long_batches(logits: str) -> None:
    """A loss in the graph, or (with "defer") none: logits that were kept in a short batch are deferred in a long one."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, VOCAB)
            self.double()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            found = self.head(x)
            return (
                found
                if logits == "defer"
                else (F.cross_entropy(found.flatten(0, 1), labels.flatten()), found)
            )

    model = Logits()
    compiled = compile_mst(model, {**CHUNKS, "logits": logits}, dynamic=True)
    counters.clear()
    types = []
    for length in (9, 70, 11, 90):  # of an input the width is dynamic too, until Dynamo meets the weight
        x, labels = torch.randn(1, length, WIDTH, dtype=torch.float64), torch.randint(0, VOCAB, (1, length))
        out, truth = compiled(x, labels), model(x, labels)
        out, truth = (out, truth) if logits == "defer" else (out[1], truth[1])
        types.append(type(out).__name__)
        assert relative_error(out[:, -1], truth[:, -1]) < 1e-10
    assert types == ["Tensor", *["DeferredLogits"] * 3]
    assert counters["stats"]["unique_graphs"] == 2


def test_no_guard_where_nobody_would_check_it() -> None:
    """A graph of torch.export, captured at a short length: loops, whatever comes."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(x)))

    model, x = MLP(), torch.randn(1, 12, WIDTH, dtype=torch.float64)
    exported = torch.export.export(
        model, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=4096)},)
    )
    new, report = mst_fx.rewrite(exported.module(check_guards=False), (x,), CHUNKS)
    assert [(r.kind, r.chunks) for r in report.rewrites] == [("mlp", 1)]
    longer = torch.randn(1, 100, WIDTH, dtype=torch.float64)
    assert relative_error(new(longer)[0], model(longer)) < 1e-12
    few = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=24)},))
    assert not mst_fx.rewrite(few.module(check_guards=False), (x,), CHUNKS)[
        1
    ].rewrites  # never more than a chunk


def test_chunks_of_a_head_have_d_rows_at_most() -> None:
    assert vocab_chunk_size(262144, 4096, 128256, "cuda").chunk_rows == 4096  # a 32nd of the rows would be 8,192
    assert vocab_chunk_size(2**20, 8192, 128256, "cuda").chunk_rows == 8192
    assert vocab_chunk_size(98304, 4096, 32000, "cuda").chunk_rows == 4096
    assert vocab_chunk_size(2**20, 512, 32000, "cuda").chunk_rows == 2048  # the floor


def test_chunks_of_a_head_do_not_follow_from_one_batch_of_several() -> None:
    assert vocab_chunk_size(1280, 384, 1536, "cpu").chunk_rows == 320
    assert vocab_chunk_size(1280, 384, 1536, "cpu", changes=True).chunk_rows == 256
    assert vocab_chunk_size(100, 64, 256, "cpu", changes=True) == vocab_chunk_size(100, 64, 256, "cpu")


def _log_probabilities(model: Layer, ids: Tensor, labels: Tensor, shift: int) -> Tensor:
    found = model.head(model.embed(ids))[:, : ids.shape[1] - shift].log_softmax(-1)
    return -found.gather(-1, labels[:, shift:, None]).mean()


LABELLED: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda m, x, y: F.cross_entropy(m.head(m.embed(x)).view(-1, VOCAB), y.view(-1)),
    "log_probabilities": lambda m, x, y: _log_probabilities(m, x, y, 0),
    "shifted": lambda m, x, y: _log_probabilities(m, x, y, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELLED)
def test_labels_have_sizes_of_their_own(name: str) -> None:
    """Batch and length both change: tokens and labels are inputs with other symbols, and as many rows."""
    model = Layer()
    run = functools.partial(LABELLED[name], model)
    with mst_fx.watch() as report:
        compiled = compile_mst(run, CHUNKS if name == "shifted" else EAGER_CHUNKS)
        for batch, length in ((2, 5), (3, 50), (4, 40), (1, 90)):
            tokens = torch.randint(0, VOCAB, (2, batch, length)).unbind(0)
            truth, found = (_loss_and_gradients(call, model, *tokens) for call in (run, compiled))
            assert all(relative_error(f, t) < 1e-9 for f, t in zip(found, truth, strict=True))
    assert len([rewrite for rewrite in report.rewrites if rewrite.kind == "vocab"]) >= 2
    assert not [refused for refused in report.refusals if refused.kind == "vocab"]


@pytest.mark.slow
def test_fewer_labels_than_rows() -> None:
    """``gather`` allows that: the guard that there is a label for each row compiles anew."""
    model = Layer()
    run = functools.partial(LABELLED["log_probabilities"], model)
    compiled = compile_mst(run, EAGER_CHUNKS)
    for rows, picked in ((50, 50), (60, 60), (70, 64)):
        ids, labels = torch.randint(0, VOCAB, (2, rows)), torch.randint(0, VOCAB, (2, picked))
        truth, found = (_loss_and_gradients(call, model, ids, labels) for call in (run, compiled))
        assert all(relative_error(f, t) < 1e-9 for f, t in zip(found, truth, strict=True))


def _loss_and_gradients(run: Callable[..., Tensor], model: Layer, *args: Tensor) -> list[Tensor]:
    parameters = [model.embed.weight, model.head.weight]
    loss = run(*args)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]
