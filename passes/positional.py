"""``linear(input=x, weight=w)`` → ``linear(x, w)``: whoever reads a node finds its operands in one place.

Only the arguments that follow the positional ones without a gap are moved, and those that code asks for by keyword stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.spelling import ARGUMENT_ALIASES, overloads
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.graph.values import tensor_value

_LEFT_AS_KEYWORDS = ("inplace", "out", "dtype")  # code asks for them by keyword


def run(context: PassContext) -> bool:
    """Makes arguments positional in a program and in all graphs that it refers to."""
    return sum(make_positional(graph) for graph in graphs_of(context.gm)) > 0


def make_positional(graph: fx.Graph) -> bool:
    """Makes arguments positional in one graph; returns whether there were any."""
    has_moved = False
    for node in graph.nodes:
        if not node.kwargs or not any(tensor_value(n) is not None for n in node.all_input_nodes):
            continue
        found = {_positional(node, names) for names in _signatures(node)}
        if len(found) == 1 and (moved := found.pop()):
            args = [*node.args, *(node.kwargs[key] for key in moved)]
            node.kwargs = {key: given for key, given in node.kwargs.items() if key not in moved}
            node.args = tuple(args)
            has_moved = True
    return has_moved


def _positional(node: fx.Node, names: Sequence[str]) -> tuple[str, ...]:
    """The keywords of a node that are its next positional arguments."""
    moved: list[str] = []
    for name in names[len(node.args) :]:
        keys = [key for key in (name, *ARGUMENT_ALIASES.get(name, ())) if key in node.kwargs]
        if len(keys) != 1 or name in _LEFT_AS_KEYWORDS:
            break
        moved += keys
    return tuple(moved)


def _signatures(node: fx.Node) -> list[tuple[str, ...]]:
    """The names of the positional arguments of each overload that takes a node's keywords."""
    found = []
    for names, every in overloads(node):
        others = {other for name in every for other in ARGUMENT_ALIASES.get(name, ())}
        if node.kwargs.keys() <= every | others:
            found.append(tuple(names))
    return found
