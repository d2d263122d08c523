"""The group of ranks that work on one sequence, and how they agree.

A collective waits until all ranks have called it, so no rank may decide by itself whether there is one. What a rank decides while it
compiles, and which batch it was given in a step, is compared: all ranks raise the same error, or none does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mst_fx.errors import GroupError, OptionError

_PRIME = 1_000_003


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
    def device(self) -> torch.device:
        """Where its collectives run."""
        is_nccl = "nccl" in str(torch.distributed.get_backend(self.process_group))
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def group_of(given: Any) -> Group:
    """The group of a 1-D ``DeviceMesh`` or of a ``ProcessGroup``.

    Raises:
        OptionError: if it is neither.
    """
    found = given
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        if given.ndim != 1:
            raise OptionError(
                f"mst option 'sequence_parallel' is a mesh of {given.ndim} dimensions; allowed: one of them, as mesh['sp']"
            )
        found = given.get_group()
    if not torch.distributed.is_available() or not isinstance(found, torch.distributed.ProcessGroup):
        raise OptionError(
            f"mst option 'sequence_parallel' is {given!r}; allowed: a 1-D DeviceMesh (mesh['sp']) or a ProcessGroup"
        )
    return Group(found.group_name, found.size(), found.rank(), found)


def agree(group: Group, what: str, said: str, checksum: Tensor | None = None) -> None:
    """Compares what the ranks of a group say; all of them have to call it.

    All calls exchange as much, so that one rank that compiles while another one runs is told so, too.

    Args:
        what: this is, in words.
        said: is the same on all ranks.
        checksum: int64, one element: so is this; of the batch.

    Raises:
        GroupError: on all ranks, with what each of them said.
    """
    digest = int.from_bytes(hashlib.sha256(f"{what}: {said}".encode()).digest()[:8], "big", signed=True)
    mine = torch.tensor([digest, 0], device=group.device)
    if checksum is not None:
        mine[1] = checksum
    all_of_them = [torch.empty_like(mine) for _ in range(group.ranks)]
    torch.distributed.all_gather(all_of_them, mine, group=group.process_group)
    found = [tuple(each) for each in torch.stack(all_of_them).tolist()]
    if len(set(found)) == 1:
        return
    texts: list[Any] = [None] * group.ranks
    torch.distributed.all_gather_object(texts, f"{what}: {said}", group=group.process_group)
    same = len(set(texts)) == 1
    lines = [f"  rank {rank}: {_short(text)}" for rank, text in enumerate(texts)]
    if same:
        lines = [
            f"  rank {rank}: {_short(text)}, checksum {of_rank[1]}"
            for rank, (text, of_rank) in enumerate(zip(texts, found, strict=True))
        ]
    raise GroupError(
        "the ranks of a group that works on one sequence need the same batch, model and options, and do not have them "
        "(mst_fx.shared_batches gives each batch to all):\n" + "\n".join(lines)
    )


def _short(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:600]} … ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def checksum_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """A number, int64, that other values, or the same ones in another order, hardly share."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for x in tensors:
        if x.is_floating_point() or x.is_complex():
            flat = torch.view_as_real(x) if x.is_complex() else x
            part = flat.detach().sum(dtype=torch.float64).view(torch.int64)
        else:
            places = torch.arange(1, x.numel() + 1, device=x.device)
            part = (x.detach().reshape(-1).to(torch.int64) * (places * _PRIME + (places >> 7))).sum()
        total = total * _PRIME + part.to(device)
    return total
