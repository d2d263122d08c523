"""Meters of CPU memory; torch keeps no peak there.

- :func:`measure_cpu` sums up the torch profiler's memory events: everything that torch's allocator hands
  out, Inductor's buffers included, in this process, at the price of the profiler's overhead.
- :func:`call_metered` calls a function in a process of its own under an LD_PRELOAD library
  (``malloc.c``) that counts every malloc block of 64 KiB and more, scratch of BLAS and oneDNN
  included; inside, :func:`malloc_meter` reads it. Linux with glibc and a C compiler only.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.meters.apart import call_apart

_SOURCE = Path(__file__).with_name("malloc.c")


@dataclasses.dataclass
class Measurement:
    """What :func:`measure_cpu` saw; filled when the context ends.

    Attributes:
        peak_bytes: most bytes alive at once of what was allocated since entry. Blocks from before do
            not count, and neither does their release.
        timeline: (seconds since entry, bytes alive) after each allocation and release.
    """

    peak_bytes: int = 0
    timeline: list[tuple[float, int]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def measure_cpu() -> Iterator[Measurement]:
    """Measures the CPU memory that torch allocates inside of the context.

    Allocations outside of torch's allocator (oneDNN's and BLAS's scratch) are not seen.
    """
    found = Measurement()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    entry = time.time_ns()
    with profiler:
        entry = time.time_ns()  # starting the profiler takes a while
        yield found
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    sizes: dict[int, int] = {}  # of the blocks that are alive, by address
    alive = 0
    for event in sorted(_memory_events(results.experimental_event_tree()), key=lambda e: e.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            sizes[fields.ptr] = fields.alloc_size
            alive += fields.alloc_size
        elif fields.ptr in sizes:
            alive -= sizes.pop(fields.ptr)
        else:  # from before; what the profiler says of it may be the size of another that it once saw there
            continue
        found.timeline.append(((event.start_time_ns - entry) * 1e-9, alive))
        found.peak_bytes = max(found.peak_bytes, alive)


def _memory_events(tree: Sequence[Any]) -> Iterator[Any]:
    for event in tree:
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event
        yield from _memory_events(event.children)


class _Event(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_double), ("address", ctypes.c_uint64), ("bytes", ctypes.c_int64))


class MallocMeter:
    """Reads the LD_PRELOAD library; see :func:`malloc_meter`. All numbers are bytes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, result in (
            ("meter_current", ctypes.c_longlong),
            ("meter_peak", ctypes.c_longlong),
            ("meter_reset", None),
            ("meter_event_count", ctypes.c_size_t),
            ("meter_event_limit", ctypes.c_size_t),
            ("meter_events", ctypes.POINTER(_Event)),
        ):
            getattr(library, name).restype = result
        self._library = library

    def current(self) -> int:
        """Bytes alive now, in blocks of 64 KiB and more."""
        return int(self._library.meter_current())

    def peak(self) -> int:
        """Most bytes alive since the last reset."""
        return int(self._library.meter_peak())

    def reset(self) -> None:
        """Sets the peak to what is alive now and forgets all events."""
        self._library.meter_reset()

    def events(self) -> list[tuple[float, int, int]]:
        """(seconds of CLOCK_MONOTONIC, address, bytes; negative when freed) since the last reset.

        Raises:
            RuntimeError: if there were more events than the log holds.
        """
        count = self._library.meter_event_count()
        if count > self._library.meter_event_limit():
            raise RuntimeError(f"the meter's log is too short for {count} events; reset it more often")
        log = self._library.meter_events()
        return [(log[i].seconds, log[i].address, log[i].bytes) for i in range(count)]

    def timeline(self) -> list[tuple[float, int]]:
        """(seconds since the first event, bytes above the level at the last reset)."""
        events = self.events()
        start = events[0][0] if events else 0.0
        line, level = [], 0
        for seconds, _, size in events:
            level += size
            line.append((seconds - start, level))
        return line

    def alive_at_peak(self) -> list[int]:
        """Sizes of the blocks that were allocated since the last reset and alive at the peak, largest first."""
        events = self.events()
        level, peak, at = 0, 0, 0
        for index, (_, _, size) in enumerate(events):
            level += size
            if level > peak:
                peak, at = level, index + 1
        alive: dict[int, int] = {}
        for _, address, size in events[:at]:
            if size > 0:
                alive[address] = size
            else:
                alive.pop(address, None)
        return sorted(alive.values(), reverse=True)


def malloc_meter() -> MallocMeter:
    """The meter of this process.

    Raises:
        RuntimeError: if the process was not started by :func:`call_metered`.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "meter_current"):
        raise RuntimeError("the malloc meter is not loaded; start this through tools.meters.cpu.call_metered")
    return MallocMeter(library)


def is_available() -> bool:
    """Whether the malloc meter can be built and loaded here."""
    return sys.platform == "linux" and _compiler() is not None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def library_path() -> Path:
    """Builds the LD_PRELOAD library, once for each version of its source.

    Raises:
        RuntimeError: if there is no C compiler or it fails.
    """
    source = _SOURCE.read_bytes()
    folder = Path(tempfile.gettempdir()) / f"mst-fx-meter-{os.getuid()}"
    path = folder / f"malloc_meter-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if path.exists():
        return path
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("the malloc meter needs a C compiler (cc)")
    folder.mkdir(mode=0o700, exist_ok=True)
    built = path.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(built), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    built.replace(path)  # in one step: another process may be loading it
    return path


def call_metered(function: Callable[..., Any], *args: Any, timeout: float = 600, **kwargs: Any) -> Any:
    """:func:`~tools.meters.apart.call_apart` in a process in which :func:`malloc_meter` works."""
    return call_apart(function, *args, timeout=timeout, env={"LD_PRELOAD": str(library_path())}, **kwargs)


def describe_blocks(sizes: Sequence[int], least: int = 1 << 20) -> str:
    """``3 x 64.0 MiB + 12.5 MiB + 0.3 MiB in smaller ones``: a list of block sizes in one line."""
    counts = collections.Counter(round(size / 2**20, 1) for size in sizes if size >= least)
    parts = [f"{n} x {mib} MiB" if n > 1 else f"{mib} MiB" for mib, n in sorted(counts.items(), reverse=True)]
    rest = sum(size for size in sizes if size < least)
    return " + ".join([*parts, f"{rest / 2**20:.1f} MiB in smaller ones"])
