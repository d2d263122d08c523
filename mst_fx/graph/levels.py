"""The graphs of a program by level: the program's own, and those of its checkpointed layers, each with the call that runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.sizes import expression
from mst_fx.graph.subgraphs import called_graph
from mst_fx.graph.values import VALUE, tensor_value, tensors_of, value


@dataclasses.dataclass(frozen=True)
class Level:
    """A graph, and the call in the graph above that runs it (None for the program's graph)."""

    gm: fx.GraphModule
    call: fx.Node | None = None
    above: Level | None = None

    @property
    def top(self) -> Level:
        return self if self.above is None else self.above.top

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node a placeholder stands for, as far up as there is one."""
        if (
            self.call is None
            or self.above is None
            or node.op != "placeholder"
            or node.graph is not self.gm.graph
        ):
            return node
        operand = self.call.args[1 + placeholders_of(self.gm).index(node)]
        return self.above.resolve(operand) if isinstance(operand, fx.Node) else node

    def imported(self, node: fx.Node) -> fx.Node:
        """The node in this graph that has the value of a node of a graph above."""
        if node.graph is self.gm.graph:
            return node
        assert self.call is not None and self.above is not None
        operand = self.above.imported(node)
        placeholders = placeholders_of(self.gm)
        for known, argument in zip(placeholders, self.call.args[1:], strict=True):
            if argument is operand:
                return known
        with self.gm.graph.inserting_after(placeholders[-1]):
            new = self.gm.graph.placeholder(f"{operand.name}_mst")
        new.meta[VALUE] = self._fake_inside(operand)
        self.call.args = (*self.call.args, operand)
        return new

    def _fake_inside(self, operand: fx.Node) -> Any:
        """A fake like an operand's in this graph's own mode, with its own symbols for dynamic sizes."""
        placeholders, found = placeholders_of(self.gm), tensor_value(operand)
        mode = fake_mode_of(tensors_of(placeholders[0]))
        if mode is None or found is None:
            return value(operand)
        assert self.call is not None
        sizes: dict[Any, Any] = {}
        for placeholder, argument in zip(placeholders, self.call.args[1:], strict=False):
            outer = tensor_value(argument) if isinstance(argument, fx.Node) else None
            inner = tensor_value(placeholder)
            if outer is not None and inner is not None:
                sizes |= {expression(a): b for a, b in zip(outer.shape, inner.shape, strict=True)}
        unknown = [s for s in found.shape if isinstance(s, torch.SymInt) and expression(s) not in sizes]
        if unknown:
            raise Refusal(
                f"{operand.name} has the dynamic size {unknown[0]}, unknown in a checkpointed layer"
            )
        shape = [sizes[expression(s)] if isinstance(s, torch.SymInt) else s for s in found.shape]
        with mode:
            return torch.empty(shape, dtype=found.dtype, device=found.device)

    def at_top(self, node: fx.Node) -> fx.Node:
        """The node of the program's graph that runs a node of this one."""
        return node if self.call is None or self.above is None else self.above.at_top(self.call)


def placeholders_of(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def all_levels(level: Level) -> Iterator[Level]:
    yield level
    for node in level.gm.graph.nodes:
        child = called_graph(level.gm, node)
        if child is not None:
            yield from all_levels(Level(child, node, level))
