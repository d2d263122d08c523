"""The modes that nodes run in: autocast, grad, inference, levels of ``torch.func`` transforms."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.effects import inference_change, level_change
from mst_fx.torch_api.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED


@contextlib.contextmanager
def autocast_contexts(contexts: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """The autocast regions (``_enter_autocast`` nodes' arguments) a node lies in."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in contexts:
            stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        yield


@contextlib.contextmanager
def in_context(context: Context) -> Iterator[None]:
    """The modes of a node, for values that are made in its place."""
    with autocast_contexts(context.autocast), torch.set_grad_enabled(context.grad):
        yield


@dataclasses.dataclass(frozen=True)
class Context:
    """The modes a node of a Dynamo graph runs in, beside the ambient ones."""

    autocast: tuple[tuple[Any, ...], ...]
    grad: bool
    level: int = 0  # of torch.func transforms (vmap, grad, jvp): no region may begin, end or be put there
    inference: bool = False  # in inference_mode, where there is no grad either


def contexts(graph: fx.Graph) -> dict[fx.Node, Context]:
    """The modes of every node; the graph starts in the ambient ones."""
    current = Context((), torch.is_grad_enabled())
    outer: list[Context] = []  # of regions of inference_mode
    contexts = {}
    for node in graph.nodes:
        if node.target is ENTER_AUTOCAST:
            current = dataclasses.replace(current, autocast=(*current.autocast, tuple(node.args)))
        elif node.target is EXIT_AUTOCAST:
            current = dataclasses.replace(current, autocast=current.autocast[:-1])
        elif node.target is SET_GRAD_ENABLED:
            current = dataclasses.replace(current, grad=bool(node.args[0]))
        elif change := level_change(node):
            current = dataclasses.replace(current, level=max(0, current.level + change))
        elif (change := inference_change(node)) > 0:
            outer.append(current)
            current = dataclasses.replace(current, grad=False, inference=True)
        elif change < 0 and outer:
            current = outer.pop()
        contexts[node] = current
    return contexts


def outside_transforms(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in no ``torch.func`` transform: all that a pass may touch."""
    return [node for node, context in contexts(graph).items() if not context.level]
