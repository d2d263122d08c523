"""Logits that are made only if somebody looks, and only the rows somebody looks at.

When a graph's loss consumes the logits in a loop and the graph also returns them, the graph returns
the rows the logits are computed from instead, and the caller gets a :class:`DeferredLogits` in their
place, which computes itself on first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import operator
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from mst_fx.compiler import outside_of_modes
from mst_fx.graph import attribute
from mst_fx.port import joined_to_port

log = logging.getLogger("mst_fx")

# Called with "file:line in function" of whoever makes deferred logits compute themselves.
on_use: list[Callable[[str], None]] = []
_told: set[str] = set()
_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))

_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_signed,
    torch.Tensor.is_inference,
    torch.Tensor.is_conj,
    torch.Tensor.is_neg,
    torch.Tensor.get_device,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_inference,
    torch.is_conj,
    torch.is_neg,
    torch.numel,
    *(
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "requires_grad",
            "is_leaf",
            "grad_fn",
            "output_nr",
            "_version",
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_sparse_csr",
            "is_quantized",
            "is_nested",
            "is_mkldnn",
            "is_mps",
            "is_mtia",
            "is_xla",
            "is_xpu",
            "is_vulkan",
            "is_maia",
            "is_meta",
            "itemsize",
            "nbytes",
        )
        if hasattr(torch.Tensor, name)
    ),
}

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_WRITERS = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)}
_KEEP = "use them before, or set the mst option logits='keep'"

Index = tuple[int | slice, ...]  # one entry a leading dimension


@dataclasses.dataclass(frozen=True)
class _Step:
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


@dataclasses.dataclass(frozen=True)
class _Apart:
    """Rows that were computed alone and are known outside: what is written to them the logits do not show.

    Attributes:
        storage: of the rows.
        version: an empty tensor with the rows' version counter.
        known: the version they had.
        owner: the logits, or the copy of them, whose rows they are.
    """

    storage: StorageWeakRef
    version: Tensor
    known: int
    owner: weakref.ref[DeferredLogits]

    def is_alive(self) -> bool:
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    def is_changed(self) -> bool:
        return _version(self.version) != self.known


class _Hooks(OrderedDict[int, Callable[[Tensor], Tensor | None]]):
    """Hooks on a gradient, by the numbers of their handles; itself one, which runs them all."""

    def __call__(self, grad: Tensor) -> Tensor:
        for hook in list(self.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad


class _Source:
    """What deferred logits, their slices and their casts are computed from.

    Args:
        compute: the function of ``inputs`` whose value are the logits ``[B, S, V]``.
        inputs: tensors, and numbers.
        rows: for each input whether its leading dimensions are those of the logits, each row of which
            depends on the same row of these inputs only; None where this is not proved.
        like: a meta tensor like the logits.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        inputs: Sequence[Any],
        rows: Sequence[bool] | None,
        like: Tensor,
        device: torch.device,
    ) -> None:
        self.inputs, self.rows, self.like, self.device = tuple(inputs), rows, like, device
        self.members: weakref.WeakValueDictionary[int, DeferredLogits] = weakref.WeakValueDictionary()
        self.is_whole = False  # rows may not be computed alone: there are hooks on the logits' gradient
        self._compute = compute
        self._count = itertools.count()
        self._versions = [_version(x) if isinstance(x, Tensor) else 0 for x in inputs]
        self._grad = torch.is_grad_enabled()
        self._autocast = (
            device.type,
            torch.get_autocast_dtype(device.type),
            torch.is_autocast_enabled(device.type),
        )
        self._apart: list[_Apart] = []

    def add(self, member: DeferredLogits) -> None:
        self.members[next(self._count)] = member

    def _run(self, inputs: Sequence[Any], grad: bool) -> Tensor:
        kind, dtype, enabled = self._autocast
        with torch.set_grad_enabled(grad and self._grad), torch.autocast(kind, dtype, enabled):
            return self._compute(*inputs)

    def logits(self, grad: bool, take: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The logits, or those of the rows that ``take`` takes from a row input.

        Raises:
            RuntimeError: if what they are computed from, or a part that was computed alone, was changed.
        """
        self._check()
        _tell(_caller())
        if take is None:
            return self._run(self.inputs, grad)
        assert self.rows is not None
        with torch.set_grad_enabled(grad and self._grad):
            inputs = [take(x) if row else x for x, row in zip(self.inputs, self.rows, strict=True)]
        return self._run(inputs, grad)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, for code that autograd reaches the logits from directly."""
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

    def keep_apart(self, part: DeferredLogits) -> None:
        """Notes that rows that were computed alone are known outside."""
        assert part._value is not None
        with _plainly():
            version = part._value.detach()
            version.data = torch.empty(0, dtype=part.dtype, device=part._value.device)
        storage = StorageWeakRef(part._value.untyped_storage())
        self._apart = [apart for apart in self._apart if apart.is_alive()]
        self._apart.append(_Apart(storage, version, part._version_of_value, weakref.ref(part._owner())))

    def _check(self) -> None:
        for x, version in zip(self.inputs, self._versions, strict=True):
            if isinstance(x, Tensor) and _version(x) != version:
                raise RuntimeError(
                    "deferred logits are used for the first time after what they are computed from "
                    f"(a {x.dtype} tensor of shape {tuple(x.shape)}) was changed in place, as an "
                    f"optimizer step does; {_KEEP}"
                )

    def check_parts(self, member: DeferredLogits) -> None:
        """Raises a RuntimeError if rows of a member were computed alone and changed since."""
        family: list[DeferredLogits] = [member]
        while family[-1]._parent is not None:
            family.append(family[-1]._parent)
        changed = [apart.owner() for apart in self._apart if apart.is_alive() and apart.is_changed()]
        for m in list(self.members.values()):
            if m._is_part and m._value is not None and _version(m._value) != m._version_of_value:
                changed.append(m._owner())
        for owner in changed:
            if any(owner is m for m in family):
                raise RuntimeError(
                    "rows of deferred logits were computed alone and changed in place since: the logits would "
                    f"not show it; {_KEEP.replace('them', 'all logits')}"
                )

    def settle(self, member: DeferredLogits) -> None:
        """Gives what shares a member's storage values that do too, before one of them is changed in place.

        Raises:
            RuntimeError: if that is too late.
        """
        self.check_parts(member)
        owner = member._owner()
        if any(apart.owner() is owner and apart.is_alive() for apart in self._apart):
            raise RuntimeError(
                "deferred logits are changed in place after some of their rows were computed alone, which would "
                f"not show it; {_KEEP.replace('them', 'all logits')}"
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


class DeferredLogits(torch.Tensor):
    """Logits ``[B, S, V]`` that hold what they are computed from, and no S×V storage.

    Shape, dtype, device and ``requires_grad`` are those of the logits. Rows taken from them
    (``logits[:, -1]``), casts, ``detach()``, ``clone()`` and ``contiguous()`` are deferred too, and
    compute these rows alone. Any other use computes what it is used on, once and differentiably, and gives
    ordinary tensors.

    Raises:
        RuntimeError: on first use, if a weight was changed in place since the forward pass: the
            logits would be others than those the loss was computed from.
    """

    _source: _Source
    _parent: DeferredLogits | None
    _step: _Step | None
    _like: Tensor
    _value: Tensor | None
    _version_of_value: int
    _is_part: bool
    _is_bypassed: bool
    _node: Any
    _hooks: _Hooks

    def materialize(self) -> Tensor:
        """The logits as an ordinary tensor ``[B, S, V]``, part of the autograd graph."""
        value = self._get()
        if self._is_part:
            self._source.keep_apart(self)
        return value

    def _get(self) -> Tensor:
        if self._value is None:
            with _plainly():
                self._value = self._evaluate()
                self._version_of_value = _version(self._value)
        return self._value

    def _evaluate(self) -> Tensor:
        parent = self._parent
        if parent is not None:
            has_all = not self._copies and self._like.numel() == parent._like.numel()
            if has_all or self._source.is_whole:
                parent._get()
        self._source.check_parts(self)
        steps, top, is_foreign = self._path()
        grad = not is_foreign and all(step.grad for step in steps)
        if grad:
            self._bypass()
        self._is_part = not self._copies and self._owner()._value is None and self._parent is not None
        if top._value is not None:
            value = top._value
            if _version(value) != top._version_of_value and any(step.copies for step in steps):
                raise RuntimeError(
                    "a copy of deferred logits is used for the first time after the logits were changed in "
                    f"place; {_KEEP}"
                )
            for step in steps:
                with torch.set_grad_enabled(step.grad and not is_foreign):
                    value = step.apply(value)
        else:
            value = self._source.logits(grad, _taker(steps, top._like.shape[:-1]))
            with torch.set_grad_enabled(grad):
                for step in steps:
                    value = step.on_rows(value)
        if is_foreign and self.requires_grad:
            with torch.enable_grad():
                value = _Attached.apply(self, value.detach())  # type: ignore[no-untyped-call]
        elif self._hooks and value.requires_grad:
            value.register_hook(self._hooks)
        return value

    def _stay_whole(self) -> None:
        """Sees to it that all gradients of rows taken from these logits go through them.

        Raises:
            RuntimeError: if that is too late, or the loss of the forward pass has such gradients too.
        """
        if self.requires_grad and (self._parent is None or self._is_bypassed):
            reason = "some of their rows were" if self._is_bypassed else "the loss of their forward pass was"
            raise RuntimeError(
                "the gradient of deferred logits as a whole is not known: "
                f"{reason} computed without them; set the mst option logits='keep'"
            )
        self._source.is_whole = True

    def _bypass(self) -> None:
        passed = self._parent
        while passed is not None and passed._value is None:
            passed._is_bypassed = True
            passed = passed._parent

    @property
    def _copies(self) -> bool:
        return self._step is not None and self._step.copies

    def _owner(self) -> DeferredLogits:
        """Whose storage the logits would share."""
        found = self
        while found._parent is not None and not found._copies:
            found = found._parent
        return found

    def _path(self) -> tuple[list[_Step], DeferredLogits, bool]:
        """The steps from the nearest logits with a value, or the first ones, and whether autograd was
        told of another history on the way (by a ``torch.autograd.Function`` that returned them)."""
        steps: list[_Step] = []
        top, is_foreign = self, False
        while top._value is None:
            is_foreign |= top.grad_fn is not top._node
            if top._parent is None:
                break
            assert top._step is not None
            steps.insert(0, top._step)
            top = top._parent
        return steps, top, is_foreign

    def _follow(self) -> None:
        value = self._value
        if value is None:
            return
        with _plainly(), torch.enable_grad():
            if value.requires_grad:
                _Followed.apply(self, value)  # type: ignore[no-untyped-call]
            elif self.requires_grad:
                self.detach_()
            self._node = self.grad_fn
        self._version_of_value = _version(value)

    def _derive(self, step: _Step) -> DeferredLogits:
        step = dataclasses.replace(step, grad=step.grad and torch.is_grad_enabled())
        with _plainly(), torch.set_grad_enabled(step.grad):
            child: DeferredLogits = _Derived.apply(self, step)  # type: ignore[no-untyped-call]
            child._node = child.grad_fn
        return child

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            state = "" if self._value is None else ", computed"
            return (
                f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}{state})"
            )

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _METADATA:
            if isinstance(first, DeferredLogits) and first._value is not None:
                return func(first._value, *args[1:], **kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, DeferredLogits) and first._value is None and func in _LAZY:
            found = _LAZY[func](first, func, *args[1:], **kwargs)
            if found is not NotImplemented:
                return found
        return _on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and func is not torch.ops.aten.detach_.default:
            raise RuntimeError(
                f"{func} would change deferred logits in place; call it on logits.materialize()"
            )
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().__deepcopy__(memo)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Values belong to the graph of the forward pass, wherever they are used first."""
    with (
        outside_of_modes(),
        torch._C.DisableTorchFunctionSubclass(),
        torch.inference_mode(False),
        saved_tensors_hooks(_same, _same),  # not those of a checkpoint, which counts what it saves
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a function on the values of the deferred logits among its arguments."""
    members = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeferredLogits)]
    sources = list({id(m._source): m._source for m in members}.values())
    named, writes = _named(func, args, kwargs), _writes(func, kwargs)
    for member in named:
        member._stay_whole()
    if writes:
        for member in members:
            member._source.settle(member)
    args, kwargs = tree_map_only(DeferredLogits, DeferredLogits._get, (args, kwargs))
    result = func(*args, **kwargs)
    parts = [m for m in members if m._is_part and m._value is not None]
    if parts:
        storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves(result) if _is_strided(leaf)}
        for member in parts:
            assert member._value is not None
            if member._value.untyped_storage()._cdata in storages:
                member._source.keep_apart(member)
    if not writes:  # but the function's name may not tell
        written = [m for m in members if _version(m._get()) != m._version_of_value]
        for member in written:
            member._source.settle(member)
        writes = bool(written)
    if named or writes:
        for source in sources:
            source.follow()
    return result


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[DeferredLogits]:
    """The logits whose own gradient a function asks for."""
    asked: Any = None
    if func in (torch.Tensor.register_hook, torch.Tensor.retain_grad):
        asked = args[0]
    elif func in (torch.autograd.grad, torch.autograd.backward):
        asked = kwargs.get("inputs", args[1] if func is torch.autograd.grad and len(args) > 1 else None)
    return [leaf for leaf in tree_leaves(asked) if isinstance(leaf, DeferredLogits)]


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
    return bool(in_place or kwargs.get("inplace") or kwargs.get("out") is not None)


def _is_strided(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


# Autograd


def _lazy(source: _Source, parent: DeferredLogits | None, step: _Step | None, like: Tensor) -> DeferredLogits:
    self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        DeferredLogits, like.shape, dtype=like.dtype, device=source.device
    )
    self._source, self._parent, self._step, self._like = source, parent, step, like
    self._value, self._version_of_value, self._node = None, 0, None
    self._is_part = self._is_bypassed = False
    self._hooks = _Hooks()
    source.add(self)
    return self  # type: ignore[no-any-return]


class _First(torch.autograd.Function):
    """Inputs → deferred logits.

    Functions compute the logits' values with a graph of their own, which does not come by here. What
    autograd does without asking Python (the inputs of a ``torch.autograd.Function``, DDP's) does.
    """

    @staticmethod
    def forward(ctx: Any, source: _Source, *inputs: Any) -> DeferredLogits:
        ctx.source = source
        return _lazy(source, None, None, source.like)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.source.gradients(grad))


class _Derived(torch.autograd.Function):
    """Deferred logits → their rows, or a cast of them."""

    @staticmethod
    def forward(ctx: Any, parent: DeferredLogits, step: _Step) -> DeferredLogits:
        ctx.step, ctx.like = step, parent._like
        return _lazy(parent._source, parent, step, step.apply(parent._like))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.step.gradient(grad, ctx.like), None


class _Attached(torch.autograd.Function):
    """A value whose gradient is the deferred logits'."""

    @staticmethod
    def forward(ctx: Any, deferred: DeferredLogits, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Followed(torch.autograd.Function):
    """Makes the gradient of deferred logits that of a value."""

    @staticmethod
    def forward(ctx: Any, deferred: DeferredLogits, value: Tensor) -> DeferredLogits:
        ctx.mark_dirty(deferred)
        return deferred

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


# What stays deferred. Each returns NotImplemented where the values are needed, or the arguments are wrong.


def _taker(steps: Sequence[_Step], sizes: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """Takes the rows of all steps at once, and keeps all dimensions; None for all rows."""
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
    if ranges == [range(size) for size in sizes]:
        return None
    slices = tuple(slice(r.start, max(r.start, r.stop), r.step) for r in ranges)
    return lambda x: x[slices]


def _rows(self: DeferredLogits, index: Index) -> DeferredLogits:
    return self._derive(_Step(lambda x: x[index], index))


def _row_dim(self: DeferredLogits, dim: Any) -> int:
    """A leading dimension, from 0; -1 if it is none, or rows are not independent."""
    if not isinstance(dim, int) or self._source.rows is None:
        return -1
    dim = dim + self.ndim if dim < 0 else dim
    return dim if 0 <= dim < self.ndim - 1 else -1


def _along(self: DeferredLogits, dim: int, part: int | slice) -> DeferredLogits:
    index: list[int | slice] = [slice(None)] * (self.ndim - 1)
    index[dim] = part
    return _rows(self, tuple(index))


def _getitem(self: DeferredLogits, func: Any, index: Any) -> Any:
    if self._source.rows is None:
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
    taken = _rows(self, tuple(basic[:lead]))
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
    lead = self.shape[:-1]
    try:
        picked = torch.arange(math.prod(lead), device=self.device).view(lead)[tuple(parts[:-1])]
    except (IndexError, RuntimeError, TypeError):
        return NotImplemented  # the logits give the error
    taker = _taker(steps, top._like.shape[:-1])
    rank = top._like.ndim - 1

    def take(x: Tensor) -> Tensor:
        rows = x if taker is None else taker(x)
        rows = rows.flatten(0, rank - 1).index_select(0, picked.flatten())
        return rows.unflatten(0, (*[1] * (rank - 1), -1)) if rank > 1 else rows

    grad = torch.is_grad_enabled() and all(step.grad for step in steps)
    if grad:
        self._is_bypassed = True
        self._bypass()
    with _plainly(), torch.set_grad_enabled(grad):
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
    return self._derive(_Step(lambda x: x.to(dtype), copies=True))


def _to(self: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("copy") or any(isinstance(arg, bool) for arg in args):
        return NotImplemented
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if memory_format is not None or (device is not None and device != self._source.device):
        return NotImplemented
    return _cast(self, dtype or self._like.dtype)


def _type(self: DeferredLogits, func: Any, dtype: Any = None, non_blocking: bool = False) -> Any:
    return _cast(self, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _type_as(self: DeferredLogits, func: Any, other: Tensor) -> Any:
    return _cast(self, other.dtype) if other.device == self._source.device else NotImplemented


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(self: DeferredLogits, func: Any, memory_format: Any = torch.preserve_format) -> Any:
        return _cast(self, dtype) if memory_format is torch.preserve_format else NotImplemented

    return cast


def _detach(self: DeferredLogits, func: Any) -> Any:
    return self._derive(_Step(torch.Tensor.detach, grad=False))


def _clone(self: DeferredLogits, func: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    if memory_format is not torch.preserve_format:
        return NotImplemented
    return self._derive(_Step(torch.Tensor.clone, copies=True))


def _contiguous(self: DeferredLogits, func: Any, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    if self._like.is_contiguous():
        return self
    return self._derive(_Step(lambda x: x.clone(memory_format=torch.contiguous_format), copies=True))


def _register_hook(self: DeferredLogits, func: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
    # FSDP's hooks prepare for a backward pass and leave the gradient alone.
    owner = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    if not self.requires_grad:
        return NotImplemented
    if owner.startswith("torch."):
        self._source.is_whole = True
    else:
        self._stay_whole()
    if not self._hooks:
        with torch._C.DisableTorchFunctionSubclass():
            self.register_hook(self._hooks)
    handle = RemovableHandle(self._hooks)
    self._hooks[handle.id] = hook
    return handle


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
}
_LAZY: dict[Any, Callable[..., Any]] = {
    getattr(owner, name): handler
    for name, handler in _BY_NAME.items()
    for owner in (torch.Tensor, torch)
    if callable(getattr(owner, name, None))
}


# Where they come from


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an input of the logits' graph is found.

    Attributes:
        kind: "output" of the rewritten graph, "argument", or "attribute".
        index: which one; of attributes, their name.
        port: which output is the port that its gradient goes by (see :mod:`mst_fx.port`); -1: none.
    """

    kind: str
    index: int | str
    port: int = -1


@dataclasses.dataclass(frozen=True)
class Deferral:
    """How the caller of a rewritten graph gets one of its outputs.

    Attributes:
        position: of the output.
        module: where attributes are found.
        compute: the graph of the logits, a function of ``inputs``.
        inputs: where they are found.
        rows: for each input whether it holds the logits' rows; None where they are not proved
            independent of each other.
        shape: ints, or ("output", index, dim): the size of an output's dimension.
        dtype, device: of the logits.
    """

    position: int
    module: torch.nn.Module
    compute: fx.GraphModule
    inputs: tuple[Origin, ...]
    rows: tuple[bool, ...] | None
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def deferring(
    function: Callable[..., Any], deferrals: Sequence[Deferral], outputs: int
) -> Callable[..., Any]:
    """Wraps a compiled graph: puts deferred logits in place and drops the extra outputs.

    Args:
        outputs: how many outputs the graph had before the rewrite.
    """
    if not deferrals:
        return function

    def run(*args: Any) -> Any:
        # Dynamo may hand over its list of arguments to be emptied: keep what the logits need.
        kept = arguments_of(deferrals, args)
        return defer_outputs(function(*args), kept, deferrals, outputs)

    return run


def arguments_of(deferrals: Sequence[Deferral], args: Sequence[Any]) -> list[dict[int | str, Any]]:
    """The arguments of a rewritten graph that each of its logits needs, by their index."""
    return [{x.index: args[int(x.index)] for x in d.inputs if x.kind == "argument"} for d in deferrals]


def _version(x: Tensor) -> int:
    """How often a tensor was written; inference tensors do not know (see :func:`_deferred`)."""
    return -1 if x.is_inference() else x._version


def _caller() -> str:
    """The innermost frame that is neither torch's nor ours."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _tell(place: str) -> None:
    for listener in on_use:
        listener(place)
    if place not in _told:
        _told.add(place)
        log.info("deferred logits are computed for %s", place)


def defer_outputs(
    results: Sequence[Any], kept: Sequence[dict[int | str, Any]], deferrals: Sequence[Deferral], outputs: int
) -> tuple[Any, ...]:
    """The outputs of a graph with deferred logits in place.

    Args:
        results: of the rewritten graph.
        kept: see :func:`arguments_of`.
        outputs: how many outputs the graph had before the rewrite.
    """
    new = list(results[:outputs])
    seen = set(range(outputs)) - {deferral.position for deferral in deferrals}
    joined: dict[int, Tensor] = {}  # rows by their port

    def found(origin: Origin, deferral: Deferral, arguments: dict[int | str, Any]) -> Any:
        if origin.kind == "attribute":
            return attribute(deferral.module, str(origin.index))
        if origin.kind == "argument":
            return arguments[origin.index]
        rows = results[int(origin.index)]
        if origin.port < 0:
            return rows
        if origin.port not in joined:
            joined[origin.port] = joined_to_port(results[origin.port], rows)
        return joined[origin.port]

    for deferral, arguments in zip(deferrals, kept, strict=True):
        inputs = [found(origin, deferral, arguments) for origin in deferral.inputs]
        shape = [
            size if isinstance(size, int) else results[size[1]].shape[size[2]] for size in deferral.shape
        ]
        is_seen = [origin.kind != "output" or origin.index in seen for origin in deferral.inputs]
        new[deferral.position] = _deferred(deferral, inputs, shape, is_seen)
    return tuple(new)


def _deferred(
    deferral: Deferral, inputs: Sequence[Any], shape: Sequence[int], is_seen: Sequence[bool]
) -> Tensor:
    unknown = [isinstance(x, Tensor) and x.is_inference() for x in inputs]
    if any(u and seen for u, seen in zip(unknown, is_seen, strict=True)):
        return deferral.compute(*inputs)  # type: ignore[no-any-return]  # the caller can change them unseen
    like = torch.empty(shape, dtype=deferral.dtype, device="meta")
    source = _Source(deferral.compute, inputs, deferral.rows, like, deferral.device)
    logits: DeferredLogits = _First.apply(source, *inputs)  # type: ignore[no-untyped-call]
    logits._node = logits.grad_fn
    return logits
