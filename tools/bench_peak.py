"""Peak memory and time of training steps on one GPU, mst beside its peers.

    python tools/bench_peak.py --out benchmarks/peak                      # Llama3-8B, 8 layers, 32K tokens
    python tools/bench_peak.py --seq 16384,32768 --only mst-ckpt,liger-tiled-ckpt
    python tools/bench_peak.py --level block                              # one MLP; one head with its loss
    python tools/bench_peak.py --only mst-ckpt --profile                  # what is alive at the peak
    python tools/bench_peak.py --cpu-smoke                                # the script's own test

Each contender runs in a process of its own; one that fails or outlasts its time is reported, and the
others go on. The model is a Hugging Face Llama with random bf16 weights, the text Python's standard
library; a step is forward and backward with gradients made anew (``set_to_none=True``), and no optimizer.
Liger's contenders need the pip package ``liger-kernel``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import linecache
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from tools.bench_support import (
    GIB,
    MIB,
    Head,
    Shape,
    SwiGLU,
    make_llama,
    markdown_table,
    text_tokens,
    write_results,
)
from tools.meter import call_apart, call_metered, is_available, malloc_meter


@dataclasses.dataclass(frozen=True)
class Contender:
    """How a model is made and run.

    Attributes:
        way: "eager", "liger", "liger-tiled", "inductor" or "mst".
        checkpoint: with gradient checkpointing.
        mask: with the mask that Hugging Face builds under ``torch.compile``; see ``make_llama``.
    """

    way: str
    checkpoint: bool = False
    mask: bool = True


# The first ones run by default, in this order: what the acceptance compares comes first.
MODELS = {
    "liger-tiled-ckpt": Contender("liger-tiled", checkpoint=True),
    "mst-ckpt": Contender("mst", checkpoint=True),
    "mst": Contender("mst"),
    "inductor-ckpt": Contender("inductor", checkpoint=True),
    "liger-ckpt": Contender("liger", checkpoint=True),
    "eager-ckpt": Contender("eager", checkpoint=True),
    "mst-ckpt-nomask": Contender("mst", checkpoint=True, mask=False),
    "inductor-ckpt-nomask": Contender("inductor", checkpoint=True, mask=False),
    "mst-nomask": Contender("mst", mask=False),
    "inductor-nomask": Contender("inductor", mask=False),
    "inductor": Contender("inductor"),
    "liger": Contender("liger"),
    "eager": Contender("eager"),
}
DEFAULT_MODELS = 8

BLOCKS = {
    "mlp-mst": Contender("mst"),
    "mlp-inductor-ckpt": Contender("inductor", checkpoint=True),
    "mlp-inductor": Contender("inductor"),
    "mlp-liger-tiled": Contender("liger-tiled"),
    "mlp-eager": Contender("eager"),
    "head-mst": Contender("mst"),
    "head-inductor-ckpt": Contender("inductor", checkpoint=True),
    "head-inductor": Contender("inductor"),
    "head-liger": Contender("liger"),
}


class Meter:
    """Time and memory of the device. Bytes; on a CPU without the malloc meter all of them are 0."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._malloc = None
        if not self._on_gpu and is_available():
            self._malloc = malloc_meter()

    def now(self) -> float:
        """Seconds, once the device has done all its work."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif self._malloc:
            self._malloc.reset()

    def current(self) -> int:
        return (
            torch.cuda.memory_allocated() if self._on_gpu else self._malloc.current() if self._malloc else 0
        )

    def peak(self) -> int:
        return (
            torch.cuda.max_memory_allocated() if self._on_gpu else self._malloc.peak() if self._malloc else 0
        )


def measure_model(
    way: str,
    checkpoint: bool,
    mask: bool,
    shape: dict[str, int],
    seq: int,
    steps: int,
    device: str,
    options: dict[str, Any],
    profile: bool,
) -> dict[str, Any]:
    """Runs training steps of a whole model; called in a process of its own."""
    lines = _keep_log()
    _apply_liger(way)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = make_llama(Shape(**shape), seq, device, dtype, checkpoint=checkpoint, mask=mask)
    if way == "liger-tiled":
        _assert_tiled(model)
    run = _compiled(model, way, options)
    batches = text_tokens(seq * (steps + 1), shape["vocabulary"]).view(steps + 1, 1, seq).to(device)

    def step(ids: torch.Tensor) -> torch.Tensor:
        # The outputs die here, as in Hugging Face's Trainer.
        loss: torch.Tensor = run(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        return loss.detach()

    meter = Meter(device)
    start = meter.now()
    step(batches[0])
    first_seconds = meter.now() - start
    model.zero_grad(set_to_none=True)
    step(batches[0])
    seconds, peaks = [], []
    for ids in batches[1:]:
        model.zero_grad(set_to_none=True)
        meter.reset()
        start = meter.now()
        step(ids)
        seconds.append(meter.now() - start)
        peaks.append(meter.peak())
    result: dict[str, Any] = {}
    model.zero_grad(set_to_none=True)
    before = meter.current()
    if profile:
        result["profile"] = _profile(lambda: step(batches[0]), device)
        model.zero_grad(set_to_none=True)
    loss = step(batches[0])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    gradient_bytes = sum(g.nbytes for g in gradients)
    return result | {
        "peak_bytes": max(peaks),
        "before_step_bytes": before,
        "parameter_bytes": parameter_bytes,
        "gradient_bytes": gradient_bytes,
        # On a CPU the meter also counts what is alive besides the model.
        "above_parameters_bytes": max(peaks) - (parameter_bytes if device == "cuda" else before),
        "above_parameters_and_gradients_bytes": max(peaks)
        - (parameter_bytes if device == "cuda" else before)
        - gradient_bytes,
        "step_seconds": statistics.median(seconds),
        "all_step_seconds": seconds,
        "first_step_seconds": first_seconds,
        "loss": loss.item(),
        "gradient_norm": torch.linalg.vector_norm(norms).item(),
        "log": lines,
    }


class _LigerHead(Head):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return loss(self.head.weight, x.view(-1, x.shape[-1]), labels.view(-1))  # type: ignore[no-any-return]


class _Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.inside, *args, use_reentrant=False)  # type: ignore[no-any-return]


def measure_block(
    kind: str,
    way: str,
    checkpoint: bool,
    shape: dict[str, int],
    rows: int,
    steps: int,
    device: str,
    options: dict[str, Any],
    profile: bool,
) -> dict[str, Any]:
    """Runs one MLP (``kind`` "mlp") or one head with its loss ("head"); in a process of its own."""
    lines = _keep_log()
    hidden = shape["hidden"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        x = torch.randn(1, rows, hidden, requires_grad=True)
        tangent, extra = torch.tensor(1.0), []
        module: nn.Module
        if kind == "head":
            head = _LigerHead if way == "liger" else Head
            module = head(hidden, shape["vocabulary"])
            extra = [torch.randint(shape["vocabulary"], (1, rows))]
        elif way == "liger-tiled":
            from liger_kernel.transformers import LigerTiledSwiGLUMLP
            from transformers import LlamaConfig

            config = LlamaConfig(hidden_size=hidden, intermediate_size=shape["intermediate"])
            module = LigerTiledSwiGLUMLP(config)
        else:
            module = SwiGLU(hidden, shape["intermediate"])
        if kind == "mlp":
            tangent = torch.randn(1, rows, hidden)
    torch.set_default_dtype(torch.float32)
    run = _compiled(_Checkpointed(module) if checkpoint else module, way, options)
    inputs = [x, *module.parameters()]
    meter = Meter(device)

    def step() -> dict[str, float]:
        for tensor in inputs:
            tensor.grad = None
        start = meter.now()
        meter.reset()
        level = meter.current()
        out = run(x, *extra)
        between = meter.now()
        forward_peak = meter.peak() - level
        meter.reset()
        if kind == "head":
            out.backward()
        else:
            out.backward(tangent)
        del out
        end = meter.now()
        return {
            "forward_seconds": between - start,
            "backward_seconds": end - between,
            "step_seconds": end - start,
            "forward_peak_bytes": forward_peak,
            "backward_peak_bytes": meter.peak() - level,
        }

    start = meter.now()
    step()
    first_seconds = meter.now() - start
    step()
    found = [step() for _ in range(max(steps, 5))]
    result: dict[str, Any] = {name: statistics.median(one[name] for one in found) for name in found[0]}
    result["output_bytes"] = rows * hidden * x.element_size() if kind == "mlp" else x.element_size()
    result["dx_bytes"] = x.nbytes
    result["gradient_bytes"] = sum(p.nbytes for p in module.parameters())
    result["first_step_seconds"] = first_seconds
    norms = [torch.linalg.vector_norm(t.grad, dtype=torch.float32) for t in inputs if t.grad is not None]
    result["gradient_norm"] = torch.linalg.vector_norm(torch.stack(norms)).item()
    result["log"] = lines
    if profile:
        result["profile"] = _profile(step, device)
    return result


def _compiled(model: nn.Module, way: str, options: dict[str, Any]) -> Callable[..., Any]:
    if way == "inductor":
        return torch.compile(model)  # type: ignore[no-any-return]
    if way == "mst":
        return torch.compile(model, backend="mst", options=options)  # type: ignore[no-any-return]
    return model


def _apply_liger(way: str) -> None:
    """Patches the library before a model is made, as Liger's users do."""
    if not way.startswith("liger"):
        return
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()  # RoPE, RMSNorm, SwiGLU and the fused linear cross-entropy
    if way == "liger-tiled":
        from liger_kernel.transformers import LigerTiledSwiGLUMLP
        from transformers.models.llama import modeling_llama

        modeling_llama.LlamaMLP = LigerTiledSwiGLUMLP  # type: ignore[misc]


def _assert_tiled(model: Any) -> None:
    found = type(model.model.layers[0].mlp).__name__
    if found != "LigerTiledSwiGLUMLP":
        raise RuntimeError(f"Liger's tiled MLP is not in the model, but {found}")


def _keep_log() -> list[str]:
    """What mst-fx says, as a list that grows."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("mst_fx")
    logger.setLevel(logging.INFO)
    logger.addHandler(Keep())
    return lines


# What is alive at the peak


def _profile(step: Callable[[], Any], device: str) -> str:
    """Runs a step and lists the largest blocks that were alive when memory peaked."""
    if device != "cuda":
        meter = malloc_meter()
        meter.reset()
        step()
        sizes = [f"{size / MIB:.1f} MiB" for size in meter.alive_at_peak()[:20]]
        return f"peak; its largest blocks: {', '.join(sizes)}"
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    step()
    torch.cuda.synchronize()
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    trace: list[dict[str, Any]] = snapshot["device_traces"][torch.cuda.current_device()]
    return describe_peak(trace, base)


def describe_peak(trace: Sequence[dict[str, Any]], base: int, least: int = 64 * MIB) -> str:
    """The blocks alive when an allocator trace peaks, those of equal size and origin together.

    Args:
        trace: events of ``torch.cuda.memory._snapshot()["device_traces"][device]``.
        base: bytes allocated before the trace.
        least: bytes of the smallest block to list.
    """
    level, peak, at = base, base, 0
    for index, event in enumerate(trace):
        level += _change(event)
        if level > peak:
            peak, at = level, index + 1
    alive: dict[int, tuple[int, dict[str, Any]]] = {}
    freed = 0
    for index, event in enumerate(trace[:at]):
        if event["action"] == "alloc":
            alive[event["addr"]] = (index, event)
        elif event["action"] == "free_requested" and alive.pop(event["addr"], None) is None:
            freed += event["size"]
    groups: dict[tuple[int, str], list[int]] = collections.defaultdict(list)
    small = 0
    for index, event in alive.values():
        if event["size"] < least:
            small += event["size"]
            continue
        groups[event["size"], _origin(event.get("frames", ()))].append(index)
    lines = [
        f"peak {peak / GIB:.3f} GiB at event {at} of {len(trace)}; before the step {base / GIB:.3f} GiB,"
        f" of which freed by then {freed / GIB:.3f} GiB; blocks smaller than {least // MIB} MiB:"
        f" {small / GIB:.3f} GiB together"
    ]
    for (size, origin), found in sorted(groups.items(), key=lambda item: -item[0][0] * len(item[1])):
        count = f"{len(found)} x " if len(found) > 1 else ""
        lines.append(f"\n{count}{size / MIB:.1f} MiB (event {found[0]})\n{origin}")
    return "\n".join(lines)


def _change(event: dict[str, Any]) -> int:
    # The allocator's statistics count a block as gone once its release is asked for.
    return {"alloc": 1, "free_requested": -1}.get(event["action"], 0) * int(event["size"])


_UNINTERESTING = ("torch/_ops.py", "torch/_dynamo/", "torch/_functorch/", "torch/nn/modules/module.py")


def _origin(frames: Sequence[dict[str, Any]], most: int = 6) -> str:
    """The top Python frames with their source lines, the machinery of torch left out."""
    lines = []
    for frame in frames:
        name = str(frame["filename"])
        if not name.endswith(".py") or any(part in name for part in _UNINTERESTING):
            continue
        source = linecache.getline(name, frame["line"]).strip()[:160]
        lines.append(f"    {'/'.join(name.split('/')[-3:])}:{frame['line']} {frame['name']}: {source}")
        if len(lines) == most:
            break
    return "\n".join(lines) or "    (no Python frame)"


# The comparison


def main() -> None:
    arguments = _arguments()
    shape = Shape.llama3_8b(arguments.layers)
    if arguments.cpu_smoke:
        shape = Shape(64, 192, 4, 2, 997, 2)
    on_blocks = arguments.level == "block"
    known = BLOCKS if on_blocks else MODELS
    names = (
        arguments.only.split(",") if arguments.only else list(known)[: None if on_blocks else DEFAULT_MODELS]
    )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown contenders {unknown}; there are {', '.join(known)}")
    end = time.monotonic() + arguments.budget
    results: list[dict[str, Any]] = []
    for seq in [512] if arguments.cpu_smoke else arguments.seq:
        for name in names:
            left = end - time.monotonic()
            if left < 20:
                result: dict[str, Any] = {"error": "not run: the time of the whole benchmark is used up"}
            else:
                limit = min(arguments.limit, left)
                result = _run(name, known[name], dataclasses.asdict(shape), seq, limit, arguments)
            results.append({"contender": name, "seq": seq, **result})
            print(_line(results[-1]), flush=True)
            if "profile" in result:
                _write_profile(arguments.out, name, seq, result.pop("profile"))
                results[-1].pop("profile")
            # After each: a run that is cut short leaves what it has.
            tables = _block_table(results) if on_blocks else _model_table(results)
            write_results(arguments.out, f"peak-{arguments.level}", results, tables)
    print(f"\n{tables}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=("model", "block"), default="model")
    parser.add_argument("--only", help=f"contenders, separated by commas: {', '.join([*MODELS, *BLOCKS])}")
    parser.add_argument(
        "--seq",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[32768],
        help="tokens, separated by commas",
    )
    parser.add_argument("--rows", type=int, help="rows of a block (65536 for MLPs, 32768 for heads)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="warm steps that are timed")
    parser.add_argument("--options", type=json.loads, default={}, help="of mst, as JSON")
    parser.add_argument("--limit", type=float, default=150, help="seconds a contender may take")
    parser.add_argument("--budget", type=float, default=470, help="seconds all may take together")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--profile", action="store_true", help="write what is alive at the peak")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny size on the CPU")
    return parser.parse_args()


def _run(
    name: str,
    contender: Contender,
    shape: dict[str, int],
    seq: int,
    limit: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    device = "cpu" if arguments.cpu_smoke else "cuda"
    call = call_metered if device == "cpu" and is_available() else call_apart
    common = {
        "shape": shape,
        "steps": arguments.steps,
        "device": device,
        "options": arguments.options,
        "profile": arguments.profile,
    }
    settings = dataclasses.asdict(contender)
    try:
        if arguments.level == "model":
            result = call(measure_model, timeout=limit, **settings, **common, seq=seq)
        else:
            kind = name.split("-")[0]
            rows = arguments.rows or (seq if device == "cpu" else 65536 if kind == "mlp" else 32768)
            settings.pop("mask")
            result = call(measure_block, timeout=limit, kind=kind, rows=rows, **settings, **common)
    except RuntimeError as error:
        return {"error": str(error)}
    return dict(result)


def _line(result: dict[str, Any]) -> str:
    text = f"{result['contender']:22s} {result['seq']:6d}  "
    if "error" in result:
        return f"{text}failed: {result['error'].strip().splitlines()[-1]}"
    peak = result.get("peak_bytes", result.get("backward_peak_bytes", 0))
    return text + f"{result['step_seconds']:.4f} s a step, peak {peak / GIB:.3f} GiB"


def _gib(result: dict[str, Any], name: str) -> float | None:
    return result[name] / GIB if name in result else None


def _failures(results: Sequence[dict[str, Any]]) -> str:
    failed = [result for result in results if "error" in result]
    if not failed:
        return ""
    parts = [f"### {r['contender']}, {r['seq']}\n\n```\n{r['error'].strip()}\n```" for r in failed]
    return "\n\n## Failures\n\n" + "\n\n".join(parts)


def _model_table(results: Sequence[dict[str, Any]]) -> str:
    head = ("contender", "tokens", "peak GiB", "above parameters", "above parameters and gradients")
    rows: list[Sequence[Any]] = [
        (*head, "s a step", "first step s", "loss", "gradient norm", "vs liger-tiled-ckpt")
    ]
    bars = {
        r["seq"]: r["peak_bytes"]
        for r in results
        if r["contender"] == "liger-tiled-ckpt" and "error" not in r
    }
    for r in results:
        name = r["contender"] + (" (failed)" if "error" in r else "")
        bar = bars.get(r["seq"])
        ratio = f"{r['peak_bytes'] / bar:.3f} x" if bar and "peak_bytes" in r else None
        rows.append(
            (
                name,
                r["seq"],
                _gib(r, "peak_bytes"),
                _gib(r, "above_parameters_bytes"),
                _gib(r, "above_parameters_and_gradients_bytes"),
                r.get("step_seconds"),
                r.get("first_step_seconds"),
                f"{r['loss']:.5f}" if "loss" in r else None,
                f"{r['gradient_norm']:.5g}" if "gradient_norm" in r else None,
                ratio,
            )
        )
    return markdown_table(rows) + _failures(results)


def _block_table(results: Sequence[dict[str, Any]]) -> str:
    rows: list[Sequence[Any]] = [
        (
            "contender",
            "forward ms",
            "backward ms",
            "both ms",
            "forward peak GiB",
            "backward peak GiB",
            "out + dx + dW GiB",
        )
    ]
    for r in results:
        floor = None
        if "error" not in r:
            floor = (r["output_bytes"] + r["dx_bytes"] + r["gradient_bytes"]) / GIB
        times = [r.get(f"{part}_seconds") for part in ("forward", "backward", "step")]
        rows.append(
            (
                r["contender"] + (" (failed)" if "error" in r else ""),
                *(None if seconds is None else 1000 * seconds for seconds in times),
                _gib(r, "forward_peak_bytes"),
                _gib(r, "backward_peak_bytes"),
                floor,
            )
        )
    return markdown_table(rows) + _failures(results)


def _write_profile(folder: Path, name: str, seq: int, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"alive-{name}-{seq}.txt"
    path.write_text(text + "\n")
    print(f"  {path}\n  {text.splitlines()[0]}")


if __name__ == "__main__":
    main()
