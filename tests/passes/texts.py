"""Graphs as texts: a function in, its captured graph through one pass, the graph out, a line a node."""

from __future__ import annotations

import collections
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.bodies.body import BodyConfig
from mst_fx.context import PassContext, Shared
from mst_fx.graph.names import target_name
from mst_fx.options import make_options
from mst_fx.passes import positional, values

_ARGUMENTS = "xwy"


def after(run: Callable[[PassContext], Any], function: str, *inputs: Any) -> str:
    """The text of the graph of a function behind a pass.

    Args:
        run: the pass.
        function: the lines inside of the function; what it reads and does not make are its arguments, in the order of
            ``inputs``: x, then w, then y.
    """
    context = _context(_captured(function, inputs), inputs)
    positional.run(context)
    values.run(context)
    run(context)
    context.graph.lint()
    return text(context.graph)


def _captured(function: str, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """What Dynamo makes of it."""
    arguments = ", ".join(_ARGUMENTS[: len(inputs)])
    source = f"def f({arguments}):\n{textwrap.indent(inspect.cleandoc(function), '    ')}"
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(source, names)
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(names["f"], backend=keep, fullgraph=True)(*inputs)
    return found[0]


def _context(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> PassContext:
    options = make_options({"inner": "aot_eager"})
    config = BodyConfig(options.inner, options.accumulate, ())
    return PassContext(gm, options, config, True, Shared(), inputs)


def text(graph: fx.Graph) -> str:
    """``name = operation(arguments)`` for each node but inputs, then what is returned.

    A name is the operation's with a number: those that Dynamo gives are others in each version of torch.
    """
    lines: list[str] = []
    names: dict[fx.Node, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = _input_name(node)
        elif node.op == "output":
            lines.append(f"return {', '.join(_shown(arg, names) for arg in node.args[0])}")
        else:
            operation = _name(node)
            short = operation.rpartition(".")[2]
            names[node] = f"{short}_{counts[short]}"
            counts[short] += 1
            arguments = [_shown(arg, names) for arg in node.args]
            arguments += [f"{name}={_shown(arg, names)}" for name, arg in node.kwargs.items()]
            lines.append(f"{names[node]} = {operation}({', '.join(arguments)})")
    return "\n".join(lines)


def _input_name(node: fx.Node) -> str:
    """x, w or y; torch 2.11 goes by their numbers."""
    name = node.name.lower().removeprefix("l_").removesuffix("_")
    number = name.removeprefix("args_")
    return _ARGUMENTS[int(number)] if number.isdigit() else name


def _name(node: fx.Node) -> str:
    """Our operators with their namespace, others by their last name."""
    operator = str(node.target)
    return operator.rpartition(".")[0] if operator.startswith("mst_fx.") else target_name(node)


def _shown(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, (tuple, list)):
        return f"({', '.join(_shown(part, names) for part in argument)})"
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        shown = ["" if part is None else _shown(part, names) for part in parts]
        return ":".join(shown[: 3 if argument.step else 2])
    return "..." if argument is ... else str(argument)
