"""The group of ranks that work on one sequence, as an option names it."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from mst_fx.errors import OptionError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Group:
    """A process group.

    Attributes:
        name: torch's, by which a graph names it.
        ranks: how many.
        me: this process' place among them.
    """

    name: str
    ranks: int
    me: int
    process_group: Any = dataclasses.field(repr=False, compare=False)

    @property
    def is_nccl(self) -> bool:
        """Whether NCCL runs its collectives: on GPUs, in the order in which they are started."""
        return "nccl" in str(_torch().distributed.get_backend(self.process_group))

    @property
    def device(self) -> torch.device:
        """Where its collectives run."""
        torch = _torch()
        return torch.device("cuda", torch.cuda.current_device()) if self.is_nccl else torch.device("cpu")


def group_of(given: Any, option: str = "sequence_parallel") -> Group:
    """The group of a 1-D ``DeviceMesh`` or of a ``ProcessGroup``.

    Args:
        option: of which it is the value.

    Raises:
        OptionError: if it is neither.
    """
    found = given
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        if given.ndim != 1:
            raise OptionError(
                f"mst option {option!r} is a mesh of {given.ndim} dimensions; allowed: one of them, as mesh['sp']"
            )
        found = given.get_group()
    distributed = _torch().distributed
    if not distributed.is_available() or not isinstance(found, distributed.ProcessGroup):
        raise OptionError(
            f"mst option {option!r} is {given!r}; allowed: a 1-D DeviceMesh (mesh['sp']) or a ProcessGroup"
        )
    return Group(found.group_name, found.size(), found.rank(), found)


def _torch() -> Any:
    """torch: options are read before it is imported."""
    return importlib.import_module("torch")
