"""The nodes of a graph as lines of text, for the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import fx

from mst_fx.diagnose.findings import Line
from mst_fx.graph.names import module_path, target_name
from mst_fx.graph.subgraphs import called_graph
from mst_fx.graph.values import tensors_of

_LONGEST = 200  # characters of a node's text
_KINDS = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def lines_of(gm: fx.GraphModule, prefix: str = "", depth: int = 0) -> Iterator[Line]:
    """The nodes of a graph but its inputs; those of a checkpointed layer after the call of it."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr") or (node.op == "output" and depth):
            continue
        name = "return" if node.op == "output" else node.name
        text = _short(str(node.args[0])) if node.op == "output" else _call_text(node)
        shapes = ", ".join(_shape(tensor) for tensor in tensors_of(node)) if node.op != "output" else ""
        operands = tuple(operand.name for operand in node.all_input_nodes)
        yield Line(prefix + name, name, text, shapes, module_path(node), depth, operands)
        inner = called_graph(gm, node)
        if inner is not None:
            yield from lines_of(inner, f"{prefix}{node.args[0].target}.", depth + 1)


def _call_text(node: fx.Node) -> str:
    arguments = [str(x) for x in node.args] + [f"{key}={x}" for key, x in node.kwargs.items()]
    return _short(f"{target_name(node)}({', '.join(arguments)})")


def _short(text: str) -> str:
    """With readable names of parameters and inputs, and not too long."""
    text = re.sub(r"\bl_(?:self|args|kwargs)_(\w+?)_(?=\W|$)", lambda m: _dotted(m[1]), text)
    text = re.sub(r"\bl_(\w+?)_(?=\W|$)", r"\1", text)
    text = re.sub(r"\[(?:-?\d+, ){8,}-?\d+\]", "[…]", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…)"


def _dotted(name: str) -> str:
    """``modules_model_modules_layers_modules_0_parameters_weight`` → ``model.layers.0.weight``."""
    return re.sub(r"(?:^|_)(?:modules|parameters|buffers)_", ".", name).strip(".")


def _shape(tensor: torch.Tensor) -> str:
    kind = re.sub(
        r"(float|bfloat|int|uint|complex)(\d+)", lambda m: _KINDS[m[1]] + m[2], str(tensor.dtype)[6:]
    )
    return f"{kind}[{', '.join(map(str, tensor.shape))}]"
