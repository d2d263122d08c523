"""The spec of a graph that a stage has changed, verified after each one (tests do; ``MST_FX_VERIFY=1`` does everywhere).

1. The graph is well-formed: operands come before those that read them (``fx.Graph.lint``).
2. Its inputs are those that it had; so are its outputs, in number, shape, type and device. Logits to be taken out may be
   anything by then, and what their caller needs follows behind.
3. What a node that is new, or reads something new, is said to give is what it gives when it runs on fakes.
4. No output shares memory with an input, or with another output, unless it did before.

Not verified: nodes that write in place, run a sub-graph or depend on data, and values that are no plain tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.graph.effects import has_effects
from mst_fx.graph.fill import call, fake_mode_of
from mst_fx.graph.modes import Context, contexts, in_context
from mst_fx.graph.sizes import expression, is_known
from mst_fx.graph.subgraphs import called_graphs
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.guards import without_guards
from mst_fx.torch_api.tensors import tree_leaves


class SpecError(AssertionError):
    """A stage of ours has made a graph that is not as the spec says."""


def is_on() -> bool:
    """Whether changed graphs are verified."""
    return os.environ.get("MST_FX_VERIFY") == "1"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A graph before a stage.

    Attributes:
        nodes: what each node calls with what, by its name.
        inputs: their names.
        outputs: what each output is like; None for what is no plain tensor.
        aliases: pairs of an output, and an input or an earlier output, that share memory.
    """

    nodes: dict[str, str]
    inputs: list[str]
    outputs: list[Any]
    aliases: set[tuple[int, str]]


def seen(gm: fx.GraphModule) -> Seen:
    inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    nodes = {node.name: _call_of(node) for node in gm.graph.nodes}
    return Seen(nodes, inputs, [_kind(node) for node in _outputs(gm.graph)], _aliases(gm.graph))


def check(before: Seen, gm: fx.GraphModule, taken: Collection[int] = ()) -> None:
    """Verifies a changed graph.

    Args:
        taken: the positions of outputs that are taken out of the graph.

    Raises:
        SpecError: if it is not as the spec says.
    """
    after = seen(gm)
    if after.inputs != before.inputs:
        raise SpecError(f"the inputs were {before.inputs}, and are {after.inputs}")
    kinds = list(zip(before.outputs, after.outputs, strict=False))
    if len(after.outputs) < len(before.outputs) or (len(after.outputs) > len(before.outputs) and not taken):
        raise SpecError(f"there were {len(before.outputs)} outputs, and are {len(after.outputs)}")
    for position, (was, now) in enumerate(kinds):
        if position not in taken and was != now:
            raise SpecError(f"output {position} was {was}, and is {now}")
    new = {(at, other) for at, other in after.aliases - before.aliases if at < len(kinds) and at not in taken}
    if new and not taken:
        raise SpecError(f"outputs share memory that did not before: {sorted(new)}")
    modes = contexts(gm.graph)
    for node in gm.graph.nodes:
        if before.nodes.get(node.name) != after.nodes[node.name] and not modes[node].level:
            _check_value(gm, node, modes[node])


def _call_of(node: fx.Node) -> str:
    return repr((node.op, str(node.target), node.args, node.kwargs))


def _outputs(graph: fx.Graph) -> list[Any]:
    found = graph.output_node().args[0]
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _kind(node: Any) -> Any:
    fake = tensor_value(node) if isinstance(node, fx.Node) else None
    return None if fake is None or not is_plain(fake) else _described(fake)


def _described(fake: torch.Tensor) -> tuple[Any, ...]:
    return tuple(map(expression, fake.shape)), fake.dtype, fake.device


def _aliases(graph: fx.Graph) -> set[tuple[int, str]]:
    """Pairs of the position of an output and the name of what it shares memory with, but for inputs as they are."""
    owners: dict[Any, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        for fake in filter(is_plain, tensors_of(node)):
            owners.setdefault(storage_key(fake), node.name)
    found = set()
    for position, node in enumerate(_outputs(graph)):
        for fake in filter(is_plain, tensors_of(node) if isinstance(node, fx.Node) else []):
            owner = owners.setdefault(storage_key(fake), f"output {position}")
            if owner != f"output {position}":
                found.add((position, owner))
    return found


def _check_value(gm: fx.GraphModule, node: fx.Node, modes: Context) -> None:
    """Runs a node on fakes and compares."""
    known = value(node)
    if not _can_run(node, known):
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_context(modes))
        stack.enter_context(torch.no_grad())
        mode = fake_mode_of(tree_leaves(known))
        if mode is not None:
            stack.enter_context(mode)
            stack.enter_context(without_guards(mode))
        found = call(node.op, node.target, args, kwargs)
    pairs = list(_pairs(known, found))
    if any(_described(was) != _described(now) for was, now in pairs):
        said = [tuple(map(_described, pair)) for pair in pairs]
        raise SpecError(f"{node.format_node()}: the graph says one thing, a run on fakes another: {said}")


def _can_run(node: fx.Node, known: Any) -> bool:
    fakes = tensors_of(node)
    if node.op not in ("call_function", "call_method") or not fakes or not all(map(is_plain, fakes)):
        return False
    operands = [fake for operand in node.all_input_nodes for fake in tensors_of(operand)]
    if any(value(operand) is None for operand in node.all_input_nodes) or not all(map(is_plain, operands)):
        return False
    if has_effects(node) or writes_in_place(node) or called_graphs(node):
        return False
    return all(is_known(size) for fake in (*fakes, *operands) for size in fake.shape)


def _pairs(known: Any, found: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    old, new = tree_leaves(known), tree_leaves(found)
    if len(old) != len(new):
        raise SpecError(f"a run on fakes gives {len(new)} values, and not {len(old)}")
    yield from ((a, b) for a, b in zip(old, new, strict=True) if isinstance(a, torch.Tensor))
