"""Batches for a group that works on each of them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mst_fx.group import Group, group_of
from mst_fx.ranks.agreement import of_ranks
from mst_fx.ranks.faults import MEMBERS
from mst_fx.torch_api.tensors import tree_map_only

# What accelerate asks a loader, to end a window of accumulated gradients with it: of the last batch of all ranks, not of each.
_END = "end_of_dataloader"


def shared_batches(loader: Iterable[Any], mesh: Any) -> SharedBatches:
    """Each rank's batches in turn, given to all ranks of a group: what ``sequence_parallel`` needs.

    A loop over a loader that gives each rank other batches becomes one of as many steps a rank, each on a batch of one of them::

        for batch in mst_fx.shared_batches(loader, mesh["sp"]):
            model(**batch).loss.backward()

    No sample is lost or seen twice. A rank whose loader ends before others' goes on with theirs.

    Args:
        loader: of this rank. Its tensors come back on the device that they were on.
        mesh: as the option ``sequence_parallel``: a 1-D ``DeviceMesh`` or a ``ProcessGroup``.

    Raises:
        OptionError: if it is neither.
    """
    return SharedBatches(loader, group_of(mesh))


class SharedBatches:
    """A loader; what it does not know itself (``dataset``, ``set_epoch``) it asks the one that it was made of."""

    def __init__(self, loader: Iterable[Any], group: Group) -> None:
        self._loader, self._group = loader, group

    def __len__(self) -> int:
        return len(self._loader) * self._group.ranks  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        member, batches = MEMBERS.of(self._group), iter(self._loader)
        while True:
            mine = next(batches, None)
            is_end = getattr(self._loader, _END, False)
            with member.waiting():
                found = of_ranks(self._group, (tree_map_only(Tensor, _Kind, mine), is_end))
            given = {rank: kind for rank, (kind, _) in enumerate(found) if kind is not None}
            if not given:
                return
            for rank, kind in given.items():
                with member.waiting():
                    batch = self._from(rank, mine if rank == self._group.me else kind)
                if is_end:
                    setattr(self._loader, _END, rank == max(given) and all(found[each][1] for each in given))
                yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def _from(self, rank: int, batch: Any) -> Any:
        """A rank's batch on all ranks; on others it has a :class:`_Kind` for each tensor."""
        process_group, device = self._group.process_group, self._group.device
        sender = torch.distributed.get_global_rank(process_group, rank)

        def send(x: Tensor) -> Tensor:
            sent = _as_numbers(x.detach().to(device).contiguous())
            torch.distributed.broadcast(sent, sender, group=process_group)
            return x

        def receive(kind: _Kind) -> Tensor:
            found = torch.empty(kind.shape, dtype=kind.dtype, device=device)
            torch.distributed.broadcast(_as_numbers(found), sender, group=process_group)
            return found.cpu() if kind.is_on_host else found

        if rank == self._group.me:
            return tree_map_only(Tensor, send, batch)
        return tree_map_only(_Kind, receive, batch)


class _Kind:
    """A tensor without its values."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.is_on_host = x.shape, x.dtype, x.device.type == "cpu"


def _as_numbers(x: Tensor) -> Tensor:
    """The same memory, of a type that back ends send."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
