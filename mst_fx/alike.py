"""Places of equal layers said in one line: ``model.layers.0–30.mlp``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

_NUMBER = re.compile(r"\d+")


def grouped(
    items: Iterable[T], name_of: Callable[[T], str], rest_of: Callable[[T], Hashable]
) -> list[list[T]]:
    """Items whose names are the same but for numbers, and that are alike in all else, in order of their first."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault((_NUMBER.sub("#", name_of(item)), rest_of(item)), []).append(item)
    return list(found.values())


def together(names: Sequence[str]) -> str:
    """Names that are the same but for numbers, in one.

    ``model.layers.0.mlp``, ``model.layers.1.mlp``, ``model.layers.3.mlp`` → ``model.layers.0–1,3.mlp ×3``.
    """
    distinct = list(dict.fromkeys(names))
    times = f" ×{len(names)}" if len(names) > 1 else ""
    if len(distinct) == 1:
        return f"{distinct[0]}{times}"
    numbers = [[int(n) for n in _NUMBER.findall(name)] for name in distinct]
    varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return f"{distinct[0]} … {distinct[-1]}{times}"
    position = itertools.count()
    spans = _spans([each[varying[0]] for each in numbers])
    text = _NUMBER.sub(lambda found: spans if next(position) == varying[0] else found[0], distinct[0])
    return f"{text}{times}"


def _spans(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` → ``"0–2,5"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
