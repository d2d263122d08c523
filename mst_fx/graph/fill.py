"""Nodes run on fakes, so that each knows its value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.subgraphs import attribute
from mst_fx.graph.values import VALUE
from mst_fx.torch_api.fakes import FakeTensor, fake_mode
from mst_fx.torch_api.fakes import fake_mode_of as fake_mode_of
from mst_fx.torch_api.tensors import tree_leaves


def call(op: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Runs a node's target on values, in the fake mode of the first fake among them."""
    mode = fake_mode_of(tree_leaves((list(args), kwargs)))
    function: Callable[..., Any] = target
    if op == "call_method":
        function = operator.methodcaller(target, *args[1:], **kwargs)
        args, kwargs = args[:1], {}
    if mode is None:
        return function(*args, **kwargs)
    with mode:
        return function(*args, **kwargs)


def fill_values(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Gives every node of a graph that Dynamo did not make its fake value.

    Args:
        gm: any GraphModule; sub-GraphModules are filled when they are called.
        example_inputs: what ``gm`` is called with; tensors may be real or fake.
    """
    mode = fake_mode_of(example_inputs) or fake_mode(is_symbolic=True)

    def fake(found: Any) -> Any:
        if isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor):
            return mode.from_tensor(found, static_shapes=True)
        return found

    class Fill(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta[VALUE] = result
            return result

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return fake(super().get_attr(target, args, kwargs))

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            child = attribute(self.module, target)
            if isinstance(child, fx.GraphModule):
                return Fill(child).run(*args)
            return super().call_module(target, args, kwargs)

    with mode:
        Fill(gm).run(*map(fake, example_inputs))
