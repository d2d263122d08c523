"""Groups of layers: of each group the first layer's start is kept alone, and those of the others are made again, all together, where the
group's backward pass begins. So few starts are kept, and each layer but the last of a group runs forward once more.

Two levels of checkpoints, as in Chen et al., arXiv 1604.06174, section 3. Where attention is kept, the forward pass that is run once more
has none of it: at long sequences that takes as many bytes as starts do, and makes less again.
"""

from __future__ import annotations

from collections.abc import Sequence

from mst_fx.plan.choices import Choice
from mst_fx.plan.joint_graph import JointGraph, bytes_of, may_run_again
from mst_fx.plan.layers import begins_of
from mst_fx.plan.search import Way

# Layers of one group that are tried. While a group's backward pass runs, all its starts are there.
_SIZES = (2, 4, 8)


def groups_of(chosen: Sequence[Choice]) -> list[list[int]]:
    """The layers in groups, by number: each begins with one that keeps its start."""
    found: list[list[int]] = []
    for index, choice in enumerate(chosen):
        if choice.keeps_start:
            found.append([])
        found[-1].append(index)
    return found


def may_join(joint: JointGraph, choices: Sequence[Sequence[Choice]]) -> list[bool]:
    """Whether each layer's start can be made again with those before it.

    What makes it may run again, whatever is kept of the layer before; and nothing of the backward pass reads it before later layers'
    backward passes are over.
    """
    order = {node: index for index, node in enumerate(joint.graph.nodes)}
    begins = begins_of(joint, [those[0].layer for those in choices])
    places = [order[begin.first] for begin in begins.values()]
    if len(places) < len(choices) or places != sorted(places, reverse=True):
        return [False] * len(choices)
    anyway = joint.kept_anyway
    can_go_on = [
        all(may_run_again(node) and node not in anyway for choice in those for node in choice.onward)
        for those in choices
    ]
    return [False, *can_go_on[:-1]]


def ways_in_groups(joint: JointGraph, choices: Sequence[Sequence[Choice]]) -> list[Way]:
    """What layers in groups of several sizes choose from, beside what they do alone."""
    joins = may_join(joint, choices)
    if not any(joins):
        return []
    inner = [
        [choice.without_start() for choice in those] if can else []
        for those, can in zip(choices, joins, strict=True)
    ]
    start = bytes_of(choices[0][0].layer.start)
    sizes = [size for size in _SIZES if 2 * size <= len(choices)]
    return [Way(_in_groups(choices, inner, size), (size - 1) * start) for size in sizes]


def _in_groups(
    choices: Sequence[Sequence[Choice]], inner: Sequence[Sequence[Choice]], size: int
) -> list[list[Choice]]:
    """The choices of layers in groups of so many; in the last ones all starts are kept, for their backward passes come at once.

    Args:
        inner: the same choices without the start, the least first; none of a layer that cannot be made again.
    """
    last = len(choices) - size
    return [
        [*more, *those] if index < last and (last - index) % size else list(those)
        for index, (those, more) in enumerate(zip(choices, inner, strict=True))
    ]
