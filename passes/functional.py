"""Writes in place as new values, where nobody outside of the graph can see the tensor that is written to.

Before::

    t = y.clone(); m = t == -100; setitem(t, m, 0); v = t.view(-1); loss(logits, v)

After::

    t = y.clone(); m = t == -100; u = t.masked_fill(m, 0); v = u.view(-1); loss(logits, v)

Whoever read the tensor, or a view of it, after a write reads the new value. One storage is rewritten
wholly or not at all, and only if

- a call in this graph makes it (no input, parameter or buffer has it), and one output at most is a view of it;
- every view of it in the graph is of a kind known here, as is every write, and no sub-graph reads it;
- nothing in it has a gradient, or all its views and writes run with gradients on and no write goes through a
  ``detach``: a write that autograd does not see has no equal without it.

Who shares a storage with whom is read from the fakes, which Dynamo made by running the very calls.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import add_call, copy_provenance
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.modes import Context, contexts, in_context
from mst_fx.graph.names import target_name
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import (
    CASTS,
    CHECKPOINTS,
    EXPANDS,
    FULLS,
    NUMBERS_EVERYWHERE,
    RESHAPES,
    SPLITS,
    TRANSPOSES,
    argument,
    is_in_place_operator,
    operation,
    out_of_place,
)
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of
from mst_fx.graph.writes import writes_in_place
from mst_fx.passes.picks import are_places
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.ops import HigherOrderOperator

log = logging.getLogger("mst_fx")

_ACTIVATIONS = (
    *(F.relu, F.silu, F.elu, F.leaky_relu, F.hardtanh, F.relu6, F.mish, F.selu, F.celu, F.threshold),
    *(F.hardsigmoid, F.hardswish),
)

# Views whose elements come in the order of those of their source.
_IN_ORDER = RESHAPES | CASTS | {"squeeze", "unsqueeze", "contiguous", "alias"}
# Views that are made anew after a write, but through which nothing is written.
_READ_ONLY = EXPANDS | SPLITS | {"movedim", "mT", "diagonal"}
_VIEWS = _IN_ORDER | TRANSPOSES | _READ_ONLY | {"detach", "permute", "narrow", "select", "slice"}
_FULL = slice(None, None, None)


def make_functional(graph: fx.Graph) -> None:
    """Replaces writes in place by new values where nobody else can see the written tensor."""
    done: set[int] = set()
    while (storage := _next_storage(graph, done)) is not None:
        done.add(storage)
        rewrite = _Rewrite(graph, storage)
        try:
            rewrite.run()
        except Refusal as refusal:
            log.debug("a write in place is left: %s", refusal)
            rewrite.undo()
        except Exception:  # a call does not run on fakes as it is made here; old nodes are as they were
            log.debug("a write in place is left", exc_info=True)
            rewrite.undo()


def _next_storage(graph: fx.Graph, done: set[int]) -> int | None:
    for node in graph.nodes:
        written = _written(node)
        fake = tensor_value(written) if written is not None else None
        if fake is not None and is_plain(fake) and _storage(fake) not in done:
            return _storage(fake)
    return None


def _written(node: fx.Node) -> fx.Node | None:
    """What a node writes to, if it is its first operand."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and writes_in_place(node) else None


def _storage(fake: torch.Tensor) -> int:
    key = storage_key(fake)
    assert key is not None  # asked of plain tensors only
    return key


class _Rewrite:
    """One storage's writes as new values: checked first, made beside the old nodes, put in their place last."""

    def __init__(self, graph: fx.Graph, storage: int) -> None:
        self.graph, self.storage = graph, storage
        self.modes = contexts(graph)
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.views = [node for node in graph.nodes if node.op != "output" and self._has(node)]
        self.parents: dict[fx.Node, fx.Node] = {}
        self.new: list[fx.Node] = []
        # What stands for a view since the last write, and the readers to be changed.
        self.current: dict[fx.Node, fx.Node] = {}
        self.changes: list[tuple[fx.Node, fx.Node, fx.Node]] = []

    def _has(self, node: fx.Node) -> bool:
        return any(is_plain(fake) and _storage(fake) == self.storage for fake in tensors_of(node))

    def run(self) -> None:
        self._check()
        readers = {user for view in self.views for user in view.users}
        writers = []
        for node in sorted(readers, key=self.order.__getitem__):
            if writes_in_place(node) and self._is_view(node.args[0]):
                self._write(node)
                writers.append(node)
            else:
                for operand in node.all_input_nodes:
                    if operand in self.current and self.current[operand] is not operand:
                        self.changes.append((node, operand, self.current[operand]))
        self._commit(writers)

    def undo(self) -> None:
        for node in reversed(self.new):
            self.graph.erase_node(node)

    # Checks

    def _check(self) -> None:
        """Raises a Refusal where the writes have to stay."""
        root = self._root()
        for view in self.views:
            if view is not root:
                self._check_view(view)
        readers = {user for view in self.views for user in view.users}
        if any(self.modes[node].level for node in (*self.views, *readers)):
            raise Refusal(f"{root.name} is used inside of a torch.func transform", Cause.NOT_PLAIN)
        for reader in readers:
            self._check_reader(reader)
        (output,) = self.graph.find_nodes(op="output")
        if sum(self._is_view(node) for node in output.all_input_nodes) > 1:
            raise Refusal("several outputs of the graph share what is written to", Cause.WRITTEN)
        self._check_gradients()

    def _root(self) -> fx.Node:
        """The node that makes the storage."""
        first = self.views[0]
        if tensor_value(first) is None:  # a tuple: its member is what is written to
            members = [user for user in first.users if self._has(user)]
            if len(members) != 1 or any(user.target is not operator.getitem for user in first.users):
                raise Refusal(f"{first.name} is written to, and no tensor", Cause.WRITTEN)
            self.views.remove(first)
            maker, first = first, members[0]
        else:
            maker = first
        if maker.op not in ("call_function", "call_method") or first is not self.views[0]:
            raise Refusal(f"{first.name} is written to, and not made here", Cause.WRITTEN)
        is_graph = isinstance(maker.target, HigherOrderOperator)
        if is_graph and operation(maker) not in CHECKPOINTS:
            raise Refusal(f"{first.name} comes from a sub-graph", Cause.WRITTEN)
        return first

    def _is_view(self, node: Any) -> bool:
        return node is self.views[0] or (isinstance(node, fx.Node) and node in self.parents)

    def _check_view(self, view: fx.Node) -> None:
        parent = view.args[0] if view.args else None
        others = view.all_input_nodes[1:]
        if not isinstance(parent, fx.Node) or not self._is_view(parent):
            raise Refusal(f"{view.name} is no view of {self.views[0].name}", Cause.WRITTEN)
        known_index = view.target is operator.getitem
        if not known_index and not writes_in_place(view) and operation(view) not in _VIEWS:
            raise Refusal(f"{view.name} is a view of a kind not known here", Cause.WRITTEN)
        if not writes_in_place(view) and any(self._has(other) for other in others):
            raise Refusal(f"{view.name} is a view of two tensors", Cause.WRITTEN)
        if any(fake.dtype != tensors_of(parent)[0].dtype for fake in tensors_of(view)):
            raise Refusal(f"{view.name} is a view as another type", Cause.WRITTEN)
        self.parents[view] = parent

    def _check_reader(self, reader: fx.Node) -> None:
        if any(not is_plain(fake) for fake in tensors_of(reader)):
            raise Refusal(f"{reader.name} is no plain tensor", Cause.NOT_PLAIN)
        if isinstance(reader.target, HigherOrderOperator) or reader.op == "call_module":
            raise Refusal(f"{reader.name} calls a sub-graph", Cause.OPAQUE)
        if writes_in_place(reader) and _twin(reader) is None:
            raise Refusal(
                f"{reader.name} ({target_name(reader)}) writes in a way not known here", Cause.WRITTEN
            )

    def _check_gradients(self) -> None:
        writers = [user for view in self.views for user in view.users if writes_in_place(user)]
        fakes = [fake for node in self.views for fake in tensors_of(node)]
        fakes += [
            fake for writer in writers for operand in writer.all_input_nodes for fake in tensors_of(operand)
        ]
        if not any(fake.requires_grad for fake in fakes):
            return
        if not all(self.modes[node].grad for node in (*self.views, *writers)):
            raise Refusal("is written to without gradients, and has some", Cause.NO_GRAD)
        for writer in writers:
            view = writer.args[0]
            while view in self.parents:
                if operation(view) == "detach":  # type: ignore[arg-type]
                    raise Refusal(f"{writer.name} writes behind autograd's back", Cause.WRITTEN)
                view = self.parents[view]  # type: ignore[index]

    # Writes

    def _write(self, node: fx.Node) -> None:
        """Adds the new values of the tensor and of its views that are read later, before the write."""
        written, twin = node.args[0], _twin(node)
        assert isinstance(written, fx.Node) and twin is not None
        add = _Adder(self.graph, node, self.modes[node], self.new)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._now)
        found = twin(add, *args, **kwargs)
        fresh = {written: found}
        view = written
        while view in self.parents:
            parent = self.parents[view]
            found = _inverse(add, view, self._now(parent), found)
            fresh[parent] = found
            view = parent
        for known in self.views:
            if self.order[known] >= self.order[node]:
                break
            if self._is_read_after(known, node):
                self._derive(add, known, fresh)
        self.current = fresh
        if node in self.parents:  # a write that returns what it wrote to
            fresh[node] = fresh[written]

    def _now(self, node: fx.Node) -> fx.Node:
        return self.current.get(node, node)

    def _is_read_after(self, view: fx.Node, node: fx.Node) -> bool:
        return any(self.order.get(user, -1) > self.order[node] for user in view.users)

    def _derive(self, add: _Adder, view: fx.Node, fresh: dict[fx.Node, fx.Node]) -> fx.Node:
        """The view of the new value."""
        if view not in fresh:
            source = self._derive(add, self.parents[view], fresh)
            if writes_in_place(view):  # which returned what it wrote to
                fresh[view] = source
            else:
                fresh[view] = add(view.target, source, *view.args[1:], **view.kwargs)
        return fresh[view]

    def _commit(self, writers: list[fx.Node]) -> None:
        for reader, old, new in self.changes:
            reader.replace_input_with(old, new)
        for node in sorted({*self.views[1:], *writers}, key=self.order.__getitem__, reverse=True):
            if node in writers or not (node.users or node.is_impure()):
                self.graph.erase_node(node)
        for node in reversed(self.new):
            if not node.users:
                self.graph.erase_node(node)


class _Adder:
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
        shared = {
            _storage(t) for operand in found.all_input_nodes for t in tensors_of(operand) if is_plain(t)
        }
        return self("clone", found) if _storage(_fake(found)) in shared else found


def _fake(node: fx.Node) -> torch.Tensor:
    fake = tensor_value(node)
    if fake is None or not is_plain(fake):
        raise Refusal(f"{node.name} is no plain tensor", Cause.NOT_PLAIN)
    return fake


# Writes: functions of an adder and of the write's operands that make what the written tensor holds then.

_Twin = Callable[..., fx.Node]


def _twin(node: fx.Node) -> _Twin | None:
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
    def twin(add: _Adder, written: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        return add.like(add(target, written, *args, **kwargs), written)

    return twin


def _activation(target: Any, add: _Adder, written: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    bound = inspect.signature(target).bind(written, *args, **kwargs)
    bound.arguments["inplace"] = False
    return add.like(add(target, *bound.args, **bound.kwargs), written)


def _copy(add: _Adder, written: fx.Node, source: Any, non_blocking: bool = False) -> fx.Node:
    if not isinstance(source, fx.Node) or tensor_value(source) is None:
        return add(torch.full_like, written, source)
    if _fake(source).dtype != _fake(written).dtype:
        source = add("to", source, _fake(written).dtype)
    if list(map(expression, _fake(source).shape)) == list(map(expression, _fake(written).shape)):
        return add.like(add("clone", source), written)  # so that what is written to is not read
    everywhere = add(torch.ones_like, written, dtype=torch.bool)
    source = add(torch.where, everywhere, source, written)  # expands it, row by row
    return add.like(add("view_as", source, written), written)


def _fill(add: _Adder, written: fx.Node, value: Any) -> fx.Node:
    return _copy(add, written, value)


def _zero(add: _Adder, written: fx.Node) -> fx.Node:
    return add(torch.zeros_like, written)


def _set_item(add: _Adder, written: fx.Node, index: Any, source: Any) -> fx.Node:
    parts = list(index) if isinstance(index, tuple) else [index]
    device = _fake(written).device
    parts = [add(torch.tensor, list(p), device=device) if are_places(p) else p for p in parts]
    tensors = [part for part in parts if isinstance(part, fx.Node) and tensor_value(part) is not None]
    if not tensors:
        return _set_slices(add, written, parts, source)
    mask = _mask(add, written, parts, tensors[0]) if len(tensors) == 1 else None
    is_scalar = not isinstance(source, fx.Node) or (fake := tensor_value(source)) is None or not fake.ndim
    if is_scalar and mask is not None:
        return _masked(add, written, mask, source)
    parts = _expanded(parts, _fake(written).ndim - sum(_fake(t).ndim - 1 for t in tensors if _is_mask(t)))
    if any(part is not _FULL and part not in tensors for part in parts):
        raise Refusal("writes to slices and picked elements at once", Cause.WRITTEN)
    picks = len(tensors) == 1 and _fake(tensors[0]).ndim == 1 and _fake(tensors[0]).dtype == torch.int64
    if picks and not isinstance(source, fx.Node):
        return add.like(add("index_fill", written, parts.index(tensors[0]), tensors[0], source), written)
    if not isinstance(source, fx.Node):
        source = add("new_full", written, (), source)
    if _fake(source).dtype != _fake(written).dtype:
        source = add("to", source, _fake(written).dtype)
    places = [None if part is _FULL else part for part in parts]
    while places[-1] is None:
        places.pop()
    return add.like(add(torch.ops.aten.index_put.default, written, places, source), written)


def _is_mask(node: fx.Node) -> bool:
    return _fake(node).dtype == torch.bool


def _mask(add: _Adder, written: fx.Node, parts: list[Any], mask: fx.Node) -> fx.Node | None:
    """A mask, with dimensions of 1 where the index takes all, if it is the only thing in the index."""
    rest = [part for part in parts if part is not mask]
    if not _is_mask(mask) or any(part is not Ellipsis and part != _FULL for part in rest):
        return None
    ndim, missing = _fake(mask).ndim, _fake(written).ndim - _fake(mask).ndim
    if not ndim or rest.count(Ellipsis) > 1:
        return None
    at = parts.index(mask)
    before = missing - (len(parts) - at - 1) if Ellipsis in parts[:at] else at
    for _ in range(missing - before):
        mask = add("unsqueeze", mask, -1)
    return mask


def _masked(add: _Adder, written: fx.Node, mask: fx.Node, source: Any) -> fx.Node:
    is_tensor = isinstance(source, fx.Node) and tensor_value(source) is not None
    if is_tensor and _fake(source).dtype != _fake(written).dtype:
        source = add("to", source, _fake(written).dtype)
    return add.like(add("masked_fill", written, mask, source), written)


# Slices: the index ``[2:, ..., 0]``, one part a dimension.


def _expanded(parts: list[Any], ndim: int) -> list[Any]:
    """The index with the full slices that an ellipsis, or nothing at its end, stands for."""
    count = sum(part is not None and part is not Ellipsis for part in parts)
    parts = [*parts, Ellipsis] if Ellipsis not in parts else parts
    at = parts.index(Ellipsis)
    full = [*parts[:at], *[_FULL] * (ndim - count), *parts[at + 1 :]]
    return [_FULL if isinstance(part, slice) and part == _FULL else part for part in full]


def _set_slices(add: _Adder, written: fx.Node, parts: list[Any], source: Any) -> fx.Node:
    if any(isinstance(part, (bool, list)) for part in parts):
        raise Refusal("an index of a kind not known here", Cause.WRITTEN)
    parts = _expanded(parts, _fake(written).ndim)
    is_scalar = not isinstance(source, fx.Node) or (fake := tensor_value(source)) is None or not fake.ndim
    if all(part is _FULL for part in parts):
        return _copy(add, written, source)
    mask = _column_mask(add, written, parts) if is_scalar else None
    if mask is not None:
        return _masked(add, written, mask, source)
    part = add(operator.getitem, written, tuple(parts))
    return _scattered(add, written, parts, _copy(add, part, source))


def _column_mask(add: _Adder, written: fx.Node, parts: list[Any]) -> fx.Node | None:
    """``[V]``: the columns that an index of the last dimension alone names."""
    last, width = parts[-1], _fake(written).shape[-1]
    if any(part is not _FULL for part in parts[:-1]) or not isinstance(width, int) or len(parts) < 2:
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


def _scattered(add: _Adder, whole: fx.Node, parts: list[Any], new: fx.Node) -> fx.Node:
    """``whole`` with ``new`` in the place of ``whole[parts]``."""
    for dim in reversed(_new_dims(parts)):
        new = add("squeeze", new, dim)
    steps: list[tuple[fx.Node, int, Any]] = []
    dim, current = 0, whole
    real = [part for part in parts if part is not None]
    for part in real:
        if part is not _FULL:
            steps.append((current, dim, part))
            if part is not real[-1] or len(steps) > 1:
                current = _step(add, current, dim, part)
        dim += part is _FULL or isinstance(part, slice)
    for source, dim, part in reversed(steps):
        if isinstance(part, slice):
            new = _put_slice(add, source, new, dim, part.start, part.stop, part.step or 1)
        else:
            new = add(torch.select_scatter, source, new, dim, part)
    return new if steps else add.like(new, whole)


def _put_slice(
    add: _Adder,
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


def _step(add: _Adder, source: fx.Node, dim: int, part: Any) -> fx.Node:
    return add(operator.getitem, source, (*[_FULL] * dim, part))


def _new_dims(parts: list[Any]) -> list[int]:
    """The dimensions of a result that ``None`` made."""
    kept = [part for part in parts if part is None or isinstance(part, slice)]
    return [dim for dim, part in enumerate(kept) if part is None]


def _inverse(add: _Adder, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
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
        return _scattered(add, parent, _expanded(parts, fake.ndim), new)
    if name in _IN_ORDER and hint(_fake(view).numel()) == hint(fake.numel()):
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
