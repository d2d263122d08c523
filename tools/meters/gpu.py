"""What a step runs on a GPU, what is alive when its memory peaks, and how its memory goes up and down."""

from __future__ import annotations

import bisect
import collections
import contextlib
import linecache
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.meters.cpu import Measurement

GIB, MIB = 2**30, 2**20

_GROUPS = (
    ("attention", r"flash|fmha|cudnn.*(sdpa|attention)|sdpa|mha_"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitK"),
    ("fused pointwise", r"^triton_"),
    ("copy, fill", r"Memcpy|Memset|copy|fill|FillFunctor|CatArray"),
)
_COLLECTIVE, _SPAN = "ncclDevKernel", "nccl:"  # a kernel, and what torch's profiler draws around it
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def kernel_table(step: Callable[[], Any], most: int = 40) -> str:
    """Runs a step: milliseconds of its kernels by group and by name, launches, waits, and idle time; of collectives also how long nothing
    ran beside them, and which kernel waited."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
    events: Any = record.events()
    on_device = [
        e
        for e in events
        if e.device_type.name == "CUDA" and e.device_time > 0 and not e.name.startswith(_SPAN)
    ]
    if not on_device:
        return "no kernel ran"
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for event in on_device:
        by_name[event.name].append(event.device_time / 1000)
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for name, times in by_name.items():
        groups[_group(name)] += times
    span = (max(e.time_range.end for e in on_device) - min(e.time_range.start for e in on_device)) / 1000
    busy = _union([(e.time_range.start, e.time_range.end) for e in on_device]) / 1000
    waits = collections.Counter(e.name for e in events if e.name in _WAITS)
    lines = [
        f"{span:.1f} ms from the first kernel to the last, {span - busy:.1f} ms of it idle; waits: {dict(waits)}"
    ]
    for group, times in sorted(groups.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(times):9.2f} ms {len(times):6d} x  {group}")
    lines += [*_collectives(on_device), ""]
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:most]:
        lines.append(f"{sum(times):9.2f} ms {len(times):6d} x  {name[:140]}")
    return "\n".join(lines)


def _collectives(on_device: list[Any], most: int = 12) -> list[str]:
    """Lines of the collectives beside which nothing ran, by the kernel that came next: it waited."""
    sends = [e for e in on_device if e.name.startswith(_COLLECTIVE)]
    if not sends:
        return []
    others = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in on_device
        if not e.name.startswith(_COLLECTIVE)
    )
    kernels = [(start, end) for start, end, _ in others]
    bare: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in sends:
        span = (event.time_range.start, event.time_range.end)
        following = bisect.bisect_left(others, (span[1],))
        reader = others[following][2] if following < len(others) else "the end"
        bare[event.name, reader].append(exposed([span], kernels) / 1000)
    all_bare = sum(map(sum, bare.values()))
    lines = ["", f"{all_bare:9.2f} ms of collectives with nothing beside them, in front of"]
    for (name, reader), times in sorted(bare.items(), key=lambda item: -sum(item[1]))[:most]:
        kind = name.removeprefix(f"{_COLLECTIVE}_").partition("(")[0]
        lines.append(f"{sum(times):9.2f} ms {len(times):6d} x  {kind}: {reader[:110]}")
    return lines


def _group(name: str) -> str:
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), "other")


def _union(intervals: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def copies_of(step: Callable[[], Any]) -> tuple[float, float]:
    """Runs a step: milliseconds of copies between host and device, and how many of these no kernel ran beside."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    found: tuple[list[Interval], list[Interval]] = ([], [])
    for event in record.events():  # type: ignore[union-attr]
        if event.device_type.name == "CUDA":
            is_copy = bool(re.search("Memcpy (DtoH|HtoD)", event.name))
            found[is_copy].append((event.time_range.start, event.time_range.end))
    kernels, copies = found
    return _union(copies) / 1000, exposed(copies, kernels) / 1000


Interval = tuple[float, float]


def exposed(copies: list[Interval], kernels: list[Interval]) -> float:
    """How much of some intervals' union lies outside of the others'."""
    return _union([*copies, *kernels]) - _union(kernels)


@contextlib.contextmanager
def measure_cuda() -> Iterator[Measurement]:
    """As :func:`tools.meters.cpu.measure_cpu`, from the CUDA allocator's own record."""
    found = Measurement()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python")
    try:
        yield found
        torch.cuda.synchronize()
        found.peak_bytes = torch.cuda.max_memory_allocated() - before
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    signs = {"alloc": 1, "free_completed": -1}
    alive = 0
    for event in trace:
        alive += signs.get(event["action"], 0) * event["size"]
        found.timeline.append(((event["time_us"] - trace[0]["time_us"]) / 1e6, alive))


def describe_peak(step: Callable[[], Any]) -> str:
    """Runs a step and lists the largest blocks that were alive when memory peaked."""
    with alive_at_peak() as found:
        step()
    return found[0]


@contextlib.contextmanager
def alive_at_peak() -> Iterator[list[str]]:
    """Fills a list, at its end, with a text: the largest blocks that were alive when memory peaked inside."""
    found: list[str] = []
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        yield found
        torch.cuda.synchronize()
        trace: list[dict[str, Any]] = torch.cuda.memory._snapshot()["device_traces"][
            torch.cuda.current_device()
        ]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    found.append(blocks_at_peak(trace, base))


def blocks_at_peak(trace: Sequence[dict[str, Any]], base: int, least: int = 64 * MIB) -> str:
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
