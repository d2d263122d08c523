"""One run: the first steps of a model with an optimizer, and the memory that each of their phases takes, on the device and on the host."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import utils as dynamo_utils

import mst_fx
from mst_fx.ops.arena import ARENA
from tools.bench.contenders import CONTENDERS, Contender, find_contender, loss_function, make_model
from tools.bench.models import text_tokens
from tools.bench.tables import GIB
from tools.max_context.forecast import Result
from tools.meters.gpu import alive_at_peak

_RESERVE = GIB // 2


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
    """AdamW of all trained parameters, after the backward pass (``way`` "adamw"), so with its states on the host until then ("parked"),
    or within it ("in-backward").

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
        self._parkings = [mst_fx.park(each) for each in self._optimizers] if way == "parked" else []
        if not self._parkings:  # these make their states bucket by bucket, when they step
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

    def parked_bytes(self) -> int:
        """Of states, on the host."""
        return sum(parking.bytes for parking in self._parkings)

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
    lora: int,
    options: dict[str, Any],
    cap: float | None,
    device: str,
    steps: int,
    alive: bool = False,
) -> Result:
    """Trains ``steps`` steps on one sequence; called in a process of its own.

    Args:
        lora: rank of PEFT's LoRA on all linear layers, all else frozen; 0: none.
        alive: whether "alive" is wanted, the largest blocks at the peak of all steps; on a GPU.

    Returns:
        Bytes, seconds (of the last step), loss and gradient norm. If memory ran out: "oom", the phase in which
        it did, and "message".
    """
    chosen = find_contender(contender, CONTENDERS)
    if chosen.way == "mst":
        chosen = dataclasses.replace(chosen, options={**chosen.options, **options})
    memory = _Memory(device, cap)
    lines = _collect_log()
    case = {"layers": layers, "seq": seq}
    found: list[str] = []
    try:
        with alive_at_peak() if alive else contextlib.nullcontext(found) as found:
            trained = _train(model, chosen, layers, seq, optimizer, kernel, lora, device, steps, memory)
        return {**case, **trained, "log": lines, "alive": "".join(found)}
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
    lora: int,
    device: str,
    steps: int,
    memory: _Memory,
) -> Result:
    made = make_model(model, contender, seq, device, lora=lora, num_hidden_layers=layers)
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
        **_bytes(parameters, stepper, memory),
        "at_first_gradient_bytes": None if stepper.at_first is None else stepper.at_first - base,
        "before_bytes": base,
        "retries": _retries(memory) - retries,
        "step_seconds": seconds - compiling,
        "compile_seconds": compiling,
        "loss": float(loss),
        "gradient_norm": norm,
        "gpu": torch.cuda.get_device_name() if memory.on_gpu else "none",
    }


def _bytes(parameters: Sequence[Tensor], stepper: _Stepper, memory: _Memory) -> Result:
    return {
        "phases": memory.phases,
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "gradient_bytes": sum(stepper.gradients.values()),
        "largest_gradient_bytes": max(stepper.gradients.values()),
        "most_steps_of_a_parameter": max(stepper.counts.values()),
        "state_bytes": stepper.state_bytes(),
        "parked_bytes": stepper.parked_bytes(),
        "lent_bytes": ARENA.size,
        "reserved_bytes": memory.reserved,
        "total_bytes": memory.total,
        "limit_bytes": memory.limit,
        "outside_bytes": memory.outside(),
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
    found: dict[str, float] = getattr(dynamo_utils, "calculate_time_spent", dict)()
    return found.get("total_wall_time", 0.0)


def _collect_log() -> list[str]:
    """What mst-fx says, as a list that grows; each line once."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = record.getMessage()
            if said not in lines and len(lines) < 50:
                lines.append(said)

    logger = logging.getLogger("mst_fx")
    logger.setLevel(logging.INFO)
    logger.addHandler(Collector())
    return lines
