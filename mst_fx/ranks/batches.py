"""Batches for a group that works on each of them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mst_fx.group import Group, group_of
from mst_fx.torch_api.tensors import tree_map_only


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
        batches = iter(self._loader)
        while True:
            mine = next(batches, None)
            kinds: list[Any] = [None] * self._group.ranks
            torch.distributed.all_gather_object(
                kinds, tree_map_only(Tensor, _Kind, mine), group=self._group.process_group
            )
            if all(kind is None for kind in kinds):
                return
            for rank, kind in enumerate(kinds):
                if kind is not None:
                    yield self._from(rank, mine if rank == self._group.me else kind)

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
