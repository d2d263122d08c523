"""Attention masks by structure: what a mask node says, and which keys each query may see.

A mask ``[B, 1, Q, K]`` is read as a Boolean formula (:data:`Mask`) of comparisons between a *key vector*
``[.., 1, K]``, a *query vector* ``[.., Q, 1]`` and numbers. The vectors stay in the graph, at O(S); the
formula is data, so nothing of S² elements is left. From formula and vectors follow

:func:`allowed`
    the mask of some queries and some keys, when a chunk needs it;
:func:`reach`
    which keys each chunk of queries can see at all, and whether the whole mask is causal, all true, or a
    window within spans of tokens: by sorting and searching in the vectors, in O(S log S).

Forms, with ``k0``, ``q0`` … the vectors (and an offset that is added to the second operand)::

    ("compare", "le", "k0", "q0", 0)     k0 <= q0                  causal, if both count tokens
    ("compare", "gt", "k0", "q0", -4096) k0 > q0 - 4096            a sliding window
    ("compare", "eq", "k1", "q1", 0)     k1 == q1                  the same document
    ("compare", "lt", "k0", "", 7)       k0 < 7                    a prefix
    ("true", "k2")                       k2                        key padding
    ("not", mask)  ("and", mask, …)  ("or", mask, …)  ("constant", True)
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.sizes import expression
from mst_fx.graph.values import is_plain, storage_key, tensor_value, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.ops import OpOverload

aten = torch.ops.aten

Mask = tuple[Any, ...]

TRUE: Mask = ("constant", True)

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
}
_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


def negated(mask: Mask) -> Mask:
    kind = mask[0]
    if kind == "constant":
        return ("constant", not mask[1])
    if kind == "not":
        inner: Mask = mask[1]
        return inner
    if kind == "compare":
        return ("compare", _NEGATED[mask[1]], *mask[2:])
    if kind in ("and", "or"):
        return ("or" if kind == "and" else "and", *(negated(part) for part in mask[1:]))
    return ("not", mask)


def joined(kind: str, parts: Sequence[Mask]) -> Mask:
    """The conjunction or disjunction of masks, flat and without constants."""
    neutral = kind == "and"
    flat: dict[Mask, None] = {}
    for part in parts:
        for inner in part[1:] if part[0] == kind else (part,):
            if inner == ("constant", not neutral):
                return inner  # type: ignore[no-any-return]
            if inner != ("constant", neutral):
                flat[inner] = None
    if not flat:
        return ("constant", neutral)
    return next(iter(flat)) if len(flat) == 1 else (kind, *flat)


def names(mask: Mask) -> list[str]:
    """The vectors a formula reads."""
    if mask[0] in ("compare", "true"):
        return [part for part in mask[1:] if isinstance(part, str) and part[:1] in ("k", "q")]
    if mask[0] == "constant":
        return []
    return [name for part in mask[1:] for name in names(part)]


def renamed(mask: Mask, new: Mapping[str, str]) -> Mask:
    if mask[0] in ("compare", "true"):
        return tuple(new.get(part, part) if isinstance(part, str) else part for part in mask)
    if mask[0] == "constant":
        return mask
    return (mask[0], *(renamed(part, new) for part in mask[1:]))


def describe(mask: Mask) -> str:
    """``k0 <= q0 and k1 == q1``."""
    kind = mask[0]
    if kind == "constant":
        return str(mask[1]).lower()
    if kind == "true":
        return str(mask[1])
    if kind == "not":
        return f"not {describe(mask[1])}"
    if kind == "compare":
        _, op, left, right, offset = mask
        sign = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}[op]
        other = right if right and not offset else f"{right} {offset:+}" if right else str(offset)
        return f"{left or '0'} {sign} {other}"
    inner = f" {kind} ".join(f"({describe(p)})" if p[0] in ("and", "or") else describe(p) for p in mask[1:])
    return inner


def parse(text: str) -> Mask:
    """The mask whose ``repr`` an op carries."""
    found: Mask = ast.literal_eval(text)
    return found


# Values. Key vectors are [b, K], query vectors [b, Q], with b = 1 or B.


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The vectors a formula names."""

    keys: Sequence[Tensor]
    queries: Sequence[Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return (self.keys if name[0] == "k" else self.queries)[int(name[1:])]


def allowed(
    mask: Mask, vectors: Vectors, start: int, end: int, first: int, last: int, device: torch.device
) -> Tensor:
    """``[b, end - start, last - first]``: which of some keys some queries may see."""

    def read(name: str) -> Any:
        if not name:
            return 0
        vector = vectors[name]
        return vector[:, None, first:last] if name[0] == "k" else vector[:, start:end, None]

    def evaluate(part: Mask) -> Tensor:
        kind = part[0]
        if kind == "compare":
            _, op, left, right, offset = part
            found = _COMPARE[op](read(left), read(right) + offset)
        elif kind == "true":
            found = read(part[1])
        elif kind == "not":
            found = ~evaluate(part[1])
        elif kind == "constant":
            found = torch.full((), part[1], device=device)
        else:
            combine = operator.and_ if kind == "and" else operator.or_
            found = functools.reduce(combine, map(evaluate, part[1:]))
        return found if isinstance(found, Tensor) else torch.full((), found, device=device)

    return evaluate(mask)


@dataclasses.dataclass
class _Interval:
    """Keys ``lo <= k < hi`` of each query, ``[b, Q or 1]``; all of them are allowed if ``exact``."""

    lo: Tensor
    hi: Tensor
    exact: Tensor


def _interval(mask: Mask, vectors: Vectors, queries: int, keys: int, device: torch.device) -> _Interval:
    def filled(number: int) -> Tensor:
        return torch.full((1, 1), number, dtype=torch.int64, device=device)

    kind = mask[0]
    if kind == "constant":  # filled on the device: a copy from the host would wait for it
        return _Interval(filled(0), filled(keys if mask[1] else 0), torch.full((), True, device=device))
    if kind == "compare":
        _, op, left, right, offset = mask
        if left and right:
            return _compared(op, vectors[left], vectors[right] + offset, keys)
        if left:
            return _of_keys(_COMPARE[op](vectors[left], offset))
        return _of_queries(_COMPARE[op](0, vectors[right] + offset), keys)
    if kind == "true":
        vector = vectors[mask[1]].bool()
        return _of_keys(vector) if mask[1][0] == "k" else _of_queries(vector, keys)
    if kind == "not":
        vector = ~vectors[mask[1][1]].bool()
        return _of_keys(vector) if mask[1][1][0] == "k" else _of_queries(vector, keys)
    parts = [_interval(part, vectors, queries, keys, device) for part in mask[1:]]
    return functools.reduce(_both if kind == "and" else _either, parts)


def _compared(op: str, key: Tensor, query: Tensor, keys: int) -> _Interval:
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
    return _Interval(torch.where(is_sorted, lo, none), torch.where(is_sorted, hi, all_), exact)


def _of_keys(vector: Tensor) -> _Interval:
    vector = vector.bool()
    keys = vector.shape[-1]
    place = torch.arange(keys, device=vector.device)
    first = torch.where(vector, place, keys).amin(-1, keepdim=True)
    last = torch.where(vector, place + 1, 0).amax(-1, keepdim=True)
    lo, hi = torch.minimum(first, last), last
    return _Interval(lo, hi, (vector.sum(-1, keepdim=True) == hi - lo).all())


def _of_queries(vector: Tensor, keys: int) -> _Interval:
    hi = torch.where(vector.bool(), keys, 0)
    return _Interval(torch.zeros_like(hi), hi, torch.ones((), dtype=torch.bool, device=vector.device))


def _both(a: _Interval, b: _Interval) -> _Interval:
    lo, hi = torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi)
    return _Interval(lo, torch.maximum(lo, hi), a.exact & b.exact)


def _either(a: _Interval, b: _Interval) -> _Interval:
    a_empty, b_empty = a.lo >= a.hi, b.lo >= b.hi
    lo = torch.where(a_empty, b.lo, torch.where(b_empty, a.lo, torch.minimum(a.lo, b.lo)))
    hi = torch.where(a_empty, b.hi, torch.where(b_empty, a.hi, torch.maximum(a.hi, b.hi)))
    touch = a_empty | b_empty | ((a.lo <= b.hi) & (b.lo <= a.hi))
    return _Interval(lo, hi, a.exact & b.exact & touch.all())


def _sees_something(
    mask: Mask, vectors: Vectors, found: _Interval, queries: int, keys: int, device: torch.device
) -> Tensor:
    """Which queries certainly see a key: of intervals and key padding, by counting keys."""
    parts = mask[1:] if mask[0] == "and" else (mask,)
    padding = [
        p for p in parts if p[0] in ("true", "not") and (p[1] if p[0] == "true" else p[1][1])[0] == "k"
    ]
    if not padding:
        return found.exact & (found.lo < found.hi)
    rest = joined("and", [p for p in parts if p not in padding])
    interval = _interval(rest, vectors, queries, keys, device)
    visible = torch.ones((1, keys), dtype=torch.bool, device=device)
    for part in padding:
        visible = visible & allowed(part, vectors, 0, queries, 0, keys, device)[:, 0]
    counts = torch.nn.functional.pad(visible.to(torch.int64).cumsum(-1), (1, 0))
    batch = max(counts.shape[0], interval.lo.shape[0])
    lo, hi = (x.expand(batch, queries).contiguous() for x in (interval.lo, interval.hi))
    counts = counts.expand(batch, -1)
    return interval.exact & (counts.gather(1, hi) > counts.gather(1, lo))


@dataclasses.dataclass(frozen=True)
class Given:
    """What is known of a mask that another graph has made as vectors (:mod:`mst_fx.passes.mask_breaks`).

    Attributes:
        formula: as it is read in this graph.
        is_finite: see :func:`reach`.
        vectors: the names of its vectors' nodes, keys first.
        chunk: queries a chunk, of what follows.
        known: the rows of its reach, flat; () if they are not known.
        reach: the names of the nodes that are the rows of its reach and its starts; () if these are known.
    """

    formula: Mask
    is_finite: bool
    vectors: tuple[str, ...]
    chunk: int
    known: tuple[int, ...]
    reach: tuple[str, ...]


GIVEN = "mst_given_masks"  # the meta key of a graph under which they are


GENERAL, CAUSAL, FULL, SPANS = 0, 1, 2, 3
PARTIAL, WHOLE, BLIND = 0, 1, 2
HEADER = 2  # rows of a reach before those of its chunks


class Reach(NamedTuple):
    """Which keys the queries of a mask can see; on the vectors' device.

    Attributes:
        rows: int64 ``[HEADER + chunks, 3]``. Row 0 is ``(form, left, right)`` with form one of
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

    rows: Tensor
    starts: Tensor


def native(form: int) -> Tensor:
    """The rows of a form that needs no chunks."""
    return torch.tensor([[form, 0, 0], [0, 0, 0]])


def reach(mask: Mask, vectors: Vectors, queries: int, keys: int, chunk: int, is_finite: bool) -> Reach:
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
    found = _interval(mask, vectors, queries, keys, device)
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
    left, right = (torch.where(reached >= longest - 1, -1, reached) for reached in (left, right))
    even = (is_start == (place % longest == 0)).all().to(torch.int64)
    flat = is_start.flatten()
    total = flat.numel()
    starts = torch.full((total + 1,), total, dtype=torch.int32, device=place.device)
    count = flat.cumsum(0)
    index = torch.arange(total, dtype=torch.int32, device=place.device)
    starts.scatter_(0, torch.where(flat, count - 1, total), torch.where(flat, index, total))
    return is_spans, [left, right, count[-1], longest, even], starts


def form_name(mask: Mask, found: Tensor | None, vectors: Vectors | None, queries: int) -> str:
    """The form in words, for the report: what is known when the graph is compiled."""
    if found is not None:
        form = int(found[0, 0])
        if form in (CAUSAL, FULL):
            return {CAUSAL: "causal", FULL: "full"}[form]
    if vectors is not None:
        exact = _interval(mask, vectors, queries, queries, torch.device("cpu"))
        if bool(exact.exact) and exact.lo.shape[-1] == queries == exact.hi.shape[-1]:
            place = torch.arange(queries)
            width = int((exact.hi - exact.lo).max())
            if bool((exact.hi == place + 1).all()):
                if bool((exact.lo == (place + 1 - width).clamp(min=0)).all()):
                    return f"window {width}"
                return "documents"
    parts = {_part_name(part) for part in (mask[1:] if mask[0] == "and" else (mask,))}
    if "" in parts:
        return f"general: {describe(mask)}"
    if len(parts - {"causal", "padding"}) > 0:
        parts.discard("causal")  # goes without saying
    return " + ".join(sorted(parts))


def _part_name(mask: Mask) -> str:
    if mask[0] == "true":
        return "padding" if mask[1][0] == "k" else ""
    if mask[0] != "compare" or not mask[2] or not mask[3]:
        return ""
    _, op, _, _, offset = mask
    if op == "eq":
        return "documents"
    if (op, offset) in (("le", 0), ("lt", 1)):
        return "causal"
    if op in ("gt", "ge") and offset < 0:
        return f"window {-offset + (op == 'ge')}"
    return ""


# Reading a mask in a graph


@dataclasses.dataclass(frozen=True)
class _Number:
    """A key or query vector plus an offset; without a vector a number."""

    name: str = ""
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class _Difference:
    """``key - query + offset`` (``sign`` 1) or ``query - key + offset`` (-1)."""

    key: str
    query: str
    sign: int
    offset: int
    absolute: bool = False


class Reader:
    """Reads mask nodes of one attention shape.

    Args:
        queries, keys: Q and K, ints or Dynamo's symbolic integers.
        resolve: maps a node to the node it stands for (a placeholder of a checkpointed body to the
            operand of its call); the identity otherwise.
        constant: the value of a node that depends on no input; None for others.
        mutated: storages that something writes to: what they hold depends on when it is read.
        batch_first: a mask of three dimensions is [B, Q, K]; otherwise they count from the last one, as
            everywhere in torch, and the first is that of heads.

    Attributes:
        key_nodes, query_nodes: the nodes that ``k0``, … and ``q0``, … name.
    """

    def __init__(
        self,
        queries: Any,
        keys: Any,
        resolve: Callable[[fx.Node], fx.Node],
        constant: Callable[[fx.Node], Any],
        mutated: Collection[int] = (),
        batch_first: bool = False,
    ) -> None:
        self.queries, self.keys, self._resolve, self._constant = queries, keys, resolve, constant
        self._mutated, self._batch_first = mutated, batch_first
        self.key_nodes: list[fx.Node] = []
        self.query_nodes: list[fx.Node] = []

    def read(self, node: fx.Node) -> Mask:
        """The formula of a Boolean mask.

        Raises:
            Refusal: naming the node that is not understood.
        """
        node = self._resolve(node)
        fake = tensor_value(node)
        if fake is None or fake.dtype != torch.bool:
            raise Refusal(f"{node.name} ({op_name(node)}) in the mask is not Boolean", Cause.MASK)
        if fill_of(node, self._mutated) is not None:
            return ("constant", bool(fill_of(node)))
        kind = self._kind(node)
        known = self._constant(node) if kind != "full" else None
        if isinstance(known, Tensor) and bool(known.all()):
            return TRUE
        if isinstance(known, Tensor) and not bool(known.any()):
            return ("constant", False)
        if kind in ("keys", "queries"):
            return ("true", self._vector(node, kind))
        name, operands = op_name(node), node.args[:2]
        if name in _AND and len(node.args) == 2:
            return joined("and", [self._part(part) for part in operands])
        if name in _OR and len(node.args) == 2:
            return joined("or", [self._part(part) for part in operands])
        if name in _NOT and len(node.args) == 1:
            return negated(self._part(node.args[0]))
        if name in _COMPARISONS and len(node.args) == 2:
            return self._compare(_COMPARISONS[name], *node.args)
        source = node.args[0] if node.args else None
        if (name in _PASSING or _keeps_all(node)) and isinstance(source, fx.Node):
            with self._behind(node, source):
                return self.read(source)
        if kind == "number":
            raise Refusal(f"{node.name} ({name}) in the mask has neither keys nor queries", Cause.MASK)
        raise self._not_understood(node)

    def _not_understood(self, node: fx.Node) -> Refusal:
        outside = made_outside(node, self._resolve, self.queries, self.keys)
        if outside is not None:
            return Refusal(*outside)
        return Refusal(f"{node.name} ({op_name(node)}) in the mask is not understood", Cause.MASK)

    def _part(self, operand: Any) -> Mask:
        if isinstance(operand, bool):
            return ("constant", operand)
        if isinstance(operand, fx.Node):
            return self.read(operand)
        raise Refusal(f"a mask is joined with {operand!r}", Cause.MASK)

    @contextlib.contextmanager
    def _behind(self, node: fx.Node, source: fx.Node) -> Iterator[None]:
        """Reads the source of a node that only adds dimensions: [B, Q, K] of [B, 1, Q, K] perhaps."""
        before = self._batch_first
        self._batch_first = before or gives_heads(node, source)
        try:
            yield
        finally:
            self._batch_first = before

    def _kind(self, node: fx.Node) -> str:
        """Which of Q and K a value varies with: "full", "keys", "queries" or "number"."""
        fake = tensor_value(node)
        if fake is None:
            raise Refusal(f"{node.name} ({op_name(node)}) in the mask is not a tensor", Cause.MASK)
        if not is_plain(fake):
            raise Refusal(f"{node.name} ({op_name(node)}) in the mask is no plain tensor", Cause.NOT_PLAIN)
        if storage_key(fake) in self._mutated:
            raise Refusal(f"{node.name} ({op_name(node)}) in the mask is written to in place", Cause.MASK)
        sizes = [1] * (4 - fake.ndim) + list(fake.shape)
        if self._batch_first and fake.ndim == 3:
            sizes = [fake.shape[0], 1, *fake.shape[1:]]
        if fake.ndim > 4 or not _is_one(sizes[1]):
            raise Refusal(f"{node.name} ({op_name(node)}) in the mask differs between heads", Cause.MASK)
        rows, columns = sizes[2], sizes[3]
        if _is_one(rows) and _is_one(columns):
            if not _is_one(sizes[0]):
                raise Refusal(
                    f"{node.name} ({op_name(node)}) in the mask is one number a sequence", Cause.MASK
                )
            return "number"
        if _is_one(rows) and _same(columns, self.keys):
            return "keys"
        if _is_one(columns) and _same(rows, self.queries):
            return "queries"
        if _same(rows, self.queries) and _same(columns, self.keys):
            return "full"
        raise Refusal(
            f"{node.name} ({op_name(node)}) in the mask has the shape {tuple(fake.shape)}", Cause.MASK
        )

    def _vector(self, node: fx.Node, kind: str) -> str:
        nodes = self.key_nodes if kind == "keys" else self.query_nodes
        if node not in nodes:
            nodes.append(node)
        return f"{kind[0]}{nodes.index(node)}"

    def _compare(self, op: str, left: Any, right: Any) -> Mask:
        a, b = self._number(left), self._number(right)
        if isinstance(b, _Difference):
            op, a, b = _MIRRORED[op], b, a
        if isinstance(a, _Difference):
            if isinstance(b, _Difference) or b.name:
                raise Refusal("a mask compares three vectors", Cause.MASK)
            return self._compare_difference(op, a, b.offset)
        assert isinstance(b, _Number)
        if b.name.startswith("k") or (a.name.startswith("q") and not b.name):
            op, a, b = _MIRRORED[op], b, a
        if a.name[:1] == b.name[:1]:
            raise Refusal("a mask compares two vectors of the same tokens", Cause.MASK)
        return ("compare", op, a.name, b.name, b.offset - a.offset)

    def _compare_difference(self, op: str, difference: _Difference, bound: int) -> Mask:
        if difference.absolute:
            if op not in ("le", "lt"):
                raise Refusal("a mask compares a distance otherwise than by < and <=", Cause.MASK)
            plain = dataclasses.replace(difference, absolute=False)
            low = self._compare_difference("ge" if op == "le" else "gt", plain, -bound)
            return joined("and", [self._compare_difference(op, plain, bound), low])
        shift = bound - difference.offset
        if difference.sign > 0:  # key - query <= shift
            return ("compare", op, difference.key, difference.query, shift)
        return ("compare", _MIRRORED[op], difference.key, difference.query, -shift)

    def _number(self, operand: Any) -> _Number | _Difference:
        if isinstance(operand, int) and not isinstance(operand, bool):
            return _Number(offset=operand)
        if not isinstance(operand, fx.Node):
            raise Refusal(f"a mask compares with {operand!r}", Cause.MASK)
        node = self._resolve(operand)
        if isinstance(value(node), torch.SymInt):
            raise Refusal(f"a mask compares with the dynamic integer {node.name}", Cause.MASK)
        fake = tensor_value(node)
        if fake is None or fake.is_floating_point() or fake.is_complex():
            raise Refusal(f"{node.name} ({op_name(node)}) in the mask is not an integer", Cause.MASK)
        kind = self._kind(node)
        name = op_name(node)
        if kind in ("keys", "queries"):
            return self._shifted(node, name) or _Number(self._vector(node, kind))
        if kind == "full" and name == "sub" and len(node.args) == 2:
            return self._difference(*node.args)
        if kind == "full" and name == "abs":
            inner = self._number(node.args[0])
            if isinstance(inner, _Difference) and not inner.absolute and not inner.offset:
                return dataclasses.replace(inner, absolute=True)
        source = node.args[0] if node.args else None
        if kind == "full" and (name in _PASSING or _keeps_all(node)) and isinstance(source, fx.Node):
            with self._behind(node, source):
                return self._number(source)
        raise self._not_understood(node)

    def _shifted(self, node: fx.Node, name: str) -> _Number | None:
        """A vector plus or minus a number that is known."""
        if name not in ("add", "sub") or len(node.args) != 2 or node.kwargs:
            return None
        source, shift = node.args
        if not isinstance(source, fx.Node) or not isinstance(shift, int) or isinstance(shift, bool):
            return None
        if self._kind(self._resolve(source)) not in ("keys", "queries"):
            return None
        found = self._number(source)
        if not isinstance(found, _Number):
            return None
        return _Number(found.name, found.offset + (shift if name == "add" else -shift))

    def _difference(self, left: Any, right: Any) -> _Difference:
        a, b = self._number(left), self._number(right)
        if isinstance(a, _Number) and isinstance(b, _Number):
            if a.name.startswith("k") and b.name.startswith("q"):
                return _Difference(a.name, b.name, 1, a.offset - b.offset)
            if a.name.startswith("q") and b.name.startswith("k"):
                return _Difference(b.name, a.name, -1, a.offset - b.offset)
        raise Refusal("a mask subtracts something else than keys and queries", Cause.MASK)


_AND = {"and_", "__and__", "bitwise_and", "logical_and", "mul"}
_OR = {"or_", "__or__", "bitwise_or", "logical_or"}
_NOT = {"invert", "inv", "not_", "logical_not", "bitwise_not", "__invert__", "~"}
_COMPARISONS = {
    **{name: name for name in _COMPARE},
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    **{f"__{name}__": name for name in _COMPARE},
}
# Ops that leave the values alone; the result's shape says whether keys and queries stay in place.
_PASSING = {
    "to",
    "bool",
    "_to_copy",
    "expand",
    "expand_as",
    "contiguous",
    "clone",
    "detach",
    "unsqueeze",
    "type",
    "broadcast_to",
    "long",
    "int",
    "view",
    "reshape",
}


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``and_`` for ``operator.and_`` and for ``aten.and_``."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def _keeps_all(node: fx.Node) -> bool:
    """Whether an index only adds dimensions (``mask[None, None]``, ``mask[:, :, :, :K]`` of K keys)."""
    source = node.args[0] if node.args else None
    if node.target is not operator.getitem or not isinstance(source, fx.Node):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    fake, out = tensor_value(source), tensor_value(node)
    only = all(i is None or i is Ellipsis or (isinstance(i, slice) and i.start in (None, 0)) for i in index)
    if not only or fake is None or out is None:
        return False
    steps = all(i.step in (None, 1) for i in index if isinstance(i, slice))
    return steps and expression(fake.numel()) == expression(out.numel())


_FILLS = {"ones": 1, "ones_like": 1, "new_ones": 1, "zeros": 0, "zeros_like": 0, "new_zeros": 0}


def fill_of(node: fx.Node, mutated: Collection[int] = ()) -> float | bool | None:
    """The number that all elements of a node are: ``x.new_zeros(shape)``, ``full(shape, True)``."""
    name, fake = op_name(node), tensor_value(node)
    if node.op not in ("call_function", "call_method") or any(map(writes_in_place, node.users)):
        return None
    if fake is None or not is_plain(fake) or storage_key(fake) in mutated:
        return None
    if name in _FILLS:
        return _FILLS[name]
    if name in ("full", "full_like", "new_full"):
        at = 2 if name == "new_full" else 1
        filled = node.args[at] if len(node.args) > at else node.kwargs.get("fill_value")
        return filled if isinstance(filled, (bool, int, float)) else None
    return None


def gives_heads(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is ``[B, 1, Q, K]`` of a source ``[B, Q, K]`` (``source[:, None]``)."""
    fake, inner = tensor_value(node), tensor_value(source)
    if fake is None or inner is None or (fake.ndim, inner.ndim) != (4, 3) or not _is_one(fake.shape[1]):
        return False
    is_kept = all(_same(fake.shape[to], inner.shape[at]) for to, at in ((0, 0), (2, 1), (3, 2)))
    return is_kept and op_name(node) in ("getitem", "unsqueeze", "view", "reshape")


def made_outside(
    node: fx.Node, resolve: Callable[[fx.Node], fx.Node], queries: Any, keys: Any
) -> tuple[str, Cause] | None:
    """Why a mask that depends on Q x K values which are an input of the graph is refused; None: it does not."""
    stack, seen = [node], set()
    while stack:
        current = resolve(stack.pop())
        if current in seen:
            continue
        seen.add(current)
        fake = tensor_value(current)
        if fake is None or fake.ndim < 2:
            continue
        if current.op not in ("placeholder", "get_attr"):
            stack += current.all_input_nodes
        elif _same(fake.shape[-2], queries) and _same(fake.shape[-1], keys):
            reason = "the mask is an input of this graph (S² elements), made outside of it"
            return f"{current.name}: {reason}", Cause.MASK_INPUT
    return None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _same(size: Any, other: Any) -> bool:
    return bool(expression(size) == expression(other))
