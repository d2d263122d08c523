"""Many architectures, each in a process that begins with what this one has imported."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tools.sweep.attempt import Outcome, Way, attempt


@dataclasses.dataclass
class _Job:
    name: str
    process: Any
    connection: Connection
    end: float


def sweep(names: Iterable[str], family: str, way: Way, jobs: int, timeout: float) -> Iterator[Outcome]:
    """Tries architectures, each in a process that begins with what this one has imported.

    Args:
        names: is read as processes become free.
        timeout: seconds an architecture.
    """
    waiting, running = iter(names), list[_Job]()
    while True:
        while len(running) < jobs and (name := next(waiting, None)) is not None:
            running.append(_start(name, family, way, timeout))
        if not running:
            return
        wait([job.connection for job in running], timeout=max(0.0, running[0].end - time.monotonic()))
        for job in list(running):
            outcome = _outcome(job, family)
            if outcome is not None:
                running.remove(job)
                job.process.kill()
                job.process.join()
                yield outcome


def _start(name: str, family: str, way: Way, timeout: float) -> _Job:
    context: Any = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, family, way, writer), daemon=True)
    process.start()
    writer.close()
    return _Job(name, process, reader, time.monotonic() + timeout)


def _run(name: str, family: str, way: Way, connection: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    connection.send(attempt(name, family, way))


def _outcome(job: _Job, family: str) -> Outcome | None:
    """What became of a job; None while it runs."""
    if job.connection.poll():
        try:
            return job.connection.recv()
        except EOFError:  # the process ended without a word
            job.process.join()
            return Outcome(job.name, family, "died", why=f"exit code {job.process.exitcode}")
    is_over = time.monotonic() > job.end
    return Outcome(job.name, family, "timeout") if is_over else None
