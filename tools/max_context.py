"""The longest sequence that trains on this GPU: predicted from two short runs, then tried.

    python tools/max_context.py --only mst+ckpt --out bench-out          # Llama3-8B, 32 layers, AdamW
    python tools/max_context.py --only eager,mst+ckpt --verify none      # bytes a token, and the prediction
    python tools/max_context.py --only mst+ckpt --resume bench-out/max-context.json   # what is known is not run
    python tools/max_context.py --only mst+ckpt --optimizer in-backward --cap 74.5    # in 80 GB
    python tools/max_context.py --model gemma2-9b --extrapolate-layers 4,8 --seq 131072,163840 --verify none
    python tools/max_context.py --cpu-smoke                              # the script's own test

Parameters, gradients and AdamW states of the parameters' type (bfloat16) are allocated, and the step is
made. Each run is the first step of a new process, one sequence long, its states allocated before; seconds
are without those that Dynamo and Inductor report for compiling, but include autotuning and the compiling
of loop bodies.

Prediction: the peaks of forward, backward and optimizer step grow with the length, each on its own line,
through two lengths (``--seq``); the first line that reaches the usable bytes is the limit. Usable is what is
free when the process starts, less half a GiB that kernels loaded later take, or ``--cap``; torch's allocator
gets no more. Short lengths mislead: with no more rows than a chunk nothing is chunked, and mst's chunks of the head grow with the length once that makes V / d_model of
them (131,072 tokens of Llama3-8B); while gradients take more than what is saved for the backward pass,
backward peaks at its end, later at its start. A backward line flatter than what is saved is therefore warned
about. ``--extrapolate-layers`` makes long short runs cheap: bytes are taken as linear in the layers, too.

Verification: a step at the predicted length (after each failure 2 % less), and one that runs out of memory
at 1.05 times that. If that one trains, it is the answer, and 1.05 times it is tried. A shorter length
that ran out of memory stands for a longer one. ``--budget`` bounds all runs together; the table says what
was not tried.

Bound: (usable - parameters - gradients - states) / (layers x hidden x 2 bytes), which is one bfloat16 hidden
row a layer a token. Gradients that come while saved rows go do not add to them, so that more than
the bound is possible.

``--optimizer in-backward`` steps a parameter when its gradient is there and drops the gradient, and the
bound counts one gradient, the largest. A compiled backward pass hands over all gradients at its end,
though: they are alive together, whatever the hooks do. "At the first gradient" is what is allocated
above parameters and states when the first hook runs: in eager mode saved rows and one gradient, in a compiled
model all gradients. Liger's tiled MLP has a gradient a tile, and is stepped as often: its loss is another one
from the second step on.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from tools.bench_support import GIB, markdown_table, numbers, text_tokens, write_results
from tools.contenders import CONTENDERS, MODELS, Contender, loss_function, make_model
from tools.meter import call_apart

Result = dict[str, Any]

# Fragmentation would differ between contenders without it.
_ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}
DEFAULT_CONTENDERS = "eager,eager+ckpt,liger-tiled+ckpt,mst+ckpt"
_ABOVE, _SHRINK = 1.05, 0.98
_RESERVE = GIB // 2


# Arithmetic


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes at a length: ``fixed + slope * tokens``."""

    fixed: float
    slope: float

    def at(self, seq: float) -> float:
        return self.fixed + self.slope * seq

    def length(self, usable: float) -> float:
        """Tokens that fit into ``usable`` bytes."""
        if self.slope > 0:
            return (usable - self.fixed) / self.slope
        return math.inf if self.fixed <= usable else 0.0


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Through the two points of largest x; (x, y)."""
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    slope = (y1 - y0) / (x1 - x0)
    return Line(y1 - slope * x1, slope)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What short runs say of long ones. All numbers but ``warnings`` are for one number of layers.

    Attributes:
        phase: the one that reaches the usable bytes first: "forward", "backward" or "optimizer".
        line: its peak.
        saved: what is alive between forward and backward.
        length: tokens, not rounded.
        gradient_bytes: of all parameters.
        largest_gradient_bytes: of one parameter.
    """

    phase: str
    line: Line
    saved: Line
    length: float
    parameter_bytes: float
    gradient_bytes: float
    largest_gradient_bytes: float
    state_bytes: float
    warnings: tuple[str, ...] = ()


def predict(points: Sequence[Result], layers: int, usable: float) -> Forecast:
    """The forecast for a model of ``layers`` layers.

    Args:
        points: results of :func:`measure`, at least two lengths; of this number of layers, or of two other
            numbers, from which all bytes are extrapolated linearly.
        usable: bytes.
    """
    groups: dict[int, list[Result]] = {}
    for point in points:
        groups.setdefault(point["layers"], []).append(point)
    if layers in groups:
        groups = {layers: groups[layers]}

    def scale(of: Callable[[Sequence[Result]], float]) -> float:
        values = [(float(n), of(group)) for n, group in groups.items()]
        return values[0][1] if len(values) == 1 else fit(values).at(layers)

    def line(phase: str, name: str) -> Line:
        def of(group: Sequence[Result]) -> Line:
            return fit([(point["seq"], point["phases"][phase][name]) for point in group])

        return Line(scale(lambda group: of(group).fixed), scale(lambda group: of(group).slope))

    lines = {phase: line(phase, "peak_bytes") for phase in points[0]["phases"]}
    saved = line("backward", "before_bytes")
    phase = min(lines, key=lambda name: lines[name].length(usable))
    warnings = []
    if lines["backward"].slope < saved.slope:
        warnings.append("backward peaked at its end, where gradients are: longer --seq are needed")

    def size(name: str) -> float:
        return scale(lambda group: float(group[-1][name]))

    return Forecast(
        phase=phase,
        line=lines[phase],
        saved=saved,
        length=lines[phase].length(usable),
        parameter_bytes=size("parameter_bytes"),
        gradient_bytes=size("gradient_bytes"),
        largest_gradient_bytes=max(point["largest_gradient_bytes"] for point in points),
        state_bytes=size("state_bytes"),
        warnings=tuple(warnings),
    )


def usable_bytes(point: Result, cap: float | None) -> float:
    """What torch's allocator may take: the cap, or what it was given, less what the driver took of it."""
    free: float = point["total_bytes"] - point["outside_bytes"]
    return min(free, point["limit_bytes"] if cap is None else cap)


def bound(forecast: Forecast, usable: float, layers: int, hidden: int, optimizer: str) -> float:
    """Tokens of one bfloat16 hidden row a layer that fit beside parameters, gradients and states."""
    one_by_one = optimizer == "in-backward"
    gradients = forecast.largest_gradient_bytes if one_by_one else forecast.gradient_bytes
    free = usable - forecast.parameter_bytes - forecast.state_bytes - gradients
    return free / (layers * hidden * 2)


def round_down(tokens: float, multiple: int) -> int:
    return int(tokens // multiple) * multiple


def trained(result: Result | None) -> bool:
    return result is not None and "phases" in result


@dataclasses.dataclass(frozen=True)
class Found:
    """What :func:`search` found.

    Attributes:
        length: the longest that trained.
        failed: the shortest that ran out of memory.
        note: what was not tried, and why.
    """

    length: int | None = None
    failed: int | None = None
    note: str = ""


def search(
    start: int, attempt: Callable[[int], Result], *, above: bool, multiple: int, tries: int = 5
) -> Found:
    """Tries a length; lower ones while memory runs out; with ``above``, 1.05 times what trained.

    Args:
        attempt: runs a length and returns "phases" if it trained, "oom" if memory ran out, else "error".
        tries: lengths at most, each way.
    """
    length, failed = start, None
    for _ in range(tries):
        result = attempt(length)
        if "error" in result:
            return Found(None, failed, f"at {length:,}: {_last_line(result['error'])}")
        if trained(result):
            break
        failed, length = length, min(round_down(length * _SHRINK, multiple), length - multiple)
        if length <= 0:
            return Found(None, failed, "nothing trains")
    else:
        return Found(None, failed, f"{tries} lengths ran out of memory")
    for _ in range(tries if above else 0):
        more = -round_down(-length * _ABOVE, multiple)
        if failed is not None and failed <= more:
            return Found(length, failed)
        result = attempt(more)
        if "error" in result:
            return Found(length, failed, f"at {more:,}: {_last_line(result['error'])}")
        if not trained(result):
            return Found(length, more)
        length = more
    return Found(length, failed, "still trains" if above else "")


def short_runs(lengths: tuple[int, int], run: Callable[[int], Result], multiple: int) -> list[Result]:
    """Two lengths that train: these, or shorter ones where memory runs out. What ends it comes last.

    Returns:
        All results, failures too.
    """
    short, long = lengths
    results = [run(short)]
    while "oom" in results[-1] and short >= 2 * multiple:
        short, long = (max(round_down(length / 2, multiple), multiple) for length in (short, long))
        results.append(run(short))
    if not trained(results[-1]):
        return results
    results.append(run(long))
    while "oom" in results[-1] and long - short >= 2 * multiple and 8 * (long - short) > short:
        long = short + round_down((long - short) / 2, multiple)
        results.append(run(long))
    if "oom" in results[-1] and short > multiple:
        results.append(run(max(round_down(short / 2, multiple), multiple)))
    return results


def default_lengths(contender: Contender) -> tuple[int, int]:
    """Lengths that train with 32 layers, and at which the limit's line can be seen."""
    whole_logits = not contender.way.startswith("liger") and (
        contender.way != "mst" or "vocab" not in contender.options.get("passes", ("vocab",))
    )
    if contender.checkpoint:
        return (16384, 24576) if whole_logits else (65536, 98304)
    return (16384, 24576) if contender.way == "mst" and not whole_logits else (4096, 6144)


# Tables


def summary(entry: Result, beside: Result | None = None) -> Sequence[Any]:
    """A contender's line of the first table; ``beside``: the entry its length is divided by."""
    forecast, found = entry.get("forecast"), entry.get("found") or {}
    if not forecast:
        return (entry["contender"], entry["optimizer"], _cap(entry), *[None] * 8, entry["note"], None, None)
    slope = forecast["line"]["slope"]
    seconds = None
    for attempt in entry["attempts"]:
        if attempt["seq"] == found.get("length") and trained(attempt):
            seconds = attempt["step_seconds"]
    length = best_length(entry)
    ratio = None
    if beside is not None and length and (other := best_length(beside)):
        both = found.get("length") and (beside.get("found") or {}).get("length")
        ratio = f"{length / other:.2f} x" + ("" if both else " (predicted)")
    return (
        entry["contender"],
        entry["optimizer"],
        _cap(entry),
        entry["layers"],
        f"{slope:,.0f}",
        f"{slope / entry['layers']:,.0f}",
        f"{entry['bound']:,.0f}",
        f"{entry['predicted']:,}",
        f"{found['length']:,}" if found.get("length") else None,
        seconds,
        _failure(entry["verify"], found),
        entry["note"] or None,
        f"{length / entry['bound']:.3f}" + ("" if found.get("length") else " (predicted)"),
        ratio,
    )


SUMMARY_HEAD = (
    "contender",
    "optimizer",
    "cap GiB",
    "layers",
    "bytes a token",
    "bytes a token a layer",
    "bound",
    "predicted",
    "verified",
    "its step, s",
    "out of memory at 1.05 x",
    "note",
    "share of the bound",
)


def best_length(entry: Result) -> int:
    """Verified if there is one, else predicted; 0 if neither."""
    verified = (entry.get("found") or {}).get("length")
    return int(verified or entry.get("predicted") or 0)


def _failure(verify: str, found: Mapping[str, Any]) -> str:
    if verify != "both" or not found:
        return "not tried"
    if found["length"] is None or found["failed"] is None:
        return "not seen"
    return f"yes, at {found['failed']:,} ({found['failed'] / found['length']:.3f} x)"


def _cap(entry: Result) -> Any:
    return None if entry["cap"] is None else entry["cap"] / GIB


def parts(entry: Result) -> Sequence[Any]:
    """A contender's line of the second table: GiB at the longest length, by what holds them."""
    forecast, length = entry["forecast"], best_length(entry)
    fixed = forecast["line"]["fixed"] - forecast["parameter_bytes"] - forecast["state_bytes"]
    last = entry["points"][-1]
    own = None
    if "optimizer" in last["phases"]:
        phase = last["phases"]["optimizer"]
        own = (phase["peak_bytes"] - phase["before_bytes"]) / GIB
    first = last["at_first_gradient_bytes"]
    return (
        entry["contender"],
        length,
        entry["usable"] / GIB,
        forecast["parameter_bytes"] / GIB,
        forecast["state_bytes"] / GIB,
        forecast["gradient_bytes"] / GIB,
        forecast["phase"],
        fixed / GIB,
        forecast["line"]["slope"] * length / GIB,
        forecast["saved"]["slope"] * length / GIB,
        own,
        None if first is None else f"{first / GIB:.2f} ({last['layers']} layers, {last['seq']:,})",
    )


PARTS_HEAD = (
    "GiB of",
    "tokens",
    "usable",
    "parameters",
    "optimizer states",
    "gradients",
    "peak in",
    "fixed rest (gradients alive at the peak too)",
    "activations (slope x tokens)",
    "of which saved for backward",
    "the optimizer's temporaries",
    "at the first gradient (of)",
)


def runs_table(entry: Result) -> list[Sequence[Any]]:
    """A contender's lines of the third table, one a run."""
    rows: list[Sequence[Any]] = []
    for run in [*entry["tried"], *entry["attempts"]]:
        phases = run.get("phases", {})
        peaks = [phases[name]["peak_bytes"] / GIB if name in phases else None for name in _PHASES]
        rows.append(
            (
                entry["contender"],
                run["layers"],
                run["seq"],
                "trained" if phases else f"out of memory: {run['oom']}" if "oom" in run else "failed",
                phases["backward"]["before_bytes"] / GIB if phases else None,
                *peaks,
                run["reserved_bytes"] / GIB if phases else None,
                run["retries"] if phases else None,
                run.get("step_seconds"),
                run.get("compile_seconds"),
                f"{run['loss']:.5f}" if phases else None,
                f"{run['gradient_norm']:.5g}" if phases else None,
            )
        )
    return rows


_PHASES = ("forward", "backward", "optimizer")
RUNS_HEAD = (
    "contender",
    "layers",
    "tokens",
    "outcome",
    "after forward GiB",
    *(f"{name} peak" for name in _PHASES),
    "reserved peak",
    "allocator's retries",
    "step s",
    "compile s",
    "loss",
    "gradient norm",
)


def tables(entries: Sequence[Result], beside: str | None) -> str:
    """All of the Markdown."""
    others = {entry["contender"]: entry for entry in entries}
    reference = others.get(beside or "")
    head = (*SUMMARY_HEAD, f"length / {beside}'s")
    known = [entry for entry in entries if entry.get("forecast")]
    text = [f"{entries[0]['model']}; GPU: {entries[0].get('gpu')}" if entries else ""]
    text.append(markdown_table([head, *(summary(entry, reference) for entry in entries)]))
    text.append("What each part takes")
    text.append(markdown_table([PARTS_HEAD, *map(parts, known)]))
    text.append("Runs")
    text.append(markdown_table([RUNS_HEAD, *(row for entry in entries for row in runs_table(entry))]))
    text += [f"{e['contender']}: {w}" for e in known for w in e["forecast"]["warnings"]]
    for entry in entries:
        for run in [*entry["tried"], *entry["attempts"]]:
            if said := run.get("error") or run.get("message"):
                text.append(f"{entry['contender']}, {run['seq']:,}:\n\n```\n{said.strip()[-1500:]}\n```")
    return "\n\n".join(text)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200].replace("|", "/")


# In the process of a run


class _Memory:
    """Peaks and seconds of the phases of a step.

    On a CPU the bytes are made up, from what is alive and the length: the script's own test needs no more.
    """

    def __init__(self, device: str, cap: float | None) -> None:
        self.on_gpu = device == "cuda"
        self.cap = cap
        self.phase = "start"
        self.phases: dict[str, dict[str, float]] = {}
        self.alive: Callable[[], int] = lambda: 0
        self.fake_bytes = 0
        self.reserved = 0
        if self.on_gpu:
            torch.cuda.init()
            free, self.total = torch.cuda.mem_get_info()
            self.limit = min(free - _RESERVE, self.total if cap is None else int(cap))
            torch.cuda.set_per_process_memory_fraction(self.limit / self.total)
        else:
            self.total = self.limit = GIB

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else self.alive()

    def outside(self) -> int:
        """Bytes of the GPU that torch's allocator does not hold: driver, kernels, other processes."""
        if not self.on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    @contextlib.contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        self.phase = phase
        self._wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = self.allocated()
        start = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else self._fake_peak(before)
        peak = max(peak, int(self.phases.get(phase, {}).get("peak_bytes", 0)))
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved() if self.on_gpu else 0)
        self.phases[phase] = {"before_bytes": before, "peak_bytes": peak, "seconds": seconds}

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _fake_peak(self, before: int) -> int:
        peak = max(before, self.allocated()) + (self.fake_bytes if self.phase != "optimizer" else 0)
        if self.cap is not None and peak > self.cap:
            raise torch.OutOfMemoryError(f"out of memory: {peak} bytes of {self.cap:.0f}")
        return peak


class _Stepper:
    """AdamW of all parameters, after the backward pass (``way`` "adamw") or within it ("in-backward").

    Attributes:
        at_first: bytes allocated when the first gradient of a step was there; in-backward only.
        gradients: bytes of each parameter's gradient.
        counts: gradients of each parameter in this step.
    """

    def __init__(self, model: nn.Module, way: str, kernel: str, allocated: Callable[[], int]) -> None:
        self.in_backward = way == "in-backward"
        self.at_first: int | None = None
        self._allocated = allocated
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._norms: list[Tensor] = []
        self.gradients: dict[int, int] = {}
        self.counts: collections.Counter[int] = collections.Counter()
        make = functools.partial(torch.optim.AdamW, lr=1e-5)
        # Both without temporaries of the size of all parameters, as foreach=True has them.
        make = functools.partial(make, **{"fused": True} if kernel == "fused" else {"foreach": False})
        groups = [[p] for p in self._parameters] if self.in_backward else [self._parameters]
        self._optimizers = [make(group) for group in groups]
        self._allocate()
        if self.in_backward:
            for parameter, optimizer in zip(self._parameters, self._optimizers, strict=True):
                parameter.register_post_accumulate_grad_hook(functools.partial(self._hook, optimizer))

    def _allocate(self) -> None:
        """Lets the optimizer make its states, one parameter at a time; a step of nothing by nothing."""
        for index, parameter in enumerate(self._parameters):
            optimizer = self._optimizers[index if self.in_backward else 0]
            group = optimizer.param_groups[0]
            rate, group["lr"] = group["lr"], 0.0
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
            group["lr"] = rate

    def state_bytes(self) -> int:
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        return sum(value.nbytes for state in states for value in state.values())

    def _hook(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        if self.at_first is None:
            self.at_first = self._allocated()
        self._note(parameter)
        optimizer.step()
        parameter.grad = None

    def _note(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients[id(parameter)] = parameter.grad.nbytes
        self.counts[id(parameter)] += 1
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))

    def start(self) -> None:
        self._norms, self.at_first = [], None
        self.counts.clear()

    def gradient_norm(self) -> float:
        """Of this step; after the backward pass."""
        if not self.in_backward:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    self._note(parameter)
        return float(torch.linalg.vector_norm(torch.stack(self._norms)))

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def measure(
    *,
    model: str,
    contender: str,
    layers: int,
    seq: int,
    optimizer: str,
    kernel: str,
    options: dict[str, Any],
    cap: float | None,
    device: str,
    steps: int,
) -> Result:
    """Trains ``steps`` steps on one sequence; called in a process of its own.

    Returns:
        Bytes, seconds (of the last step), loss and gradient norm. If memory ran out: "oom", the phase in which
        it did, and "message".
    """
    chosen = CONTENDERS[contender]
    if chosen.way == "mst":
        chosen = dataclasses.replace(chosen, options={**chosen.options, **options})
    memory = _Memory(device, cap)
    lines = _keep_log()
    case = {"layers": layers, "seq": seq}
    try:
        return {
            **case,
            **_train(model, chosen, layers, seq, optimizer, kernel, device, steps, memory),
            "log": lines,
        }
    except Exception as error:  # torch, cuBLAS, cuDNN, the driver and compilers say it in their own ways
        if not _is_out_of_memory(error):
            raise
        return {**case, "oom": memory.phase, "message": str(error).strip()[:600], "log": lines}


def _train(
    model: str,
    contender: Contender,
    layers: int,
    seq: int,
    optimizer: str,
    kernel: str,
    device: str,
    steps: int,
    memory: _Memory,
) -> Result:
    made = make_model(model, contender, seq, device, num_hidden_layers=layers)
    stepper = _Stepper(made, optimizer, kernel, memory.allocated)
    parameters = list(made.parameters())
    memory.fake_bytes = 1024 * layers * seq

    def alive() -> int:
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        return sum(p.nbytes for p in parameters) + gradients + stepper.state_bytes()

    memory.alive = alive
    vocabulary = int(made.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = text_tokens(seq, vocabulary).view(1, seq).to(device)
    run = loss_function(made, contender)
    if memory.on_gpu:
        torch.cuda.empty_cache()
    retries = _retries(memory)
    base, compiling, norm = memory.allocated(), 0.0, math.nan
    loss: Tensor = ids
    for _ in range(steps):
        stepper.start()
        compiling = _compile_seconds()
        with memory.watch("forward"):
            loss = run(ids)
        with memory.watch("backward"):
            torch.autograd.backward(loss)
            loss = loss.detach()
        norm = stepper.gradient_norm()
        if not stepper.in_backward:
            with memory.watch("optimizer"):
                stepper.step()
    compiling = _compile_seconds() - compiling
    seconds = sum(phase["seconds"] for phase in memory.phases.values())
    return {
        "phases": memory.phases,
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "gradient_bytes": sum(stepper.gradients.values()),
        "largest_gradient_bytes": max(stepper.gradients.values()),
        "most_steps_of_a_parameter": max(stepper.counts.values()),
        "state_bytes": stepper.state_bytes(),
        "at_first_gradient_bytes": None if stepper.at_first is None else stepper.at_first - base,
        "before_bytes": base,
        "reserved_bytes": memory.reserved,
        "retries": _retries(memory) - retries,
        "total_bytes": memory.total,
        "limit_bytes": memory.limit,
        "outside_bytes": memory.outside(),
        "step_seconds": seconds - compiling,
        "compile_seconds": compiling,
        "loss": float(loss),
        "gradient_norm": norm,
        "gpu": torch.cuda.get_device_name() if memory.on_gpu else "none",
    }


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in said
        or "alloc_failed" in said
        or "allocation_failed" in said
    )


def _retries(memory: _Memory) -> int:
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if memory.on_gpu else 0


def _compile_seconds() -> float:
    from torch._dynamo import utils

    found: dict[str, float] = getattr(utils, "calculate_time_spent", dict)()
    return found.get("total_wall_time", 0.0)


def _keep_log() -> list[str]:
    """What mst-fx says, as a list that grows; each line once."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = record.getMessage()
            if said not in lines and len(lines) < 50:
                lines.append(said)

    logger = logging.getLogger("mst_fx")
    logger.setLevel(logging.INFO)
    logger.addHandler(Keep())
    return lines


# In the process that compares


class _Runs:
    """Runs :func:`measure` in new processes, within the budget; what earlier files tell is not run again."""

    def __init__(self, arguments: argparse.Namespace, changed: Callable[[], None]) -> None:
        self._arguments = arguments
        self._changed = changed
        self._end = time.monotonic() + arguments.budget
        self._known: list[Result] = []
        for path in arguments.resume:
            for entry in json.loads(path.read_text())["results"]:
                self._known += [*entry["tried"], *entry["attempts"]]

    def __call__(
        self, into: list[Result], contender: str, layers: int, seq: int, cap: float | None
    ) -> Result:
        arguments = self._arguments
        request = {
            "model": arguments.model,
            "contender": contender,
            "layers": layers,
            "seq": seq,
            "optimizer": arguments.optimizer,
            "kernel": arguments.kernel,
            "options": arguments.options if CONTENDERS[contender].way == "mst" else {},
            "cap": cap,
            "device": "cpu" if arguments.cpu_smoke else "cuda",
            "steps": arguments.steps,
        }
        for run in [*into, *self._known]:
            if run["request"] == request and "error" not in run:
                result, is_known = run, True
                break
        else:
            result, is_known = {**self._run(request), "request": request}, False
        if result not in into:
            into.append(result)
        print(_describe(contender, result) + (" (known)" if is_known else ""), flush=True)
        self._changed()
        return result

    def _run(self, request: dict[str, Any]) -> Result:
        left = self._end - time.monotonic()
        case = {"layers": request["layers"], "seq": request["seq"]}
        if left < 15:
            return {**case, "error": "not run: the time is used up"}
        start = time.monotonic()
        try:
            result = call_apart(measure, timeout=left, env=_ENVIRONMENT, **request)
        except RuntimeError as error:
            result = {**case, "error": str(error)}
        return {**result, "process_seconds": time.monotonic() - start}


def _describe(contender: str, result: Result) -> str:
    text = f"{contender:18s} {result['layers']:3d} layers {result['seq']:8,d} tokens  "
    seconds = f"{result.get('process_seconds', 0):.0f} s"
    if "error" in result:
        return f"{text}failed: {_last_line(result['error'])}"
    if "oom" in result:
        return f"{text}out of memory: {result['oom']}, process {seconds}"
    peak = max(phase["peak_bytes"] for phase in result["phases"].values())
    return f"{text}peak {peak / GIB:.2f} GiB, step {result['step_seconds']:.1f} s, process {seconds}"


def examine(entry: Result, runs: _Runs, arguments: argparse.Namespace) -> None:
    """Fills a contender's entry: short runs, forecast, verification."""
    name, layers, cap, multiple = entry["contender"], entry["layers"], entry["cap"], arguments.multiple
    lengths = arguments.seq or default_lengths(CONTENDERS[name])
    points: list[Result] = []
    for count in arguments.extrapolate_layers or [layers]:
        found = short_runs(
            lengths,
            # Without the cap: peaks do not depend on it.
            functools.partial(lambda count, seq: runs(entry["tried"], name, count, seq, None), count),
            multiple,
        )
        right = sorted((run for run in found if trained(run)), key=lambda run: run["seq"])
        if len(right) < 2:
            entry["note"] = "no two lengths trained"
            if "error" in found[-1]:
                entry["note"] += f": {_last_line(found[-1]['error'])}"
            return
        points += right
    entry["points"], entry["gpu"] = points, points[-1]["gpu"]
    usable = usable_bytes(points[-1], cap)
    forecast = predict(points, layers, usable)
    hidden = MODELS[arguments.model][1]["hidden_size"]
    length = forecast.length * (1 - arguments.margin)
    entry |= {
        "usable": usable,
        "forecast": dataclasses.asdict(forecast),
        "bound": bound(forecast, usable, layers, hidden, arguments.optimizer),
        "predicted": round_down(length, multiple) if math.isfinite(length) else 0,
    }
    start = arguments.length or entry["predicted"]
    if arguments.verify == "none" or start <= 0:
        entry["note"] = "" if start > 0 else "does not fit at any length"
        return
    result = search(
        start,
        lambda seq: runs(entry["attempts"], name, layers, seq, cap),
        above=arguments.verify == "both",
        multiple=multiple,
    )
    entry["found"], entry["note"] = dataclasses.asdict(result), result.note


def main() -> None:
    arguments = _arguments()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise SystemExit(f"unknown contenders {unknown}; there are {', '.join(CONTENDERS)}")
    entries: list[Result] = []

    def keep() -> None:
        # Without write_results, which asks CUDA for the GPU's name: this process must hold nothing of it yet.
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": {}, "results": entries}, indent=2)
        (arguments.out / f"{arguments.name}.json").write_text(text + "\n")

    runs = _Runs(arguments, keep)
    for name in names:
        entry: Result = {
            "contender": name,
            "model": arguments.model,
            "layers": arguments.layers or MODELS[arguments.model][1]["num_hidden_layers"],
            "optimizer": f"{arguments.optimizer}, {arguments.kernel}",
            "cap": arguments.cap * GIB if arguments.cap else None,
            "verify": arguments.verify,
            "tried": [],
            "points": [],
            "attempts": [],
            "note": "",
        }
        entries.append(entry)
        examine(entry, runs, arguments)
        keep()
    text = tables(entries, arguments.beside)
    write_results(arguments.out, arguments.name, entries, text)
    print(f"\n{text}")


def _pair(text: str) -> tuple[int, int]:
    low, high = sorted(numbers(text))
    if not 0 < low < high:
        raise ValueError
    return low, high


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="llama3-8b")
    parser.add_argument("--only", help=f"of {', '.join(CONTENDERS)}; {DEFAULT_CONTENDERS}")
    parser.add_argument("--beside", help="the contender whose length others are divided by (the first)")
    parser.add_argument("--layers", type=int, help="of the model (as published)")
    parser.add_argument("--extrapolate-layers", type=_pair, help="two numbers of layers for the short runs")
    parser.add_argument("--seq", type=_pair, help="tokens of the two short runs (by contender)")
    parser.add_argument("--length", type=int, help="where verification starts, instead of the prediction")
    parser.add_argument("--verify", choices=("none", "step", "both"), default="both")
    parser.add_argument("--optimizer", choices=("adamw", "in-backward"), default="adamw")
    parser.add_argument("--kernel", choices=("fused", "loop"), default="fused", help="loop: foreach=False")
    parser.add_argument("--cap", type=float, help="GiB that torch may take (80 GB: 74.5)")
    parser.add_argument("--margin", type=float, default=0.005, help="of the prediction, left free")
    parser.add_argument("--multiple", type=int, default=1024, help="lengths are multiples of it")
    parser.add_argument("--steps", type=int, default=1, help="the last one is timed")
    parser.add_argument("--options", type=json.loads, default={}, help="of mst, as JSON")
    parser.add_argument("--budget", type=float, default=560, help="seconds all runs may take together")
    parser.add_argument("--resume", type=Path, action="append", default=[], help="a JSON file of before")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--name", default="max-context", help="of the files in --out")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny model on the CPU, bytes made up")
    arguments = parser.parse_args()
    if arguments.cpu_smoke:
        arguments.model, arguments.multiple = "tiny", 64
        arguments.seq = arguments.seq or (256, 384)
        arguments.cap = arguments.cap or 5 / 1024
        arguments.options = {"inner": "aot_eager", "chunk_rows": 64, **arguments.options}
    arguments.only = arguments.only or ("eager,mst+ckpt" if arguments.cpu_smoke else DEFAULT_CONTENDERS)
    arguments.beside = arguments.beside or arguments.only.split(",")[0]
    return arguments


if __name__ == "__main__":
    main()
