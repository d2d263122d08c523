"""Host memory that a GPU copies to and from: registered once, cut into buffers, used again.

Registering takes 0.15 s a GiB (H200), so it is done when a step is compiled, for the bytes of its plan, and what is freed goes
to the next step. Sizes are exact: torch's own pinned allocator rounds up to a power of two.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mst_fx.process import State
from mst_fx.torch_api.fakes import real_tensors

log = logging.getLogger("mst_fx")

# One registration of 512 GiB and more fails with some drivers.
_MOST_AT_ONCE = 64 * 2**30
# Of the host's memory that is free, what a plan, or an optimizer's states, may take unless said otherwise.
HOST_SHARE = 0.8
# Where buffers begin: a page.
_ALIGNMENT = mmap.PAGESIZE


@dataclasses.dataclass(frozen=True, eq=False)
class _Slab:
    memory: mmap.mmap
    size: int
    is_pinned: bool


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of a slab that is free, or that a buffer has."""

    slab: _Slab
    start: int
    size: int


class _Given(weakref.ref[memoryview]):
    """A piece that a buffer has, for as long as something lives."""

    __slots__ = ("piece",)
    piece: _Piece


class Arena(State):
    """Host memory in buffers. A buffer is free when the storage of its tensor is: retained graphs and dropped ones need nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._slabs: list[_Slab] = []
        self._free: list[_Piece] = []
        self._given: dict[int, _Given] = {}  # by identity
        # Of storages that died, in whatever thread: taken in by the next that asks. What runs when one dies is written in C:
        # in a function of Python's, Ctrl-C would be raised, and go no further.
        self._returned: collections.deque[_Given] = collections.deque()

    @property
    def size(self) -> int:
        """Bytes of host memory that it has of the system."""
        return sum(slab.size for slab in self._slabs)

    @property
    def used(self) -> int:
        """Bytes that buffers have."""
        with self._lock:
            self._take_in()
            return self.size - sum(piece.size for piece in self._free)

    def reserve(self, sizes: Iterable[int], is_pinned: bool) -> None:
        """Sees to it that buffers of these bytes find place together.

        Raises:
            MemoryError: if the system has no such memory to give, or to register.
        """
        with self._lock:
            lacking = sum(map(_rounded, sizes)) - (self.size - self.used)
            while lacking > 0:
                part = min(lacking, _MOST_AT_ONCE)
                self._grow(part, is_pinned)
                lacking -= part

    def buffer(self, like: Tensor, is_pinned: bool) -> Tensor:
        """A tensor of the host, contiguous, of the shape and type of another.

        Raises:
            MemoryError: as :meth:`reserve`.
        """
        size = _rounded(max(like.numel() * like.element_size(), 1))
        with self._lock:
            self._take_in()
            piece = self._cut(size)
            if piece is None:
                self._grow(size, is_pinned)
                piece = self._cut(size)
                assert piece is not None
        view = memoryview(piece.slab.memory)[piece.start : piece.start + size]
        # torch.frombuffer holds the view for as long as the storage lives.
        given = _Given(view, self._returned.append)
        given.piece = piece
        self._given[id(given)] = given
        raw = torch.frombuffer(view, dtype=torch.uint8, count=like.numel() * like.element_size())
        return raw.view(like.dtype).view(like.shape)

    def release(self) -> None:
        """Gives the slabs that no buffer is in back to the system."""
        with self._lock:
            self._take_in()
            empty = {piece.slab for piece in self._free if piece.size == piece.slab.size}
            self._free = [piece for piece in self._free if piece.slab not in empty]
            self._slabs = [slab for slab in self._slabs if slab not in empty]
            for slab in empty:
                if slab.is_pinned:
                    _unregister(slab.memory)

    def reset(self) -> None:
        self.release()

    def _take_in(self) -> None:
        """Joins what was given back with what is free beside it."""
        while self._returned:
            given = self._returned.popleft()
            del self._given[id(given)]
            self._free.append(given.piece)
        order = {slab: index for index, slab in enumerate(self._slabs)}
        joined: list[_Piece] = []
        for piece in sorted(self._free, key=lambda p: (order[p.slab], p.start)):
            last = joined[-1] if joined else None
            if last is not None and last.slab is piece.slab and last.start + last.size == piece.start:
                joined[-1] = _Piece(piece.slab, last.start, last.size + piece.size)
            else:
                joined.append(piece)
        self._free = joined

    def _cut(self, size: int) -> _Piece | None:
        for index, piece in enumerate(self._free):
            if piece.size >= size:
                rest = _Piece(piece.slab, piece.start + size, piece.size - size)
                self._free[index : index + 1] = [rest] if rest.size else []
                return _Piece(piece.slab, piece.start, size)
        return None

    def _grow(self, size: int, is_pinned: bool) -> None:
        try:
            memory = mmap.mmap(-1, size)
        except OSError as error:
            raise MemoryError(f"the system has no {size} bytes of host memory: {error}") from error
        if is_pinned:
            with real_tensors():  # also while a graph is compiled
                _register(memory, size)
        slab = _Slab(memory, size, is_pinned)
        self._slabs.append(slab)
        self._free.append(_Piece(slab, 0, size))


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _register(memory: mmap.mmap, size: int) -> None:
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    raw.fill_(0)  # by several threads, where the driver would touch page by page
    code = int(torch.cuda.cudart().cudaHostRegister(raw.data_ptr(), size, 0))
    if code:
        _forget_error()
        raise MemoryError(f"cudaHostRegister of {size} bytes gave error {code}")


def _unregister(memory: mmap.mmap) -> None:
    code = int(torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(memory, dtype=torch.uint8).data_ptr()))
    if code:
        log.warning("mst-fx: cudaHostUnregister gave error %d", code)
        _forget_error()


def _forget_error() -> None:
    """The next call of CUDA would report what was reported here."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def free_on_host() -> int:
    """Bytes that are free, for each process of this machine: by the system's count and, in a container, by the limit of its
    control group (version 2, or 1)."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            cached = int(stat.get("inactive_file", 0))
            found.append(int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text()) + cached)
        except (OSError, ValueError):  # no such version; "max": no limit
            continue
    return max(0, min(found)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


ARENA = Arena()
