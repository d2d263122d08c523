"""What a plan keeps in the host's memory: there in the forward pass, back in the backward pass, beside the computation.

``mst_fx::stash(kept, orders, before, sources) -> hosts`` starts copies to the host, on a stream of their own.
``before`` are the results of the stash before and ``sources`` what that one copies: it waits for these copies, and as its operands the
sources can neither be freed nor written over before. ``mst_fx::settle(before, sources, after) -> token`` ends the chain.

``mst_fx::fetch(hosts, orders, waits, ahead, ahead_orders) -> kept`` is what the hosts are copies of, on the device of the first of
``waits``: gradients and tokens that must be there before. It starts to bring ``ahead``, what the next layer of
the backward pass will fetch; ``mst_fx::start_fetch(waits, ahead, ahead_orders) -> token`` does that alone, where there is nothing to fetch yet.

A copy in host memory is dense: ``orders`` has, one behind the other, the dimensions of each tensor by decreasing stride. There is no
``record_stream``: the compute stream waits for each copy before anything of it is freed.
(The ideas are those of torch's ``ao::offload`` and Megatron's arena; torch's operators take no views and no results of several.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mst_fx.ops.arena import ARENA
from mst_fx.ops.chunks import plain_mode
from mst_fx.process import State
from mst_fx.torch_api.autograd import keep_through_backward

# A pass puts these in: there is no eager call whose strides Inductor could restore.
_TAGS = (torch.Tag.needs_fixed_stride_order,)


class _Coming:
    """A tensor on its way to the device, for one backward pass."""

    def __init__(self, found: Tensor, event: torch.cuda.Event | None) -> None:
        self._found: Tensor | None = found
        self._event = event

    def take(self) -> Tensor:
        """The tensor, once; what runs from here on finds it there."""
        assert self._found is not None
        found, self._found = self._found, None
        if self._event is not None:
            torch.cuda.current_stream(found.device).wait_event(self._event)
        return found

    def __del__(self) -> None:
        if self._found is not None:
            self.take()  # its memory is not used again while the copy writes to it


class _Copies(State):
    """Copies under way, by the address of their host's memory, and the streams that they run on."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        self.leaving: dict[int, torch.cuda.Event] = {}
        self.coming: weakref.WeakValueDictionary[int, _Coming] = weakref.WeakValueDictionary()

    def streams_of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """One to the host, one back."""
        if device not in self.streams:
            self.streams[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        return self.streams[device]

    def reset(self) -> None:
        self.streams.clear()
        self.leaving.clear()
        self.coming.clear()


_COPIES = _Copies()


def streams_of(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies from a device to the host, and back."""
    return _COPIES.streams_of(device)


def dense_order(x: Tensor) -> list[int]:
    """The dimensions of a tensor by decreasing stride: so permuted it is contiguous, if it is dense."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: (-strides[d], d))


def _with_orders(tensors: Sequence[Tensor], orders: Sequence[int]) -> Iterator[tuple[Tensor, list[int]]]:
    place = 0
    for each in tensors:
        yield each, list(orders[place : place + each.ndim])
        place += each.ndim


def _wait_for(hosts: Sequence[Tensor], device: torch.device) -> None:
    for host in hosts:
        event = _COPIES.leaving.pop(host.data_ptr(), None)
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)


@torch.library.custom_op(
    "mst_fx::stash",
    mutates_args=(),
    schema="(Tensor[] kept, int[] orders, Tensor[] before, Tensor[] sources) -> Tensor[]",
    tags=_TAGS,
)
def stash(kept: list[Tensor], orders: list[int], before: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    device = kept[0].device
    with plain_mode():
        dense = [x.permute(order) for x, order in _with_orders(kept, orders)]
        hosts = [ARENA.buffer(x, device.type == "cuda") for x in dense]
        if device.type != "cuda":
            for host, x in zip(hosts, dense, strict=True):
                host.copy_(x)
            return hosts
        _wait_for(before, device)
        out, _ = _COPIES.streams_of(device)
        out.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(out):
            for host, x in zip(hosts, dense, strict=True):
                host.copy_(x, non_blocking=True)
                _COPIES.leaving[host.data_ptr()] = out.record_event()
        return hosts


@stash.register_fake
def _(kept: list[Tensor], orders: list[int], before: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty([x.shape[d] for d in order], dtype=x.dtype, device="cpu")
        for x, order in _with_orders(kept, orders)
    ]


@torch.library.custom_op(
    "mst_fx::settle",
    mutates_args=(),
    schema="(Tensor[] before, Tensor[] sources, Tensor after) -> Tensor",
    tags=_TAGS,
)
def settle(before: list[Tensor], sources: list[Tensor], after: Tensor) -> Tensor:
    _wait_for(before, sources[0].device)
    return _token()


@settle.register_fake
def _(before: list[Tensor], sources: list[Tensor], after: Tensor) -> Tensor:
    return _token()


def _token() -> Tensor:
    """What an operator gives that others wait for."""
    return torch.empty(0, device="cpu")


@torch.library.custom_op(
    "mst_fx::start_fetch",
    mutates_args=(),
    schema="(Tensor[] waits, Tensor[] ahead, int[] ahead_orders) -> Tensor",
    tags=_TAGS,
)
def start_fetch(waits: list[Tensor], ahead: list[Tensor], ahead_orders: list[int]) -> Tensor:
    with plain_mode():
        _start(ahead, ahead_orders, waits[0].device)
    return _token()


@start_fetch.register_fake
def _(waits: list[Tensor], ahead: list[Tensor], ahead_orders: list[int]) -> Tensor:
    return _token()


@torch.library.custom_op(
    "mst_fx::fetch",
    mutates_args=(),
    schema="(Tensor[] hosts, int[] orders, Tensor[] waits, Tensor[] ahead, int[] ahead_orders) -> Tensor[]",
    tags=_TAGS,
)
def fetch(
    hosts: list[Tensor], orders: list[int], waits: list[Tensor], ahead: list[Tensor], ahead_orders: list[int]
) -> list[Tensor]:
    device = waits[0].device
    with plain_mode():
        found = []
        for host, order in _with_orders(hosts, orders):
            coming = _COPIES.coming.pop(host.data_ptr(), None)
            found.append(coming if coming is not None else _bring(host, order, device))
        _start(ahead, ahead_orders, device)
        return [each.take() for each in found]


@fetch.register_fake
def _(
    hosts: list[Tensor], orders: list[int], waits: list[Tensor], ahead: list[Tensor], ahead_orders: list[int]
) -> list[Tensor]:
    return [_empty(host, order, waits[0].device) for host, order in _with_orders(hosts, orders)]


def _empty(host: Tensor, order: Sequence[int], device: torch.device) -> Tensor:
    """A tensor of the device with the memory order of what ``host`` is a copy of."""
    shape, strides = [0] * host.ndim, [0] * host.ndim
    for d, size, stride in zip(order, host.shape, host.stride(), strict=True):
        shape[d], strides[d] = size, stride
    return torch.empty_strided(shape, strides, dtype=host.dtype, device=device)


def _start(hosts: Sequence[Tensor], orders: Sequence[int], device: torch.device) -> None:
    for host, order in _with_orders(hosts, orders):
        if host.data_ptr() not in _COPIES.coming:
            coming = _bring(host, order, device)
            keep_through_backward(coming)
            _COPIES.coming[host.data_ptr()] = coming


def _bring(host: Tensor, order: list[int], device: torch.device) -> _Coming:
    new = _empty(host, order, device)  # of the compute stream, which is where it will be freed
    if device.type != "cuda":
        new.permute(order).copy_(host)
        return _Coming(new, None)
    _, back = _COPIES.streams_of(device)
    back.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(back):
        new.permute(order).copy_(host, non_blocking=True)
        return _Coming(new, back.record_event())
