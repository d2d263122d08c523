"""What the process remembers from one compilation to the next, beside compiled graphs.

Each piece of it is an object of one of these classes, at the top of the module that uses it. No other name of a module
is written to once the module is imported.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import torch


class _HasKey(Protocol):
    @property
    def key(self) -> str: ...


T = TypeVar("T", bound=_HasKey)


class State(abc.ABC):
    """A piece of what the process remembers; :func:`reset` resets all that there are."""

    def __init__(self) -> None:
        _STATES.add(self)

    @abc.abstractmethod
    def reset(self) -> None:
        """Back to what it was when mst-fx was imported."""


_STATES: weakref.WeakSet[State] = weakref.WeakSet()


def reset() -> None:
    """Forgets what was said, who listens and what was enabled, as a new process would.

    Bodies and formulas (:class:`Named`) are their graphs', which ``torch.compiler.reset()`` forgets.
    """
    for state in list(_STATES):
        state.reset()


class Said(State):
    """What is said once a process."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def is_new(self, what: str) -> bool:
        """Whether it was not said yet; now it is."""
        with self._lock:
            before = len(self._said)
            self._said.add(what)
            return len(self._said) > before

    def reset(self) -> None:
        self._said.clear()


class Named(Generic[T]):
    """What nodes of a graph name by key, as long as somebody keeps it alive: whoever can run the graph."""

    def __init__(self) -> None:
        self._named: weakref.WeakValueDictionary[str, T] = weakref.WeakValueDictionary()

    def the_one(self, it: T) -> T:
        """The one of that key that the process knows, or from now on this one."""
        return self._named.setdefault(it.key, it)

    def __getitem__(self, key: str) -> T:
        """
        Raises:
            KeyError: if nobody keeps one of that key.
        """
        return self._named[key]

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._named.values()))

    def reset(self) -> None:
        """Forgets the names, also those of graphs that are alive, which cannot run any more."""
        self._named.clear()


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Inside of the block the collector of cycles looks through what is made there alone, and not again and again through all that is there
    already: graphs on trial, which are cycles of some ten thousand objects, make it run, and a process that compiles has millions.

    What is garbage already is freed first: a plan would take a dead model's memory for taken. Where somebody has frozen objects himself
    (``gc.freeze``) they stay so, and nothing changes.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside of the block torch's operators on the CPU run on the thread that calls them: they are many and small, and where each rank
    of a machine wakes as many threads as there are cores for each, they wait for one another (twice the seconds of the passes, measured
    with two ranks and 65,536 tokens).

    A thread that calls torch for the first time while the block lasts stays with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
