"""Where states of parameters are between steps, and the copies there and back.

A state is a tensor in ``optimizer.state[parameter]``. Its home is a tensor of the host of its shape, strides and dtype, in
registered memory; it is parked while the optimizer's entry *is* its home. At any time an entry is valid: its home, or a tensor
of the device. (One that is on its way home is waited for before a step ends.)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mst_fx.ops.arena import Arena, free_on_host
from mst_fx.ops.offload import dense_order, streams_of
from mst_fx.report import human_bytes
from mst_fx.torch_api.shards import are_cut_alike, around, local_of

log = logging.getLogger("mst_fx")

States = Mapping[Tensor, Any]

# Not the arena of plans: what stays for a whole run would take the memory that a plan has reserved for its steps.
ARENA = Arena()

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclasses.dataclass(frozen=True)
class _State:
    """A tensor of an optimizer's: ``entry[key]``, where ``entry`` is ``optimizer.state[parameter]``."""

    parameter: Tensor
    entry: dict[Any, Any]
    key: Any

    @property
    def value(self) -> Tensor:
        return self.entry[self.key]


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Copies that were started; what they read and write is kept."""

    tensors: list[Tensor]
    events: dict[torch.device, torch.cuda.Event]

    def finish(self) -> None:
        """Waits for them, on the host."""
        for event in self.events.values():
            event.synchronize()


@dataclasses.dataclass(frozen=True)
class Coming:
    """States on their way to the device, whose entries are their homes still."""

    states: list[_State]
    values: list[Tensor]
    copies: _Copies

    def arrive(self) -> None:
        """The entries are on the device for what runs from here on."""
        for device, event in self.copies.events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for state, value in zip(self.states, self.values, strict=True):
            state.entry[state.key] = value


class Homes:
    """The homes of the states of one optimizer.

    Args:
        allowed: bytes of the host that they may have.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._homes: dict[Tensor, dict[Any, Tensor]] = {}
        self._leaving: list[_Copies] = []
        self.is_full = False

    @property
    def bytes(self) -> int:
        """That they have."""
        return sum(bytes_of(home) for homes in self._homes.values() for home in homes.values())

    def has(self, parameter: Tensor) -> bool:
        return bool(self._homes.get(parameter))

    def bytes_of(self, states: States, parameter: Tensor) -> int:
        """Of the states of a parameter that are parked."""
        return sum(bytes_of(state.value) for state in self._parked(states, [parameter]))

    @torch.no_grad()
    def fetch(self, states: States, parameters: Iterable[Tensor]) -> Coming:
        """Starts to bring what is parked of these parameters.

        Raises:
            torch.OutOfMemoryError: of the device; nothing was started.
        """
        found = list(self._parked(states, parameters))
        homes = [local_of(state.value) for state in found]
        new = [
            torch.empty_strided(
                home.shape, home.stride(), dtype=home.dtype, device=local_of(state.parameter).device
            )
            for state, home in zip(found, homes, strict=True)
        ]
        values = [around(local, state.value) for state, local in zip(found, new, strict=True)]
        return Coming(found, values, _started(new, homes, to_host=False))

    @torch.no_grad()
    def send(self, states: States, parameters: Iterable[Tensor]) -> None:
        """Starts to bring home what is on the device of these parameters; what has no home gets one, as long as there is place."""
        found = self._on_device(states, parameters)
        homes = self._homes_for([(state, state.value) for state in found])
        sent = [(state, home) for state, home in zip(found, homes, strict=True) if home is not None]
        if sent:
            values = [local_of(state.value) for state, _ in sent]
            self._leaving.append(_started([local_of(home) for _, home in sent], values, to_host=True))
            for state, home in sent:
                self._homes.setdefault(state.parameter, {})[state.key] = home
                state.entry[state.key] = home

    @torch.no_grad()
    def take_in(
        self, entry: dict[Any, Any], parameter: Tensor, key: Any, value: Tensor, dtype: torch.dtype
    ) -> None:
        """Parks a value from wherever it is; on the device of the parameter if there is no place."""
        state = _State(parameter, entry, key)
        like = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")
        (home,) = self._homes_for([(state, like)])
        if home is None:
            entry[key] = value.to(parameter.device, dtype)
            return
        home.copy_(value)
        self._homes.setdefault(parameter, {})[key] = home
        entry[key] = home

    def owners(self) -> dict[int, tuple[Tensor, Any]]:
        """Whose home is at an address: parameter and key."""
        return {
            address_of(home): (parameter, key)
            for parameter, homes in self._homes.items()
            for key, home in homes.items()
        }

    def settle(self, besides: int = 0) -> None:
        """Waits until what was sent is there, but for the last ``besides`` sendings; its memory on the device is free then."""
        while len(self._leaving) > besides:
            self._leaving[0].finish()
            del self._leaving[0]

    def forget(self) -> None:
        """All homes; nothing may be parked."""
        self._homes.clear()

    def _parked(self, states: States, parameters: Iterable[Tensor]) -> Iterator[_State]:
        for parameter in parameters:
            entry = states.get(parameter)
            for key, home in self._homes.get(parameter, {}).items():
                if entry and entry.get(key) is home:
                    yield _State(parameter, entry, key)

    def _on_device(self, states: States, parameters: Iterable[Tensor]) -> list[_State]:
        """What could be parked, and is not."""
        found: dict[int, list[_State]] = {}
        for parameter in parameters:
            entry = states.get(parameter)
            if not isinstance(entry, dict):
                continue
            homes = self._homes.get(parameter, {})
            for key, value in entry.items():
                if not can_be_parked(value) or homes.get(key) is value:
                    continue
                if local_of(value).device != local_of(parameter).device:
                    continue
                where = address_of(value)
                if not _is_at(where, parameter) and not _is_at(where, parameter.grad):
                    found.setdefault(where, []).append(_State(parameter, entry, key))
        # Two that share their memory would not share it afterwards.
        return [those[0] for those in found.values() if len(those) == 1]

    def _homes_for(self, wanted: list[tuple[_State, Tensor]]) -> list[Tensor | None]:
        """A home for each: the one that there is, a new one, or none if it is said that the host is full."""
        found = [
            _fitting(self._homes.get(state.parameter, {}).get(state.key), like) for state, like in wanted
        ]
        new = [index for index, home in enumerate(found) if home is None]
        if not new or self.is_full:
            return found
        likes = [local_of(wanted[index][1]) for index in new]
        is_pinned = [local_of(wanted[index][0].parameter).device.type == "cuda" for index in new]
        try:
            self._make_place(sum(like.nbytes for like in likes))
            for pinned in set(is_pinned):
                ARENA.reserve(
                    [x.nbytes for x, p in zip(likes, is_pinned, strict=True) if p == pinned], pinned
                )
            for index, like, pinned in zip(new, likes, is_pinned, strict=True):
                local = ARENA.buffer(like, pinned).as_strided(like.shape, like.stride())
                found[index] = around(local, wanted[index][1])
        except MemoryError as error:
            self.is_full = True
            log.warning(
                "mst-fx: states of an optimizer stay on the device, beyond %s that are parked: %s",
                human_bytes(self.bytes),
                error,
            )
        return found

    def _make_place(self, size: int) -> None:
        """
        Raises:
            MemoryError: if there is none.
        """
        allowed, free = self._allowed - self.bytes, free_on_host() + ARENA.size - ARENA.used
        if size > min(allowed, free):
            lacking = human_bytes(size - max(0, min(allowed, free)))
            raise MemoryError(
                f"the next states need {human_bytes(size)} of the host's memory, {lacking} more than "
                + ("host_memory allows" if allowed < free else "is free")
            )


def _fitting(home: Tensor | None, like: Tensor) -> Tensor | None:
    """The home, if it fits."""
    if home is None or home.shape != like.shape or home.dtype != like.dtype or not are_cut_alike(home, like):
        return None
    return home if local_of(home).stride() == local_of(like).stride() else None


def _started(targets: list[Tensor], sources: list[Tensor], to_host: bool) -> _Copies:
    """Copies between host and device, in one stream for each device and direction, behind what its current stream has."""
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        by_device.setdefault((source if to_host else target).device, []).append((target, source))
    events = {}
    for device, pairs in by_device.items():
        if device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            continue
        stream = streams_of(device)[0 if to_host else 1]
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                events[device] = stream.record_event()
        except BaseException:
            stream.synchronize()  # before anything of it is freed
            raise
    return _Copies(sources if to_host else targets, events)


def _is_at(where: int, x: Tensor | None) -> bool:
    return x is not None and is_plain(local_of(x)) and x.layout == torch.strided and address_of(x) == where


def address_of(x: Tensor) -> int:
    """Where its storage is, or that of what this process has of it."""
    return local_of(x).untyped_storage().data_ptr()


def bytes_of(x: Tensor) -> int:
    """Of what this process has of it."""
    return local_of(x).nbytes


def is_plain(value: Any) -> bool:
    """Whether it is a tensor of no other class."""
    return type(value) in _PLAIN


def can_be_parked(value: Any) -> bool:
    """Whether it is a tensor, or DTensor, of several elements here that has a storage for itself, without holes."""
    if not isinstance(value, Tensor):
        return False
    local = local_of(value)
    return (
        is_plain(local)
        and local.layout == torch.strided
        and local.numel() > 1
        and local.storage_offset() == 0
        and local.untyped_storage().nbytes() == local.nbytes
        and local.permute(dense_order(local)).is_contiguous()
        and not local.is_conj()
        and not local.is_neg()
    )
