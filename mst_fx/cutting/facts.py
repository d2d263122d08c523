"""What is asked of a node before it is cut."""

from __future__ import annotations

import torch
from torch import fx

from mst_fx.graph.effects import has_effects
from mst_fx.graph.spelling import dropout_probability
from mst_fx.graph.values import is_of_batch, tensor_value, tensors_of, value
from mst_fx.rows.tokens import Tokens
from mst_fx.torch_api.ops import HigherOrderOperator
from mst_fx.torch_api.tensors import tree_leaves


def index_of(node: fx.Node) -> fx.Node | None:
    """The ids of an embedding: ``F.embedding(ids, weight)``, ``torch.embedding(weight, ids)``."""
    ids = [
        x
        for x in node.all_input_nodes
        if (fake := tensor_value(x)) is not None and not fake.is_floating_point()
    ]
    return ids[0] if len(ids) == 1 else None


def is_given(node: fx.Node) -> bool:
    """Whether integers are made of some that the graph was given."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            return True
        for operand in current.all_input_nodes:
            fake = tensor_value(operand)
            if fake is not None and not fake.is_floating_point() and operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    return False


def is_activation(fake: torch.Tensor) -> bool:
    """Whether an input holds something of each token of a batch: ``[B, S, E]``."""
    return is_of_batch(fake) and fake.is_floating_point() and fake.ndim == 3 and fake.shape[2] > 1


def why_not(node: fx.Node) -> str | None:
    """Why a node is never run on a rank's tokens alone; None: it may be."""
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
        return "calls a graph, or a module"
    if has_effects(node) and dropout_probability(node) is None:
        return "has effects"
    if not tensors_of(node) or len(tree_leaves(value(node))) != len(tensors_of(node)):
        return "gives something else than tensors"
    return None


def cut_again(shape: tuple[int, ...], place: Tokens, found: tuple[int, ...]) -> int:
    """How many tokens a result has where an operand has its own, and no other size differs; 0: it is another one."""
    if len(shape) != len(found) or shape[: place.dim] != found[: place.dim]:
        return 0
    if shape[place.dim + 1 :] != found[place.dim + 1 :]:
        return 0
    if found[place.dim] == shape[place.dim]:
        return place.count
    is_most = place.batch == 1 and place.count > found[place.dim] >= place.count // 2
    return found[place.dim] if is_most else 0
