"""What may not be linear in the gradient that it is given: a ``torch.autograd.Function``, an operator of another library.

All ranks run it on all tokens, or on none (a weight that is dequantised).

Before: ``y = lib::quantised(x, w)``, whose backward gets a part of the gradient of ``y`` on each rank. After: ``y = mst_fx::true_gradient(lib::quantised(x, w), …)``.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.spelling import is_of_library, operation
from mst_fx.graph.subgraphs import is_function
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.group import Group

_LINEAR = ("mst_fx::", "_c10d_functional::")


def is_foreign(node: fx.Node) -> bool:
    """Whether somebody has written by hand what a node does with its gradient."""
    return is_function(node) or (is_of_library(node) and not operation(node).startswith(_LINEAR))


def give_true_gradient(graph: fx.Graph, node: fx.Node, group: Group) -> None:
    """Lets a node, which all ranks run on the same, get the gradient that it gets in one process."""
    results = (
        [node] if tensor_value(node) is not None else [x for x in node.users if x.target is operator.getitem]
    )
    for result in results:
        if not any(x.requires_grad and x.is_floating_point() for x in tensors_of(result)):
            continue
        readers = list(result.users)
        with graph.inserting_after(result):
            averaged = add_call(
                graph, torch.ops.mst_fx.true_gradient.default, result, group.name, group.ranks
            )
        for reader in readers:
            reader.replace_input_with(result, averaged)
