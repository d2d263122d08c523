"""How many bytes a step may take beside what is there already, on the device and in the host's memory."""

from __future__ import annotations

import dataclasses
import os

import torch

from mst_fx.ops.arena import ARENA, HOST_SHARE, free_on_host
from mst_fx.parking.parked import STATES, host_bytes_to_come, parked_bytes
from mst_fx.plan.joint_graph import JointGraph, bytes_of, tensor_of

# Of what is free, for fragments.
_MARGIN = 0.03
# Of any budget: measured peaks are that much above those that :mod:`mst_fx.plan.peak` sees.
_UNSEEN = 0.01


@dataclasses.dataclass(frozen=True)
class Room:
    """The memory of a device, when a step is compiled.

    Attributes:
        device: its name.
        budget: bytes that may be allocated at the peak.
        taken: bytes that are: parameters, inputs, optimizer states, gradients that are accumulated.
        is_gpu: whether it has memory of its own, to which host memory is registered.
    """

    device: str
    budget: int
    taken: int
    is_gpu: bool = False

    @property
    def bytes(self) -> int:
        """For what a step makes, the gradients that come out of it included, and what is not seen left out."""
        return int(self.budget * (1 - _UNSEEN)) - self.taken

    @property
    def most(self) -> int:
        """The same without a margin."""
        return self.budget - self.taken


def room_for(memory: int | None, joint: JointGraph) -> Room:
    """What a step has, of the device that most of its inputs are on.

    Args:
        memory: bytes of the user's budget for all that is allocated at the peak. None: what is free on the device now, less
            the states that an optimizer will make, as far as they are not there and are not going to be parked.
    """
    inputs = [n for n in joint.graph.find_nodes(op="placeholder") if n not in joint.backward]
    sizes: dict[torch.device, int] = {}
    for node in inputs:
        value = tensor_of(node)
        if value is not None:
            sizes[value.device] = sizes.get(value.device, 0) + bytes_of(node)
    device = max(sizes, key=lambda d: sizes[d], default=torch.device("cpu"))
    given = sizes.get(device, 0)
    if device.type != "cuda":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Room("cpu", given + int(free * (1 - _MARGIN)) if memory is None else memory, given)
    taken = torch.cuda.memory_allocated(device)
    name = torch.cuda.get_device_name(device)
    if memory is not None:
        return Room(name, memory, taken, is_gpu=True)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - taken
    trained = max(0, joint.trained_bytes - parked_bytes(device))
    states = max(0, STATES * trained - max(0, taken - given))
    return Room(name, int(taken + free * (1 - _MARGIN)) - states, taken, is_gpu=True)


def host_bytes(memory: int | None, room: Room) -> int:
    """What a plan may keep in the host's memory.

    Args:
        memory: bytes of the user's; None: a share of what is free there, for each process of this machine, less the states that
            parked optimizers will make, and none for a model that is in the host's memory itself.
    """
    if memory is not None:
        return memory
    if not room.is_gpu:
        return 0
    to_come = host_bytes_to_come()
    return max(0, int(HOST_SHARE * free_on_host()) + ARENA.size - ARENA.used - to_come)
