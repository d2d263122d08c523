"""A mask as a Boolean formula of positions.

A mask ``[B, 1, Q, K]`` is a formula (:data:`Mask`) of comparisons between a *key vector* ``[.., 1, K]``, a *query
vector* ``[.., Q, 1]`` and numbers. The vectors stay in the graph, at O(S); the formula is data, so nothing of S²
elements is left. Vectors are named ``k0``, ``q0``, … by their place among those of the mask.

An operator carries a formula as text (:func:`text`), and reads it again (:func:`parse`)::

    Compare("le", "k0", "q0", 0)      ('compare', 'le', 'k0', 'q0', 0)        k0 <= q0           causal, if both count tokens
    Compare("gt", "k0", "q0", -4096)  ('compare', 'gt', 'k0', 'q0', -4096)    k0 > q0 - 4096     a sliding window
    Compare("eq", "k1", "q1", 0)      ('compare', 'eq', 'k1', 'q1', 0)        k1 == q1           the same document
    Compare("lt", "k0", "", 7)        ('compare', 'lt', 'k0', '', 7)          k0 < 7             a prefix
    Holds("k2")                       ('true', 'k2')                          k2                 key padding
    Not(Holds("k2"))                  ('not', ('true', 'k2'))                 not k2
    And((a, b))  Or((a, b))           ('and', …, …)  ('or', …, …)             a and b, a or b
    Constant(True)                    ('constant', True)                      true
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same everywhere."""

    value: bool


@dataclasses.dataclass(frozen=True)
class Compare:
    """``left op right + offset``.

    Attributes:
        op: a key of :data:`COMPARE`.
        left: a key vector; "": 0.
        right: a query vector; "": 0, so that ``left`` is compared with ``offset``.
    """

    op: str
    left: str
    right: str
    offset: int


@dataclasses.dataclass(frozen=True)
class Holds:
    """A Boolean vector."""

    vector: str


@dataclasses.dataclass(frozen=True)
class Not:
    """Where a Boolean vector does not hold: of all else :func:`negated` gives a formula without negations."""

    part: Holds


@dataclasses.dataclass(frozen=True)
class And:
    """The conjunction of two or more; :func:`both` makes it."""

    parts: tuple[Mask, ...]


@dataclasses.dataclass(frozen=True)
class Or:
    """The disjunction of two or more; :func:`either` makes it."""

    parts: tuple[Mask, ...]


Mask = Constant | Compare | Holds | Not | And | Or

# How a score is hidden: ``score + bias + fill``, ``score + fill``, ``fill``, ``max(score + bias + fill, fill)``.
ADDS, NO_BIAS, NO_SCORE, AT_LEAST = "adds", "instead of the bias", "instead of the score", "at least"
# A mask hides by minus infinity, and a bias may by a number.
BY_BIAS = "by a bias"
# What else is done to scores (:mod:`mst_fx.ops.masked`), with a tensor and without.
SHOW, HIDE, SINK, SOFTMAX, TANH = "show", "hide", "sink", "softmax", "tanh"
WITH_TENSOR = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}
WITH_NUMBER = {"add": "plus", "mul": "times", "div": "over"}
TAKE_TENSORS = frozenset((*WITH_TENSOR.values(), SHOW, HIDE, SINK))

TRUE, FALSE = Constant(True), Constant(False)

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
}
MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}
_SIGNS = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}


def is_key(vector: str) -> bool:
    """Whether a name is that of a key vector."""
    return vector.startswith("k")


def negated(mask: Mask) -> Mask:
    match mask:
        case Constant(found):
            return Constant(not found)
        case Not(part):
            return part
        case Compare(op):
            return dataclasses.replace(mask, op=_NEGATED[op])
        case And(parts):
            return Or(tuple(map(negated, parts)))
        case Or(parts):
            return And(tuple(map(negated, parts)))
        case Holds():
            return Not(mask)


def both(parts: Iterable[Mask]) -> Mask:
    """The conjunction of masks, flat and without constants."""
    return _joined(And, parts, neutral=TRUE, decisive=FALSE)


def either(parts: Iterable[Mask]) -> Mask:
    """The disjunction of masks, flat and without constants."""
    return _joined(Or, parts, neutral=FALSE, decisive=TRUE)


def _joined(kind: type[And] | type[Or], parts: Iterable[Mask], neutral: Mask, decisive: Mask) -> Mask:
    flat: dict[Mask, None] = {}
    for part in parts:
        for inner in part.parts if isinstance(part, kind) else (part,):
            if inner == decisive:
                return inner
            if inner != neutral:
                flat[inner] = None
    if not flat:
        return neutral
    return next(iter(flat)) if len(flat) == 1 else kind(tuple(flat))


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """The parts that must all be true."""
    return mask.parts if isinstance(mask, And) else (mask,)


def vectors_in(mask: Mask) -> list[str]:
    """The names of the vectors that a formula reads, in order, each as often as it is read."""
    match mask:
        case Constant():
            return []
        case Compare(_, left, right):
            return [name for name in (left, right) if name]
        case Holds(vector):
            return [vector]
        case Not(part):
            return vectors_in(part)
        case And(parts) | Or(parts):
            return [name for part in parts for name in vectors_in(part)]


def renamed(mask: Mask, new: Mapping[str, str]) -> Mask:
    match mask:
        case Constant():
            return mask
        case Compare(op, left, right, offset):
            return Compare(op, new.get(left, left), new.get(right, right), offset)
        case Holds(vector):
            return Holds(new.get(vector, vector))
        case Not(Holds(vector)):
            return Not(Holds(new.get(vector, vector)))
        case And(parts) | Or(parts):
            return type(mask)(tuple(renamed(part, new) for part in parts))
    raise AssertionError(mask)


def describe(mask: Mask) -> str:
    """For people: ``k0 <= q0 and k1 == q1``."""
    match mask:
        case Constant(found):
            return str(found).lower()
        case Holds(vector):
            return vector
        case Not(part):
            return f"not {describe(part)}"
        case Compare(op, left, right, offset):
            other = right if right and not offset else f"{right} {offset:+}" if right else str(offset)
            return f"{left or '0'} {_SIGNS[op]} {other}"
        case And(parts) | Or(parts):
            word = " and " if isinstance(mask, And) else " or "
            return word.join(f"({describe(p)})" if isinstance(p, (And, Or)) else describe(p) for p in parts)


def text(mask: Mask) -> str:
    """What an operator carries: a literal of Python, which a graph prints as it is."""
    return repr(_literal(mask))


def parse(literal: str) -> Mask:
    """The mask of a :func:`text`."""
    return _of_literal(ast.literal_eval(literal))


_WORDS = {Constant: "constant", Compare: "compare", Holds: "true", Not: "not", And: "and", Or: "or"}
_KINDS: dict[str, Any] = {word: kind for kind, word in _WORDS.items()}


def _literal(mask: Mask) -> tuple[Any, ...]:
    word = _WORDS[type(mask)]
    match mask:
        case And(parts) | Or(parts):
            return (word, *map(_literal, parts))
        case Not(part):
            return (word, _literal(part))
        case _:
            return (word, *dataclasses.astuple(mask))


def _of_literal(literal: tuple[Any, ...]) -> Mask:
    kind, rest = _KINDS[literal[0]], literal[1:]
    if kind in (And, Or):
        return kind(tuple(map(_of_literal, rest)))  # type: ignore[no-any-return]
    return Not(_of_literal(rest[0])) if kind is Not else kind(*rest)  # type: ignore[arg-type, no-any-return]
