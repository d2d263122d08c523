"""``log_probs.gather(-1, labels[..., None])``: guards that there is a label for each row, where there is now.

An index may be shorter than what it picks from, so torch assumes nothing of sizes that change apart, as those of two inputs
do. A batch with fewer labels than rows compiles anew. Left alone: sizes of which the user promised a range.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.sizes import expression, hint
from mst_fx.graph.spelling import PICKS, operation
from mst_fx.graph.values import tensor_value
from mst_fx.torch_api.symbols import guards_are_checked, promised_ranges


def run(context: PassContext) -> None:
    """Adds the guards; the graph stays as it is."""
    for node in context.graph.nodes:
        if operation(node) not in PICKS or len(node.args) < 3:
            continue
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        shapes = [fake.shape for arg in operands if (fake := tensor_value(arg)) is not None]
        dim = next((arg for arg in node.args[1:] if isinstance(arg, int)), 0)
        if (
            len(shapes) != 2
            or len({len(shape) for shape in shapes}) != 1
            or dim % len(shapes[0]) != len(shapes[0]) - 1
        ):
            continue
        for size, other in zip(*(shape[:-1] for shape in shapes), strict=True):
            _unite(size, other)


def _unite(size: Any, other: Any) -> None:
    first, second = expression(size), expression(other)
    symbols = first.free_symbols | second.free_symbols
    is_pair = len(first.free_symbols) == len(second.free_symbols) == 1 and len(symbols) == 2
    if not is_pair or hint(size) != hint(other):
        return
    if guards_are_checked(size) and not symbols & promised_ranges(size):
        bool(size == other)
