"""How the ranks of a group agree: all of them raise the same error, or none does.

A collective waits until all ranks have called it, so no rank may decide by itself whether there is one. What a rank was given and
decides while it compiles, and which batch it has in a step, is compared.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mst_fx.errors import GroupError
from mst_fx.group import Group
from mst_fx.torch_api.fakes import real_tensors

T = TypeVar("T")

_PRIME = 1_000_003
_HINT = (
    "the ranks of a group that works on one sequence need the same batches, model and options, and do not have them "
    "(mst_fx.shared_batches gives each batch to all of them)"
)


def agree(group: Group, said: str, checksum: Tensor | None = None) -> None:
    """Compares what the ranks of a group say; all of them have to call it.

    Every call exchanges as much, so that a rank that compiles while another one runs is told so, too.

    Args:
        said: in words; the same on all ranks.
        checksum: int64, one element, of the batch: so is this.

    Raises:
        GroupError: on all ranks, with what each of them said.
    """
    ask(group, said, checksum)()


def ask(group: Group, said: str, checksum: Tensor | None = None) -> Callable[[], None]:
    """:func:`agree` in two parts: on a GPU the numbers of the others come while the host goes on.

    Returns:
        raises the GroupError; the host waits there.
    """
    digest = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big", signed=True)
    with real_tensors():
        mine = torch.full((2,), digest, device=group.device)
        mine[1] = 0 if checksum is None else checksum
        found = mine.new_empty(2 * group.ranks)
        torch.distributed.all_gather_into_tensor(found, mine, group=group.process_group)
        arrived = None
        if found.is_cuda:
            found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
            arrived = torch.cuda.current_stream().record_event()

    def check() -> None:
        if arrived is not None:
            arrived.synchronize()
        _compare(group, said, found.view(-1, 2).tolist())

    return check


def _compare(group: Group, said: str, found: list[list[int]]) -> None:
    """
    Args:
        found: of each rank the digest of what it said, and its checksum.

    Raises:
        GroupError: if they differ.
    """
    if all(each == found[0] for each in found):
        return
    texts = texts_of(group, said)
    if len(set(texts)) == 1:
        texts = [
            f"{text}, with the checksum {of_rank[1]}" for text, of_rank in zip(texts, found, strict=True)
        ]
    raise GroupError(f"{_HINT}:\n{_lines(texts)}")


def texts_of(group: Group, text: str) -> list[str]:
    """What each rank says; all of them have to call it."""
    return of_ranks(group, text)


def of_ranks(group: Group, mine: T) -> list[T]:
    """What each rank has, in order; all of them have to call it.

    Args:
        mine: can be pickled.
    """
    found: list[Any] = [None] * group.ranks
    with real_tensors():
        torch.distributed.all_gather_object(found, mine, group=group.process_group)
    return found


def decided(group: Group, function: Callable[[], T]) -> T:
    """What a function gives on the first rank, on all of them; the others do not run it.

    Args:
        function: its result, and what it raises, can be pickled.

    Raises:
        Exception: on all ranks, what it raised.
    """
    found: list[Any] = [None, None]
    if group.me == 0:
        try:
            found[0] = function()
        except Exception as error:
            found[1] = error
    with real_tensors():
        torch.distributed.broadcast_object_list(found, group=group.process_group, group_src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]  # type: ignore[no-any-return]


def tried(group: Group, function: Callable[[], T], said: Callable[[T], str]) -> tuple[T, list[str]]:
    """What a function gives, and what all ranks say of what it gave them.

    Raises:
        GroupError: on all ranks, if it failed on one.
    """
    failure: Exception | None = None
    try:
        found = function()
        text = said(found)
    except Exception as error:
        failure, text = error, f"{type(error).__name__}: {error}"
    texts = texts_of(group, ("failed " if failure is not None else "") + text)
    if failure is not None and len(set(texts)) == 1:
        raise failure
    if any(text.startswith("failed ") for text in texts):
        raise GroupError(f"a rank of the group could not compile:\n{_lines(texts)}") from failure
    return found, texts


def _lines(texts: Sequence[str]) -> str:
    """What each rank says, around where they differ first."""
    differ = (at for at, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    start = max(0, next(differ, 0) - 150)
    shown = [("… " if start else "") + " ".join(text[start : start + 300].split()) for text in texts]
    return "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(shown))


def checksum_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """A number, int64, that other values, or the same ones in another order, hardly share."""
    total: Tensor | None = None
    for x in tensors:
        if x.is_floating_point() or x.is_complex():
            flat = torch.view_as_real(x) if x.is_complex() else x
            part = flat.detach().sum(dtype=torch.float64).view(torch.int64)
        else:
            part = (x.detach().reshape(-1).to(torch.int64) * _weights(x.numel(), x.device)).sum()
        part = part.to(device)
        total = part if total is None else total * _PRIME + part
    return torch.zeros((), dtype=torch.int64, device=device) if total is None else total


@functools.lru_cache(maxsize=2)
def _weights(count: int, device: torch.device) -> Tensor:
    """One for each place. Kept: while the GPU has nothing to do but wait for a step to start, each call counts."""
    places = torch.arange(1, count + 1, device=device)
    return places * _PRIME + (places >> 7)
