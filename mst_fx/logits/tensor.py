"""Logits that are made only if somebody looks, and only the rows somebody looks at.

When a graph's loss consumes the logits in a loop and the graph also returns them, the graph returns
the rows the logits are computed from instead, and the caller gets a :class:`DeferredLogits` in their
place, which computes itself on first use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_fx.logits import calls
from mst_fx.logits.snapshot import Snapshot, snapshot, version
from mst_fx.logits.source import ADVICE, Hooks, Source
from mst_fx.logits.uses import STAY_DEFERRED, Step, plainly, row_ranges, taker
from mst_fx.torch_api.modes import without_torch_function
from mst_fx.torch_api.ops import schema_of
from mst_fx.torch_api.tensors import refuse_address, storage_id, tree_leaves, tree_map_only, wrapper


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
    _hooks: Hooks

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
            self._source.set_apart(self)
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
        if top._value is not None:
            value = self._of_value(top, top._value, steps, is_foreign)
        else:
            value = self._source.logits(grad, taker(steps, top._like.shape[:-1]))
            with torch.set_grad_enabled(grad):
                for step in steps:
                    value = step.on_rows(value)
        value = self._with_history(value, is_foreign)
        if self._born is None:
            is_exposed = self._has_copies_to_make() or any(apart.is_of(self) for apart in self._source.apart)
            self._born = _Born(value, snapshot(value, is_exposed))
        return value

    def _of_value(
        self, top: DeferredLogits, value: Tensor, steps: Sequence[Step], is_foreign: bool
    ) -> Tensor:
        """The steps on the values of ``top``."""
        copies = any(step.copies for step in steps)
        self._born = None if copies else top._born
        if copies and not top._is_as_it_was():
            raise RuntimeError(
                f"a copy of deferred logits is used for the first time after the logits were changed in place; {ADVICE}"
            )
        for step in steps:
            with torch.set_grad_enabled(step.grad and not is_foreign):
                value = step.apply(value)
        return value

    def _with_history(self, value: Tensor, is_foreign: bool) -> Tensor:
        """The value as a part of the autograd graph that these logits are of."""
        if is_foreign and self.requires_grad:
            with torch.enable_grad():
                return _Attached.apply(self, value.detach())  # type: ignore[no-untyped-call, no-any-return]
        if self._hooks and value.requires_grad:
            value.register_hook(self._hooks)
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

    def _row_ranges(self) -> list[range]:
        """Which rows of the first logits these are, one range a leading dimension."""
        steps = [m._step for m in reversed(self._family()) if m._step is not None]
        return row_ranges(steps, self._source.like.shape[:-1])

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
            state = "made on first use" if self._value is None else "computed"
            return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in calls.METADATA:
            if isinstance(first, DeferredLogits) and first._value is not None:
                return func(first._value, *args[1:], **kwargs)
            with without_torch_function():
                return func(*args, **kwargs)
        if isinstance(first, DeferredLogits) and first._value is None and func in STAY_DEFERRED:
            found = STAY_DEFERRED[func](first, func, *args[1:], **kwargs)
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
    members, named = _members_in((args, kwargs)), _members_in(calls.asked_for(func, args, kwargs))
    sources = list({id(m._source): m._source for m in members}.values())
    writes = calls.writes(func, kwargs)
    for member in named:
        member._stay_whole()
    if writes:
        _settle(members)
    args, kwargs = tree_map_only(DeferredLogits, DeferredLogits._get, (args, kwargs))
    result = _run(func, args, kwargs, is_split=func in calls.MEMORY and any(m._is_split() for m in members))
    _set_apart(func, members, tree_leaves(result))
    if not writes:  # but the function's name may not tell
        written = [m for m in members if version(m._get()) != m._version_of_value]
        _settle(written)
        writes = bool(written)
    if named or writes:
        for source in sources:
            source.follow()
    return result


def _members_in(arguments: Any) -> list[DeferredLogits]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, DeferredLogits)]


def _settle(members: Sequence[DeferredLogits]) -> None:
    for member in members:
        member._source.settle(member)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_split: bool) -> Any:
    """Runs a function on values, of which it may give out the memory.

    Args:
        is_split: somebody has rows that are among these, in other memory: what is written here would not show there.
    """
    if is_split and func not in calls.ARRAYS:
        raise RuntimeError(
            f"{calls.MEMORY[func]} gives out the memory of deferred logits after some of their rows "
            f"were computed alone, which would not show what is written there; {ADVICE.replace('them', 'all logits')}"
        )
    result = func(*args, **kwargs)
    if is_split:
        result.setflags(write=False)
    return result


def _set_apart(func: Any, members: Sequence[DeferredLogits], results: Sequence[Any]) -> None:
    """Notes of rows that were computed alone that their memory is known outside now."""
    parts = [m for m in members if m._is_part and m._value is not None]
    if not parts:
        return
    is_memory = calls.gives_memory(func, results)
    storages = {storage_id(found) for found in results if _is_strided(found)}
    for part in parts:
        if is_memory or part._storage() in storages:
            part._source.set_apart(part)


def _is_strided(found: Any) -> bool:
    return isinstance(found, Tensor) and found.layout == torch.strided


# Autograd


def _new(source: Source, parent: DeferredLogits | None, step: Step | None, like: Tensor) -> DeferredLogits:
    self = wrapper(DeferredLogits, like.shape, like.dtype, source.device)
    self._source, self._parent, self._step, self._like = source, parent, step, like
    self._value, self._version_of_value, self._born, self._node = None, 0, None, None
    self._is_part = self._is_bypassed = False
    self._hooks = Hooks()
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
        return _new(source, None, None, source.like)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.source.gradients(grad))


class _Derived(torch.autograd.Function):
    """Deferred logits → their rows, or a cast of them."""

    @staticmethod
    def forward(ctx: Any, parent: DeferredLogits, step: Step) -> DeferredLogits:
        ctx.step, ctx.like = step, parent._like
        return _new(parent._source, parent, step, step.apply(parent._like))

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
