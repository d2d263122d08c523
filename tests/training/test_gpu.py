"""On a CUDA device: parity under real Inductor, precision of accumulators, memory by the allocator."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from mst_fx.masks import formula
from mst_fx.masks.formula import And, Compare, Holds
from mst_fx.masks.reach import CAUSAL, FULL, GENERAL, SPANS, Vectors, allowed
from mst_fx.ops.attention import attention, mask_reach
from mst_fx.ops.scaled import scaled
from mst_fx.torch_api import attention as kernels
from tests.helpers import compile_mst, kinds, relative_error, report_of, step, worst_error
from tests.models import ACCEPTED, attention_batch, inputs_of

pytestmark = pytest.mark.gpu

CHUNKS = {"chunk_rows": 64, "vocab_chunk_rows": 64}
MIB = 2**20


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parity(name: str, checkpointing: bool) -> None:
    entry = ACCEPTED[name]
    model = entry.build().cuda()
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    inputs = {key: value.cuda() for key, value in inputs_of(entry, 2, 101).items()}
    loss, grads = step(model, model, inputs)
    found_loss, found = step(model, compile_mst(model, CHUNKS), inputs)
    assert relative_error(found_loss, loss) <= 1e-5
    assert worst_error(found, grads) <= 1e-4


@pytest.mark.parametrize("accumulate", ["auto", "weight"])
def test_bf16_weight_gradients(accumulate: str) -> None:
    """The float32 accumulator loses nothing to chunking; the bf16 one does."""
    x = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16)
    up = (torch.randn(1024, 256, device="cuda") / 16).bfloat16().requires_grad_()
    down = (torch.randn(256, 1024, device="cuda") / 32).bfloat16().requires_grad_()

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, up)), down)

    def grads(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        weights = [w.detach().to(dtype).requires_grad_() for w in (up, down)]
        y = function(x.to(dtype), *weights)
        tangent = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=torch.float64).view_as(y).to(dtype)
        return list(torch.autograd.grad(y, weights, tangent))

    truth = grads(mlp, torch.float64)
    eager = [relative_error(g, t) for g, t in zip(grads(mlp, torch.bfloat16), truth, strict=True)]
    compiled = compile_mst(mlp, {"chunk_rows": 128, "accumulate": accumulate})
    found = [relative_error(g, t) for g, t in zip(grads(compiled, torch.bfloat16), truth, strict=True)]
    if accumulate == "auto":
        assert all(f <= 1.1 * e for f, e in zip(found, eager, strict=True))
    else:
        assert max(found) > 1.1 * max(eager)


def _peak(run: Callable[[], object]) -> int:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_an_mlp() -> None:
    rows, width, inner = 32768, 512, 4096
    x = torch.randn(1, rows, width, device="cuda", requires_grad=True)
    gate, up, down = (
        (torch.randn(*shape, device="cuda") / 32).requires_grad_()
        for shape in ((inner, width), (inner, width), (width, inner))
    )

    def mlp(x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    (rewrite,) = report_of(mlp, {"chunk_rows": 1024}, x).rewrites
    compiled = compile_mst(mlp, {"chunk_rows": 1024})

    def run() -> object:
        return torch.autograd.grad(compiled(x).sum(), [x, gate, up, down])

    boundary = 3 * x.numel() * 4 + 3 * gate.numel() * 4  # out and its tangent, dx, dW
    assert _peak(run) <= boundary + 1.3 * rewrite.chunk_bytes


def test_memory_of_dropout() -> None:
    """The masks are made where they are read. What is more is numbers of rows, and a chunk's input and gradient."""
    up, down = (torch.randn(*shape, device="cuda") / 32 for shape in ((4096, 512), (512, 4096)))
    x = torch.randn(1, 32768, 512, device="cuda", requires_grad=True)

    def mlp(x: Tensor, p: float) -> Tensor:
        return F.linear(F.dropout(F.silu(F.linear(F.dropout(x, p), up)), p), down)

    peaks = []
    for p in (0.0, 0.1):
        compiled = compile_mst(functools.partial(mlp, p=p), {"chunk_rows": 1024})
        peaks.append(_peak(functools.partial(lambda run: torch.autograd.grad(run(x).sum(), x), compiled)))
    assert peaks[1] <= peaks[0] + 32768 * 8 + 3 * 1024 * 512 * 4 + MIB


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpointed"])
def test_dropout(checkpoint: bool) -> None:
    """As many are dropped as asked, and the recomputation drops the same: see tests/ops/test_dropout.py."""
    up, down = (torch.randn(*shape, device="cuda", dtype=torch.float64) for shape in ((256, 64), (64, 256)))
    x = torch.randn(2, 3001, 64, device="cuda", dtype=torch.float64)

    def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.dropout(F.linear(F.dropout(x, 0.2), up), 0.4), down)

    def run(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if checkpoint:
            return torch.utils.checkpoint.checkpoint(mlp, x, up, down, use_reentrant=False)  # type: ignore[no-any-return]
        return mlp(x, up, down)

    inputs = [t.requires_grad_() for t in (x, up, down)]
    assert kinds(report_of(run, CHUNKS, *inputs)) == {"mlp": 1}
    loss = (
        compile_mst(run, CHUNKS)(*inputs) * torch.linspace(-1, 2, 64, device="cuda", dtype=torch.float64)
    ).sum()
    for tensor, grad in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):  # it is linear in each
        assert abs(float((tensor.detach() * grad).sum() / loss.detach()) - 1) <= 1e-10
    ones = [torch.ones_like(t) for t in (x, up, down)]
    share = float(compile_mst(run, CHUNKS)(*ones).detach().mean()) / (64 * 256)  # 1 in the mean
    assert abs(share - 1) <= 6 * (0.25 / x.numel() + 2 / 3 / (6002 * 256)) ** 0.5


def test_memory_of_a_head() -> None:
    rows, width, vocab = 16384, 512, 32000
    x = torch.randn(1, rows, width, device="cuda", requires_grad=True)
    head = (torch.randn(vocab, width, device="cuda") / 32).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head).view(-1, vocab), labels)

    (rewrite,) = report_of(loss, {}, x).rewrites
    compiled = compile_mst(loss, {})

    def run() -> object:
        return torch.autograd.grad(compiled(x), [x, head])

    gradients = 2 * (x.numel() + head.numel()) * 4  # as computed in the forward loop, and scaled
    assert _peak(run) <= gradients + 1.3 * rewrite.chunk_bytes


def test_chunks_of_more_elements_than_32_bits_count() -> None:
    """One body for chunks of 2.6e8 and of 2.6e9 logits, in this order and back."""
    rows, width, vocab = 40_000, 64, 131_072
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(vocab, width, device="cuda") / 8).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head).float(), labels)

    def run(chunk_rows: int) -> list[Tensor]:
        found = compile_mst(loss, {"vocab_chunk_rows": chunk_rows})(x)
        return [found.detach(), *torch.autograd.grad(found, [x, head])]

    first = run(2048)
    for chunk_rows in (20_000, 2048):
        for found, truth in zip(run(chunk_rows), first, strict=True):
            assert relative_error(found, truth) <= 1e-3


@pytest.mark.parametrize("variant", ["", "right", "left", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_attention(name: str, variant: str) -> None:
    """float32 on CUDA kernels: causal, sliding window, padding and packed documents."""
    model = ACCEPTED[name].build().float().cuda()
    inputs = {key: value.cuda() for key, value in attention_batch(name, 2, variant, torch.float32).items()}
    options = {"attention_chunk_rows": 8, "passes": ("attention",)}
    assert [r.kind for r in report_of(model, options, **inputs).rewrites] == ["attention"] * 2
    loss, grads = step(model, model, inputs)
    found_loss, found = step(model, compile_mst(model, options), inputs)
    assert relative_error(found_loss, loss) <= 1e-5
    assert worst_error(found, grads) <= 1e-4


CAUSAL_MASK = Compare("le", "k0", "q0", 0)
MASKS: dict[str, formula.Mask] = {
    "causal": CAUSAL_MASK,
    "full": formula.TRUE,
    "window": And((CAUSAL_MASK, Compare("gt", "k0", "q0", -100))),
    "documents": And((CAUSAL_MASK, Compare("eq", "k1", "q1", 0))),
    "even": And((CAUSAL_MASK, Compare("eq", "k2", "q2", 0))),
    "both ways": Compare("eq", "k1", "q1", 0),
    "padding": And((CAUSAL_MASK, Holds("k3"))),
}


def _check_sinks(found: Tensor, truth: Tensor, noise: Tensor) -> None:
    assert ((found.double() - truth).abs() <= 2.0**-8 * truth.abs() + 4 * noise).all()


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_kernels(
    name: str, kernel: str, heads: int, has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 against float64: as near as attention that is written out in bfloat16."""
    monkeypatch.setattr(kernels, "_BUSY", 2048)  # several calls of the backward kernels
    batch, size, width = 2, 1000, 64
    place = torch.arange(size, device="cuda")[None]
    documents = torch.randint(0, 9, (batch, size), device="cuda").sort(-1).values
    vectors = [place, documents, place // 128, place < 990]
    query, key, value = (
        torch.randn(batch, size, count, width, device="cuda").bfloat16().transpose(1, 2).requires_grad_()
        for count in (4, heads, heads)
    )
    tangent = torch.randn(batch, size, 4, width, device="cuda").bfloat16().transpose(1, 2)
    sinks = (torch.randn(4, device="cuda") * 2).bfloat16().requires_grad_()
    mask, operands = MASKS[name], (query, key, value, *([sinks] if has_sinks else []))
    seen = allowed(mask, Vectors(vectors, vectors), 0, size, 0, size, query.device)
    seen = seen.expand(batch, size, size)[:, None]

    def written_out(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in operands]
        q, k, v, *more = leaves
        wide_key, wide_value = (x.repeat_interleave(4 // heads, 1) for x in (k, v))
        scores = [(q @ wide_key.mT / 8).masked_fill(~seen, float("-inf"))]
        scores += [x.view(1, 4, 1, 1).expand(batch, 4, size, 1) for x in more]
        out = torch.cat(scores, -1).softmax(-1)[..., :size] @ wide_value
        return [out, *torch.autograd.grad(out, leaves, tangent.to(dtype))]

    def noise_of_sinks() -> Tensor:
        """A sink's gradient is the sum of what it takes, times output times tangent, which cancel: what rounding each output to 16 bits does."""
        wide_key = key.double().repeat_interleave(4 // heads, 1)
        scores = (query.double() @ wide_key.mT / 8).masked_fill(~seen, float("-inf"))
        column = sinks.double().view(1, 4, 1, 1)
        taken = torch.exp(column - torch.logaddexp(scores.logsumexp(-1, keepdim=True), column))
        return 2.0**-9 * (taken * truth[0] * tangent.double()).square().sum((0, 2, 3)).sqrt()

    backends = [SDPBackend.CUDNN_ATTENTION] if kernel == "cudnn" else [SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel([*backends, SDPBackend.EFFICIENT_ATTENTION]):
        reaches = mask_reach(vectors, vectors, [formula.text(mask)], size, size, 128, [False])
        out, _ = attention(
            *(query, key, value), vectors, vectors, *reaches,
            *([], formula.text(mask), 0, 128, 0.125, 0.0, 0.0, None, sinks if has_sinks else None),
        )  # fmt: skip
        found = [out, *torch.autograd.grad(out, operands, tangent)]
    expected = {"causal": CAUSAL, "full": FULL, "padding": GENERAL}.get(name, SPANS)
    assert int(reaches[0][0, 0, 0]) == expected
    truth = written_out(torch.float64)
    plain = written_out(torch.bfloat16)
    for mine, near, true in list(zip(found, plain, truth, strict=True))[:4]:
        assert relative_error(mine, true) <= 1.1 * relative_error(near, true)
    if has_sinks:
        _check_sinks(found[4], truth[4], noise_of_sinks())


@pytest.mark.parametrize("variant", ["", "ones", "packed"])
def test_a_step_waits_for_the_device_once_at_most(variant: str) -> None:
    """Whatever the mask depends on, it is read once for all layers."""
    model = ACCEPTED["mistral"].build().bfloat16().cuda()
    inputs = {
        key: value.cuda() for key, value in attention_batch("mistral", 2, variant, torch.float32).items()
    }
    compiled = compile_mst(model, {"attention_chunk_rows": 8})

    def run() -> None:
        compiled(**inputs).loss.backward()

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
    waits = [e.name for e in record.events() if e.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]
    # The profiler itself waits once at its end.
    assert waits.count("cudaStreamSynchronize") <= 1 and waits.count("cudaDeviceSynchronize") <= 1, waits


@pytest.mark.parametrize("size", [100_000, 3_000_000, 2**31 + 1])
def test_scaling_does_not_round_the_tangent(size: int) -> None:
    """1/700 in bfloat16 is off by 1.3e-3, the same for all elements; large ones are Inductor's."""
    gradient, tangent = torch.rand(size, device="cuda").bfloat16(), torch.tensor(1 / 700, device="cuda")
    found = scaled(gradient, tangent)
    assert found.dtype == torch.bfloat16
    for part, whole in zip(found.split(2**28), gradient.split(2**28), strict=True):
        assert torch.equal(part, (whole.float() * tangent).bfloat16())
    sums = [float(x[:100_000].double().sum()) for x in (found, gradient)]
    assert abs(sums[0] / sums[1] / float(tangent.double()) - 1.0) <= 3e-4


@pytest.mark.parametrize("size", [1000, 2048, 4095])
@pytest.mark.parametrize("is_trained", [False, True], ids=["", "slopes are trained"])
def test_alibi(size: int, is_trained: bool) -> None:
    """By a kernel that reads the bias, in 16 bits; in chunks where the bias wants a gradient, which the kernel does not give: in 64 bits, since the
    scores grow with the place of a key, and a slope's gradient is what their rounding leaves of large sums."""
    batch, heads, width = 2, 4, 64
    dtype = torch.float64 if is_trained else torch.bfloat16
    made = [
        torch.randn(batch, size, heads, width, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4)
    ]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device="cuda", dtype=dtype)
    *operands, tangent = [x.requires_grad_() for x in made[:3]] + [made[3]]
    leaves = [*operands, slopes.requires_grad_()] if is_trained else operands
    distance = torch.arange(size, device="cuda") - (size - 1)

    def attend(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
        place = torch.arange(size, device="cuda")
        bias = slopes[:, None] * distance
        if not is_trained:
            bias = (slopes[:, None].float() * distance).to(dtype).to(query.dtype)  # rounded once, as Bloom's
        scores = query @ key.mT / 8 + bias[None, :, None]
        hidden = torch.zeros((), dtype=query.dtype, device="cuda").where(
            place[:, None] >= place, float("-inf")
        )
        return torch.softmax(scores + hidden, -1) @ value

    with torch.no_grad():
        report = report_of(attend, {"attention_chunk_rows": 256}, *operands, slopes)
    assert kinds(report) == {"attention": 1}
    compiled = compile_mst(attend, {"attention_chunk_rows": 256})
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (*operands, slopes)]
    truth = [attend(*wide)]
    truth += torch.autograd.grad(truth[0], [x for x in wide if x.requires_grad], tangent.double())
    ways = []
    for way in (attend, compiled):
        out = way(*operands, slopes)  # type: ignore[call-arg]
        ways.append([out, *torch.autograd.grad(out, leaves, tangent)])
    for index, (plain, mine, true) in enumerate(zip(*ways, truth, strict=True)):
        error = relative_error(mine, true)
        assert error <= (1e-10 if is_trained else 1.1 * relative_error(plain, true)), index
        assert is_trained or error <= 0.01, index  # the kernel adds in 32 bits
