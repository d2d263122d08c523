"""What deferred logits are computed from, how, and whether it is still what it was."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mst_fx.listeners import on_logits
from mst_fx.logits.apart import Apart, overlap
from mst_fx.logits.snapshot import is_freed, snapshot, version
from mst_fx.process import Said
from mst_fx.torch_api.tensors import storage_id

if TYPE_CHECKING:
    from mst_fx.logits.tensor import DeferredLogits

log = logging.getLogger("mst_fx")

_TOLD = Said()
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
ADVICE = "use them before, or set the mst option logits='keep'"


class Hooks(OrderedDict[int, Callable[[Tensor], Tensor | None]]):
    """Hooks on a gradient, by the numbers of their handles; itself one, which runs them all."""

    def __call__(self, grad: Tensor) -> Tensor:
        for hook in list(self.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad


class _Announced(Hooks):
    """Hooks that are told that a backward pass begins, by whatever gradient comes first."""

    def __call__(self, grad: Tensor) -> None:  # type: ignore[override]
        for hook in list(self.values()):
            changed = hook(grad)
            if changed is not None and changed is not grad:
                raise RuntimeError(
                    f"{hook} changes the gradient of deferred logits, of which it sees a part; "
                    "set the mst option logits='keep'"
                )


@dataclasses.dataclass(frozen=True)
class RowsOfRank:
    """This rank's rows of logits: ``batch`` sequences along ``dim``, of which each rank of a group has so many tokens."""

    dim: int
    batch: int
    rows_of: tuple[int, ...]
    me: int
    group: str


class Source:
    """What deferred logits, their slices and their casts are computed from.

    Args:
        compute: the function of ``inputs`` whose value are the logits ``[B, S, V]``.
        inputs: tensors, and numbers.
        holds_rows: for each input whether its leading dimensions are those of the logits, each row of which
            depends on the same row of these inputs only; None where this is not proved.
        like: a meta tensor like the logits.
        device: of the logits.
        is_exposed: for each input whether somebody else has it, and may write to it without a trace; None: all.
        of_rank: which rows the inputs have, where that is not all; then nobody can use the logits as they are.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        inputs: Sequence[Any],
        holds_rows: Sequence[bool] | None,
        like: Tensor,
        device: torch.device,
        is_exposed: Sequence[bool] | None = None,
        of_rank: RowsOfRank | None = None,
    ) -> None:
        self.of_rank = of_rank
        self.inputs, self.holds_rows, self.like, self.device = tuple(inputs), holds_rows, like, device
        self.members: weakref.WeakValueDictionary[int, DeferredLogits] = weakref.WeakValueDictionary()
        self.is_whole = False  # rows may not be computed alone: there are hooks on the logits' gradient
        self._compute = compute
        self._count = itertools.count()
        self._known = [
            snapshot(x, is_exposed is None or is_exposed[at]) if isinstance(x, Tensor) else None
            for at, x in enumerate(inputs)
        ]
        self._grad = torch.is_grad_enabled()
        self._autocast = (
            device.type,
            torch.get_autocast_dtype(device.type),
            torch.is_autocast_enabled(device.type),
        )
        self.apart: list[Apart] = []
        self.announced = _Announced()  # called with the gradient of all that is computed

    def add(self, member: DeferredLogits) -> None:
        self.members[next(self._count)] = member

    def _run(self, inputs: Sequence[Any], grad: bool) -> Tensor:
        kind, dtype, enabled = self._autocast
        with torch.set_grad_enabled(grad and self._grad), torch.autocast(kind, dtype, enabled):
            value = self._compute(*inputs)
            # What was said of the layout before there was any.
            if value.shape == self.like.shape and value.stride() != self.like.stride():
                value = value.contiguous().view(-1).view(self.like.shape)
        return value

    def rows_of_rank(self) -> Tensor:
        """This rank's rows of the logits, as an ordinary tensor.

        Raises:
            RuntimeError: if what they are computed from was changed.
        """
        self._check()
        return self._run(self.inputs, torch.is_grad_enabled())

    def logits(self, grad: bool, take: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The logits, or those of the rows that ``take`` takes from a row input.

        Raises:
            RuntimeError: if what they are computed from, or a part that was computed alone, was changed.
        """
        if self.of_rank is not None:
            raise RuntimeError(
                "each rank of the group has its own rows of these logits; mst_fx.gather_rows(logits, mesh), called on all of its ranks, "
                "gives all rows"
            )
        self._check()
        _tell(_caller())
        inputs: Sequence[Any] = self.inputs
        if take is not None:
            assert self.holds_rows is not None
            with torch.set_grad_enabled(grad and self._grad):
                inputs = [take(x) if holds else x for x, holds in zip(inputs, self.holds_rows, strict=True)]
        value = self._run(inputs, grad)
        if self.announced and value.requires_grad:
            value.register_hook(self.announced)
        return value

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, for code that autograd reaches the logits from directly.

        Raises:
            RuntimeError: for a gradient of all rows, of which this rank has its own: nobody could use them. DDP's is of zeros.
        """
        if self.of_rank is not None:
            if bool(grad.any()):
                raise RuntimeError(
                    "a gradient of logits that are cut among ranks came by another way than mst_fx.gather_rows"
                )
            return [None] * len(self.inputs)
        self._check()
        needed = [isinstance(x, Tensor) and x.requires_grad for x in self.inputs]
        inputs = [
            x.detach().requires_grad_() if need else x for x, need in zip(self.inputs, needed, strict=True)
        ]
        with torch.enable_grad():
            value = self._run(inputs, grad=True)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(value, wanted, grad, allow_unused=True))
        return [next(found) if need else None for need in needed]

    def set_apart(self, part: DeferredLogits) -> None:
        """Notes that rows that were computed alone are known outside."""
        assert part._value is not None
        if storage_id(part._value) not in [apart.storage for apart in self.apart]:
            self.apart.append(Apart(part))

    def _check(self) -> None:
        for x, known in zip(self.inputs, self._known, strict=True):
            if is_freed(x):
                raise RuntimeError(
                    f"deferred logits are used for the first time after a weight of shape {tuple(x.shape)} was "
                    "freed, as FSDP does after the backward pass, and with reshard_after_forward=True after the "
                    f"forward pass; {ADVICE}"
                )
            if known is not None and not known.is_of(x):
                raise RuntimeError(
                    "deferred logits are used for the first time after what they are computed from "
                    f"(a {x.dtype} tensor of shape {tuple(x.shape)}) was changed in place, as an "
                    f"optimizer step does; {ADVICE}"
                )

    def check_parts(self, member: DeferredLogits, owner: DeferredLogits | None = None) -> None:
        """Raises a RuntimeError if rows that are among a member's were computed alone and changed since.

        Args:
            owner: whose rows they were; None: whatever the member was made from.
        """
        self.apart = [apart for apart in self.apart if not apart.is_done()]
        family = member._family() if owner is None else [owner]
        if (
            any(apart.concerns(member, family) and apart.is_changed() for apart in self.apart)
            or any(self._is_changed_part(m, member, family) for m in list(self.members.values()))
            or self._is_whole_changed(family)
        ):
            raise RuntimeError(
                "rows of deferred logits were computed alone and changed in place since: the logits would "
                f"not show it; {ADVICE.replace('them', 'all logits')}"
            )

    @staticmethod
    def _is_changed_part(
        part: DeferredLogits, member: DeferredLogits, family: Sequence[DeferredLogits]
    ) -> bool:
        """Whether another one was computed alone of rows that are a member's, too, and was written to."""
        return (
            part._is_part
            and part is not member
            and part._value is not None
            and version(part._value) != part._version_of_value
            and any(part._owner() is whole for whole in family)
            and part._storage() != member._storage()
            and overlap(part._row_ranges(), member._row_ranges())
        )

    def _is_whole_changed(self, family: Sequence[DeferredLogits]) -> bool:
        """Whether logits were written to of which rows, computed alone, are in somebody's hands."""
        used = [apart for apart in self.apart if apart.is_used()]
        wholes = [f for f in family if f._owner() is f and f._born is not None and not f._is_part]
        return any(apart.is_of(whole) and not whole._is_as_it_was() for apart in used for whole in wholes)

    def settle(self, member: DeferredLogits) -> None:
        """Gives what shares a member's storage values that do too, before one of them is changed in place.

        Raises:
            RuntimeError: if that is too late.
        """
        self.check_parts(member)
        owner = member._owner()
        if any(apart.owner() is owner and apart.is_used() for apart in self.apart):
            raise RuntimeError(
                "deferred logits are changed in place after some of their rows were computed alone, which would "
                f"not show it; {ADVICE.replace('them', 'all logits')}"
            )
        members = list(self.members.values())
        views = [m for m in members if m._owner() is owner]
        copies = [m for m in members if m._copies and m._parent is not None and m._parent._owner() is owner]
        for view in views:
            if view._is_part:
                view._value = None
        for other in (*views, *copies):  # parents first: they are older
            other._get()

    def follow(self) -> None:
        """Tells autograd that the members are what has become of their values."""
        for member in list(self.members.values()):
            member._follow()


def _caller() -> str:
    """The innermost frame that is neither torch's nor ours."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _tell(place: str) -> None:
    on_logits.tell(place)
    if _TOLD.is_new(place):
        log.info("deferred logits are computed for %s", place)
