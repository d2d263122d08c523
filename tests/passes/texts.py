"""Graphs as texts: a function in, its captured graph through one pass, the graph out, a line a node."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.bodies.body import BodyConfig
from mst_fx.context import PassContext, Shared
from mst_fx.graph.names import target_name
from mst_fx.options import make_options
from mst_fx.passes import positional, values


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
    arguments = ", ".join("xwy"[: len(inputs)])
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
    """``name = operation(arguments)`` for each node but inputs, then what is returned."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {', '.join(map(_shown, node.args[0]))}")
        elif node.op != "placeholder":
            arguments = [_shown(arg) for arg in node.args]
            arguments += [f"{name}={_shown(arg)}" for name, arg in node.kwargs.items()]
            lines.append(f"{node.name} = {_name(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def _name(node: fx.Node) -> str:
    """Our operators with their namespace, others by their last name."""
    operator = str(node.target)
    return operator.rpartition(".")[0] if operator.startswith("mst_fx.") else target_name(node)


def _shown(argument: Any) -> str:
    if isinstance(argument, (tuple, list)):
        return f"({', '.join(map(_shown, argument))})"
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return ":".join("" if part is None else _shown(part) for part in parts[: 3 if argument.step else 2])
    if isinstance(argument, fx.Node) and argument.op == "placeholder":
        return argument.name.removeprefix("l_").removesuffix("_")
    return "..." if argument is ... else str(argument)
