"""Memory of blocks and of training steps on a CPU, by the exact malloc meter: mst beside Inductor.

    python -m tools.bench.memory                        # everything, S = 16,384 (half an hour on 2 cores)
    python -m tools.bench.memory --level block          # one SwiGLU block, one head with its loss
    python -m tools.bench.memory --level model --seq 4096

float32, one process a measurement. A warm step comes first, so that no compiler's memory is counted.

Block: peaks above what is alive before the forward pass (inputs, weights and the tangent). The *live
set* is what one chunk cannot do without: C×I×4 bytes three times for the forward pass of SwiGLU (gate,
up, product), C×V×4 once for the logits of a head. What ``explain`` calls a chunk's inside counts every
value of the traced body, also those that are never in memory because their kernels are fused.

Model: a Hugging Face Llama with gradient checkpointing; the whole step's peak above parameters and
gradients (which are made anew).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mst_fx
from tools.bench.models import Head, Shape, SwiGLU, make_llama, text_tokens
from tools.bench.tables import MIB, markdown_table, write_results
from tools.meters.cpu import call_metered, describe_blocks, malloc_meter

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class BlockPeaks:
    """One block, one way. Bytes; peaks are above the block's inputs, weights and tangent.

    Attributes:
        chunk_rows: rows a chunk at most; all rows, where nothing is chunked.
        chunk_bytes: one chunk's inside, as ``explain`` has it.
        live_bytes: the live set of one chunk, see above.
        output_bytes, dx_bytes, dw_bytes: what the block leaves.
        forward_alive, backward_alive: the blocks at the peak, in words.
    """

    forward_peak: int
    backward_peak: int
    forward_seconds: float
    backward_seconds: float
    chunk_rows: int
    chunk_bytes: int
    live_bytes: int
    output_bytes: int
    dx_bytes: int
    dw_bytes: int
    forward_alive: str
    backward_alive: str

    @property
    def left_bytes(self) -> int:
        """out + dx + dW."""
        return self.output_bytes + self.dx_bytes + self.dw_bytes

    def insides(self, peak: int, left: int) -> float:
        """How many chunk insides (as ``explain`` has them) a peak is above what is left."""
        return (peak - left) / self.chunk_bytes if self.chunk_bytes else float("nan")


@dataclasses.dataclass(frozen=True)
class StepPeak:
    """One training step. Bytes and seconds.

    Attributes:
        above: peak above parameters and gradients.
        alive: the blocks at the peak, gradients included, in words.
    """

    above: int
    gradient_bytes: int
    seconds: float
    loss: float
    alive: str


def block_peaks(kind: str, way: str, rows: int, hidden: int, wide: int, **options: Any) -> BlockPeaks:
    """Measures one block in a process of its own.

    Args:
        kind: "mlp" (SwiGLU; ``wide`` is I) or "head" (with its loss; ``wide`` is V).
        way: "mst" or "inductor".
        options: of mst.
    """
    return BlockPeaks(**call_metered(_measure_block, kind, way, rows, hidden, wide, options, timeout=900))


def step_peak(
    way: str, returns: str, shape: Shape, seq: int, *, mask: bool = True, **options: Any
) -> StepPeak:
    """Measures one training step in a process of its own.

    Args:
        way: "mst" or "inductor".
        returns: "model": the whole Hugging Face model is compiled, its logits are among the outputs,
            which are dropped before the backward pass, as HF Trainer does; "held": they are alive until
            the step's end; "loss": what is compiled returns only the loss.
        mask: see :func:`~tools.bench.models.make_llama`.
    """
    return step_peaks(way, (returns,), shape, seq, mask=mask, **options)[0]


def step_peaks(
    way: str, returns: Sequence[str], shape: Shape, seq: int, *, mask: bool = True, **options: Any
) -> list[StepPeak]:
    """As :func:`step_peak`, one step after the other in one process, where what is equal is compiled once."""
    arguments = (way, returns, dataclasses.asdict(shape), seq, mask, options)
    return [StepPeak(**found) for found in call_metered(_measure_steps, *arguments, timeout=3000)]


def _measure_block(
    kind: str, way: str, rows: int, hidden: int, wide: int, options: dict[str, Any]
) -> dict[str, Any]:
    torch.manual_seed(0)
    module: nn.Module = SwiGLU(hidden, wide) if kind == "mlp" else Head(hidden, wide)
    x = torch.randn(1, rows, hidden, requires_grad=True)
    inputs = [x] if kind == "mlp" else [x, torch.randint(wide, (1, rows))]
    tangent = torch.randn(1, rows, hidden) if kind == "mlp" else torch.tensor(1.0)
    chunk_rows, chunk_bytes = rows, 0
    if way == "mst":
        (rewrite,) = mst_fx.explain(module, options)(*inputs).rewrites
        chunk_rows, chunk_bytes = -(-rewrite.rows // rewrite.chunks), rewrite.chunk_bytes
    run = _compiled(module, way, options)
    leaves = [x, *module.parameters()]
    meter = malloc_meter()

    def step() -> dict[str, Any]:
        for tensor in leaves:
            tensor.grad = None
        meter.reset()
        level = meter.current()
        start = time.perf_counter()
        out = run(*inputs)
        between = time.perf_counter()
        forward, forward_alive = meter.peak() - level, meter.alive_at_peak()
        kept = meter.current() - level
        meter.reset()
        torch.autograd.backward(out, tangent)
        end = time.perf_counter()
        return {
            "forward_peak": forward,
            "backward_peak": meter.peak() - level,
            "forward_seconds": between - start,
            "backward_seconds": end - between,
            "forward_alive": describe_blocks(forward_alive),
            "backward_alive": f"from forward {kept / MIB:.1f} MiB + {describe_blocks(meter.alive_at_peak())}",
        }

    step()
    found = step()
    return found | {
        "chunk_rows": chunk_rows,
        "chunk_bytes": chunk_bytes,
        "live_bytes": chunk_rows * wide * FLOAT_BYTES * (3 if kind == "mlp" else 1),
        "output_bytes": x.nbytes if kind == "mlp" else 0,
        "dx_bytes": x.nbytes,
        "dw_bytes": sum(p.nbytes for p in module.parameters()),
    }


def _measure_steps(
    way: str, returns: Sequence[str], shape: dict[str, int], seq: int, mask: bool, options: dict[str, Any]
) -> list[dict[str, Any]]:
    model = make_llama(Shape(**shape), seq, "cpu", torch.float32, checkpoint=True, mask=mask)
    ids = text_tokens(seq, shape["vocabulary"])[None]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]

    whole, loss_only = _compiled(model, way, options), _compiled(loss_of, way, options)

    def step(what: str) -> tuple[float, float]:
        start = time.perf_counter()
        if what == "loss":
            loss = loss_only(ids)
        else:
            out = whole(input_ids=ids, labels=ids)
            loss = out.loss
            if what == "model":
                del out
        torch.autograd.backward(loss)
        return loss.item(), time.perf_counter() - start

    return [_measure_step(model, functools.partial(step, what)) for what in returns]


def _measure_step(model: nn.Module, step: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    """``step`` returns its loss and its seconds."""
    meter = malloc_meter()
    model.zero_grad(set_to_none=True)
    step()
    model.zero_grad(set_to_none=True)
    meter.reset()
    level = meter.current()
    loss, seconds = step()
    gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {
        "above": meter.peak() - level - gradient_bytes,
        "gradient_bytes": gradient_bytes,
        "seconds": seconds,
        "loss": loss,
        "alive": describe_blocks(meter.alive_at_peak()),
    }


def _compiled(function: Any, way: str, options: dict[str, Any]) -> Any:
    if way == "mst":
        return torch.compile(function, backend="mst", options=options)
    return torch.compile(function)


# The tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=("all", "block", "model"), default="all")
    parser.add_argument("--seq", type=int, default=16384)
    parser.add_argument("--only", default="", help="of the model's lines, those that contain this")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    tables: list[str] = []
    if arguments.level != "model":
        blocks = _run_blocks(arguments.seq)
        results["blocks"] = {name: dataclasses.asdict(peaks) for name, peaks in blocks.items()}
        tables.append(_block_table(blocks))
        write_results(arguments.out, "memory", results, "\n\n".join(tables))
        print(tables[-1], flush=True)
    if arguments.level != "block":
        steps = _run_steps(arguments.seq, arguments.only)
        results["steps"] = {name: dataclasses.asdict(peak) for name, peak in steps.items()}
        tables.append(_step_table(steps))
        write_results(arguments.out, "memory", results, "\n\n".join(tables))
        print(tables[-1])


def _run_blocks(seq: int) -> dict[str, BlockPeaks]:
    found = {}
    for kind, wide in (("mlp", 4096), ("head", 32000)):
        for way in ("mst", "inductor"):
            found[f"{kind} {way}"] = peaks = block_peaks(kind, way, seq, 512, wide)
            print(
                f"{kind} {way}\n  forward: {peaks.forward_alive}\n  backward: {peaks.backward_alive}",
                flush=True,
            )
    return found


def _run_steps(seq: int, only: str) -> dict[str, StepPeak]:
    shape = Shape(hidden=512, intermediate=4096, heads=8, kv_heads=8, vocabulary=32000, layers=4)
    found = {}
    for mask in (True, False):
        for way in ("inductor", "mst"):
            for returns in ("model", "held", "loss"):
                name = f"{way}, {returns}{'' if mask else ', no mask'}"
                if only not in name:
                    continue
                found[name] = peak = step_peak(way, returns, shape, seq, mask=mask)
                print(
                    f"{name}: {peak.above / MIB:.0f} MiB above parameters and gradients, {peak.seconds:.1f} s,"
                    f" loss {peak.loss:.6f}\n  alive: {peak.alive}",
                    flush=True,
                )
    return found


def _block_table(blocks: dict[str, BlockPeaks]) -> str:
    head = (
        "block",
        "rows a chunk",
        "out + dx + dW",
        "chunk inside",
        "live set",
        "forward peak",
        "backward peak",
    )
    lines: list[Sequence[Any]] = [(*head, "forward s", "backward s", "insides above what is left")]
    for name, peaks in blocks.items():
        mib = [
            value / MIB
            for value in (
                peaks.left_bytes,
                peaks.chunk_bytes,
                peaks.live_bytes,
                peaks.forward_peak,
                peaks.backward_peak,
            )
        ]
        forward = peaks.insides(peaks.forward_peak, peaks.output_bytes)
        backward = peaks.insides(peaks.backward_peak, peaks.left_bytes)
        above = f"{forward:.2f}, {backward:.2f}" if peaks.chunk_bytes else None
        lines.append((name, peaks.chunk_rows, *mib, peaks.forward_seconds, peaks.backward_seconds, above))
    return "MiB\n\n" + markdown_table(lines)


def _step_table(steps: dict[str, StepPeak]) -> str:
    lines: list[Sequence[Any]] = [
        ("step", "above parameters and gradients MiB", "of Inductor's", "s", "loss")
    ]
    for name, peak in steps.items():
        plain = steps.get(name.replace("mst", "inductor"))
        ratio = peak.above / plain.above if plain else None
        lines.append((name, peak.above / MIB, ratio, peak.seconds, f"{peak.loss:.6f}"))
    return markdown_table(lines)


if __name__ == "__main__":
    main()
