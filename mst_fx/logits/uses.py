"""Which uses of deferred logits stay deferred: rows that are taken, casts, copies.

:data:`STAY_DEFERRED` has a handler for each such function of torch. A handler gets the logits, the function and its other
arguments, and returns ``NotImplemented`` where the values are needed, or the arguments are wrong. It is a part of
:class:`~mst_fx.logits.tensor.DeferredLogits`, and reads what is private there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mst_fx.torch_api.autograd import is_checkpointed, without_saved_tensors_hooks
from mst_fx.torch_api.modes import outside_of_modes, without_torch_function
from mst_fx.torch_api.tensors import parse_to

if TYPE_CHECKING:
    from mst_fx.logits.tensor import DeferredLogits

Index = tuple[int | slice, ...]  # one entry a leading dimension


@dataclasses.dataclass(frozen=True)
class Step:
    """What made deferred logits from others.

    Attributes:
        apply: the function of their values.
        index: the rows that it takes, if it takes rows.
        copies: its result has storage of its own.
        grad: whether gradients go through it.
    """

    apply: Callable[[Tensor], Tensor]
    index: Index | None = None
    copies: bool = False
    grad: bool = True

    def on_rows(self, value: Tensor) -> Tensor:
        """``apply`` to a value that has only the step's rows, and still all dimensions."""
        if self.index is None:
            return self.apply(value)
        return value[tuple(0 if isinstance(part, int) else slice(None) for part in self.index)]

    def gradient(self, grad: Tensor, like: Tensor) -> Tensor:
        """The gradient of the step's input, which has the shape and dtype of ``like``."""
        if self.index is None:
            return grad.to(like.dtype)
        full = grad.new_zeros(like.shape)
        full[self.index] = grad
        return full


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Values belong to the graph of the forward pass, wherever they are used first."""
    with (
        outside_of_modes(),
        without_torch_function(),
        torch.inference_mode(False),
        # A checkpoint counts what its function saves; other hooks see what these values save, as any operator's.
        without_saved_tensors_hooks() if is_checkpointed() else contextlib.nullcontext(),
    ):
        yield


def row_ranges(steps: Sequence[Step], sizes: Sequence[int]) -> list[range]:
    """The rows that steps take of leading dimensions of these sizes, one range each."""
    ranges, left = [range(size) for size in sizes], list(range(len(sizes)))
    for step in steps:
        if step.index is None:
            continue
        for dim, part in zip(left, step.index, strict=True):
            if isinstance(part, int):
                at = ranges[dim][part]
                ranges[dim] = range(at, at + 1)
            else:
                ranges[dim] = ranges[dim][part]
        left = [dim for dim, part in zip(left, step.index, strict=True) if not isinstance(part, int)]
    return ranges


def taker(steps: Sequence[Step], sizes: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """Takes the rows of all steps at once, and keeps all dimensions; None for all rows."""
    ranges = row_ranges(steps, sizes)
    if ranges == [range(size) for size in sizes]:
        return None
    slices = tuple(slice(r.start, max(r.start, r.stop), r.step) for r in ranges)
    return lambda x: x[slices]


def _at_rows(self: DeferredLogits, index: Index) -> DeferredLogits:
    return self._derive(Step(lambda x: x[index], index))  # type: ignore[return-value]  # no copy


def _row_dim(self: DeferredLogits, dim: Any) -> int:
    """A leading dimension, from 0; -1 if it is none, or rows are not independent."""
    if not isinstance(dim, int) or self._source.holds_rows is None:
        return -1
    dim = dim + self.ndim if dim < 0 else dim
    return dim if 0 <= dim < self.ndim - 1 else -1


def _along(self: DeferredLogits, dim: int, part: int | slice) -> DeferredLogits:
    index: list[int | slice] = [slice(None)] * (self.ndim - 1)
    index[dim] = part
    return _at_rows(self, tuple(index))


def _getitem(self: DeferredLogits, func: Any, index: Any) -> Any:
    if self._source.holds_rows is None:
        return NotImplemented
    parts = _expanded(index if isinstance(index, tuple) else (index,), self.ndim)
    if parts is None:
        return NotImplemented
    lead = self.ndim - 1
    if not all(part is None or isinstance(part, (int, slice)) for part in parts):
        return _gathered(self, parts)
    basic = [part for part in parts if part is not None]
    if not all(_fits(part, size) for part, size in zip(basic, self.shape, strict=True)):
        return NotImplemented
    taken = _at_rows(self, tuple(basic[:lead]))
    if None not in parts and basic[lead] == slice(None):
        return taken
    # The rest of the index: new dimensions, and the vocabulary's.
    rest, seen = [], 0
    for part in parts:
        seen += part is not None
        if part is None or seen > lead:
            rest.append(part)
        elif isinstance(part, slice):
            rest.append(slice(None))
    return taken.materialize()[tuple(rest)]


def _expanded(index: tuple[Any, ...], ndim: int) -> list[Any] | None:
    """An index with an entry for every dimension, in plain integers; None for what needs the values."""
    parts: list[Any] = []
    dims = 0
    for part in index:
        if isinstance(part, bool) or (type(part).__name__ == "bool" and not isinstance(part, Tensor)):
            return None
        if part is None or part is Ellipsis or isinstance(part, slice):
            dims += isinstance(part, slice)
        elif isinstance(part, (Tensor, list)) or (hasattr(part, "__array__") and part.ndim > 0):
            part = torch.as_tensor(part)
            dims += part.ndim if part.dtype in (torch.bool, torch.uint8) else 1
        elif hasattr(part, "__index__"):
            part, dims = operator.index(part), dims + 1
        else:
            return None
        parts.append(part)
    at = [position for position, part in enumerate(parts) if part is Ellipsis]
    if len(at) > 1 or dims > ndim:
        return None
    position = at[0] if at else len(parts)
    return [*parts[:position], *[slice(None)] * (ndim - dims), *parts[position + 1 :]]


def _fits(part: Any, size: int) -> bool:
    if isinstance(part, int):
        return -size <= part < size
    return part.step is None or operator.index(part.step) > 0


def _gathered(self: DeferredLogits, parts: list[Any]) -> Any:
    """Rows picked by tensors of positions, or by a mask: computed at once, in a single row of rows."""
    if not isinstance(parts[-1], slice) or parts[-1] != slice(None):
        return NotImplemented
    steps, top, is_foreign = self._path()
    if is_foreign or top._value is not None or self._source.is_whole:
        return NotImplemented
    self._source.check_parts(self)
    lead = self.shape[:-1]
    try:
        picked = torch.arange(math.prod(lead), device=self.device).view(lead)[tuple(parts[:-1])]
    except (IndexError, RuntimeError, TypeError):
        return NotImplemented  # the logits give the error
    taken = taker(steps, top._like.shape[:-1])
    rank = top._like.ndim - 1

    def take(x: Tensor) -> Tensor:
        found = x if taken is None else taken(x)
        found = found.flatten(0, rank - 1).index_select(0, picked.flatten())
        return found.unflatten(0, (*[1] * (rank - 1), -1)) if rank > 1 else found

    grad = torch.is_grad_enabled() and all(step.grad for step in steps)
    if grad:
        self._is_bypassed = True
        self._bypass()
    with plainly(), torch.set_grad_enabled(grad):
        value = self._source.logits(grad, take)
        for step in steps:
            if step.index is None:
                value = step.apply(value)
        return value.reshape(*picked.shape, self._like.shape[-1])


def _select(self: DeferredLogits, func: Any, dim: Any, index: Any) -> Any:
    row_dim = _row_dim(self, dim)
    if row_dim < 0 or not isinstance(index, int) or not _fits(index, self.shape[row_dim]):
        return NotImplemented
    return _along(self, row_dim, index)


def _narrow(self: DeferredLogits, func: Any, dim: Any, start: Any, length: Any) -> Any:
    row_dim = _row_dim(self, dim)
    if row_dim < 0 or not isinstance(start, int) or not isinstance(length, int):
        return NotImplemented
    size = self.shape[row_dim]
    start = start + size if start < 0 else start
    if not 0 <= start <= start + length <= size:
        return NotImplemented
    return _along(self, row_dim, slice(start, start + length))


def _unbind(self: DeferredLogits, func: Any, dim: Any = 0) -> Any:
    row_dim = _row_dim(self, dim)
    if row_dim < 0:
        return NotImplemented
    return tuple(_along(self, row_dim, at) for at in range(self.shape[row_dim]))


def _iter(self: DeferredLogits, func: Any) -> Any:
    found = _unbind(self, func)
    return found if found is NotImplemented else iter(found)


def _split(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    row_dim = _row_dim(self, kwargs.get("dim", args[1] if len(args) > 1 else 0))
    if row_dim < 0:
        return NotImplemented
    pieces = func(self._like, *args, **kwargs)
    ends = itertools.accumulate(piece.shape[row_dim] for piece in pieces)
    return tuple(
        _along(self, row_dim, slice(end - piece.shape[row_dim], end))
        for piece, end in zip(pieces, ends, strict=True)
    )


def _index_select(self: DeferredLogits, func: Any, dim: Any, index: Any) -> Any:
    row_dim = _row_dim(self, dim)
    if row_dim < 0 or not isinstance(index, Tensor) or index.ndim > 1:
        return NotImplemented
    parts: list[Any] = [slice(None)] * self.ndim
    parts[row_dim] = index.reshape(-1)
    return _gathered(self, parts)


def _cast(self: DeferredLogits, dtype: torch.dtype) -> Any:
    if dtype == self._like.dtype:
        return self
    if not dtype.is_floating_point:
        return NotImplemented
    return self._derive(Step(lambda x: x.to(dtype), copies=True))


def _to(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("copy") or any(isinstance(arg, bool) for arg in args):
        return NotImplemented
    device, dtype, _, memory_format = parse_to(*args, **kwargs)
    if memory_format is not None or (device is not None and device != self._source.device):
        return NotImplemented
    return _cast(self, dtype or self._like.dtype)


def _type(self: DeferredLogits, func: Any, dtype: Any = None, non_blocking: bool = False) -> Any:
    if dtype is None:
        with without_torch_function():
            return func(self)
    return _cast(self, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _type_as(self: DeferredLogits, func: Any, other: Tensor) -> Any:
    return _cast(self, other.dtype) if other.device == self._source.device else NotImplemented


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(self: DeferredLogits, func: Any, memory_format: Any = torch.preserve_format) -> Any:
        return _cast(self, dtype) if memory_format is torch.preserve_format else NotImplemented

    return cast


def _detach(self: DeferredLogits, func: Any) -> Any:
    return self._derive(Step(torch.Tensor.detach, grad=False))


def _clone(self: DeferredLogits, func: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    if memory_format is not torch.preserve_format:
        return NotImplemented
    return self._derive(Step(torch.Tensor.clone, copies=True))


def _contiguous(self: DeferredLogits, func: Any, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    if self._like.is_contiguous():
        return self
    return self._derive(Step(lambda x: x.clone(memory_format=torch.contiguous_format), copies=True))


_ANNOUNCING = ("torch.distributed.fsdp.", "deepspeed.runtime.")


def announces(hook: Any) -> bool:
    """Whether a hook only wants to know that a backward pass begins, as FSDP's and DeepSpeed's on all outputs of a module.

    The loss has the same hook, so it may stay uncalled if nobody uses the logits. No other hook may: the loss's
    part of the gradient does not come by the logits, and what changes or collects it would be wrong in silence.
    """
    owner = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return owner.startswith(_ANNOUNCING)


def _register_hook(self: DeferredLogits, func: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
    if not self.requires_grad:
        return NotImplemented
    if announces(hook):
        return _register_announced(self, hook)
    self._stay_whole()
    if not self._hooks:
        with without_torch_function():
            self.register_hook(self._hooks)
    handle = RemovableHandle(self._hooks)
    self._hooks[handle.id] = hook
    return handle


def _register_announced(self: DeferredLogits, hook: Callable[[Tensor], Any]) -> Any:
    """Keeps a hook for what will be computed, logits or rows of them."""
    if self._path()[1]._value is not None:
        return NotImplemented  # too late for that: the hook is for the values
    announced = self._source.announced
    with without_torch_function():
        self.register_hook(announced)  # autograd may come by without a value
    handle = RemovableHandle(announced)
    announced[handle.id] = hook
    return handle


def _no_leaf_hook(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    with without_torch_function():
        return func(self, *args, **kwargs)  # an error: deferred logits are no leaves that need gradients


def _base(self: DeferredLogits, func: Any) -> Any:
    owner = self._viewed()
    return None if owner is self else owner


def _is_view(self: DeferredLogits, func: Any) -> bool:
    return self._viewed() is not self


def _layout(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Strides and what follows from them, where they do not depend on which rows are computed."""
    member: DeferredLogits | None = self
    while member is not None:
        if member._step is not None and member._step.index is not None:
            return NotImplemented
        member = member._parent
    return func(self._like, *args, **kwargs)


def _as_empty(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    """What asks for a dtype and a device only."""
    return func(torch.empty(0, dtype=self._like.dtype, device=self._source.device), *args, **kwargs)


def _as_like(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(self._like, *args, **kwargs)


def _cpu(self: DeferredLogits, func: Any, memory_format: Any = torch.preserve_format) -> Any:
    is_there = self._source.device.type == "cpu" and memory_format is torch.preserve_format
    return self if is_there else NotImplemented


_BY_NAME: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem,
    "__iter__": _iter,
    "select": _select,
    "narrow": _narrow,
    "unbind": _unbind,
    "split": _split,
    "chunk": _split,
    "tensor_split": _split,
    "split_with_sizes": _split,
    "index_select": _index_select,
    "float": _cast_to(torch.float32),
    "double": _cast_to(torch.float64),
    "half": _cast_to(torch.float16),
    "bfloat16": _cast_to(torch.bfloat16),
    "to": _to,
    "type": _type,
    "type_as": _type_as,
    "detach": _detach,
    "clone": _clone,
    "contiguous": _contiguous,
    "cpu": _cpu,
    "register_hook": _register_hook,
    "register_post_accumulate_grad_hook": _no_leaf_hook,
    "_is_view": _is_view,
    **dict.fromkeys(("stride", "is_contiguous", "storage_offset", "dim_order"), _layout),
    **dict.fromkeys(("dense_dim", "sparse_dim", "is_coalesced", "is_pinned"), _as_like),
    **dict.fromkeys(
        ("new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"),
        _as_empty,
    ),
}
_PROPERTIES: dict[str, Callable[..., Any]] = {
    "_base": _base,
    "real": lambda self, func: self,  # of real numbers
    "imag": _as_like,  # an error
}
STAY_DEFERRED: dict[Any, Callable[..., Any]] = {
    getattr(owner, name): handler
    for name, handler in _BY_NAME.items()
    for owner in (torch.Tensor, torch)
    if callable(getattr(owner, name, None))
} | {getattr(torch.Tensor, name).__get__: handler for name, handler in _PROPERTIES.items()}
