"""Meters of CPU memory; torch keeps no peak there.

- :func:`measure_cpu` sums up the torch profiler's memory events: everything that torch's allocator hands
  out, Inductor's buffers included, in this process, at the price of the profiler's overhead.
- :func:`call_metered` calls a function in a process of its own under an LD_PRELOAD library
  (``malloc_meter.c``) that counts every malloc block of 64 KiB and more, scratch of BLAS and oneDNN
  included; inside, :func:`malloc_meter` reads it. Linux with glibc and a C compiler only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SOURCE = Path(__file__).with_name("malloc_meter.c")


@dataclasses.dataclass
class Measurement:
    """What :func:`measure_cpu` saw; filled when the context ends.

    Attributes:
        peak_bytes: most bytes alive at once of what was allocated since entry. Blocks from before do
            not count, and neither does their release: the profiler does not know their sizes.
        timeline: (seconds since entry, bytes alive) after each allocation and release.
    """

    peak_bytes: int = 0
    timeline: list[tuple[float, int]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def measure_cpu() -> Iterator[Measurement]:
    """Measures the CPU memory that torch allocates inside of the context.

    Allocations outside of torch's allocator (oneDNN's and BLAS's scratch) are not seen.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    found = Measurement()
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    entry = time.time_ns()
    with profiler:
        entry = time.time_ns()  # starting the profiler takes a while
        yield found
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events: list[tuple[int, int]] = []
    waiting = list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields: Any = event.extra_fields
            if fields.device.type == "cpu":
                events.append((event.start_time_ns, fields.alloc_size))
    alive = 0
    for nanoseconds, size in sorted(events, key=lambda event: event[0]):
        alive += size
        found.timeline.append(((nanoseconds - entry) * 1e-9, alive))
        found.peak_bytes = max(found.peak_bytes, alive)


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
        raise RuntimeError("the malloc meter is not loaded; start this through tools.meter.call_metered")
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
    """Calls a function in a new process, in which :func:`malloc_meter` works.

    Args:
        function: at the top level of a module that can be imported, or of the script that runs.
        args, kwargs: anything JSON can hold.
        timeout: seconds until the process is killed.

    Returns:
        The function's result, as JSON brings it back (tuples become lists).

    Raises:
        RuntimeError: if the process fails, with the end of its output, or outlasts the timeout.
    """
    return call_apart(function, *args, timeout=timeout, env={"LD_PRELOAD": str(library_path())}, **kwargs)


def call_apart(
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 600,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """:func:`call_metered` without the meter, with more environment variables instead."""
    module = function.__module__
    if module == "__main__":
        module = os.path.abspath(sys.modules["__main__"].__file__ or "")
    request = {"module": module, "function": function.__qualname__, "args": args, "kwargs": kwargs}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
        try:
            status = start(request, result, log, {**os.environ, "PYTHONPATH": path, **(env or {})}, timeout)
        except subprocess.TimeoutExpired as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            message = f"{function.__qualname__} took more than {timeout:.0f} s"
            raise RuntimeError(f"{tail}\n{message}") from error
        if status or not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{function.__qualname__} failed with status {status}:\n{tail}")
        return json.loads(result.read_text())


def _start(
    request: dict[str, Any], result: Path, log: Path, environment: dict[str, str], timeout: float
) -> int:
    """A new process calls :func:`answer`; its exit status.

    Raises:
        subprocess.TimeoutExpired: and the process, with all that it started, was ended.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(request), str(result)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that compilers it has started can be stopped with it
        )
        try:
            return process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


start = _start  # the tests have processes whose imports are done


def describe_blocks(sizes: Sequence[int], least: int = 1 << 20) -> str:
    """``3 x 64.0 MiB + 12.5 MiB + 0.3 MiB in smaller ones``: a list of block sizes in one line."""
    counts = collections.Counter(round(size / 2**20, 1) for size in sizes if size >= least)
    parts = [f"{n} x {mib} MiB" if n > 1 else f"{mib} MiB" for mib, n in sorted(counts.items(), reverse=True)]
    rest = sum(size for size in sizes if size < least)
    return " + ".join([*parts, f"{rest / 2**20:.1f} MiB in smaller ones"])


def _load(name: str) -> Any:
    """A module by its name, or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def answer(request: dict[str, Any], result: Path) -> None:
    """The other end of :func:`call_apart`."""
    os.environ.pop("LD_PRELOAD", None)  # compilers that are started from here need no meter
    function = _load(request["module"])
    for part in request["function"].split("."):
        function = getattr(function, part)
    found = function(*request["args"], **request["kwargs"])
    result.write_text(json.dumps(found))


def _child() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request")
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    answer(json.loads(arguments.request), arguments.result)


if __name__ == "__main__":
    # Run as a script, so tools/ is where imports are looked for first: the repository root is what is meant.
    sys.path[0] = str(ROOT)
    _child()
