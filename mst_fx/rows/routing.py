"""What is known of the integers that route rows to their experts.

Of ``N`` rows each has ``k`` *slots*, and each slot a *key*: the number of the matrix, of a stack of ``E``, that it meets. Slot ``s``
is of row ``s // k``. Before the products, slots are brought into the order of their keys::

    keys, perm = sort(key); x = rows[perm // k]; offs = cumsum(histc(keys, E, 0, E - 1)); y = grouped_mm(x, stack, offs)

What the proof of a product of groups needs is followed through the graph here, node by node, in any spelling: which values are keys
and what bounds them, which permutation sorts which keys, what of it says where a slot came from or goes back to, and which counts and
offsets are of which keys. None of it depends on what the numbers are:

- ``sort`` of a key gives a permutation ``p`` with ``key[p]`` ascending; ties may lie in any order;
- with ``offs = cumsum(counts of key)`` and all keys in ``[0, E)`` the group that holds place ``i`` is ``key[p[i]]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mst_fx.graph.sizes import expression
from mst_fx.graph.spelling import CASTS, COPIES, RESHAPES, argument, operation
from mst_fx.graph.values import is_plain, storage_keys, tensor_value, value
from mst_fx.graph.writes import mutated_storages

# ``histc`` computes the bin of a key in its own type; for no more bins than this it is the key (23 counts tried, 65,536 fails).
_MOST_BINS = 4096
# What represents all keys below the bound exactly.
_EXACT = {
    torch.int32: 2**31,
    torch.int64: 2**63,
    torch.float32: 2**24,
    torch.float64: 2**53,
    torch.int16: 2**15,
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A vector of keys, in the order of the elements of ``source``; all are in ``[0, bound)``."""

    source: fx.Node
    bound: int


@dataclasses.dataclass(frozen=True)
class Order:
    """The permutation by which ``sort`` brings the slots of ``key`` into the order of their keys."""

    key: Key
    sort: fx.Node


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys themselves, one a slot."""

    key: Key


@dataclasses.dataclass(frozen=True)
class SortedKeys:
    """The keys in ascending order."""

    order: Order

    @property
    def key(self) -> Key:
        """What was sorted."""
        return self.order.key


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Which slot lies at each place of the order."""

    order: Order


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which row the slot at each place of the order is of, if each row has ``per`` slots."""

    order: Order
    per: int


@dataclasses.dataclass(frozen=True)
class Inverse:
    """At which place of the order each slot lies."""

    order: Order


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many slots have each key of ``[0, bins)``."""

    key: Key
    bins: int


@dataclasses.dataclass(frozen=True)
class Offsets:
    """Where the slots of each key of ``[0, bins)`` end, in the order of the keys."""

    key: Key
    bins: int


@dataclasses.dataclass(frozen=True)
class OneHot:
    """For each key a row of ``bins`` zeros and a one."""

    key: Key
    bins: int


@dataclasses.dataclass(frozen=True)
class Places:
    """0, 1, 2, … as many as ``size``, an expression."""

    size: Any


Fact = Keys | SortedKeys | Permutation | Origin | Inverse | Counts | Offsets | OneHot | Places
Facts = dict[fx.Node, Fact]


def facts_of(graph: fx.Graph) -> Facts:
    """What is known of the integers of a graph, by node; nothing of what is written to in place."""
    facts: Facts = {}
    mutated = mutated_storages(graph)
    for node in graph.nodes:
        rule = _RULES.get(operation(node))
        found = (rule(node, facts) if rule is not None else None) or _gathered_by(node)
        if found is not None and mutated.isdisjoint(storage_keys(node)):
            facts[node] = found
    return facts


def picked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The source and the indices of ``source[indices]``, a vector of indices into the first dimension; None for other nodes.

    Dimensions of size 1 may come in behind, as in ``source[indices, None]``.
    """
    name = operation(node)
    if name == "getitem":
        source, index = node.args
    elif name == "index":
        source, index = node.args
        if isinstance(index, (list, tuple)):
            index = index[0] if len(index) == 1 else None
    elif name == "index_select" and argument(node, "dim") == 0:
        source, index = node.args[0], argument(node, "index")
    else:
        return None
    if isinstance(index, tuple) and index and all(part is None or part is Ellipsis for part in index[1:]):
        index = index[0]
    if not isinstance(source, fx.Node) or not isinstance(index, fx.Node) or tensor_value(source) is None:
        return None
    fake = tensor_value(index)
    if fake is None or fake.ndim != 1 or fake.dtype not in (torch.int32, torch.int64):
        return None
    return source, index


def slot_count(fake: torch.Tensor) -> Any:
    """How many elements a vector has, as an expression."""
    return expression(fake.shape[0])


# Rules


def _gathered_by(index: fx.Node) -> Keys | None:
    """Integers by which something is gathered lie below its size, or the program fails there: experts that a table names (DeepSeek-V4)."""
    fake = tensor_value(index)
    if fake is None or fake.dtype != torch.int64 or not is_plain(fake):
        return None
    for reader in index.users:
        source, dim = argument(reader, "input"), argument(reader, "dim")
        is_read = operation(reader) == "gather" and argument(reader, "index") is index and bool(reader.users)
        whole = tensor_value(source) if isinstance(source, fx.Node) else None
        if is_read and whole is not None and isinstance(dim, int) and isinstance(whole.shape[dim], int):
            return Keys(Key(index, whole.shape[dim]))
    return None


def _fact(node: Any, facts: Facts) -> Fact | None:
    return facts.get(node) if isinstance(node, fx.Node) else None


def _of_pick(node: fx.Node, facts: Facts) -> Fact | None:
    """A member of a tuple, or elements picked by an index."""
    if operation(node) == "getitem" and isinstance(node.args[1], int):
        source: Any = node.args[0]
        return _of_member(node, source, node.args[1], facts) if tensor_value(source) is None else None
    found = picked(node)
    if found is None:
        return None
    source, index = _fact(found[0], facts), _fact(found[1], facts)
    if isinstance(source, Keys) and isinstance(index, Permutation) and source.key == index.order.key:
        return SortedKeys(index.order)
    return None


def _of_member(node: fx.Node, source: fx.Node, member: int, facts: Facts) -> Fact | None:
    name = operation(source)
    if name in ("topk", "max", "min") and member == 1:
        return _below_size(node, source, -1)
    if name == "sort":
        found = _sorted(source, facts)
        return found[member] if found is not None else None
    return None


def _below_size(node: fx.Node, source: fx.Node, default: int) -> Keys | None:
    """Indices along a dimension lie below its size."""
    picked_from: Any = source.args[0] if source.args else None
    fake = tensor_value(picked_from) if isinstance(picked_from, fx.Node) else None
    dim = argument(source, "dim", default)
    if fake is None or not isinstance(dim, int) or not isinstance(fake.shape[dim], int):
        return None
    return Keys(Key(node, fake.shape[dim]))


def _of_argmax(node: fx.Node, facts: Facts) -> Fact | None:
    return _below_size(node, node, -1) if argument(node, "dim") is not None else None


def _sorted(node: fx.Node, facts: Facts) -> tuple[Fact | None, Fact] | None:
    """The facts of what a sort gives: the values, and the order."""
    source: Any = node.args[0] if node.args else None
    known, fake = _fact(source, facts), tensor_value(source) if isinstance(source, fx.Node) else None
    is_ascending = not argument(node, "descending", False)
    if fake is None or fake.ndim != 1 or not is_ascending:
        return None
    if isinstance(known, Keys):
        order = Order(known.key, node)
        return SortedKeys(order), Permutation(order)
    if isinstance(known, Permutation):
        return None, Inverse(known.order)
    return None


def _of_argsort(node: fx.Node, facts: Facts) -> Fact | None:
    found = _sorted(node, facts)
    return found[1] if found is not None else None


def _of_view(node: fx.Node, facts: Facts) -> Fact | None:
    """The same elements in the same order; what is said of a vector, as a vector."""
    known, fake = _fact(node.args[0] if node.args else None, facts), tensor_value(node)
    if fake is None or any(isinstance(arg, torch.dtype) for arg in node.args):
        return None
    return known if isinstance(known, Keys) or fake.ndim == 1 else None


def _of_cast(node: fx.Node, facts: Facts) -> Fact | None:
    known, fake = _fact(node.args[0] if node.args else None, facts), tensor_value(node)
    if known is None or fake is None:
        return None
    if isinstance(known, (Keys, SortedKeys)):
        return known if known.key.bound <= _EXACT.get(fake.dtype, 0) else None
    return known if fake.dtype in (torch.int32, torch.int64) else None


def _of_clamp(node: fx.Node, facts: Facts) -> Fact | None:
    """Keys that no bound of the clamp touches."""
    known = _fact(node.args[0] if node.args else None, facts)
    low, high = argument(node, "min"), argument(node, "max")
    if not isinstance(known, (Keys, SortedKeys)):
        return None
    bound = known.key.bound
    is_touched = (low is not None and not (isinstance(low, int) and low <= 0)) or (
        high is not None and not (isinstance(high, int) and high >= bound - 1)
    )
    return None if is_touched else known


def _of_fill(node: fx.Node, facts: Facts) -> Fact | None:
    """Keys of which some become another number below the bound; all of the last one, where the mask says so: no expert's."""
    known, mask, number = _fact(node.args[0], facts), argument(node, "mask"), argument(node, "value")
    if not isinstance(known, Keys) or type(number) is not int or not 0 <= number < known.key.bound:
        return None
    last, is_last_out = known.key.bound - 1, False
    if isinstance(mask, fx.Node) and operation(mask) in ("eq", "ge") and number < last:
        is_last_out = _fact(mask.args[0], facts) == known and bool(mask.args[1] == last)
    return Keys(Key(node, last if is_last_out else known.key.bound))


def _of_join(node: fx.Node, facts: Facts) -> Fact | None:
    """Keys beside keys."""
    parts = node.args[0]
    known = [_fact(part, facts) for part in parts] if isinstance(parts, (list, tuple)) else []
    bounds = [part.key.bound for part in known if isinstance(part, Keys)]
    return Keys(Key(node, max(bounds))) if known and len(bounds) == len(known) else None


def _of_division(node: fx.Node, facts: Facts) -> Fact | None:
    known = _fact(node.args[0] if node.args else None, facts)
    by = argument(node, "other", node.args[1] if len(node.args) > 1 else None)
    is_whole = operation(node) == "floor_divide" or argument(node, "rounding_mode") in ("floor", "trunc")
    if isinstance(known, Permutation) and is_whole and type(by) is int and by > 0:
        return Origin(known.order, by)
    return None


def _of_histogram(node: fx.Node, facts: Facts) -> Fact | None:
    """The bin of a key ``x`` of ``[0, bins)`` is ``floor(x / (high - low) * bins)``, which is ``x``, the last one included."""
    known = _fact(node.args[0] if node.args else None, facts)
    bins, low, high = argument(node, "bins", 100), argument(node, "min", 0), argument(node, "max", 0)
    if not isinstance(known, (Keys, SortedKeys)) or type(bins) is not int or bins > _MOST_BINS:
        return None
    key = known.key
    # With one bin and no range, the range is that of the keys, which all are 0.
    is_whole = key.bound <= bins and low == 0 and high in (bins - 1, bins) and (high > 0 or bins == 1)
    return Counts(key, bins) if is_whole else None


def _of_one_hot(node: fx.Node, facts: Facts) -> Fact | None:
    known, fake = _fact(node.args[0] if node.args else None, facts), tensor_value(node)
    if not isinstance(known, (Keys, SortedKeys)) or fake is None or not isinstance(fake.shape[-1], int):
        return None
    return OneHot(known.key, fake.shape[-1]) if known.key.bound <= fake.shape[-1] else None


def _of_sum(node: fx.Node, facts: Facts) -> Fact | None:
    """The sum of all rows of zeros and a one."""
    source: Any = node.args[0] if node.args else None
    known, fake = _fact(source, facts), tensor_value(node)
    if not isinstance(known, OneHot) or fake is None or fake.ndim != 1:
        return None
    operand = tensor_value(source)
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if operand is None or not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
        return None
    return (
        Counts(known.key, known.bins)
        if {d % operand.ndim for d in dims} == set(range(operand.ndim - 1))
        else None
    )


def _of_running_sum(node: fx.Node, facts: Facts) -> Fact | None:
    known, fake = _fact(node.args[0] if node.args else None, facts), tensor_value(node)
    if isinstance(known, Counts) and fake is not None and fake.ndim == 1:
        return Offsets(known.key, known.bins)
    return None


def _of_range(node: fx.Node, facts: Facts) -> Fact | None:
    fake = tensor_value(node)
    starts_at_0 = len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0)
    if fake is None or fake.ndim != 1 or not starts_at_0 or "step" in node.kwargs or "start" in node.kwargs:
        return None
    return Places(slot_count(fake)) if fake.dtype in (torch.int32, torch.int64) else None


def _of_put(node: fx.Node, facts: Facts) -> Fact | None:
    """``blank[perm] = arange(n)`` out of place: each slot's place."""
    blank: Any = node.args[0]
    if operation(node) == "index_put":
        places = argument(node, "indices")
        index = places[0] if isinstance(places, (list, tuple)) and len(places) == 1 else None
        source = argument(node, "values")
        is_plain_write = not argument(node, "accumulate", False)
    else:
        index, source = argument(node, "index"), argument(node, "src")
        is_plain_write = argument(node, "dim") == 0
    known, numbers = _fact(index, facts), _fact(source, facts)
    fake, whole = value(node), tensor_value(index) if isinstance(index, fx.Node) else None
    if (
        not is_plain_write
        or not isinstance(known, Permutation)
        or not isinstance(numbers, Places)
        or whole is None
    ):
        return None
    is_blank = isinstance(blank, fx.Node) and isinstance(fake, torch.Tensor) and fake.ndim == 1
    if not is_blank or slot_count(fake) != slot_count(whole) or numbers.size != slot_count(whole):
        return None
    return Inverse(known.order) if fake.dtype in (torch.int32, torch.int64) else None


_Rule = Callable[[fx.Node, Facts], Fact | None]

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("getitem", "index", "index_select"), _of_pick),
    "argmax": _of_argmax,
    "argsort": _of_argsort,
    **dict.fromkeys((*RESHAPES, *COPIES, "squeeze", "unsqueeze"), _of_view),
    **dict.fromkeys(CASTS, _of_cast),
    "clamp": _of_clamp,
    "masked_fill": _of_fill,
    **dict.fromkeys(("cat", "stack"), _of_join),
    **dict.fromkeys(("floor_divide", "div"), _of_division),
    "histc": _of_histogram,
    "one_hot": _of_one_hot,
    "sum": _of_sum,
    "cumsum": _of_running_sum,
    "arange": _of_range,
    **dict.fromkeys(("index_put", "scatter"), _of_put),
}
