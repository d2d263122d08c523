"""Writes in place as new values: for a node that writes, the nodes that make what the tensor holds then.

A twin is a function of an adder and of the write's operands. It raises a :class:`Refusal` where a write has no equal.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import add_call, copy_provenance
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.indices import FULL, are_places, expanded
from mst_fx.graph.modes import Context, in_context
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import (
    CASTS,
    FULLS,
    NUMBERS_EVERYWHERE,
    RESHAPES,
    TRANSPOSES,
    argument,
    is_in_place_operator,
    operation,
    out_of_place,
)
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.modes import enable_python_dispatcher

_ACTIVATIONS = (
    *(F.relu, F.silu, F.elu, F.leaky_relu, F.hardtanh, F.relu6, F.mish, F.selu, F.celu, F.threshold),
    *(F.hardsigmoid, F.hardswish),
)

# Views whose elements come in the order of those of their source.
IN_ORDER = RESHAPES | CASTS | {"squeeze", "unsqueeze", "contiguous", "alias"}


def storage(fake: torch.Tensor) -> int:
    key = storage_key(fake)
    assert key is not None  # asked of plain tensors only
    return key


class Adder:
    """Adds nodes before a write, in its modes.

    Args:
        new: where they are noted.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, modes: Context, new: list[fx.Node]) -> None:
        self._graph, self._node, self._modes, self._new = graph, node, modes, new
        self._mode = fake_mode_of(tensors_of(node.args[0]))  # type: ignore[arg-type]

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._graph.inserting_before(self._node))
            stack.enter_context(in_context(self._modes))
            if self._mode is not None:
                stack.enter_context(self._mode)
            found = add_call(self._graph, target, *args, **kwargs)
        copy_provenance(self._node, found)
        self._new.append(found)
        return found

    def like(self, found: fx.Node, written: fx.Node) -> fx.Node:
        """A result in the type of what it is written into, and nobody else's.

        Raises:
            Refusal: if autocast chose another type than the write in place has.
        """
        fake, wanted = _fake(found), _fake(written)
        if list(map(expression, fake.shape)) != list(map(expression, wanted.shape)):
            raise Refusal("has another shape out of place", Cause.WRITTEN)
        if fake.dtype != wanted.dtype:
            if self._modes.autocast or torch.is_autocast_enabled(wanted.device.type):
                raise Refusal("has another type out of place", Cause.WRITTEN)
            found = self("to", found, wanted.dtype)
        if fake.device != wanted.device:
            raise Refusal("lies on another device", Cause.WRITTEN)
        shared = {storage(t) for operand in found.all_input_nodes for t in tensors_of(operand) if is_plain(t)}
        return self("clone", found) if storage(_fake(found)) in shared else found


def _fake(node: fx.Node) -> torch.Tensor:
    fake = tensor_value(node)
    if fake is None or not is_plain(fake):
        raise Refusal(f"{node.name} is no plain tensor", Cause.NOT_PLAIN)
    return fake


# Writes: functions of an adder and of the write's operands that make what the written tensor holds then.

_Twin = Callable[..., fx.Node]


def twin(node: fx.Node) -> _Twin | None:
    """The out-of-place form of a write; None if none is known."""
    if node.kwargs.get("out") is not None:
        return None
    if is_in_place_operator(node.target) and operation(node) == "setitem":
        return _set_item
    if node.target in _ACTIVATIONS:
        return functools.partial(_activation, node.target)
    specials: dict[str, _Twin] = {"copy": _copy, "fill": _fill, "zero": _zero}
    if operation(node) in specials:
        return specials[operation(node)]
    found = out_of_place(node.target)
    return _same_call(found) if found is not None else None


def _same_call(target: Any) -> _Twin:
    def twin(add: Adder, written: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return add.like(add(target, written, *args, **kwargs), written)

    return twin


def _activation(target: Any, add: Adder, written: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    bound = inspect.signature(target).bind(written, *args, **kwargs)
    bound.arguments["inplace"] = False
    return add.like(add(target, *bound.args, **bound.kwargs), written)


def _copy(add: Adder, written: fx.Node, source: Any, non_blocking: bool = False) -> fx.Node:
    if not isinstance(source, fx.Node) or tensor_value(source) is None:
        return add(torch.full_like, written, source)
    if _fake(source).dtype != _fake(written).dtype:
        source = add("to", source, _fake(written).dtype)
    if list(map(expression, _fake(source).shape)) == list(map(expression, _fake(written).shape)):
        return add.like(add("clone", source), written)  # so that what is written to is not read
    everywhere = add(torch.ones_like, written, dtype=torch.bool)
    source = add(torch.where, everywhere, source, written)  # expands it, row by row
    return add.like(add("view_as", source, written), written)


def _fill(add: Adder, written: fx.Node, value: Any) -> fx.Node:
    return _copy(add, written, value)


def _zero(add: Adder, written: fx.Node) -> fx.Node:
    return add(torch.zeros_like, written)


def _set_item(add: Adder, written: fx.Node, index: Any, source: Any) -> fx.Node:
    parts = list(index) if isinstance(index, tuple) else [index]
    device = _fake(written).device
    parts = [add(torch.tensor, list(p), device=device) if are_places(p) else p for p in parts]
    tensors = [part for part in parts if isinstance(part, fx.Node) and tensor_value(part) is not None]
    if not tensors:
        return _set_slices(add, written, parts, source)
    mask = _mask(add, written, parts, tensors[0]) if len(tensors) == 1 else None
    if mask is not None and _is_scalar(source):
        return _masked(add, written, mask, source)
    return _set_picked(add, written, parts, tensors, source)


def _is_scalar(source: Any) -> bool:
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    return fake is None or not fake.ndim


def _set_picked(
    add: Adder, written: fx.Node, parts: list[Any], tensors: list[fx.Node], source: Any
) -> fx.Node:
    """Writes to the elements that tensors in the index pick, and that it takes whole in all other dimensions."""
    parts = expanded(parts, _fake(written).ndim - sum(_fake(t).ndim - 1 for t in tensors if _is_mask(t)))
    if any(part is not FULL and part not in tensors for part in parts):
        raise Refusal("writes to slices and picked elements at once", Cause.WRITTEN)
    picks = len(tensors) == 1 and _fake(tensors[0]).ndim == 1 and _fake(tensors[0]).dtype == torch.int64
    if picks and not isinstance(source, fx.Node):
        return add.like(add("index_fill", written, parts.index(tensors[0]), tensors[0], source), written)
    if not isinstance(source, fx.Node):
        source = add("new_full", written, (), source)
    if _fake(source).dtype != _fake(written).dtype:
        source = add("to", source, _fake(written).dtype)
    places = [None if part is FULL else part for part in parts]
    while places[-1] is None:
        places.pop()
    return add.like(add(torch.ops.aten.index_put.default, written, places, source), written)


def _is_mask(node: fx.Node) -> bool:
    return _fake(node).dtype == torch.bool


def _mask(add: Adder, written: fx.Node, parts: list[Any], mask: fx.Node) -> fx.Node | None:
    """A mask, with dimensions of 1 where the index takes all, if it is the only thing in the index."""
    rest = [part for part in parts if part is not mask]
    if not _is_mask(mask) or any(part is not Ellipsis and part != FULL for part in rest):
        return None
    ndim, missing = _fake(mask).ndim, _fake(written).ndim - _fake(mask).ndim
    if not ndim or rest.count(Ellipsis) > 1:
        return None
    at = parts.index(mask)
    before = missing - (len(parts) - at - 1) if Ellipsis in parts[:at] else at
    for _ in range(missing - before):
        mask = add("unsqueeze", mask, -1)
    return mask


def _masked(add: Adder, written: fx.Node, mask: fx.Node, source: Any) -> fx.Node:
    is_tensor = isinstance(source, fx.Node) and tensor_value(source) is not None
    if is_tensor and _fake(source).dtype != _fake(written).dtype:
        source = add("to", source, _fake(written).dtype)
    return add.like(add("masked_fill", written, mask, source), written)


# Slices: the index ``[2:, ..., 0]``, one part a dimension.


def _set_slices(add: Adder, written: fx.Node, parts: list[Any], source: Any) -> fx.Node:
    if any(isinstance(part, (bool, list)) for part in parts):
        raise Refusal("an index of a kind not known here", Cause.WRITTEN)
    parts = expanded(parts, _fake(written).ndim)
    is_scalar = not isinstance(source, fx.Node) or (fake := tensor_value(source)) is None or not fake.ndim
    if all(part is FULL for part in parts):
        return _copy(add, written, source)
    mask = _column_mask(add, written, parts) if is_scalar else None
    if mask is not None:
        return _masked(add, written, mask, source)
    part = add(operator.getitem, written, tuple(parts))
    return _scattered(add, written, parts, _copy(add, part, source))


def _column_mask(add: Adder, written: fx.Node, parts: list[Any]) -> fx.Node | None:
    """``[V]``: the columns that an index of the last dimension alone names."""
    last, width = parts[-1], _fake(written).shape[-1]
    if any(part is not FULL for part in parts[:-1]) or not isinstance(width, int) or len(parts) < 2:
        return None
    if isinstance(last, slice) and all(
        x is None or isinstance(x, int) for x in (last.start, last.stop, last.step)
    ):
        start, stop, step = last.indices(width)
    elif isinstance(last, int):
        start, stop, step = last % width, last % width + 1, 1
    else:
        return None
    if step != 1:
        return None
    columns = add(torch.arange, width, device=_fake(written).device)
    return add(torch.logical_and, add(torch.ge, columns, start), add(torch.lt, columns, stop))


def _scattered(add: Adder, whole: fx.Node, parts: list[Any], new: fx.Node) -> fx.Node:
    """``whole`` with ``new`` in the place of ``whole[parts]``."""
    for dim in reversed(_new_dims(parts)):
        new = add("squeeze", new, dim)
    steps: list[tuple[fx.Node, int, Any]] = []
    dim, current = 0, whole
    real = [part for part in parts if part is not None]
    for part in real:
        if part is not FULL:
            steps.append((current, dim, part))
            if part is not real[-1] or len(steps) > 1:
                current = _step(add, current, dim, part)
        dim += part is FULL or isinstance(part, slice)
    for source, dim, part in reversed(steps):
        if isinstance(part, slice):
            new = _put_slice(add, source, new, dim, part.start, part.stop, part.step or 1)
        else:
            new = add(torch.select_scatter, source, new, dim, part)
    return new if steps else add.like(new, whole)


def _put_slice(
    add: Adder,
    whole: fx.Node,
    new: fx.Node,
    dim: Any = 0,
    start: Any = None,
    stop: Any = None,
    step: Any = 1,
) -> fx.Node:
    """``whole`` with ``new`` in the place of a slice of one dimension.

    What goes into some columns of a tensor that holds one number is padded with it: so the buffer is no value that
    all rows have to be made for.
    """
    number, fake = _filled_with(whole), _fake(whole)
    width = fake.shape[-1] if isinstance(dim, int) and dim % fake.ndim == fake.ndim - 1 else None
    ends = [start, stop, step]
    if number is None or not isinstance(width, int) or not all(x is None or isinstance(x, int) for x in ends):
        return add(torch.slice_scatter, whole, new, dim, start, stop, step)
    first, last, stride = slice(*ends).indices(width)
    if stride != 1 or not fake.is_floating_point():
        return add(torch.slice_scatter, whole, new, dim, start, stop, step)
    with enable_python_dispatcher():  # else sizes that change would become numbers, by guards
        return add(F.pad, new, (first, width - last), "constant", number)


def _filled_with(node: fx.Node) -> float | None:
    """The number that a new tensor holds everywhere, or may hold; None if nobody knows."""
    name = operation(node)
    number = argument(node, "fill_value") if name in FULLS else NUMBERS_EVERYWHERE.get(name)
    return number if isinstance(number, (int, float)) else None


def _step(add: Adder, source: fx.Node, dim: int, part: Any) -> fx.Node:
    return add(operator.getitem, source, (*[FULL] * dim, part))


def _new_dims(parts: list[Any]) -> list[int]:
    """The dimensions of a result that ``None`` made."""
    left = [part for part in parts if part is None or isinstance(part, slice)]
    return [dim for dim, part in enumerate(left) if part is None]


def inverse(add: Adder, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    """The parent of a view after the view was given a new value.

    Raises:
        Refusal: for views that are read only here.
    """
    name, args, fake = operation(view), view.args[1:], _fake(parent)
    if writes_in_place(view):
        return new
    if view.target is operator.getitem:
        parts = list(args[0]) if isinstance(args[0], tuple) else [args[0]]
        if any(isinstance(part, (bool, list)) for part in parts):
            raise Refusal("an index of a kind not known here", Cause.WRITTEN)
        return _scattered(add, parent, expanded(parts, fake.ndim), new)
    if name in IN_ORDER and hint(_fake(view).numel()) == hint(fake.numel()):
        return add("reshape_as", new, parent)
    if view.kwargs:
        raise Refusal(f"{view.name} is a view through which nothing is written here", Cause.WRITTEN)
    if name in TRANSPOSES:
        return add(name, new, *args)
    if name == "permute":
        order: Any = args[0] if isinstance(args[0], (tuple, list)) else args
        back = sorted(range(fake.ndim), key=lambda dim: order[dim] % fake.ndim)
        return add("permute", new, back)
    if name == "select":
        return add(torch.select_scatter, parent, new, *args)
    if name == "narrow":
        dim, start, length = args
        return _put_slice(add, parent, new, dim, start, start + length)  # type: ignore[operator]
    if name == "slice":
        return _put_slice(add, parent, new, *args)
    raise Refusal(f"{view.name} is a view through which nothing is written here", Cause.WRITTEN)
