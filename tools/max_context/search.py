"""Which lengths are tried, by what became of those before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tools.bench.contenders import Contender
from tools.max_context.forecast import Result, round_down

_ABOVE, _SHRINK = 1.05, 0.98


def trained(result: Result | None) -> bool:
    return result is not None and "phases" in result


@dataclasses.dataclass(frozen=True)
class Found:
    """What :func:`search` found.

    Attributes:
        length: the longest that trained.
        failed: the shortest that ran out of memory.
        note: what was not tried, and why.
    """

    length: int | None = None
    failed: int | None = None
    note: str = ""


def search(
    start: int, attempt: Callable[[int], Result], *, above: bool, multiple: int, tries: int = 5
) -> Found:
    """Tries a length; lower ones while memory runs out; with ``above``, 1.05 times what trained.

    Args:
        attempt: runs a length and returns "phases" if it trained, "oom" if memory ran out, else "error".
        tries: lengths at most, each way.
    """
    length, failed = start, None
    for _ in range(tries):
        result = attempt(length)
        if "error" in result:
            return Found(None, failed, f"at {length:,}: {last_line(result['error'])}")
        if trained(result):
            break
        failed, length = length, min(round_down(length * _SHRINK, multiple), length - multiple)
        if length <= 0:
            return Found(None, failed, "nothing trains")
    else:
        return Found(None, failed, f"{tries} lengths ran out of memory")
    for _ in range(tries if above else 0):
        more = -round_down(-length * _ABOVE, multiple)
        if failed is not None and failed <= more:
            return Found(length, failed)
        result = attempt(more)
        if "error" in result:
            return Found(length, failed, f"at {more:,}: {last_line(result['error'])}")
        if not trained(result):
            return Found(length, more)
        length = more
    return Found(length, failed, "still trains" if above else "")


def short_runs(lengths: tuple[int, int], run: Callable[[int], Result], multiple: int) -> list[Result]:
    """Two lengths that train: these, or shorter ones where memory runs out. What ends it comes last.

    Returns:
        All results, failures too.
    """
    short, long = lengths
    results = [run(short)]
    while "oom" in results[-1] and short >= 2 * multiple:
        short, long = (max(round_down(length / 2, multiple), multiple) for length in (short, long))
        results.append(run(short))
    if not trained(results[-1]):
        return results
    results.append(run(long))
    while "oom" in results[-1] and long - short >= 2 * multiple and 8 * (long - short) > short:
        long = short + round_down((long - short) / 2, multiple)
        results.append(run(long))
    if "oom" in results[-1] and short > multiple:
        results.append(run(max(round_down(short / 2, multiple), multiple)))
    return results


def default_lengths(contender: Contender) -> tuple[int, int]:
    """Lengths that train with 32 layers, and at which the limit's line can be seen."""
    whole_logits = not contender.way.startswith("liger") and (
        contender.way != "mst" or "vocab" not in contender.options.get("passes", ("vocab",))
    )
    if contender.checkpoint:
        return (16384, 24576) if whole_logits else (65536, 98304)
    return (16384, 24576) if contender.way == "mst" and not whole_logits else (4096, 6144)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200].replace("|", "/")
