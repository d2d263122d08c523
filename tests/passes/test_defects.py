"""One test for each defect of the paper's reference code, and for what peers' users hit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mst_fx.bodies.body
from mst_fx.rows.fold import Folder
from mst_fx.torch_api.inductor import compile_body
from mst_fx.torch_api.symbolic_rows import RowGuards
from tests.direct import check
from tests.helpers import (
    SMALL_CHUNKS,
    ToyLM,
    check_parity,
    compile_mst,
    kinds,
    report_of,
    step,
    token_batch,
    worst_error,
)
from tests.models import ACCEPTED, inputs_of

_LOSS, _GRAD = 1e-10, 1e-9


class Head(nn.Module):
    """A head with a bias and its loss, float64: [B, S, H] → scalar."""

    def __init__(self, **loss: object) -> None:
        super().__init__()
        self.head = nn.Linear(16, 96).double()
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), **self.loss)  # type: ignore[arg-type]


def _head_batch(batch: int, length: int) -> dict[str, Tensor]:
    x = torch.randn(batch, length, 16, dtype=torch.float64)
    return {"x": x, "labels": torch.randint(0, 96, (batch, length))}


@pytest.mark.slow
def test_head_gradient_is_not_doubled_nor_tripled_by_accumulation() -> None:
    model, inputs = ToyLM(), token_batch(1, 64)
    compiled = compile_mst(model)
    _, once = step(model, model, inputs)
    step(model, compiled, inputs)
    compiled(**inputs)[0].backward()
    assert (
        worst_error({n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}, once) <= _GRAD
    )


@pytest.mark.slow
def test_scale_does_not_depend_on_the_first_chunk() -> None:
    inputs = token_batch(1, 64)
    inputs["labels"][:, :45] = -100
    check_parity(ToyLM(), inputs, _LOSS, _GRAD)


@pytest.mark.slow
def test_tied_embeddings() -> None:
    model = ToyLM()
    model.head.weight = model.embed.weight
    check_parity(model, token_batch(2, 33), _LOSS, _GRAD)


@pytest.mark.slow
def test_tail_rows_are_not_dropped() -> None:
    check_parity(ToyLM(), token_batch(1, 67), _LOSS, _GRAD)


@pytest.mark.slow
def test_fewer_rows_than_chunks() -> None:
    check_parity(ToyLM(), token_batch(1, 3), _LOSS, _GRAD)


@pytest.mark.slow
def test_chunks_of_one_row() -> None:
    report = check_parity(
        ToyLM(), token_batch(1, 5), _LOSS, _GRAD, {**SMALL_CHUNKS, "chunk_rows": 1, "vocab_chunk_rows": 1}
    )
    assert [rewrite.chunks for rewrite in report.rewrites] == [5, 5, 5]


@pytest.mark.slow
def test_frozen_head_gets_no_gradient() -> None:
    model = ToyLM()
    model.head.weight.requires_grad_(False)
    check_parity(model, token_batch(1, 64), _LOSS, _GRAD)
    assert model.head.weight.grad is None


def test_softcap_is_kept() -> None:
    entry = ACCEPTED["gemma2"]
    model = entry.build(final_logit_softcapping=0.5).double()
    check_parity(model, inputs_of(entry, 1, 40), 3e-6, 3e-6)


def test_num_items_in_batch() -> None:
    entry = ACCEPTED["llama"]
    inputs = {**inputs_of(entry, 1, 40), "num_items_in_batch": torch.tensor(7)}
    check_parity(entry.build().double(), inputs, 3e-6, 3e-6)


@pytest.mark.slow
def test_logits_are_there_when_wanted() -> None:
    model, inputs = ToyLM(), token_batch(1, 64)
    _, logits = compile_mst(model)(**inputs)
    assert torch.allclose(logits + 0, model(**inputs)[1], rtol=1e-10)


def test_row_losses_with_a_bias_and_a_batch() -> None:
    model = Head(reduction="none")
    inputs = _head_batch(3, 21)

    def run(**given: Tensor) -> Tensor:
        return (model(**given) * torch.linspace(-1, 1, 63, dtype=torch.float64)).sum()

    _, truth = step(model, run, inputs)
    assert kinds(report_of(run, SMALL_CHUNKS, **inputs)) == {"vocab": 1}
    assert worst_error(step(model, compile_mst(run), inputs)[1], truth) <= _GRAD


def test_class_weights_do_not_crash() -> None:
    check_parity(Head(weight=torch.rand(96, dtype=torch.float64)), _head_batch(2, 33), _LOSS, _GRAD)


@pytest.mark.slow
def test_two_heads() -> None:
    first, second = Head(), Head()
    both = nn.ModuleList([first, second])
    inputs = _head_batch(1, 50)

    def run(**given: Tensor) -> Tensor:
        return first(**given) + 0.5 * second(**given)

    _, truth = step(both, run, inputs)
    assert kinds(report_of(run, SMALL_CHUNKS, **inputs)) == {"vocab": 2}
    assert worst_error(step(both, compile_mst(run), inputs)[1], truth) <= _GRAD


def test_short_sequences_are_left_alone() -> None:
    """Peers are slower and larger at 2K tokens; here one chunk is enough, and nothing changes."""
    report = report_of(ToyLM(), {"inner": "aot_eager"}, **token_batch(1, 64))
    assert not report.rewrites and not report.refusals


@pytest.mark.slow
def test_lora_around_frozen_weights() -> None:
    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.Linear(base.in_features, 4, bias=False).double()
            self.b = nn.Linear(4, base.out_features, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model = ToyLM()
    for block in model.blocks:
        for name in ("gate", "up", "down"):
            setattr(block.mlp, name, Lora(getattr(block.mlp, name)))
    inputs = token_batch(1, 64)
    assert kinds(check_parity(model, inputs, _LOSS, _GRAD)) == {"mlp": 2, "vocab": 1}
    assert model.blocks[0].mlp.up.base.weight.grad is None  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("order", [(64, 2500), (2500, 64)])
def test_code_for_small_chunks_is_not_run_on_large_ones(
    order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's GPU kernels count elements in 32 bits where the rows that they are compiled for allow it,
    under a guard. A body that was shared nonetheless read what was not its own: 16,384 rows of 152,064 logits,
    after 4,096. test_gpu.py has the kernels themselves; here a compiler that makes such a guard."""
    limit = 36_000  # the usual stand-in for the number of rows is under 2,100
    made: list[bool] = []

    def compile_guarded(
        gm: fx.GraphModule, inputs: Sequence[Any], inner: str, patches: Mapping[str, Any]
    ) -> Callable[[list[Any]], Any]:
        run = compile_body(gm, inputs, inner, patches)
        is_narrow = bool(inputs[0] * 16 <= limit)  # a guard
        made.append(is_narrow)

        def checked(args: list[Any]) -> Any:
            assert not is_narrow or args[0] * 16 <= limit
            return run(args)

        return checked

    mst_fx.bodies.body.BODIES.reset()
    monkeypatch.setattr(mst_fx.bodies.body, "compile_body", compile_guarded)
    head, inputs = Head(), _head_batch(1, 5000)
    truth = step(head, head, inputs)[1]
    runs = [compile_mst(head, {"vocab_chunk_rows": chunk_rows}) for chunk_rows in (*order, *order)]
    for run in runs:
        assert worst_error(step(head, run, inputs)[1], truth) <= _GRAD
    assert made == [True, False]


def test_code_for_one_number_of_rows_takes_no_other() -> None:
    folder = Folder(1)
    (rows,) = torch.empty(int(folder.n)).shape
    guards = RowGuards(folder.n)
    assert not guards.failed(rows) and guards.failed(rows - 1)


_REORDERED = {
    "transpose": lambda x: x.transpose(0, 1),
    "swapaxes": lambda x: torch.swapaxes(x, -4, -3),
    "permute": lambda x: x.permute(1, 0, 2, 3),
    "movedim": lambda x: x.movedim(0, 1),
    "moveaxis": lambda x: torch.moveaxis(x, (0, 1), (1, 0)),
    "einsum": lambda x: torch.einsum("bnsh->nbsh", x),
    "parts": lambda x: x.unflatten(0, (1, x.shape[0])).transpose(1, 2).flatten(0, 1),
    "there_and_back": lambda x: x.transpose(0, 1).contiguous().view(x.shape),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 1),
    "other_rows": lambda x: x.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1),
}


@pytest.mark.parametrize("parts", [2, 3])  # as many as sequences, or not
@pytest.mark.parametrize("name", _REORDERED)
def test_rows_of_three_dimensions_keep_their_order(name: str, parts: int) -> None:
    """Sizes of 1 stand for the folded dimensions: that two of them change places shows in no shape."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.head = (
                nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}),
                nn.Linear(8, 64),
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.mlp["down"](F.gelu(_REORDERED[name](self.mlp["up"](x))).reshape(*x.shape[:3], 32)) + x
            logits = _REORDERED[name](self.head(h)).reshape(-1, 64)
            return F.nll_loss(F.log_softmax(logits, -1), y.reshape(-1))

    x = torch.randn(2, parts, 9, 8, dtype=torch.float64, requires_grad=True)
    report = check(Model().double(), [x, torch.randint(0, 64, (2, parts, 9))], 1e-10)
    assert not report.rewrites


class _AroundTheRows(torch.autograd.Function):
    """Swaps two dimensions while they are behind the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1, 3).transpose(1, 2).permute(1, 2, 0, 3).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        batch, parts, length, width = g.shape
        swapped = g.reshape(parts, batch, length, width).permute(2, 0, 1, 3).transpose(1, 2)
        return swapped.permute(1, 2, 0, 3)


def test_rows_may_not_be_reordered_inside_of_a_function() -> None:
    up, down = nn.Linear(8, 32).double(), nn.Linear(32, 8).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    both = nn.ModuleList([up, down])
    report = check(lambda x: down(_AroundTheRows.apply(F.gelu(up(x)))), [x], 1e-10, module=both)
    assert not report.rewrites


def test_rows_of_three_dimensions_in_their_order_are_chunked() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    report = check(lambda x: model(x.transpose(0, 1)).transpose(1, 2), [x], 1e-10, module=model)
    assert kinds(report) == {"mlp": 1}
