"""What a node calls, however it is spelled: the one table of names.

A Dynamo graph has many spellings of one operation: ``torch.mul(x, y)``, ``x.mul(y)``, ``x * y``, ``x *= y``, ``torch.multiply``,
``aten.mul.Tensor``. Whoever asks what a node is asks :func:`operation`, which gives all of these one name, and compares it with
a family of this file (``operation(node) in CASTS``); arguments are read by name with :func:`argument`.

Only functions of torch, methods of tensors and ``operator.*`` have names here: a user's function that Dynamo left whole
(``allow_in_graph``) is nothing that we know, whatever it is called.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from typing import Any

import torch
from torch import fx

from mst_fx.torch_api.ops import OpOverload, OpOverloadPacket, schema_of

aten = torch.ops.aten

# Spellings of one operation. Left: what torch, ATen or ``operator`` also call it.
_ALIASES = {
    "_log_softmax": "log_softmax", "_softmax": "softmax", "_to_copy": "to", "_unsafe_view": "view", "absolute": "abs",
    "and_": "bitwise_and", "clip": "clamp", "concat": "cat", "concatenate": "cat", "convert_element_type": "to",
    "cross_entropy_loss": "cross_entropy", "divide": "div", "floordiv": "floor_divide", "greater": "gt",
    "greater_equal": "ge", "inv": "bitwise_not", "invert": "bitwise_not", "less": "lt", "less_equal": "le",
    "mod": "remainder", "moveaxis": "movedim", "multiply": "mul", "negative": "neg", "not_equal": "ne",
    "or_": "bitwise_or", "subtract": "sub", "swapaxes": "transpose", "swapdims": "transpose", "true_divide": "div",
    "truediv": "div", "xor": "bitwise_xor",
}  # fmt: skip

# Families, by the names that operation() gives.
FLOAT_CASTS = frozenset(("float", "double", "half", "bfloat16", "to", "type", "type_as"))
CASTS = FLOAT_CASTS | {"bool", "int", "long", "short"}
COPIES = frozenset(("clone", "contiguous", "detach", "alias", "lift_fresh"))  # values as they are
RESHAPES = frozenset(("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel"))
PERMUTES = frozenset(("transpose", "permute", "movedim", "t", "mT", "adjoint"))
EXPANDS = frozenset(("expand", "expand_as", "broadcast_to"))
SPLITS = frozenset(("chunk", "split", "tensor_split", "unbind", "split_with_sizes"))
MATMULS = frozenset(("matmul", "mm", "bmm"))  # two operands, nothing added
MATRIX_PRODUCTS = MATMULS | {"linear", "addmm", "baddbmm", "einsum", "bilinear"}
CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d", "convolution"))
ATTENTION = frozenset(("scaled_dot_product_attention",))
SOFTMAXES = frozenset(("softmax",))
DROPOUTS = frozenset(("dropout",))
EMBEDDINGS = frozenset(("embedding",))
LABEL_LOSSES = frozenset(("cross_entropy", "nll_loss"))  # rows of scores, one label a row
COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
ARITHMETIC = frozenset(("add", "sub", "rsub", "mul", "div"))
REDUCTIONS = frozenset(("sum", "mean", "logsumexp", "amax", "amin", "max", "min", "prod", "var", "std"))
WAVES = frozenset(("cos", "sin"))

# Of the products whose operands stand in other places than 0 and 1: the rows, the matrix.
_PLACES = {"addmm": (1, 2), "baddbmm": (1, 2), "einsum": (1, 2)}

_NO_CALLS = ("placeholder", "get_attr", "output", "call_module")


def operation(node: fx.Node) -> str:
    """The one name of what a node calls, in place or not; "" if that is nothing of torch's."""
    return "" if node.op in _NO_CALLS else _operation(node.target)


@functools.cache
def _operation(target: Any) -> str:
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, OpOverloadPacket):
        name = target.__name__
    elif isinstance(target, str):
        name = target
    elif _is_of_torch(target):
        name = str(getattr(target, "__name__", ""))
    else:
        return ""
    is_operator = getattr(target, "__module__", "") in ("_operator", "operator")
    if is_operator or (name.startswith("__") and name.endswith("__")):
        name = name.removeprefix("__").removesuffix("__")
        if name[:1] in ("i", "r") and hasattr(operator, f"__{name[1:]}__"):  # x += y; 1 + x
            name = name[1:] if name[1:] not in ("sub", "truediv", "pow") or name[0] == "i" else name
        name = {"and": "and_", "or": "or_"}.get(name, name)
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def _is_of_torch(target: Any) -> bool:
    """Whether a function is torch's, or of the standard library's operators, and no user's."""
    if isinstance(
        target, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
    ):
        return True
    module = getattr(target, "__module__", None) or ""
    return module in ("builtins", "math") or module.split(".")[0] in ("torch", "_operator", "operator")


def product_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """The two factors of a matrix product, the rows first; None for other nodes."""
    name = operation(node)
    if name not in MATRIX_PRODUCTS:
        return None
    places = _PLACES.get(name, (0, 1))
    return (node.args[places[0]], node.args[places[1]]) if len(node.args) > max(places) else None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a node by torch's name for it (``dim``, ``p``, ``attn_mask``), given by place or by keyword.

    Args:
        default: where it is not given.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    for names in signatures(node):
        if name in names and names.index(name) < len(node.args):
            return node.args[names.index(name)]
    return default


@functools.cache
def _names_of(target: Any) -> tuple[tuple[str, ...], ...]:
    """The names of positional arguments, of each overload of what is called."""
    if isinstance(target, types.FunctionType):
        parameters = inspect.signature(target).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return ()
        return (tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),)
    return tuple(tuple(a.name for a in schema.arguments if not a.kwarg_only) for schema in _schemas(target))


def _schemas(target: Any) -> list[Any]:
    if isinstance(target, OpOverload):
        return [schema_of(target)]
    if isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
        packet = getattr(aten, target.__name__, None)
        return [schema_of(getattr(packet, name)) for name in packet.overloads()] if packet is not None else []
    return []


def signatures(node: fx.Node) -> tuple[tuple[str, ...], ...]:
    """The names of the positional arguments of what a node calls, one tuple an overload."""
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, str(target), None)
    return _names_of(target) if target is not None and _is_of_torch_or_operator(target) else ()


def _is_of_torch_or_operator(target: Any) -> bool:
    return isinstance(target, OpOverload) or _is_of_torch(target)


def dropout_probability(node: fx.Node) -> float | None:
    """The probability with which a dropout drops, 0 when not training; None for other nodes."""
    if operation(node) not in DROPOUTS or node.op != "call_function":
        return None
    default = 0.5 if node.target is torch.nn.functional.dropout else None
    p = argument(node, "p", default)
    training = argument(node, "training", argument(node, "train", True))
    if training is False:
        return 0.0
    return float(p) if isinstance(p, (int, float)) and training is True else None


def is_identity_dropout(node: fx.Node) -> bool:
    """Whether a dropout is the identity: probability 0, or not training."""
    return dropout_probability(node) == 0
