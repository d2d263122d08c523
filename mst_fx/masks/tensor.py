"""A mask ``[B, 1, Q, K]`` that crosses a graph break without being made.

Where a graph ends before the layers that read its mask (a hook of FSDP2, experts that break the graph), the
mask is an output of one graph and an input of others. In its place goes a :class:`DeferredMask`: the key and
query vectors of its formula (:mod:`mst_fx.masks.formula`), O(S) of them. :mod:`mst_fx.passes.mask_breaks` puts the vectors
in the place of the mask in both kinds of graphs.

Eager code, and other compilers, may do with it what they may do with any tensor: the first operator that asks
for its values makes the mask, Boolean or added to scores, as the graph would have.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mst_fx.masks import formula
from mst_fx.masks.formula import Mask
from mst_fx.masks.reach import Vectors, allowed
from mst_fx.process import Said
from mst_fx.torch_api.fakes import FunctionalTensor
from mst_fx.torch_api.modes import NO_TORCH_FUNCTION
from mst_fx.torch_api.ops import schema_of
from mst_fx.torch_api.tensors import tree_leaves, tree_map_only, version_of, wrapper

log = logging.getLogger("mst_fx")

aten = torch.ops.aten

_INTERNAL = (torch.__path__[0], __file__)
_TOLD = Said()


@dataclasses.dataclass(frozen=True)
class MaskForm:
    """What Dynamo guards a deferred mask by.

    Attributes:
        formula: of the vectors ``k0``, … and ``q0``, …
        dtype: ``torch.bool`` (True: may see), or that of the scores to which the mask is added.
        fill: what is added where the formula is false, -inf included; 0 for a Boolean mask.
        chunk: queries a chunk, of what is known of the reach.
        table: that of the mask's reach (:class:`mst_fx.masks.reach.Reach`), flat, where it is constant.
        has_reach: otherwise two more vectors are: the table of its reach and the starts of its spans.
    """

    formula: Mask
    dtype: torch.dtype
    fill: float
    chunk: int
    table: tuple[int, ...] = ()
    has_reach: bool = False

    @property
    def vectors(self) -> list[str]:
        """The names of the vectors: those of the formula, in order, and those of the reach."""
        found = sorted(set(formula.vectors_in(self.formula)), key=lambda name: (name[0], int(name[1:])))
        return found + (["table", "starts"] if self.has_reach else [])


class _Cell:
    """What a mask and its detached selves share: the values, once made, and whether they were changed."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value
        self.is_written = value is not None
        self.members: list[weakref.ref[DeferredMask]] = []

    def was_written(self) -> bool:
        """Whether somebody has changed the values: views of them count the changes for their base."""
        if not self.is_written and self.value is not None:
            members = [member for ref in self.members if (member := ref()) is not None]
            self.is_written = any(version_of(x) > 0 for x in (self.value, *members))
        return self.is_written


class DeferredMask(torch.Tensor):
    """A mask that holds the vectors of its formula, and no S×S storage until somebody asks for its values.

    To torch it is a traceable wrapper subclass; its inner tensors are the vectors (or, after a change in
    place, its values). Each has ``b`` rows, 1 or B: ``k0`` … are ``[b, K]``, ``q0`` … ``[b, Q]``.
    """

    _form: MaskForm | None
    _cell: _Cell

    @staticmethod
    def __new__(
        cls, vectors: Mapping[str, Tensor], form: MaskForm | None, size: Sequence[Any]
    ) -> DeferredMask:
        first = next(x for name, x in vectors.items() if name != "table")
        dtype = first.dtype if form is None else form.dtype
        return wrapper(cls, size, dtype, first.device)

    def __init__(self, vectors: Mapping[str, Tensor], form: MaskForm | None, size: Sequence[Any]) -> None:
        self._form = form
        self._take_cell(_Cell(vectors["made"] if form is None else None))
        for name, vector in vectors.items():
            if form is not None:
                setattr(self, name, vector)

    def _take_cell(self, cell: _Cell) -> None:
        self._cell = cell
        cell.members.append(weakref.ref(self))

    @property
    def made(self) -> Tensor:
        """The mask as an ordinary tensor; a change of it is a change of the mask."""
        cell = self._cell
        if cell.value is None:
            assert self._form is not None
            self._tell()
            vectors = {name: getattr(self, name) for name in self._form.vectors}
            cell.value = made_mask(self._form, vectors, self.shape)
        return cell.value

    def _is_real(self) -> bool:
        """Whether the mask is for use, and does not stand for one while something is traced."""
        return self._form is None or type(getattr(self, self._form.vectors[0])) is Tensor

    def _tell(self) -> None:
        """Says that a mask is made."""
        place = _caller()
        if self._is_real() and _TOLD.is_new(place):
            log.info("a deferred mask of %s elements is made for %s", f"{self.numel():,}", place)

    def __tensor_flatten__(self) -> tuple[list[str], MaskForm | None]:
        # A trace keeps to what it began with; the graph's own changes are seen by mask_breaks.
        if self._form is None or (self._is_real() and self._cell.was_written()):
            return ["made"], None
        return self._form.vectors, self._form

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], form: MaskForm | None, size: Any, stride: Any
    ) -> DeferredMask:
        return DeferredMask(inner, form, size)

    __torch_function__ = NO_TORCH_FUNCTION

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _STAY_DEFERRED and isinstance(args[0], DeferredMask) and args[0]._cell.value is None:
            found = _STAY_DEFERRED[func](args[0], **kwargs)
            if found is not None:
                return found
        written = _written(func, args, kwargs)
        if any(isinstance(x, FunctionalTensor) for mask in written for x in mask.__dict__.values()):
            raise RuntimeError(
                f"{func} would change a deferred mask in place, and the caller would not see it"
            )
        args, kwargs = tree_map_only(DeferredMask, lambda mask: mask.made, (args, kwargs))
        result = func(*args, **kwargs)
        for mask in written:
            mask._cell.is_written = True
            result = mask if result is mask._cell.value else result
        return result

    # What reads memory past the dispatcher. Nobody counts what is written there, so the values are the mask from here on.

    def _escaped(self) -> Tensor:
        """The values, which somebody may change without a trace."""
        found = self.made
        self._cell.is_written = True
        return found

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self._escaped().data if self._is_real() else self.made.data

    @data.setter
    def data(self, new: Tensor) -> None:
        if new.shape != self.shape or new.dtype != self.dtype:
            raise RuntimeError(f"a deferred mask stays {tuple(self.shape)} of {self.dtype}: no other .data")
        self._escaped().data.copy_(new)

    def untyped_storage(self) -> Any:
        # torch asks for it too, to compare storages: those of masks that are not made.
        is_internal = sys._getframe(1).f_code.co_filename.startswith(_INTERNAL)
        return super().untyped_storage() if is_internal else self._escaped().untyped_storage()

    def data_ptr(self) -> int:
        return self._escaped().data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        return self._escaped().numpy(force=force)

    def tolist(self) -> Any:
        return self.made.tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._escaped().__array__(*args, **kwargs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._escaped().__dlpack__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.made.__deepcopy__(memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredMask(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def made_mask(form: MaskForm, vectors: Mapping[str, Tensor], size: Sequence[Any]) -> Tensor:
    """The values of a mask, contiguous.

    Args:
        vectors: by their names.
        size: ``[B, 1, Q, K]``, or ``[Q, K]``.
    """
    found = Vectors(
        [vectors[name] for name in form.vectors if name[0] == "k"],
        [vectors[name] for name in form.vectors if name[0] == "q"],
    )
    first = next(iter((*found.keys, *found.queries)))
    with torch.no_grad():
        mask = allowed(form.formula, found, 0, size[-2], 0, size[-1], first.device)
        mask = mask[:, None] if len(size) == 4 else mask.flatten(0, 1)
        if form.dtype != torch.bool:
            zero, fill = (first.new_full((), x, dtype=form.dtype) for x in (0.0, form.fill))
            mask = torch.where(mask, zero, fill)
        return mask.expand(size).contiguous()


def _same(mask: DeferredMask, **kwargs: Any) -> DeferredMask:
    """The same mask, without a history; they share their values."""
    assert mask._form is not None
    vectors = {name: getattr(mask, name) for name in mask._form.vectors}
    new = DeferredMask(vectors, mask._form, mask.shape)
    new._take_cell(mask._cell)
    return new


def _copy(mask: DeferredMask, **kwargs: Any) -> DeferredMask | None:
    """A copy, of another floating-point type perhaps (FSDP2 casts what a module is given); None: otherwise."""
    form = mask._form
    assert form is not None
    dtype = kwargs.pop("dtype", None) or form.dtype
    device = kwargs.pop("device", None)
    kwargs.pop("non_blocking", None)
    is_cast = dtype != form.dtype
    if (device is not None and torch.device(device) != mask.device) or any(
        x is not None and x is not torch.preserve_format for x in kwargs.values()
    ):
        return None
    if is_cast and not (dtype.is_floating_point and form.dtype.is_floating_point):
        return None
    fill = float(torch.tensor(form.fill, dtype=form.dtype, device="cpu").to(dtype)) if is_cast else form.fill
    vectors = {name: getattr(mask, name) for name in form.vectors}
    return DeferredMask(vectors, dataclasses.replace(form, dtype=dtype, fill=fill), mask.shape)


_STAY_DEFERRED: dict[Any, Callable[..., DeferredMask | None]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
}


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[DeferredMask]:
    """The masks that an operator changes."""
    if not schema_of(func).is_mutable:
        return []
    found = []
    for index, argument in enumerate(schema_of(func).arguments):
        given = kwargs.get(argument.name, args[index] if index < len(args) else None)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [
                x for x in tree_leaves(given) if isinstance(x, DeferredMask)
            ]  # _foreach_ writes to lists
    return found


def _caller() -> str:
    """The innermost frame that is neither torch's nor of this file."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


@dataclasses.dataclass(frozen=True)
class MaskOutput:
    """How the caller of a graph gets a mask that was taken out of its outputs.

    Attributes:
        positions: of the mask among the outputs; the first of its vectors is there instead.
        vectors: for each of the form's vectors which output it is.
        size: ints, or (index,): the output that is the size.
    """

    positions: tuple[int, ...]
    form: MaskForm
    vectors: tuple[int, ...]
    size: tuple[Any, ...]

    def mask(self, results: Sequence[Any]) -> Tensor:
        vectors = {name: results[i] for name, i in zip(self.form.vectors, self.vectors, strict=True)}
        size = [x if isinstance(x, int) else results[x[0]] for x in self.size]
        if torch.is_inference_mode_enabled():  # inference tensors do not know whether they were changed
            return made_mask(self.form, vectors, size)
        return DeferredMask(vectors, self.form, size)


def put_masks(
    function: Callable[..., Any], masks: Sequence[MaskOutput], outputs: int | None
) -> Callable[..., Any]:
    """Wraps a compiled graph: puts deferred masks into their places.

    Args:
        outputs: how many outputs the graph had before its masks were taken out; None: more are needed.
    """
    if not masks:
        return function

    def run(*args: Any) -> Any:
        results = function(*args)
        new = list(results)
        for output in masks:
            mask = output.mask(results)
            for position in output.positions:
                new[position] = mask
        return tuple(new[:outputs])

    return run
