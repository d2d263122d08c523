"""A graph that all ranks of a group compile, and run, together (the option ``sequence_parallel``).

Before anything is compiled they compare what they were given; behind the passes which logits were taken out, since others are gathered
in the graph; and in each step their batches. What differs, or fails on one of them, is an error on all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mst_fx.graph.names import target_name
from mst_fx.graph.sizes import settled
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.graph.values import is_of_batch, tensors_of, value
from mst_fx.group import Group
from mst_fx.options import Options
from mst_fx.pipeline import Result
from mst_fx.ranks.agreement import agree, ask, checksum_of, tried


def run_together(
    group: Group, gm: fx.GraphModule, options: Options, run_passes: Callable[[bool], Result]
) -> tuple[Result, bool]:
    """The passes on all ranks of a group.

    Args:
        run_passes: with whether logits may be taken out.

    Returns:
        What they gave, and whether the graphs of all ranks have the same calls: one with a row less may have no loop where others have one.

    Raises:
        GroupError: on all ranks.
    """
    _settle_sizes(gm)
    agree(group, f"compiles {_inputs(gm)}; {_text(gm)}; {_options(options)}")
    result, found = tried(group, lambda: run_passes(True), _outcome)
    if len({text.partition(_AND)[0] for text in found}) > 1:  # one rank has so few rows that it took out none
        result, found = tried(group, lambda: run_passes(False), _outcome)
    return result, len(set(found)) == 1


def compile_together(group: Group, compile_graph: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What is compiled on all ranks.

    Raises:
        GroupError: on all ranks, if it fails on one.
    """
    compiled, _ = tried(group, compile_graph, lambda _: "compiled")
    return compiled


def with_same_batches(function: Callable[..., Any], group: Group, gm: fx.GraphModule) -> Callable[..., Any]:
    """A compiled graph that compares the batches of all ranks when it is called, and raises GroupError on all if they differ."""
    said = f"runs {_inputs(gm)}"
    given = [at for at, node in enumerate(gm.graph.find_nodes(op="placeholder")) if is_of_batch(value(node))]

    def run(*args: Any) -> Any:
        tensors = [args[at] for at in given if isinstance(args[at], torch.Tensor)]
        with torch.no_grad():
            check = ask(group, said, checksum_of(tensors, group.device))
        if not group.is_nccl:
            check()
            return function(*args)
        found = function(*args)  # what a GPU is told to run: the comparison stands before it in its queue
        check()
        return found

    return run


def _settle_sizes(gm: fx.GraphModule) -> None:
    """Makes one number of each size that may change: a share of the rows is one of so many tokens. Other lengths compile anew."""
    for graph in graphs_of(gm):
        for node in graph.find_nodes(op="placeholder"):
            for size in [value(node), *(size for x in tensors_of(node) for size in x.shape)]:
                if isinstance(size, torch.SymInt):
                    int(size)  # adds a guard


def _inputs(gm: fx.GraphModule) -> str:
    nodes = gm.graph.find_nodes(op="placeholder")
    return ", ".join(f"{n.name} {list(settled(value(n).shape))}" for n in nodes if is_of_batch(value(n)))


def _text(gm: fx.GraphModule) -> str:
    """The graph, and those of its layers, but for the number of a device."""
    lines = []
    for graph in graphs_of(gm):
        for node in graph.nodes:
            shapes = [settled(x.shape) for x in tensors_of(node)]
            lines.append(f"{node.name} = {target_name(node)}{node.args}{node.kwargs or ''} {shapes}")
    return re.sub(r"cuda:\d+|index=\d+", "", "\n".join(lines))


def _options(options: Options) -> str:
    given = {name: of for name, of in vars(options).items() if name not in _OF_A_RANK}
    return f"{given}, grad {torch.is_grad_enabled()}"


# Options whose values name this rank.
_OF_A_RANK = ("sequence_parallel", "average_gradients")


_AND = "; "


def _outcome(result: Result) -> str:
    """Which logits were taken out, and what is called, but for sizes."""
    calls = "\n".join(target_name(node) for graph in graphs_of(result.gm) for node in graph.nodes)
    taken = [logits.position for logits in result.taken_logits]
    return f"{taken}{_AND}{hashlib.sha256(calls.encode()).hexdigest()}"
