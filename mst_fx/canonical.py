"""Equal graphs that are easier to chunk: losses as sums of row losses, no writes in place.

Every function here changes a copy of the user's graph; the runner throws the copy away when no
pass rewrites anything.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.fold import autocast_contexts, contexts, writes_in_place
from mst_fx.graph import add_call, sum_dtype, tensor_value

aten = torch.ops.aten

CLONE_OF = "mst_clone_of"  # meta key: the node whose rows the marked node computes a part of

# Losses whose mean is the sum divided by the number of elements.
_PLAIN_LOSSES = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.kl_div,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
)
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


_CASTS = ("float", "double", "half", "bfloat16", "to", "type")


def join_casts(graph: fx.Graph) -> None:
    """Moves casts that follow the end of an autocast region into it, next to what they cast.

    accelerate's mixed precision casts a model's outputs to float32 behind its autocast region; logits
    and what is made of them have to lie in one. A cast is the same in and out of autocast.
    """
    for node in list(graph.nodes):
        operands = node.all_input_nodes
        if node.op == "call_method" and node.target in _CASTS and len(operands) == 1:
            between = list(_between(operands[0], node))
            ends = any(other.target is torch.amp.autocast_mode._exit_autocast for other in between)
            if ends and not any(map(_is_barrier, between)):
                operands[0].append(node)


# Arguments that code asks for by keyword, and other names that torch takes for the same argument.
_LEFT_AS_KEYWORDS = ("inplace", "out", "dtype")
_OTHER_NAMES = {"self": ("input",), "dim": ("axis",), "keepdim": ("keepdims",)}


def make_positional(graph: fx.Graph) -> None:
    """``linear(input=x, weight=w)`` → ``linear(x, w)``: whoever reads a node finds its operands in one place.

    Only the arguments that follow the positional ones without a gap are moved.
    """
    for node in graph.nodes:
        if not node.kwargs or not any(tensor_value(n) is not None for n in node.all_input_nodes):
            continue
        found = {_positional(node, names) for names in _signatures(node)}
        if len(found) == 1 and (moved := found.pop()):
            args = [*node.args, *(node.kwargs[key] for key in moved)]
            node.kwargs = {key: given for key, given in node.kwargs.items() if key not in moved}
            node.args = tuple(args)


def _positional(node: fx.Node, names: Sequence[str]) -> tuple[str, ...]:
    """The keywords of a node that are its next positional arguments."""
    moved: list[str] = []
    for name in names[len(node.args) :]:
        keys = [key for key in (name, *_OTHER_NAMES.get(name, ())) if key in node.kwargs]
        if len(keys) != 1 or name in _LEFT_AS_KEYWORDS:
            break
        moved += keys
    return tuple(moved)


def _signatures(node: fx.Node) -> list[tuple[str, ...]]:
    """The names of the positional arguments of what a node calls: of each overload that takes its keywords."""
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, target, None)
    if isinstance(target, types.FunctionType) and target.__module__.startswith("torch."):
        parameters = inspect.signature(target).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return []
        return [tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)]
    if isinstance(target, torch._ops.OpOverload):
        schemas = [target._schema]
    elif isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
        packet = getattr(aten, target.__name__, None)
        schemas = [getattr(packet, name)._schema for name in packet.overloads()] if packet is not None else []
    else:
        return []
    found = []
    for schema in schemas:
        taken = {name for a in schema.arguments for name in (a.name, *_OTHER_NAMES.get(a.name, ()))}
        if node.kwargs.keys() <= taken:
            found.append(tuple(a.name for a in schema.arguments if not a.kwarg_only))
    return found


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while (first := first.next) is not last:
        yield first


def _is_barrier(node: fx.Node) -> bool:
    return node.target is torch._C._set_grad_enabled or writes_in_place(node)


def _replace(node: fx.Node, new: fx.Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in node.meta:
            new.meta[key] = node.meta[key]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def sum_losses(graph: fx.Graph) -> None:
    """Writes means and sums of losses as a sum of row losses, divided by the global count.

    A mean over chunks would weigh chunks by their number and not by their valid rows; a sum over
    chunks divided once is the mean. All rows ignored gives 0 / 0 = NaN, as in eager.
    """
    modes = contexts(graph)
    for node in list(graph.nodes):
        with autocast_contexts(modes[node].autocast):  # which decide the types of the values made here
            new = _as_sum(graph, node)
        if new is not None:
            sources = node.all_input_nodes
            _replace(node, new)
            for source in sources:  # a transpose that only the mean needed
                if not source.users and source.op != "placeholder":
                    graph.erase_node(source)


def _as_sum(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    if node.target in (F.cross_entropy, F.nll_loss, aten.cross_entropy_loss.default):
        return _sum_cross_entropy(graph, node)
    if node.target in _PLAIN_LOSSES:
        return _sum_plain_loss(graph, node)
    if node.target in ("mean", torch.mean, aten.mean.default) and len(node.args) == 1:
        source = node.args[0]
        if not node.kwargs and isinstance(source, fx.Node) and tensor_value(source) is not None:
            with graph.inserting_before(node):
                return _sum_over(graph, source, _numel(graph, source))
    return None


def _sum_cross_entropy(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    if node.target is aten.cross_entropy_loss.default:
        names = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        reduction = _REDUCTIONS[given.pop("reduction", 1)]
        target: Any = F.cross_entropy
    else:
        target = node.target
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
        given = dict(bound.arguments)
        reduction = given.pop("reduction", "mean")
        if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
            return None
    logits, labels, weight = given["input"], given["target"], given.get("weight")
    fake, fake_labels = tensor_value(logits), tensor_value(labels)
    if fake is None or fake_labels is None:
        return None
    is_soft = fake_labels.is_floating_point()  # probabilities
    is_written_out = is_soft and fake.dtype == sum_dtype(fake.dtype)
    if reduction == "none" and (not is_written_out or fake.ndim != 2):
        return None
    if fake.ndim == 3 and (source := _class_last(logits)) is not None and fake_labels.ndim == 2:
        with graph.inserting_before(node):
            given["input"] = logits = add_call(graph, "flatten", source, 0, 1)
            given["target"] = labels = add_call(graph, "flatten", labels, 0, 1)
    elif fake.ndim != 2:
        return None
    with graph.inserting_before(node):
        if is_written_out:
            losses = _soft_losses(graph, **given)
        else:
            losses = add_call(graph, target, **given, reduction="none")
        if reduction == "none":
            return losses
        if reduction == "sum":
            return _sum_over(graph, losses, None)
        if is_soft:  # every row counts
            return _sum_over(graph, losses, _numel(graph, losses))
        ignore = given.get("ignore_index", -100)
        valid = add_call(graph, torch.ne, labels, ignore)
        if weight is None:
            return _sum_over(graph, losses, add_call(graph, "sum", valid))
        first = add_call(graph, torch.mul, labels, valid)  # class 0 where the row is ignored
        weights = add_call(graph, torch.index_select, weight, 0, first)
        return _sum_over(graph, losses, add_call(graph, "sum", add_call(graph, torch.mul, weights, valid)))


def _soft_losses(
    graph: fx.Graph,
    input: fx.Node,
    target: fx.Node,
    weight: fx.Node | None = None,
    label_smoothing: float = 0.0,
    **_: Any,
) -> fx.Node:
    """Losses of rows whose targets are probabilities, as ``cross_entropy_loss_prob_target`` of ATen's LossNLL.cpp.

    Before torch 2.13 the trace of ``cross_entropy`` itself ends in a guard on the number of rows. Logits of
    16 bits are left to it all the same: which parts are rounded, or autocast, is its own affair.
    """
    if label_smoothing:
        classes = tensor_value(input).shape[1]  # type: ignore[union-attr]
        kept = add_call(graph, torch.mul, target, 1 - label_smoothing)
        target = add_call(graph, torch.add, kept, label_smoothing / classes)
    losses = add_call(graph, torch.mul, add_call(graph, "log_softmax", input, 1), target)
    if weight is not None:
        losses = add_call(graph, torch.mul, losses, weight)
    return add_call(graph, torch.neg, add_call(graph, "sum", losses, 1))


def _class_last(logits: fx.Node) -> fx.Node | None:
    """``x`` of ``x.transpose(1, 2)``: ``[B, S, V]`` logits, written as ``[B, V, S]`` for cross_entropy."""
    source = logits.args[0] if logits.args else None
    if not isinstance(source, fx.Node):
        return None
    dims: Any = logits.args[1:]
    order = tuple(dims[0]) if dims and isinstance(dims[0], (tuple, list)) else dims
    if logits.target in ("transpose", torch.transpose, aten.transpose.int):
        swaps = {dim % 3 for dim in order if isinstance(dim, int)} == {1, 2}
    else:
        swaps = logits.target in ("permute", torch.permute, aten.permute.default) and order == (0, 2, 1)
    return source if swaps else None


def _sum_plain_loss(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    given = dict(bound.arguments)
    reduction = given.pop("reduction", "mean")
    if reduction == "none" or given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    with graph.inserting_before(node):
        losses = add_call(graph, node.target, **given, reduction="none")
        if reduction == "sum":
            return _sum_over(graph, losses, None)
        if reduction == "batchmean":
            return _sum_over(graph, losses, _size(graph, given["input"], 0))
        return _sum_over(graph, losses, _numel(graph, losses))


def _numel(graph: fx.Graph, losses: fx.Node) -> fx.Node | int:
    """The number of elements, not read from the losses themselves, which would have to outlive their loop."""
    wanted = tensor_value(losses).numel()  # type: ignore[union-attr]
    if isinstance(wanted, int):
        return wanted
    for node in graph.find_nodes(op="placeholder"):
        fake = tensor_value(node)
        found = fake.numel() if fake is not None else 0
        if isinstance(found, torch.SymInt) and found.node.expr == wanted.node.expr:
            return add_call(graph, "numel", node)
    return add_call(graph, "numel", losses)


def _size(graph: fx.Graph, source: fx.Node, dim: int) -> fx.Node | int:
    size = tensor_value(source).shape[dim]  # type: ignore[union-attr]
    return size if isinstance(size, int) else add_call(graph, "size", source, dim)


def _sum_over(graph: fx.Graph, losses: fx.Node, count: fx.Node | int | None) -> fx.Node:
    """``losses.sum() / count``, the sum in float32 for 16-bit losses, as eager's kernels do.

    With a count of 0 the value is NaN and the gradient 0, as in eager: hence not a plain division.
    """
    dtype = tensor_value(losses).dtype  # type: ignore[union-attr]
    wide = sum_dtype(dtype)
    total = add_call(graph, "sum", losses, dtype=wide)
    if count is not None:
        if isinstance(count, int) or tensor_value(count) is None:  # a number of elements
            total = add_call(graph, torch.div, total, count)
        else:
            empty = add_call(graph, torch.eq, count, 0)
            safe = add_call(graph, torch.div, total, add_call(graph, torch.where, empty, 1, count))
            total = add_call(graph, torch.where, empty, float("nan"), safe)
    return total if wide == dtype else add_call(graph, "to", total, dtype)


def hoist_row_slices(graph: fx.Graph) -> None:
    """``linear(x, w)[:, :-1]`` → ``linear(x[:, :-1], w)``: losses that shift the logits.

    Before: ``logits = linear(x, w).float(); loss(logits[:, :-1], ...)``. After: the same chain on
    the sliced rows of ``x``, for this use of the logits only.
    """
    modes = contexts(graph)
    for node in list(graph.nodes):
        if node.target is operator.getitem and (chain := _sliced_chain(node)):
            head, index = chain[-1], node.args[1]
            assert isinstance(index, tuple)
            with graph.inserting_before(node), autocast_contexts(modes[head].autocast):
                current = add_call(graph, operator.getitem, head.args[0], _rows_only(index))
                for link in reversed(chain):
                    old = current
                    current = add_call(graph, link.target, old, *link.args[1:], **link.kwargs)
                    for key in ("nn_module_stack", "stack_trace"):
                        if key in link.meta:
                            current.meta[key] = link.meta[key]
                    current.meta[CLONE_OF] = link
            node.replace_all_uses_with(current)
            graph.erase_node(node)


_ROWWISE_LINKS = {
    torch.tanh,
    operator.mul,
    operator.truediv,
    torch.mul,
    torch.div,
    "float",
    "to",
    "tanh",
    "contiguous",
}
_LINEAR = (F.linear, aten.linear.default)


def _rows_only(index: tuple[Any, ...]) -> tuple[Any, ...]:
    full = slice(None, None, None)
    return tuple(full if part is Ellipsis else part for part in index)[:2]


def _sliced_chain(node: fx.Node) -> list[fx.Node] | None:
    """The links from a sliced 3-D tensor back to the linear that made it, last link first."""
    source, index = node.args
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or fake.ndim != 3 or not isinstance(index, tuple):
        return None
    full = slice(None, None, None)
    if index[0] is Ellipsis:  # [..., :-1, :]
        index = (full, *index[1:])
        if len(index) != 3:
            return None
    parts = [*index, *[full] * (3 - len(index))]
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in parts):
        return None
    if parts[0] != full or parts[2] != full or parts[1] in (full, slice(0, None, None)):
        return None
    chain: list[fx.Node] = []
    current = source
    while isinstance(current, fx.Node):
        chain.append(current)
        if current.target in _LINEAR:
            return chain
        if current.target not in _ROWWISE_LINKS or not current.args:
            return None
        if any(isinstance(arg, fx.Node) and arg is not current.args[0] for arg in current.all_input_nodes):
            return None
        current = current.args[0]
    return None
