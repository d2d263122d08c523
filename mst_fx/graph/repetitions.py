"""Where an ATen graph repeats itself: equal layers, one behind the other, whatever was done to them.

A *repetition* is what string algorithms call a run: equal stretches of calls, each right behind the one before (Kolpakov and Kucherov, Finding
maximal repetitions in a word in linear time, 1999). Two calls are equal if they call the same with the same constants and give the same sizes,
strides, types and devices; two stretches, if their calls are, and read the same of their own stretch.

A repetition with a period of ``p`` calls may be cut into stretches at ``p`` places. Chosen is the one across which the fewest bytes are alive: of a
transformer the border of two layers, where the residual stream is.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.torch_api.overwriting import leaves

Ask = Callable[[fx.Node], bool]
Stretches = list[tuple[fx.Node, ...]]

_FOLLOWERS = 8  # of equal calls: as many behind each may be a period away, as in layers that take turns
_CUTS = 64  # the cheapest places for a cut that are tried


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Equal stretches of calls of a graph.

    Attributes:
        stretches: their calls, in order: ``stretches[k][i]`` is equal to ``stretches[0][i]``.
        inputs: of each stretch what it reads of the rest of the graph: tensors that are alike in all of them.
        slots: the place in ``inputs`` of an operand from outside, by the place of its call and its own among the call's leaves.
        outputs: of each stretch the places of the calls that the rest of the graph reads.
    """

    stretches: tuple[tuple[fx.Node, ...], ...]
    inputs: tuple[tuple[fx.Node, ...], ...]
    slots: dict[tuple[int, int], int]
    outputs: tuple[tuple[int, ...], ...]


def find_repetitions(
    graph: fx.Graph, is_mark: Ask, is_apart: Ask, is_tied: Ask, may_cross: Ask, fewest: int = 1
) -> Iterator[Repetition]:
    """The repetitions of a graph, no two of which have a call in common; of two that have, the one that spares more calls.

    Args:
        graph: whose values are in ``meta["val"]``, all of sizes that are known.
        is_mark: of which calls each stretch has to have one.
        is_apart: which calls belong to no stretch.
        is_tied: which calls may not be cut off from what they read.
        may_cross: which values may be read from another stretch than that which makes them.
        fewest: calls of a stretch.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    numbers: dict[Any, int] = {}
    words = [numbers.setdefault(node if is_apart(node) else _word(node), len(numbers)) for node in calls]
    marks = [at for at, node in enumerate(calls) if is_mark(node)]
    alive = _bytes_alive(calls)
    waiting = [(0, len(calls))]
    while waiting:
        first, end = waiting.pop()
        run = _longest_run(words, [at for at in marks if first <= at < end], first, end, fewest)
        if run is None:
            continue
        start, stop, period = run
        for stretches in _cut(calls, alive, start, stop, period):
            found = _repetition(stretches, is_tied, may_cross)
            if found is not None:
                yield found
                break
        waiting += [(first, start), (stop, end)]


def _word(node: fx.Node) -> Any:
    """What equal calls have in common."""
    return node.target, _constants(node.args), _constants(node.kwargs), _kind(node.meta.get("val"))


def _constants(argument: Any) -> Any:
    """An argument that can be compared, with no nodes in it."""
    match argument:
        case fx.Node():
            return fx.Node
        case list() | tuple():
            return tuple(map(_constants, argument))
        case dict():
            return tuple((key, _constants(x)) for key, x in sorted(argument.items()))
        case slice():
            return slice, _constants(argument.start), _constants(argument.stop), _constants(argument.step)
    return type(argument), repr(argument)


def _kind(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return tuple(found.shape), found.stride(), found.dtype, found.device
    if isinstance(found, (list, tuple)):
        return tuple(map(_kind, found))
    return type(found), repr(found)


def _longest_run(
    words: Sequence[int], marks: Sequence[int], first: int, end: int, fewest: int
) -> tuple[int, int, int] | None:
    """Start, end and period of the run, between two places and with a mark, that spares most calls; the shortest period of these."""
    places: dict[int, list[int]] = collections.defaultdict(list)
    for at in marks:
        places[words[at]].append(at)
    periods = {
        following - at
        for found in places.values()
        for index, at in enumerate(found)
        for following in found[index + 1 : index + 1 + _FOLLOWERS]
    }
    best, most = None, 0
    for period in sorted(period for period in periods if period >= fewest):
        for start, stop in _runs(words, period, first, end):
            spared = ((stop - start) // period - 1) * period
            if spared > most and any(start <= at < stop for at in marks):
                best, most = (start, stop, period), spared
    return best


def _runs(words: Sequence[int], period: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """From where to where, between two places, each word is the one a period before."""
    start = first
    for at in range(first, end - period + 1):
        if at == end - period or words[at] != words[at + period]:
            if at - start >= period:
                yield start, at + period
            start = at + 1


def _cut(
    calls: Sequence[fx.Node], alive: Sequence[float], start: int, stop: int, period: int
) -> Iterator[Stretches]:
    """The stretches of a run, for each place where it may be cut, from the cheapest on; one fewer than there could be, if that is cheaper."""
    most = (stop - start) // period
    options = []
    for first in range(start, min(start + period, stop - 2 * period + 1)):
        count = (stop - first) // period
        costs = [alive[first + k * period] for k in range(count + 1)]
        if count >= most - 1 and math.isfinite(sum(costs)):
            options.append((costs[1], -count, first))
    for _, count, first in sorted(options)[:_CUTS]:
        yield [tuple(calls[at : at + period]) for at in range(first, first - count * period, period)]


def _bytes_alive(calls: Sequence[fx.Node]) -> list[float]:
    """The bytes that are alive in front of each call, and behind the last; infinite where anything but a tensor is."""
    place = {node: at for at, node in enumerate(calls)}
    changes = [0] * (len(calls) + 2)
    others = [0] * (len(calls) + 2)
    for at, node in enumerate(calls):
        last = max((place.get(user, len(calls)) for user in node.users), default=at)
        found = node.meta.get("val")
        of, size = (changes, found.nbytes) if isinstance(found, torch.Tensor) else (others, 1)
        of[at + 1] += size
        of[last + 1] -= size
    pairs = zip(itertools.accumulate(changes), itertools.accumulate(others), strict=True)
    return [math.inf if count else size for size, count in pairs]


def _repetition(stretches: Stretches, is_tied: Ask, may_cross: Ask) -> Repetition | None:
    """What equal calls make, if they read the same of their own stretch."""
    insides = [{node: at for at, node in enumerate(stretch)} for stretch in stretches]
    slots: dict[tuple[int, int], int] = {}
    inputs: dict[tuple[fx.Node, ...], int] = {}
    for at, nodes in enumerate(zip(*stretches, strict=True)):
        for leaf, operands in enumerate(zip(*map(leaves, nodes), strict=True)):
            places = {inside.get(x) for inside, x in zip(insides, operands, strict=True)}
            if places == {None}:
                if is_tied(nodes[0]) or not _are_alike(operands):
                    return None
                slots[at, leaf] = inputs.setdefault(operands, len(inputs))
            elif len(places) > 1:
                return None
    outputs = tuple(
        tuple(at for node, at in inside.items() if any(user not in inside for user in node.users))
        for inside in insides
    )
    if not inputs or not all(outputs):
        return None
    given = [stretch[at] for stretch, places in zip(stretches, outputs, strict=True) for at in places]
    if not all(map(may_cross, [*itertools.chain(*inputs), *given])):
        return None
    return Repetition(tuple(stretches), tuple(zip(*inputs, strict=True)), slots, outputs)


def _are_alike(nodes: Sequence[fx.Node]) -> bool:
    found = [node.meta.get("val") for node in nodes]
    kinds = {(x.shape, x.stride(), x.dtype, x.device) for x in found if isinstance(x, torch.Tensor)}
    return len(kinds) == 1 and all(isinstance(x, torch.Tensor) for x in found)


def sink_free_calls(graph: fx.Graph, is_free: Ask) -> None:
    """Gives each call its own of what costs nothing, right in front of it, in the order of its operands.

    AOTAutograd makes one of equal calls, which the first layer then has alone.

    Args:
        is_free: for views, and constants.
    """

    def sink(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if is_free(operand):
                own = graph.node_copy(operand)
                node.replace_input_with(operand, own)
                with graph.inserting_before(own):
                    sink(own)

    for node in list(graph.nodes):
        if node.op in ("call_function", "output") and not is_free(node):
            with graph.inserting_before(node):
                sink(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and is_free(node):
            graph.erase_node(node)
