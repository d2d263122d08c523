"""What the others say when a rank of a group fails: which one it was, instead of an address that did not answer.

A collective waits until all ranks have called it. One that runs out of memory in its step, or is killed, lets the others wait
until their connections to it end, or torch's time-out is over. A rank that fails in a graph leaves word in the store of the group before it
raises; who gets an error of a collective reads there what the others have said, and looks whether those of this machine still run.
Nothing of this happens in a step that is right.

After such a step ranks no longer know which collective comes next: the group cannot be used again, and says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mst_fx.errors import GroupError
from mst_fx.group import Group
from mst_fx.process import State
from mst_fx.ranks.agreement import of_ranks
from mst_fx.torch_api.processes import guard_backward, is_of_a_collective, store_of

_PATIENCE = 10.0  # seconds, until it is said that nothing was heard of a rank
_FEW = 1.0  # for others that fail at the same time


@dataclasses.dataclass(frozen=True)
class Process:
    """A rank's process, as others can tell it from one that gets its number later.

    Attributes:
        machine: of the processes that can see it; empty: nobody can.
        started: in ticks, by the kernel.
    """

    name: str
    pid: int
    host: str
    machine: str
    started: str

    @staticmethod
    def this() -> Process:
        pid = os.getpid()
        return Process(uuid.uuid4().hex, pid, socket.gethostname(), _machine(), (_stat(pid) or ("", ""))[1])

    def has_ended(self) -> bool:
        """Whether it certainly has."""
        if not self.machine or self.machine != _machine():
            return False
        found = _stat(self.pid)
        return found is None or found[0] in "ZX" or found[1] != self.started

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"


def _machine() -> str:
    """The running kernel, and the processes of it that this one can see; nothing where there is no ``/proc``."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}" if _stat(os.getpid()) is not None else ""
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str] | None:
    """A process' state, and when it started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


@dataclasses.dataclass(frozen=True)
class _Word:
    """What is known of a rank that may have failed.

    Attributes:
        is_lost: whether it failed itself, or has ended; else it waited for others, too, or nothing is known of it.
        is_said: by itself.
    """

    text: str
    is_lost: bool
    is_said: bool


class Member:
    """This process in a group, and the processes of the others. To be made on all ranks at once."""

    def __init__(self, group: Group) -> None:
        # No reference to the process group: this is the value of a weak table of those.
        self._me, self._store = group.me, store_of(group.process_group)
        get_rank = torch.distributed.get_global_rank
        ranks = [get_rank(group.process_group, rank) for rank in range(group.ranks)]
        self._names = [
            str(rank) if rank == everywhere else f"{rank} ({everywhere} of all)"
            for rank, everywhere in enumerate(ranks)
        ]
        self._end = ""
        self._processes = self._met(group)

    def _met(self, group: Group) -> list[Process]:
        """
        Raises:
            GroupError: names those who did not come.
        """
        keys = [f"mst_fx/came/{rank}" for rank in range(group.ranks)]
        try:
            self._store.set(keys[self._me], "")
            return of_ranks(group, Process.this())
        except Exception as error:
            if not is_of_a_collective(error):
                raise
            missing: list[str] = []
            start = time.monotonic()
            with contextlib.suppress(Exception):
                missing = self._missing(keys)
                while len(missing) > 1 and time.monotonic() - start < _PATIENCE:  # others may be on their way
                    time.sleep(0.05)
                    missing = self._missing(keys)
            named = ", ".join(missing) or "unknown"
            raise GroupError(
                f"a rank of a group that works on one sequence has not come: rank {named} ({_described(error)})"
            ) from error

    def _missing(self, keys: list[str]) -> list[str]:
        return [name for name, key in zip(self._names, keys, strict=True) if not self._store.check([key])]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around collectives: where one fails, the error names the rank that did not come.

        Raises:
            GroupError: in the place of an error of a collective, and where a step before has failed.
        """
        self._check()
        try:
            yield
        except Exception as error:
            if not is_of_a_collective(error):
                raise
            raise GroupError(self._lost(error)) from error

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a part of a step: as :meth:`waiting`; and what fails on this rank is told to the others.

        Raises:
            GroupError: as there.
        """
        try:
            with self.waiting():
                yield
        except GroupError:  # of all ranks
            raise
        except BaseException as error:
            text = _described(error)
            self._say(text, is_lost=True)
            self._end = f"a step failed on this rank, {self._names[self._me]}, before: {text}"
            raise

    def _check(self) -> None:
        if self._end:
            raise GroupError(
                "a group that works on one sequence cannot be used any more, since its ranks do not agree on which collective comes next; "
                f"start the processes anew: {self._end}"
            )

    def _lost(self, error: Exception) -> str:
        """What to say of an error of a collective."""
        mine = _described(error)
        self._say(mine, is_lost=False)
        start = time.monotonic()
        while True:
            words = {rank: self._word(rank) for rank in range(len(self._processes)) if rank != self._me}
            lost = [rank for rank, word in words.items() if word.is_lost]
            silent = [rank for rank, word in words.items() if not (word.is_lost or word.is_said)]
            if not silent or time.monotonic() - start > (_FEW if lost else _PATIENCE):
                break
            time.sleep(0.05)
        named = ", ".join(self._names[rank] for rank in lost or silent) or "unknown"
        lines = {**{rank: word.text for rank, word in words.items()}, self._me: f"waited: {mine}"}
        self._end = f"lost rank {named}"
        return "\n".join(
            [
                f"a rank of a group that works on one sequence is lost, and the others cannot go on: rank {named}",
                *(f"  rank {self._names[rank]}: {lines[rank]}" for rank in sorted(lines)),
            ]
        )

    def _say(self, text: str, is_lost: bool) -> None:
        with contextlib.suppress(Exception):  # whoever holds the store may be the rank that is lost
            self._store.set(_key(self._processes[self._me]), json.dumps([text, is_lost]))

    def _word(self, rank: int) -> _Word:
        process = self._processes[rank]
        has_ended = process.has_ended()  # first: what it said, it said before
        try:
            if self._store.check([_key(process)]):
                text, is_lost = json.loads(self._store.get(_key(process)))
                return _Word(f"{'failed' if is_lost else 'waited'}: {text}", is_lost, True)
        except Exception:
            if not has_ended:
                return _Word(
                    f"cannot be asked: the store of the group does not answer ({process})", False, False
                )
        if has_ended:
            return _Word(f"has ended, and said nothing ({process})", True, False)
        return _Word(f"nothing was heard of it ({process})", False, False)


def _key(process: Process) -> str:
    return f"mst_fx/fault/{process.name}"


def _described(error: BaseException) -> str:
    lines = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {lines[0][:400]}"


class Members(State):
    """Of each process group that sequences were cut for."""

    def __init__(self) -> None:
        super().__init__()
        self._known: weakref.WeakKeyDictionary[Any, Member] = weakref.WeakKeyDictionary()

    def of(self, group: Group) -> Member:
        """To be called on all ranks at once."""
        if group.process_group not in self._known:
            self._known[group.process_group] = Member(group)
        return self._known[group.process_group]

    def reset(self) -> None:
        self._known.clear()


MEMBERS = Members()


def guarded(function: Callable[..., Any], group: Group) -> Callable[..., Any]:
    """A compiled graph that says which rank failed, in its forward and its backward pass."""
    member = MEMBERS.of(group)

    def run(*args: Any) -> Any:
        with member.step():
            results = function(*args)
        guard_backward(results, member.step)
        return results

    return run
