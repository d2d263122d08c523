"""What a node calls, however it is spelled: the one table of names.

A Dynamo graph has many spellings of one operation: ``torch.mul(x, y)``, ``x.mul(y)``, ``x * y``, ``x *= y``, ``torch.multiply``,
``aten.mul.Tensor``. Whoever asks what a node is asks :func:`operation`, which gives all of these one name, and compares it with
a family of this file (``operation(node) in CASTS``); arguments are read by name with :func:`argument`.

Only functions of torch, methods of tensors and ``operator.*`` have plain names: a user's function that Dynamo left whole
(``allow_in_graph``) is nothing that we know, whatever it is called, and an operator of another library is known by its
whole name (``library::mul``). The name does not say whether a call writes to its argument: :mod:`mst_fx.graph.writes` does.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.graph.values import tensor_value
from mst_fx.torch_api.ops import OpOverload, OpOverloadPacket, same_overload, schema_of

aten = torch.ops.aten

# Spellings of one operation. Left: what torch, ATen or ``operator`` also call it.
_ALIASES = {
    "_log_softmax": "log_softmax", "_softmax": "softmax", "_to_copy": "to", "_unsafe_view": "view", "absolute": "abs",
    "and_": "bitwise_and", "clip": "clamp", "concat": "cat", "concatenate": "cat", "convert_element_type": "to",
    "cross_entropy_loss": "cross_entropy", "divide": "div", "floordiv": "floor_divide", "greater": "gt",
    "greater_equal": "ge", "inv": "bitwise_not", "invert": "bitwise_not", "less": "lt", "less_equal": "le",
    "lshift": "bitwise_left_shift", "mod": "remainder", "moveaxis": "movedim", "multiply": "mul", "negative": "neg",
    "not_equal": "ne", "or_": "bitwise_or", "rshift": "bitwise_right_shift", "subtract": "sub",
    "swapaxes": "transpose", "swapdims": "transpose", "true_divide": "div", "truediv": "div", "xor": "bitwise_xor",
}  # fmt: skip

# Names of ``operator`` that mean something else elsewhere, or that Python's protocol spells without an underscore.
_OPERATORS = {"and": "and_", "or": "or_", "concat": "", "idiv": "div", "iconcat": ""}
_SYMMETRIC = frozenset(("add", "mul", "and", "or", "xor"))  # 1 + x is x + 1; 1 - x is ``rsub``

# Families, by the names that operation() gives.
FLOAT_CASTS = frozenset(("float", "double", "half", "bfloat16", "to", "type", "type_as"))
CASTS = FLOAT_CASTS | {"bool", "int", "long", "short"}
COPIES = frozenset(("clone", "contiguous", "detach", "alias", "lift_fresh"))  # values as they are
SIZED_VIEWS = frozenset(("view", "reshape", "view_as", "reshape_as", "unflatten"))  # say the sizes they give
FLATTENS = frozenset(("flatten", "view", "reshape"))  # of rows, between logits and what reads them
RESHAPES = SIZED_VIEWS | {"flatten", "ravel"}
TRANSPOSES = frozenset(("transpose", "t"))  # undone by themselves
REORDERINGS = TRANSPOSES | {"permute", "movedim"}  # of dimensions, as their arguments say
PERMUTES = REORDERINGS | {"mT", "adjoint"}
EXPANDS = frozenset(("expand", "expand_as", "broadcast_to"))
CUTS = frozenset(("chunk", "split", "tensor_split"))  # parts along a dimension
SPLITS = CUTS | {"unbind", "split_with_sizes"}
SAME_ORDER = SIZED_VIEWS - {"view_as", "reshape_as", "unflatten"} | {  # elements in their order, if not fewer
    "unsqueeze", "contiguous", "clone", "detach", "long", "to", "getitem",
}  # fmt: skip
PICKS = frozenset(("gather", "take_along_dim"))  # one element a row, by an index
MATMULS = frozenset(("matmul", "mm", "bmm"))  # two operands, nothing added
MATRIX_PRODUCTS = MATMULS | {"linear", "addmm", "baddbmm", "einsum", "bilinear"}
GROUPED_PRODUCTS = frozenset(
    ("grouped_mm", "_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "transformers::grouped_mm_fallback")
)  # fmt: skip
# Multiply by a matrix, in whatever form.
PRODUCTS = (
    MATRIX_PRODUCTS | GROUPED_PRODUCTS
    | {"addbmm", "chain_matmul", "_int_mm", "_scaled_mm", "_weight_int8pack_mm", "_weight_int4pack_mm"}
)  # fmt: skip
CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d", "convolution"))
ATTENTION = frozenset(("scaled_dot_product_attention",))
ATTENTION_KERNELS = ATTENTION | {
    "flex_attention", "mst_fx::attention", "mst_fx::biased_attention", "mst_fx::masked_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip
PADS = frozenset(("pad", "constant_pad_nd"))
SOFTMAXES = frozenset(("softmax",))
CLASS_FUNCTIONS = SOFTMAXES | {"log_softmax"}  # of all classes of a row
# Pointwise functions that may stand between a head and what reads its logits.
POINTWISE_LINKS = FLOAT_CASTS - {"type_as"} | {
    "contiguous", "clone", "tanh", "sigmoid", "neg", "clamp", "mul", "div", "add", "sub", "masked_fill", "pow", "exp",
    "log", "softplus", "log_sigmoid",
}  # fmt: skip
WAVES = frozenset(("cos", "sin"))
DROPOUTS = frozenset(("dropout",))
EMBEDDINGS = frozenset(("embedding",))
LABEL_LOSSES = frozenset(("cross_entropy", "nll_loss"))  # rows of scores, one label a row
WEIGHTED_MEANS = frozenset(("mse_loss", "l1_loss"))  # given weights, their mean divides by the sum of them
# Losses whose mean is the sum divided by the number of elements.
PLAIN_LOSSES = WEIGHTED_MEANS | {
    "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy_with_logits", "binary_cross_entropy",
    "soft_margin_loss", "multilabel_soft_margin_loss", "multi_margin_loss", "poisson_nll_loss", "margin_ranking_loss",
    "triplet_margin_loss",
}  # fmt: skip
# Whatever reduces scores, or what goes for it.
LOSSES = LABEL_LOSSES | {
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "gaussian_nll_loss", "poisson_nll_loss", "nll_loss2d",
    "nll_loss_nd", "nll_loss_forward", "nll_loss2d_forward",
}  # fmt: skip
ROUTERS = frozenset(("topk", "one_hot"))
COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
ARITHMETIC = frozenset(("add", "sub", "rsub", "mul", "div"))
REDUCTIONS = frozenset(("sum", "mean", "logsumexp", "amax", "amin", "max", "min", "prod", "var", "std"))
NUMBERS_EVERYWHERE = {  # new tensors that hold one number, or (empty) may hold it
    "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "empty": 0.0, "empty_like": 0.0, "new_empty": 0.0,
    "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0,
}  # fmt: skip
FULLS = frozenset(("full", "full_like", "new_full"))  # given the number
CHECKPOINTS = frozenset(("tag_activation_checkpoint", "wrap_activation_checkpoint"))
# Give no tensor, and only look at their operands.
LOOKS = frozenset((
    "size", "numel", "nelement", "dim", "ndimension", "stride", "storage_offset", "element_size", "get_device",
    "is_contiguous", "is_floating_point", "is_complex", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset",
))  # fmt: skip
# Write to running means, variances and extremes, which not every schema says.
STATISTICS_WRITERS = frozenset((
    "batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_impl_index",
    "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_update_stats",
    "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts", "fused_moving_avg_obs_fake_quant",
    "_fused_moving_avg_obs_fq_helper",
))  # fmt: skip
# Have a form ``op_`` that does what ``op`` does and writes the result, in the type of the tensor, into it.
_IN_PLACE_TOO = """
    abs add addbmm addcdiv addcmul addmm addmv addr atan2 baddbmm bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min copysign cos cosh cumprod cumsum
    deg2rad div elu eq erf erfc exp exp2 expm1 fix floor floor_divide fmod frac ge gt hardtanh hypot index_add
    index_copy index_fill index_put le leaky_relu lerp log log10 log1p log2 logical_and logical_not logical_or
    logical_xor logit lt masked_fill masked_scatter mul nan_to_num ne neg pow put reciprocal relu relu6 remainder
    renorm round rsqrt scatter scatter_add scatter_reduce selu sigmoid sign sin sinc sinh sqrt square sub tan tanh
    threshold tril triu trunc xlogy
"""
IN_PLACE_TOO = frozenset(_IN_PLACE_TOO.split())

# Of the products whose operands stand in other places than 0 and 1: the rows, the matrix.
_PLACES = {"addmm": (1, 2), "baddbmm": (1, 2), "einsum": (1, 2)}

# The operand that a product adds, by position and by name.
_ADDED = {
    "linear": (2, ("bias",)),
    "addmm": (0, ("input", "self")),
    "baddbmm": (0, ("input", "self")),
    "scaled_dot_product_attention": (3, ("attn_mask",)),
}

# Other names of an argument: of torch's Python functions, and of NumPy.
ARGUMENT_ALIASES = {"self": ("input",), "input": ("self",), "dim": ("axis",), "keepdim": ("keepdims",)}

# Keywords that torch takes beside those of a schema.
_IN_NO_SCHEMA = frozenset(("axis", "keepdims", "input", "self", "requires_grad", "names", "out"))

_NO_CALLS = ("placeholder", "get_attr", "output", "call_module")
_OF_TORCH = ("torch", "_operator", "operator", "builtins", "math")
_OWN_NAMESPACES = ("aten", "prims")


def operation(node: fx.Node) -> str:
    """The one name of what a node calls, in place or not; "" if that is nothing of torch's."""
    return "" if node.op in _NO_CALLS else operation_of(node.target)


@functools.cache
def operation_of(target: Any) -> str:
    """The same of what a ``call_function`` or ``call_method`` node calls: a function, or the name of a method."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        namespace, name = str(target).split(".")[:2]
        if namespace not in _OWN_NAMESPACES:
            return f"{namespace}::{name}"
    elif isinstance(target, str):
        name = target
    elif _is_of_torch(target):
        name = str(getattr(target, "__name__", ""))
    else:
        return ""
    if _is_of_operator(target) or (name.startswith("__") and name.endswith("__")):
        name = _of_protocol(name.removeprefix("__").removesuffix("__"))
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def _of_protocol(name: str) -> str:
    """``iadd``, ``radd``, ``add`` → ``add``: of ``x += y``, ``1 + x``, ``x + 1``."""
    base = name[1:]
    if hasattr(operator, f"__{base}__") and (name[0] == "i" or (name[0] == "r" and base in _SYMMETRIC)):
        name = base
    return _OPERATORS.get(name, name)


def _is_of_torch(target: Any) -> bool:
    """Whether a function is torch's, or of the standard library's operators, and no user's."""
    if isinstance(target, type):
        return False
    owner = getattr(target, "__objclass__", None)
    if owner is not None:
        return issubclass(torch.Tensor, owner)
    return (getattr(target, "__module__", None) or "").partition(".")[0] in _OF_TORCH


def _is_of_operator(target: Any) -> bool:
    return getattr(target, "__module__", "") in ("_operator", "operator")


def is_of_library(node: fx.Node) -> bool:
    """Whether a node calls an operator that is not torch's own, such as a quantised product, or one of ours."""
    return "::" in operation(node)


def is_of_mst(node: fx.Node) -> bool:
    """Whether a node calls one of our operators."""
    return operation(node).startswith("mst_fx::")


def is_in_place_operator(target: Any) -> bool:
    """Whether a target is ``x += y`` and the like, or ``x[i] = y``, as a function or as a method."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    is_protocol = name.startswith("__") and name.endswith("__")
    name = name.strip("_") if _is_of_operator(target) or is_protocol else ""
    return name in ("setitem", "idiv") or (name[:1] == "i" and hasattr(operator, f"__{name[1:]}__"))


def out_of_place(target: Any) -> Any:
    """What gives the value that ``target`` writes to its first operand; None if ``target`` is not known to write.

    ``operator.iadd`` → ``operator.add``, ``"mul_"`` → ``"mul"``, ``aten.add_.Tensor`` → ``aten.add.Tensor``.
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", "").partition(".")[0]
    if is_in_place_operator(target):
        base = name.strip("_")[1:]
        return getattr(operator, {"and": "and_", "or": "or_"}.get(base, base), None)
    base = name.removesuffix("_")
    if base == name or operation_of(target) not in IN_PLACE_TOO:
        return None
    if isinstance(target, str):
        return base if hasattr(torch.Tensor, base) else None
    if isinstance(target, OpOverload):
        return same_overload(getattr(aten, base, None), target)
    return getattr(torch, base, None) or getattr(torch.nn.functional, base, None)


def product_operands(node: fx.Node) -> tuple[Any, Any] | None:
    """The two factors of a matrix product, the rows first; None for other nodes."""
    name = operation(node)
    if name not in MATRIX_PRODUCTS:
        return None
    places = _PLACES.get(name, (0, 1))
    return (node.args[places[0]], node.args[places[1]]) if len(node.args) > max(places) else None


def multiplied(product: fx.Node) -> list[fx.Node]:
    """The tensors that a product multiplies; a bias, a mask or a residual is added only."""
    place, names = _ADDED.get(operation(product), (-1, ()))
    given = [x for index, x in enumerate(product.args) if index != place]
    given += [x for name, x in product.kwargs.items() if name not in names]
    nodes: dict[fx.Node, None] = {}
    fx.map_arg(given, lambda node: nodes.setdefault(node))
    return [node for node in nodes if tensor_value(node) is not None]


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a node by torch's name for it (``dim``, ``p``, ``attn_mask``), given by place or by keyword.

    Args:
        default: where it is not given.
    """
    for spelled in (name, *ARGUMENT_ALIASES.get(name, ())):
        if spelled in node.kwargs:
            return node.kwargs[spelled]
        for names in signatures(node):
            if spelled in names and names.index(spelled) < len(node.args):
                return node.args[names.index(spelled)]
    return default


def given_arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments that a node is given, by torch's names and in torch's order; None if overloads differ in them."""
    found = set(signatures(node))
    if len(found) != 1:
        return None
    (names,) = found
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {name: given.pop(name) for name in names if name in given} | given


def signatures(node: fx.Node) -> list[tuple[str, ...]]:
    """The names of the positional arguments of what a node calls, one tuple an overload that it may call."""
    return [tuple(names) for names, every in overloads(node) if _may_be_called(node, names, every)]


def overloads(node: fx.Node) -> Sequence[tuple[dict[str, str], frozenset[str]]]:
    """The names and types of the positional arguments, and the names of all, of each overload of what a node calls."""
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, str(target), None)
    is_known = isinstance(target, OpOverload) or _is_of_torch(target)
    return _parameters_of(target) if target is not None and is_known else ()


def _may_be_called(node: fx.Node, names: dict[str, str], every: frozenset[str]) -> bool:
    given = node.kwargs.keys() - _IN_NO_SCHEMA
    if len(node.args) > len(names) or not given <= every:
        return False
    return all(map(_is_of_kind, node.args, names.values()))


def _is_of_kind(arg: Any, kind: str) -> bool:
    """Whether an argument may be of a type of a schema; "" is any."""
    if isinstance(arg, bool):
        return not kind or "bool" in kind or "number" in kind
    is_tensor = isinstance(arg, fx.Node) and tensor_value(arg) is not None
    return not is_tensor or not kind or "Tensor" in kind


@functools.cache
def _parameters_of(target: Any) -> tuple[tuple[dict[str, str], frozenset[str]], ...]:
    if isinstance(target, types.FunctionType):
        parameters = inspect.signature(target).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return ()
        positional = {p.name: "" for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        return ((positional, frozenset(p.name for p in parameters)),)
    return tuple(
        (
            {a.name: str(a.type) for a in s.arguments if not a.kwarg_only},
            frozenset(a.name for a in s.arguments),
        )
        for s in _schemas(target)
    )


def _schemas(target: Any) -> list[Any]:
    if isinstance(target, OpOverload):
        return [schema_of(target)]
    packet = getattr(aten, getattr(target, "__name__", ""), None)
    if not isinstance(
        packet, OpOverloadPacket
    ):  # a method of Python's that the namespace has, as each object does
        return []
    return [schema_of(getattr(packet, name)) for name in packet.overloads()]


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
