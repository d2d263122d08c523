"""``stack([p, q], 0).mean(0)`` → ``stack([p, q], -1).mean(-1)``: divergences from several teachers.

A new first dimension would move the rows. Done where all that reads the stack, or a pointwise function of it, reduces
that dimension, reduces everything or takes a member; left alone otherwise.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, replace_with
from mst_fx.graph.modes import Context, contexts, in_context, outside_transforms
from mst_fx.graph.spelling import POINTWISE_LINKS, REDUCTIONS, operation
from mst_fx.graph.values import tensor_value
from mst_fx.graph.writes import writes_in_place

aten = torch.ops.aten


def run(context: PassContext) -> None:
    """Moves the new dimension of stacks to the end."""
    graph = context.graph
    modes = contexts(graph)
    for node in outside_transforms(graph):
        if node.target in (torch.stack, aten.stack.default):
            with context.at("vocab", node):
                _stack_one_last(graph, node, modes)


def _stack_one_last(graph: fx.Graph, node: fx.Node, modes: dict[fx.Node, Context]) -> None:
    fake, members = tensor_value(node), node.args[0] if node.args else None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if fake is None or fake.ndim < 2 or dim not in (0, -fake.ndim) or not isinstance(members, (list, tuple)):
        return
    if all(map(_is_moved_reader, node.users)):
        with graph.inserting_before(node), in_context(modes[node]):
            new = add_call(graph, torch.stack, members, -1)
        new.meta = {**node.meta, **new.meta}
        _move_readers(graph, node, new, modes)
        graph.erase_node(node)


def _is_moved_reader(node: fx.Node) -> bool:
    """Whether what reads a stack can read one whose new dimension is the last."""
    name, source = operation(node), node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or len(node.all_input_nodes) > 1:
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[1], int)
    if name in POINTWISE_LINKS and not writes_in_place(node):
        return all(map(_is_moved_reader, node.users)) and bool(node.users)
    if name not in REDUCTIONS or node.kwargs.keys() - {"dim", "keepdim", "dtype"}:
        return False
    if len(node.args) == 1 and "dim" not in node.kwargs:
        return name in ("sum", "mean") and "keepdim" not in node.kwargs
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return _reduced(node) in (0, -fake.ndim) and keepdim is False and len(node.args) <= 3


def _reduced(node: fx.Node) -> Any:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim


def _move_readers(graph: fx.Graph, old: fx.Node, new: fx.Node, modes: dict[fx.Node, Context]) -> None:
    """Lets the readers of a stack, and of pointwise functions of it, read one whose new dimension is the last."""
    for user in list(old.users):
        args, kwargs = user.args[1:], dict(user.kwargs)
        if user.target is operator.getitem:
            args = ((Ellipsis, *args),)  # type: ignore[arg-type]
        elif operation(user) in REDUCTIONS and (args or "dim" in kwargs):
            args, kwargs = (-1, *args[1:]), {key: given for key, given in kwargs.items() if key != "dim"}
        with graph.inserting_before(user), in_context(modes[user]):
            moved = add_call(graph, user.target, new, *args, **kwargs)
        if operation(user) in POINTWISE_LINKS and user.target is not operator.getitem:
            _move_readers(graph, user, moved, modes)
            graph.erase_node(user)
        else:
            replace_with(user, moved)
