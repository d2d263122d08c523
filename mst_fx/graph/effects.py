"""What a node does beside giving a value: effects, and the levels of ``torch.func`` transforms it opens.

In a Dynamo graph ``torch.vmap(f)(x)`` is ``_vmap_increment_nesting(); b = _add_batch_dim(x); …;
_remove_batch_dim(…); _vmap_decrement_nesting()``. What lies between the two has another meaning than outside:
its values are no plain tensors, and nothing may be taken out, put in or left out.
"""

from __future__ import annotations

import torch
from torch import fx

from mst_fx.declared import is_declared
from mst_fx.graph.names import target_name
from mst_fx.graph.spelling import LOOKS, STATISTICS_WRITERS, is_of_library, is_of_mst, operation
from mst_fx.graph.subgraphs import called_graphs
from mst_fx.graph.values import tensors_of, value
from mst_fx.torch_api.ops import OpOverload, OpOverloadPacket

# By name: from release to release they move between torch._C._functorch and torch._functorch.predispatch.
_ENTERS = ("_increment_nesting", "_enter_dual_level")
_LEAVES = ("_decrement_nesting", "_exit_dual_level")

# Modes that end with the graph they are in.
_MODES = ("_set_grad_enabled", "_autocast", "_inference_mode", "lazy_load_decompositions")

_LOOKING_MODULES = ("_operator", "builtins", "math")
_SYMBOLIC = (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite)


def level_change(node: fx.Node) -> int:
    """1 where a level of a transform begins, -1 where one ends, 0 elsewhere."""
    if node.op != "call_function" or isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return 0
    name = target_name(node)
    return int(name.endswith(_ENTERS)) - int(name.endswith(_LEAVES))


def inference_change(node: fx.Node) -> int:
    """The same for ``torch.inference_mode()``."""
    name = target_name(node) if node.op == "call_function" else ""
    if name == "_exit_inference_mode":
        return -inference_change(node.all_input_nodes[0])
    return int(name == "_enter_inference_mode" and node.args[0] is not False)


def has_effects(node: fx.Node) -> bool:
    """Whether a node may do more than to give its value, so that it stays though nobody reads that.

    A function that gives no tensor is run for something else (asserts, levels, modes), unless it looks at
    sizes. What is written to arguments in an obvious way is :func:`mst_fx.graph.writes.writes_in_place`'s affair.
    """
    if node.op in ("placeholder", "get_attr", "output") or node.is_impure():
        return node.op != "get_attr"
    if operation(node) in STATISTICS_WRITERS:
        return True
    if is_of_library(node) and not is_of_mst(node) and not is_declared(node.target):
        return True  # its schema does not say what else it does
    if any(map(_changes_outside, called_graphs(node))):
        return True
    return node.op != "call_module" and not tensors_of(node) and not _only_looks(node)


def _changes_outside(gm: fx.GraphModule) -> bool:
    calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
    return any(has_effects(n) for n in calls if not level_change(n) and not target_name(n).endswith(_MODES))


def _only_looks(node: fx.Node) -> bool:
    looks = operation(node) in LOOKS
    if node.op == "call_method" or isinstance(node.target, OpOverload):
        return looks
    is_of_python = getattr(node.target, "__module__", None) in _LOOKING_MODULES and node.target is not print
    return is_of_python or node.target in _SYMBOLIC or (looks and value(node) is not None)
