"""RUN TIME: which keys each query of a formula may see, from the vectors that it names.

:func:`allowed`
    the mask of some queries and some keys, when a chunk needs it;
:func:`reach_of`
    which keys each chunk of queries can see at all, and whether the whole mask is causal, all true, or a
    window within spans of tokens: by sorting and searching in the vectors, in O(S log S).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mst_fx.masks import formula
from mst_fx.masks.formula import And, Compare, Constant, Holds, Mask, Not, Or

# Values. Key vectors are [b, K], query vectors [b, Q], with b = 1 or B.


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The vectors a formula names."""

    keys: Sequence[Tensor]
    queries: Sequence[Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return (self.keys if formula.is_key(name) else self.queries)[int(name[1:])]


def allowed(
    mask: Mask, vectors: Vectors, start: int, end: int, first: int, last: int, device: torch.device
) -> Tensor:
    """``[b, end - start, last - first]``: which of some keys some queries may see."""

    def read(name: str) -> Any:
        if not name:
            return 0
        vector = vectors[name]
        return vector[:, None, first:last] if formula.is_key(name) else vector[:, start:end, None]

    def evaluate(part: Mask) -> Tensor:
        match part:
            case Compare(op, left, right, offset):
                found = formula.COMPARE[op](read(left), read(right) + offset)
            case Holds(vector):
                found = read(vector)
            case Not(inner):
                found = ~evaluate(inner)
            case Constant(number):
                found = torch.full((), number, device=device)
            case And(parts):
                found = functools.reduce(operator.and_, map(evaluate, parts))
            case Or(parts):
                found = functools.reduce(operator.or_, map(evaluate, parts))
        return found if isinstance(found, Tensor) else torch.full((), found, device=device)

    return evaluate(mask)


@dataclasses.dataclass
class Interval:
    """Keys ``lo <= k < hi`` of each query, ``[b, Q or 1]``; all of them are allowed if ``exact``."""

    lo: Tensor
    hi: Tensor
    exact: Tensor


def interval_of(mask: Mask, vectors: Vectors, queries: int, keys: int, device: torch.device) -> Interval:
    """The keys that each of so many queries may see lie in it."""

    def filled(number: int) -> Tensor:
        return torch.full((1, 1), number, dtype=torch.int64, device=device)

    match mask:
        case Constant(is_true):  # filled on the device: a copy from the host would wait for it
            return Interval(filled(0), filled(keys if is_true else 0), torch.full((), True, device=device))
        case Compare(op, left, right, offset) if left and right:
            return _compared(op, vectors[left], vectors[right] + offset, keys)
        case Compare(op, left, right, offset):
            if left:
                return _of_keys(formula.COMPARE[op](vectors[left], offset))
            return _of_queries(formula.COMPARE[op](0, vectors[right] + offset), keys)
        case Holds(name) | Not(Holds(name)):
            vector = vectors[name].bool()
            vector = ~vector if isinstance(mask, Not) else vector
            return _of_keys(vector) if formula.is_key(name) else _of_queries(vector, keys)
        case And(parts) | Or(parts):
            found = [interval_of(part, vectors, queries, keys, device) for part in parts]
            return functools.reduce(_intersection if isinstance(mask, And) else _hull, found)
    raise AssertionError(mask)


def _compared(op: str, key: Tensor, query: Tensor, keys: int) -> Interval:
    """By binary search, where the key vector is sorted; otherwise all keys are in reach."""
    batch = max(key.shape[0], query.shape[0])
    key, query = key.expand(batch, -1).contiguous(), query.expand(batch, -1).contiguous()
    key, query = key.to(torch.int64), query.to(torch.int64)
    is_sorted = (key[:, 1:] >= key[:, :-1]).all()
    left = torch.searchsorted(key, query, right=False)
    right = torch.searchsorted(key, query, right=True)
    none, all_ = torch.zeros_like(left), torch.full_like(left, keys)
    lo, hi = {
        "le": (none, right),
        "lt": (none, left),
        "ge": (left, all_),
        "gt": (right, all_),
        "eq": (left, right),
        "ne": (none, all_),
    }[op]
    exact = is_sorted if op != "ne" else ((left == right).all() & is_sorted)
    return Interval(torch.where(is_sorted, lo, none), torch.where(is_sorted, hi, all_), exact)


def _of_keys(vector: Tensor) -> Interval:
    vector = vector.bool()
    keys = vector.shape[-1]
    place = torch.arange(keys, device=vector.device)
    first = torch.where(vector, place, keys).amin(-1, keepdim=True)
    last = torch.where(vector, place + 1, 0).amax(-1, keepdim=True)
    lo, hi = torch.minimum(first, last), last
    return Interval(lo, hi, (vector.sum(-1, keepdim=True) == hi - lo).all())


def _of_queries(vector: Tensor, keys: int) -> Interval:
    hi = torch.where(vector.bool(), keys, 0)
    return Interval(torch.zeros_like(hi), hi, torch.ones((), dtype=torch.bool, device=vector.device))


def _intersection(a: Interval, b: Interval) -> Interval:
    lo, hi = torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi)
    return Interval(lo, torch.maximum(lo, hi), a.exact & b.exact)


def _hull(a: Interval, b: Interval) -> Interval:
    a_empty, b_empty = a.lo >= a.hi, b.lo >= b.hi
    lo = torch.where(a_empty, b.lo, torch.where(b_empty, a.lo, torch.minimum(a.lo, b.lo)))
    hi = torch.where(a_empty, b.hi, torch.where(b_empty, a.hi, torch.maximum(a.hi, b.hi)))
    touch = a_empty | b_empty | ((a.lo <= b.hi) & (b.lo <= a.hi))
    return Interval(lo, hi, a.exact & b.exact & touch.all())


def _sees_something(
    mask: Mask, vectors: Vectors, found: Interval, queries: int, keys: int, device: torch.device
) -> Tensor:
    """Which queries certainly see a key: of intervals and key padding, by counting keys."""
    parts = formula.conjuncts(mask)
    padding = [part for part in parts if is_padding(part)]
    if not padding:
        return found.exact & (found.lo < found.hi)
    rest = formula.both(part for part in parts if part not in padding)
    interval = interval_of(rest, vectors, queries, keys, device)
    visible = torch.ones((1, keys), dtype=torch.bool, device=device)
    for part in padding:
        visible = visible & allowed(part, vectors, 0, queries, 0, keys, device)[:, 0]
    counts = torch.nn.functional.pad(visible.to(torch.int64).cumsum(-1), (1, 0))
    batch = max(counts.shape[0], interval.lo.shape[0])
    lo, hi = (x.expand(batch, queries).contiguous() for x in (interval.lo, interval.hi))
    counts = counts.expand(batch, -1)
    return interval.exact & (counts.gather(1, hi) > counts.gather(1, lo))


def is_padding(mask: Mask) -> bool:
    """Whether a formula picks keys by a Boolean vector."""
    match mask:
        case Holds(vector) | Not(Holds(vector)):
            return formula.is_key(vector)
    return False


GENERAL, CAUSAL, FULL, SPANS = 0, 1, 2, 3
PARTIAL, WHOLE, BLIND = 0, 1, 2
HEADER = 2  # rows of a reach's table before those of its chunks


class Reach(NamedTuple):
    """Which keys the queries of a mask can see; on the vectors' device.

    Attributes:
        table: int64 ``[HEADER + chunks, 3]``. Row 0 is ``(form, left, right)`` with form one of
            :data:`GENERAL`, :data:`CAUSAL`, :data:`FULL` and :data:`SPANS`; row 1 ``(spans, longest, even)``.
            Row ``HEADER + i`` is ``(first, last, kind)``: all keys that chunk i sees lie in
            ``first <= k < last``, and kind is :data:`WHOLE` if each of its queries sees them all,
            :data:`BLIND` if some query may see none and masked scores are finite, otherwise
            :data:`PARTIAL`.
        starts: int32 ``[b·Q + 1]``: where each span starts among the b·Q tokens, then b·Q.

    Form :data:`SPANS`: the tokens fall into spans that see nothing of each other, and within its span a
    query sees ``left`` tokens before itself and ``right`` after it (-1: all). There are ``spans`` of them in
    all b sequences, the longest of ``longest`` tokens; ``even``: each starts at a multiple of ``longest``.
    """

    table: Tensor
    starts: Tensor


def native_table(form: int) -> Tensor:
    """The table of a form that needs no chunks."""
    return torch.tensor([[form, 0, 0], [0, 0, 0]])


def reach_of(mask: Mask, vectors: Vectors, queries: int, keys: int, chunk: int, is_finite: bool) -> Reach:
    """Which keys each chunk of queries can see.

    Args:
        is_finite: a masked score is a finite number, as when ``finfo.min`` is added: a query that sees
            no key sees all alike then, and every chunk that may hold one reaches for all keys.
    """
    device = (
        [*vectors.keys, *vectors.queries][0].device
        if vectors.keys or vectors.queries
        else torch.device("cpu")
    )
    found = interval_of(mask, vectors, queries, keys, device)
    shape = (max(found.lo.shape[0], found.hi.shape[0]), queries)
    lo, hi, exact = found.lo.expand(shape), found.hi.expand(shape), found.exact
    place = torch.arange(queries, device=device)
    is_full = exact & (lo == 0).all() & (hi == keys).all()
    is_causal = exact & (lo == 0).all() & (hi == place + 1).all() & (queries == keys)
    is_spans, header, starts = _spans(lo, hi, place)
    is_spans = is_spans & exact & (queries == keys)
    form = torch.where(is_spans, SPANS, GENERAL)
    form = torch.where(is_full, FULL, torch.where(is_causal, CAUSAL, form))
    chunks = -(-queries // chunk)
    padding = chunks * chunk - queries
    is_empty = lo >= hi
    blind = torch.zeros_like(is_empty)
    if is_finite:
        blind = ~_sees_something(mask, vectors, found, queries, keys, device).expand(shape)
        lo, hi = torch.where(blind, 0, lo), torch.where(blind, keys, hi)
        is_empty = torch.zeros_like(is_empty)

    def split(vector: Tensor, fill: int) -> Tensor:
        padded = torch.nn.functional.pad(vector, (0, padding), value=fill)
        return padded.view(shape[0], chunks, chunk).transpose(0, 1).flatten(1)

    first = split(torch.where(is_empty, keys, lo), keys).amin(-1)
    last = split(torch.where(is_empty, 0, hi), 0).amax(-1)
    first = torch.minimum(first, last)
    highest, lowest = split(lo, 0).amax(-1), split(hi, keys).amin(-1)
    whole = exact & (highest == first) & (lowest == last)
    kind = torch.where(whole, WHOLE, PARTIAL)
    kind = torch.where(split(blind.to(torch.int64), 0).amax(-1) > 0, BLIND, kind)
    head = torch.stack([form, *header]).view(HEADER, 3)
    return Reach(torch.cat([head, torch.stack([first, last, kind], 1)]), starts)


def _spans(lo: Tensor, hi: Tensor, place: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Whether intervals ``[b, Q]`` are those of :data:`SPANS`; the rest of the header; the starts."""
    size = place.numel()

    def least_from(x: Tensor) -> Tensor:  # of each place and those after it
        return x.flip(1).cummin(1).values.flip(1)

    seen_before = torch.nn.functional.pad(hi.cummax(1).values[:, :-1], (1, 0))
    is_start = (seen_before <= place) & (least_from(lo) >= place)
    start = torch.where(is_start, place, 0).cummax(1).values
    end = least_from(torch.nn.functional.pad(torch.where(is_start, place, size)[:, 1:], (0, 1), value=size))
    left, right, longest = (place - lo).amax(), (hi - 1 - place).amax(), (end - start).amax()
    fits = (lo == torch.maximum(start, place - left)) & (hi == torch.minimum(end, place + 1 + right))
    is_spans = fits.all() & (left >= 0) & (right >= 0)
    left, right = (torch.where(length >= longest - 1, -1, length) for length in (left, right))
    even = (is_start == (place % longest == 0)).all().to(torch.int64)
    flat = is_start.flatten()
    total = flat.numel()
    starts = torch.full((total + 1,), total, dtype=torch.int32, device=place.device)
    count = flat.cumsum(0)
    index = torch.arange(total, dtype=torch.int32, device=place.device)
    starts.scatter_(0, torch.where(flat, count - 1, total), torch.where(flat, index, total))
    return is_spans, [left, right, count[-1], longest, even], starts
