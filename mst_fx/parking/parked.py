"""``park(optimizer)``: its states are in the host's memory but for a few buckets of them while it steps.

A pre-hook of the step hands it a stand-in for the optimizer, which shares all that it has, but whose ``param_groups`` give, one after
the other, parts of each group: the optimizer's own loop over its groups goes from bucket to bucket, in one call of its own code.

    for group in self.param_groups:            fetch bucket 2 · bucket 1 is on the device
        update the parameters of the group         the optimizer, foreach or fused as ever
                                               send bucket 1 home · fetch bucket 3 · bucket 2 is on the device …

Only optimizers of torch.optim are known to update each parameter for itself. Any other has all of its states on the device while
it steps, and so has a group whose parameters are not alike, for which torch would choose other kernels if it saw a part.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mst_fx.errors import OptionError
from mst_fx.ops.arena import HOST_SHARE, free_on_host
from mst_fx.options import bytes_in
from mst_fx.parking.homes import ARENA, Coming, Homes, address_of, bytes_of, can_be_parked, is_plain
from mst_fx.process import State
from mst_fx.switch import is_off
from mst_fx.torch_api.dynamo import runs_under_dynamo
from mst_fx.torch_api.shards import is_shard, local_of

log = logging.getLogger("mst_fx")

# Bytes of states for a byte of what is trained, until they are there: the two moments of Adam.
STATES = 2

# What steps by one loop over its groups, in which each parameter is updated from its own gradient and states.
_EACH_FOR_ITSELF = (
    torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax, torch.optim.ASGD, torch.optim.Muon, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip


class Parking:
    """An optimizer whose states are parked; also a context, at the end of which they are not.

    The optimizer keeps it alive, so that it may be dropped.
    """

    def __init__(self, optimizer: Optimizer, allowed: int, bucket: int) -> None:
        self._homes = Homes(allowed)
        self._bucket = bucket
        self._optimizer = weakref.ref(optimizer)
        self._is_each_for_itself = _is_known(optimizer)
        self._running: weakref.ref[Any] | None = None
        self._loaded: list[tuple[Tensor, Any, Tensor]] = []
        self._hooks: list[Any] = []
        if is_off():
            return
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: self._homes.settle()),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]
        weakref.finalize(optimizer, self._homes.forget).atexit = False
        _PARKINGS.all.add(self)

    @property
    def bytes(self) -> int:
        """Of the states that are on the host between steps."""
        return self._homes.bytes

    def remove(self) -> None:
        """All states are on the device again, and stay there.

        Raises:
            torch.OutOfMemoryError: of the device; what is not there is still parked.
        """
        optimizer = self._optimizer()
        if optimizer is not None and self in _PARKINGS.all:
            self._recover()
            for group in optimizer.param_groups:
                for part in self._parts(optimizer, group):
                    coming = self._homes.fetch(optimizer.state, part)
                    coming.arrive()
                    coming.copies.finish()
        _PARKINGS.all.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._homes.forget()
        ARENA.release()

    def __enter__(self) -> Parking:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def trained_bytes(self, device: torch.device) -> int:
        """Bytes of the device's parameters whose states are, or will be, on the host."""
        return sum(
            bytes_of(p) for p in self._trained() if local_of(p).device == device and self._finds_place(p)
        )

    def host_bytes_to_come(self) -> int:
        """Bytes of the host for states that are not there yet."""
        states = self._of().state
        return sum(
            STATES * bytes_of(p) for p in self._trained() if self._finds_place(p) and not states.get(p)
        )

    def park(self) -> None:
        """Sends home what there is."""
        optimizer = self._of()
        for group in optimizer.param_groups:
            for part in self._parts(optimizer, group):
                if self._is_each_for_itself:
                    self._adopt(optimizer, part)
                self._homes.send(optimizer.state, part)
                self._homes.settle(besides=1)
        self._homes.settle()

    def _of(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def _trained(self) -> Iterator[Tensor]:
        return (p for group in self._of().param_groups for p in group["params"] if p.requires_grad)

    def _finds_place(self, parameter: Tensor) -> bool:
        return not self._homes.is_full or self._homes.has(parameter)

    def _adopt(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """Takes in what a copy, or a pickled one, of a parked optimizer has on the host."""
        for parameter in parameters:
            entry: dict[Any, Any] = optimizer.state.get(parameter, {})
            for key, value in list(entry.items()) if parameter.device.type == "cuda" else ():
                if can_be_parked(value) and is_plain(value) and value.device.type == "cpu":
                    self._homes.take_in(entry, parameter, key, value, value.dtype)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if torch.compiler.is_compiling() or runs_under_dynamo():
            raise RuntimeError(
                "mst_fx.park: an optimizer whose states are parked has to step outside of what torch.compile compiles"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "mst_fx.park: an optimizer whose states are parked cannot step in a CUDA graph that is captured"
            )
        self._recover()
        if self._is_each_for_itself:
            return (_StandIn(self, optimizer), *args[1:]), kwargs
        for group in optimizer.param_groups:
            self._homes.fetch(optimizer.state, group["params"]).arrive()
        return None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_each_for_itself:
            self.park()

    def _recover(self) -> None:
        """Ends what is left of a step that raised."""
        left = self._running() if self._running is not None else None
        if left is not None:
            left.close()
        self._homes.settle()

    def in_buckets(self, optimizer: Optimizer) -> Iterator[dict[str, Any]]:
        """The groups of an optimizer in parts, whose states are on the device for as long as nobody asks for the next part."""
        found = self._in_buckets(optimizer)
        self._running = weakref.ref(found)
        return found

    def _in_buckets(self, optimizer: Optimizer) -> Iterator[dict[str, Any]]:
        homes, states = self._homes, optimizer.state
        parts = [(group, part) for group in optimizer.param_groups for part in self._parts(optimizer, group)]
        coming: Coming | None = None
        inside: list[Tensor] = []
        try:
            for index, (group, part) in enumerate(parts):
                coming = coming or self._fetched(states, part)
                inside = part
                coming.arrive()
                homes.settle(besides=1)
                coming = self._ahead(states, parts[index + 1][1]) if index + 1 < len(parts) else None
                yield {**group, "params": part}
                homes.send(states, part)
                inside = []
        finally:
            if coming is not None:
                coming.copies.finish()
            homes.send(states, inside)
            homes.settle()

    def _fetched(self, states: Any, parameters: list[Tensor]) -> Coming:
        try:
            return self._homes.fetch(states, _stepped(parameters))
        except torch.OutOfMemoryError:
            self._homes.settle()
            return self._homes.fetch(states, _stepped(parameters))

    def _ahead(self, states: Any, parameters: list[Tensor]) -> Coming | None:
        try:
            return self._homes.fetch(states, _stepped(parameters))
        except torch.OutOfMemoryError:  # there is place for it when what is before it has gone
            return None

    def _parts(self, optimizer: Optimizer, group: dict[str, Any]) -> list[list[Tensor]]:
        """The parameters of a group in buckets, in their order."""
        parameters: list[Tensor] = group["params"]
        if self._is_each_for_itself and _are_alike(optimizer, parameters):
            return cut_in_buckets(
                parameters, [self._bytes_for(optimizer, p) for p in parameters], self._bucket
            )
        return [parameters]

    def _bytes_for(self, optimizer: Optimizer, parameter: Tensor) -> int:
        """Of states on the device when a parameter is updated; of DTensors as if they were whole, for the same buckets everywhere."""
        if is_shard(parameter):
            return STATES * parameter.nbytes
        if not optimizer.state.get(parameter):
            return STATES * parameter.nbytes if parameter.grad is not None else 0
        return self._homes.bytes_of(optimizer.state, parameter)

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes large tensors out, of which torch would put all on the device: an element of each shows what it makes of them."""
        self._recover()
        self._loaded = []
        owners = self._homes.owners()
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        of = dict(zip(saved, (p for group in optimizer.param_groups for p in group["params"]), strict=False))

        def sample(parameter: Tensor, key: Any, value: Any) -> Any:
            if not can_be_parked(value):
                return value
            owner = owners.get(address_of(value))
            if owner is not None and (owner[0] is not parameter or owner[1] != key):
                value = value.clone()  # is written over before it is read
            if is_shard(value):
                return value
            self._loaded.append((parameter, key, value))
            return value.detach().as_strided((1,), (1,))

        entries = {
            number: {key: sample(of[number], key, value) for key, value in entry.items()}
            if number in of and isinstance(entry, dict)
            else entry
            for number, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": entries}

    def _after_loading(self, optimizer: Optimizer) -> None:
        loaded, self._loaded = self._loaded, []
        for parameter, key, value in loaded:
            entry = optimizer.state.get(parameter, {})
            made = entry.get(key)
            # Else a hook behind ours has put another there.
            if isinstance(made, Tensor) and made.numel() == 1:
                self._homes.take_in(entry, parameter, key, value, made.dtype)
        self.park()


class _StandIn:
    """An optimizer in its step, but for its groups: whoever goes through them gets them in buckets."""

    _parking: Parking
    _optimizer: Optimizer

    def __init__(self, parking: Parking, optimizer: Optimizer) -> None:
        vars(self).update(_parking=parking, _optimizer=optimizer)

    @property
    def param_groups(self) -> Iterator[dict[str, Any]]:
        return self._parking.in_buckets(self._optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._optimizer, name, value)


class _Parkings(State):
    """All that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.all: weakref.WeakSet[Parking] = weakref.WeakSet()

    def alive(self) -> list[Parking]:
        return [each for each in self.all if each._optimizer() is not None]

    def reset(self) -> None:
        for each in list(self.all):
            each.remove()


_PARKINGS = _Parkings()


def park(optimizer: Optimizer, host_memory: str | int = "auto", bucket: str | int = "256MiB") -> Parking:
    """Keeps the states of an optimizer in pinned memory of the host; its steps bring them to the device, bucket by bucket.

    To be called once, whenever: states that are not there yet are parked as the first step makes them. Parameters become what they
    would without, to the bit. A state dict has tensors of the host; one that is loaded is parked. Whatever finds no
    place on the host stays on the device, and a warning says how much is lacking. Under ``MST_FX=0`` nothing is parked.

    Args:
        optimizer: of torch.optim, or derived from its Optimizer; or a wrapper with such a one as ``optimizer``, as accelerate's.
        host_memory: bytes of the host that its states may take, as in "30GiB"; "auto": four fifths of what is free now.
        bucket: bytes of states that are brought together; up to three buckets are on the device while an optimizer of
            torch.optim steps. One parameter's states are never divided. Others have all of theirs there.

    Returns:
        What undoes it: ``remove()``, or the end of a ``with``.

    Raises:
        OptionError: if bytes are not understood.
        ValueError: if the optimizer cannot be parked; the message says why.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    allowed = int(HOST_SHARE * free_on_host()) if host_memory == "auto" else bytes_in(host_memory)
    size = bytes_in(bucket)
    if allowed is None or size is None:
        name, value = ("host_memory", host_memory) if allowed is None else ("bucket", bucket)
        raise OptionError(f"mst_fx.park: {name} is {value!r}; allowed: bytes as in '30GiB', or an int ≥ 1")
    _check(optimizer)
    ARENA.release()
    parking = Parking(optimizer, allowed, size)
    if is_off():
        return parking
    if not _is_known(optimizer):
        log.info(
            "mst-fx: park: %s is none of torch.optim: all of its states are on the device while it steps",
            type(optimizer).__name__,
        )
    parking.park()
    return parking


def parked_bytes(device: torch.device) -> int:
    """Bytes of the parameters of a device whose optimizer's states are on the host in forward and backward pass, now or from its
    first step on."""
    return sum(each.trained_bytes(device) for each in _PARKINGS.alive())


def host_bytes_to_come() -> int:
    """Bytes of the host that parked optimizers are going to take. What nobody has any more is given back."""
    ARENA.release()
    return sum(each.host_bytes_to_come() for each in _PARKINGS.alive())


def _check(optimizer: Any) -> None:
    """
    Raises:
        ValueError: if its states cannot be parked.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"mst_fx.park takes a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if any(each._optimizer() is optimizer for each in _PARKINGS.all):
        raise ValueError(
            "mst_fx.park: the optimizer is parked already; remove() of what park() gave comes first"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "mst_fx.park: LBFGS runs forward and backward passes in its step, with all of its states"
        )
    for group in optimizer.param_groups:
        for flag in ("capturable", "differentiable"):
            if group.get(flag):
                raise ValueError(
                    f"mst_fx.park: a step with {flag}=True cannot have its states moved; allowed: {flag}=False"
                )
        for parameter in group["params"]:
            if local_of(parameter).device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"mst_fx.park: a parameter is on {parameter.device}; allowed: CUDA devices, or the CPU"
                )
            if parameter.requires_grad and not is_plain(local_of(parameter)):
                raise ValueError(
                    f"mst_fx.park: a parameter is a {type(parameter).__name__}, whose states are such too; allowed: plain tensors "
                    "and DTensors of these"
                )


def _is_known(optimizer: Optimizer) -> bool:
    """Whether its step is one of torch.optim's."""
    return inspect.unwrap(type(optimizer).step) in {inspect.unwrap(each.step) for each in _EACH_FOR_ITSELF}


def _are_alike(optimizer: Optimizer, parameters: list[Tensor]) -> bool:
    """Whether torch chooses for each of these parameters the kernels that it chooses for all of them.

    By tests of all that it steps: whether ``foreach`` can have them, and its fast kernels; for SGD, whether momentum is there.
    """
    looks = set()
    for parameter in _stepped(parameters):
        gradient, entry = parameter.grad, optimizer.state.get(parameter) or {}
        assert gradient is not None
        beside = [
            x for x in (gradient, *entry.values()) if isinstance(x, Tensor) and x.shape == parameter.shape
        ]
        is_even = gradient.layout == torch.strided and all(
            x.stride() == parameter.stride() and x.dtype == parameter.dtype for x in beside
        )
        # Its epsilon is that of the first parameter's type.
        dtype = parameter.dtype if isinstance(optimizer, torch.optim.Adafactor) else parameter.is_complex()
        looks.add((parameter.device.type, is_plain(parameter), gradient.layout, is_even, bool(entry), dtype))
    return len(looks) <= 1


def _stepped(parameters: list[Tensor]) -> list[Tensor]:
    """Those that a step looks at."""
    return [p for p in parameters if p.grad is not None]


def cut_in_buckets(parameters: list[Tensor], sizes: list[int], most: int) -> list[list[Tensor]]:
    """Runs of parameters whose sizes are at most ``most`` together, or of one."""
    parts: list[list[Tensor]] = [[]]
    total = 0
    for parameter, size in zip(parameters, sizes, strict=True):
        if parts[-1] and total + size > most:
            parts.append([])
            total = 0
        parts[-1].append(parameter)
        total += size
    return parts
