"""Logits that are made only if somebody looks, and only the rows somebody looks at.

When a graph's loss consumes the logits in a loop and the graph also returns them, the graph returns
the rows the logits are computed from instead, and the caller gets a :class:`DeferredLogits` in their
place, which computes itself on first use.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_fx.listeners import on_logits
from mst_fx.logits.apart import Apart, overlap
from mst_fx.logits.snapshot import Snapshot, is_freed, snapshot, version
from mst_fx.logits.uses import LAZY, Step, announces, plainly, rows_of, taker
from mst_fx.torch_api.modes import without_torch_function
from mst_fx.torch_api.ops import schema_of
from mst_fx.torch_api.tensors import refuse_address, storage_id, tree_leaves, tree_map_only, wrapper

log = logging.getLogger("mst_fx")

_told: set[str] = set()
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))

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
            "is_ipu",
            "name",
            "names",
            "volatile",
            # None of a gradient: logits are no leaves, and what keeps theirs computes them.
            "grad",
            "_grad",
            "grad_dtype",
            "retains_grad",
            "_backward_hooks",
            "_post_accumulate_grad_hooks",
        )
        if hasattr(torch.Tensor, name)
    ),
    *(
        getattr(torch.Tensor, name)
        for name in ("__dir__", "has_names", "is_distributed", "is_shared", "_is_zerotensor")
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
# What gives out memory: nobody counts what is written there.
_MEMORY: dict[Any, str] = {
    getattr(torch.Tensor, name): name
    for name in (
        "untyped_storage",
        "storage",
        "_typed_storage",
        "data_ptr",
        "__dlpack__",
        "numpy",
        "__array__",
    )
} | {getattr(torch.Tensor, name).__get__: name for name in ("data", "__cuda_array_interface__")}
_ARRAYS: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}  # can be made read-only
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, type(None))
_KEEP = "use them before, or set the mst option logits='keep'"


class _Hooks(OrderedDict[int, Callable[[Tensor], Tensor | None]]):
    """Hooks on a gradient, by the numbers of their handles; itself one, which runs them all."""

    def __call__(self, grad: Tensor) -> Tensor:
        for hook in list(self.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad


class _Announced(_Hooks):
    """Hooks that are told that a backward pass begins, by whatever gradient comes first."""

    def __call__(self, grad: Tensor) -> None:  # type: ignore[override]
        for hook in list(self.values()):
            changed = hook(grad)
            if changed is not None and changed is not grad:
                raise RuntimeError(
                    f"{hook} changes the gradient of deferred logits, of which it sees a part; "
                    "set the mst option logits='keep'"
                )


class Source:
    """What deferred logits, their slices and their casts are computed from.

    Args:
        compute: the function of ``inputs`` whose value are the logits ``[B, S, V]``.
        inputs: tensors, and numbers.
        rows: for each input whether its leading dimensions are those of the logits, each row of which
            depends on the same row of these inputs only; None where this is not proved.
        like: a meta tensor like the logits.
        device: of the logits.
        is_reached: for each input whether somebody else has it, and may write to it without a trace; None: all.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        inputs: Sequence[Any],
        rows: Sequence[bool] | None,
        like: Tensor,
        device: torch.device,
        is_reached: Sequence[bool] | None = None,
    ) -> None:
        self.inputs, self.rows, self.like, self.device = tuple(inputs), rows, like, device
        self.members: weakref.WeakValueDictionary[int, DeferredLogits] = weakref.WeakValueDictionary()
        self.is_whole = False  # rows may not be computed alone: there are hooks on the logits' gradient
        self._compute = compute
        self._count = itertools.count()
        self._known = [
            snapshot(x, is_reached is None or is_reached[at]) if isinstance(x, Tensor) else None
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
            # What was said of the layout before there was any (mst_fx.lazy).
            if value.shape == self.like.shape and value.stride() != self.like.stride():
                value = value.contiguous().view(-1).view(self.like.shape)
        return value

    def logits(self, grad: bool, take: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The logits, or those of the rows that ``take`` takes from a row input.

        Raises:
            RuntimeError: if what they are computed from, or a part that was computed alone, was changed.
        """
        self._check()
        _tell(_caller())
        inputs: Sequence[Any] = self.inputs
        if take is not None:
            assert self.rows is not None
            with torch.set_grad_enabled(grad and self._grad):
                inputs = [take(x) if row else x for x, row in zip(inputs, self.rows, strict=True)]
        value = self._run(inputs, grad)
        if self.announced and value.requires_grad:
            value.register_hook(self.announced)
        return value

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
        if storage_id(part._value) not in [apart.storage for apart in self.apart]:
            self.apart.append(Apart(part))

    def _check(self) -> None:
        for x, known in zip(self.inputs, self._known, strict=True):
            if is_freed(x):
                raise RuntimeError(
                    f"deferred logits are used for the first time after a weight of shape {tuple(x.shape)} was "
                    "freed, as FSDP does after the backward pass, and with reshard_after_forward=True after the "
                    f"forward pass; {_KEEP}"
                )
            if known is not None and not known.is_of(x):
                raise RuntimeError(
                    "deferred logits are used for the first time after what they are computed from "
                    f"(a {x.dtype} tensor of shape {tuple(x.shape)}) was changed in place, as an "
                    f"optimizer step does; {_KEEP}"
                )

    def check_parts(self, member: DeferredLogits, owner: DeferredLogits | None = None) -> None:
        """Raises a RuntimeError if rows that are among a member's were computed alone and changed since.

        Args:
            owner: whose rows they were; None: whatever the member was made from.
        """
        self.apart = [apart for apart in self.apart if not apart.is_done()]
        family = member._family() if owner is None else [owner]
        changed = any(apart.concerns(member, family) and apart.is_changed() for apart in self.apart)
        for m in list(self.members.values()):
            if m._is_part and m is not member and m._value is not None and not changed:
                changed = version(m._value) != m._version_of_value and any(m._owner() is f for f in family)
                changed = changed and m._storage() != member._storage() and overlap(m._rows(), member._rows())
        if not changed:  # nor the other way round
            wholes = [f for f in family if f._owner() is f and f._born is not None and not f._is_part]
            views = [apart for apart in self.apart if apart.is_used()]
            changed = any(apart.is_of(f) and not f._is_as_it_was() for apart in views for f in wholes)
        if changed:
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
        if any(apart.owner() is owner and apart.is_used() for apart in self.apart):
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


@dataclasses.dataclass(frozen=True)
class _Born:
    """Values that were computed, and what they were then; views of them share it."""

    value: Tensor
    snapshot: Snapshot


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

    _source: Source
    _parent: DeferredLogits | None
    _step: Step | None
    _like: Tensor
    _value: Tensor | None
    _version_of_value: int
    _born: _Born | None
    _is_part: bool
    _is_bypassed: bool
    _node: Any
    _hooks: _Hooks

    def _is_split(self) -> bool:
        """Whether somebody has, under another storage, rows that are among these."""
        owner = self._owner()
        if self._is_part and owner._value is not None:
            return True
        return any(apart.is_used() and apart.concerns(self, [owner]) for apart in self._source.apart)

    def materialize(self) -> Tensor:
        """The logits as an ordinary tensor ``[B, S, V]``, part of the autograd graph."""
        value = self._get()
        if self._is_part:
            self._source.keep_apart(self)
        return value

    def _get(self) -> Tensor:
        if self._value is None:
            with plainly():
                self._value = self._evaluate()
                self._version_of_value = version(self._value)
            self._unite()
        elif self._source.apart:
            self._source.check_parts(self, self._owner())
        return self._value

    def _unite(self) -> None:
        """Sees to it that rows that were computed alone, and are not known outside, become views of these logits."""
        if self._is_part or self._owner() is not self:
            return
        known = [apart.storage for apart in self._source.apart]
        for member in list(self._source.members.values()):
            if member._is_part and member._owner() is self and member._storage() not in known:
                member._value, member._is_part = None, False

    def _storage(self) -> int:
        """The address of the value's storage; 0: there is none."""
        return 0 if self._value is None else storage_id(self._value)

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
        copies = any(step.copies for step in steps)
        if top._value is not None:
            value = top._value
            self._born = None if copies else top._born
            if copies and not top._is_as_it_was():
                raise RuntimeError(
                    "a copy of deferred logits is used for the first time after the logits were changed in "
                    f"place; {_KEEP}"
                )
            for step in steps:
                with torch.set_grad_enabled(step.grad and not is_foreign):
                    value = step.apply(value)
        else:
            value = self._source.logits(grad, taker(steps, top._like.shape[:-1]))
            with torch.set_grad_enabled(grad):
                for step in steps:
                    value = step.on_rows(value)
        if is_foreign and self.requires_grad:
            with torch.enable_grad():
                value = _Attached.apply(self, value.detach())  # type: ignore[no-untyped-call]
        elif self._hooks and value.requires_grad:
            value.register_hook(self._hooks)
        if self._born is None:
            is_reached = self._has_copies_to_make() or any(apart.is_of(self) for apart in self._source.apart)
            self._born = _Born(value, snapshot(value, is_reached))
        return value

    def _is_as_it_was(self) -> bool:
        """Whether the values are those that were computed, here or where they are a view of."""
        return self._born is None or self._born.snapshot.is_of(self._born.value)

    def _has_copies_to_make(self) -> bool:
        """Whether there are copies of these logits, or of rows of them, that would be made of their values."""
        waiting = [m for m in self._source.members.values() if m._value is None and m._copies]
        return any(m is not self and any(self is f for f in m._family()) for m in waiting)

    def _family(self) -> list[DeferredLogits]:
        """The logits and all that they were made from."""
        family = [self]
        while family[-1]._parent is not None:
            family.append(family[-1]._parent)
        return family

    def _rows(self) -> list[range]:
        """Which rows of the first logits these are, one range a leading dimension."""
        steps = [m._step for m in reversed(self._family()) if m._step is not None]
        return rows_of(steps, self._source.like.shape[:-1])

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

    def _viewed(self) -> DeferredLogits:
        """Whose view autograd would say that the logits are."""
        found = self
        while found._parent is not None and found._step is not None and found._step.index is not None:
            found = found._parent
        return found

    def _path(self) -> tuple[list[Step], DeferredLogits, bool]:
        """The steps from the nearest logits with a value, or the first ones, and whether autograd was
        told of another history on the way (by a ``torch.autograd.Function`` that returned them)."""
        steps: list[Step] = []
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
        with plainly(), torch.enable_grad():
            if value.requires_grad:
                _Followed.apply(self, value)  # type: ignore[no-untyped-call]
            elif self.requires_grad:
                self.detach_()
            self._node = self.grad_fn
        self._version_of_value = version(value)

    def _derive(self, step: Step) -> Tensor:
        step = dataclasses.replace(step, grad=step.grad and torch.is_grad_enabled())
        if step.copies and self._path()[1]._value is not None:  # who knows what is written to it until then
            value = self._get()
            with plainly(), torch.set_grad_enabled(step.grad):
                return step.apply(value)
        with plainly(), torch.set_grad_enabled(step.grad):
            child: DeferredLogits = _Derived.apply(self, step)  # type: ignore[no-untyped-call]
            child._node = _without_hooks(child.grad_fn)
        return child

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with without_torch_function():
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
            with without_torch_function():
                return func(*args, **kwargs)
        if isinstance(first, DeferredLogits) and first._value is None and func in LAZY:
            found = LAZY[func](first, func, *args[1:], **kwargs)
            if found is not NotImplemented:
                return found
        return _on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if schema_of(func).is_mutable and func is not torch.ops.aten.detach_.default:
            raise RuntimeError(
                f"{func} would change deferred logits in place; call it on logits.materialize()"
            )
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().__deepcopy__(memo)


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
    split = func in _MEMORY and any(m._is_split() for m in members)
    if split and func not in _ARRAYS:
        raise RuntimeError(
            f"{_MEMORY[func]} gives out the memory of deferred logits after some of their rows "
            f"were computed alone, which would not show what is written there; {_KEEP.replace('them', 'all logits')}"
        )
    result = func(*args, **kwargs)
    if split:
        result.setflags(write=False)
    parts = [m for m in members if m._is_part and m._value is not None]
    if parts:
        leaves = tree_leaves(result)
        storages = {storage_id(leaf) for leaf in leaves if _is_strided(leaf)}
        is_memory = func in _MEMORY or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
        for member in parts:
            if is_memory or member._storage() in storages:
                member._source.keep_apart(member)
    if not writes:  # but the function's name may not tell
        written = [m for m in members if version(m._get()) != m._version_of_value]
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
    if func is torch.Tensor.retain_grad:
        asked = args[0]
    elif func is torch.Tensor.register_hook:
        asked = None if announces(kwargs.get("hook", args[-1])) else args[0]
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


def _lazy(source: Source, parent: DeferredLogits | None, step: Step | None, like: Tensor) -> DeferredLogits:
    self = wrapper(DeferredLogits, like.shape, like.dtype, source.device)
    self._source, self._parent, self._step, self._like = source, parent, step, like
    self._value, self._version_of_value, self._born, self._node = None, 0, None, None
    self._is_part = self._is_bypassed = False
    self._hooks = _Hooks()
    # What no Python sees (torch.utils.dlpack.to_dlpack) gets an error instead of an address that is none.
    refuse_address(self)
    source.add(self)
    return self


class _First(torch.autograd.Function):
    """Inputs → deferred logits.

    Functions compute the logits' values with a graph of their own, which does not come by here. What
    autograd does without asking Python (the inputs of a ``torch.autograd.Function``, DDP's) does.
    """

    @staticmethod
    def forward(ctx: Any, source: Source, *inputs: Any) -> DeferredLogits:
        ctx.source = source
        return _lazy(source, None, None, source.like)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.source.gradients(grad))


class _Derived(torch.autograd.Function):
    """Deferred logits → their rows, or a cast of them."""

    @staticmethod
    def forward(ctx: Any, parent: DeferredLogits, step: Step) -> DeferredLogits:
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


def _caller() -> str:
    """The innermost frame that is neither torch's nor ours."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _tell(place: str) -> None:
    on_logits.tell(place)
    if place not in _told:
        _told.add(place)
        log.info("deferred logits are computed for %s", place)


def _no_hook(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "the gradient of deferred logits does not go through this node, and a hook on it would not be called; set the "
        "mst option logits='keep'"
    )


def _without_hooks(node: Any) -> Any:
    """The node of deferred logits in autograd's graph; their values have others."""
    if node is not None:
        node.register_hook = node.register_prehook = _no_hook
    return node


def deferred_logits(source: Source) -> DeferredLogits:
    """Logits that are not computed yet."""
    logits: DeferredLogits = _First.apply(source, *source.inputs)  # type: ignore[no-untyped-call]
    logits._node = _without_hooks(logits.grad_fn)
    return logits
