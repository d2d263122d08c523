"""Equal graphs that are easier to chunk: losses as sums of row losses, slices of rows before the head.

Every function here changes a copy of the user's graph; the runner throws the copy away when no
pass rewrites anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.graph.edit import add_call, eliminate_dead_code
from mst_fx.graph.modes import Context, contexts, in_context, outside_transforms
from mst_fx.graph.names import module_path
from mst_fx.graph.sizes import hint, is_known, sum_dtype
from mst_fx.graph.values import tensor_value
from mst_fx.graph.writes import writes_in_place
from mst_fx.rows.labels import is_same_size
from mst_fx.torch_api.modes import EXIT_AUTOCAST, SET_GRAD_ENABLED
from mst_fx.torch_api.ops import OpOverload, schema_of
from mst_fx.torch_api.symbols import expression

aten = torch.ops.aten

# Where one place of several is worked on: an exception inside costs that place alone. By kind and name.
Place = Callable[[str, str], AbstractContextManager[None]]


def nowhere(kind: str, name: str) -> AbstractContextManager[None]:
    """A place that costs everything."""
    return contextlib.nullcontext()


def _place_of(node: fx.Node) -> str:
    return module_path(node) or node.name


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
    F.soft_margin_loss,
    F.multilabel_soft_margin_loss,
    F.multi_margin_loss,
    F.poisson_nll_loss,
    F.margin_ranking_loss,
    F.triplet_margin_loss,
)
_WEIGHTED_MEANS = (F.mse_loss, F.l1_loss)  # given weights, their mean divides by the sum of them
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
            ends = any(other.target is EXIT_AUTOCAST for other in between)
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
    if isinstance(target, OpOverload):
        schemas = [schema_of(target)]
    elif isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
        packet = getattr(aten, target.__name__, None)
        schemas = (
            [schema_of(getattr(packet, name)) for name in packet.overloads()] if packet is not None else []
        )
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
    return node.target is SET_GRAD_ENABLED or writes_in_place(node)


def _replace(node: fx.Node, new: fx.Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in node.meta:
            new.meta[key] = node.meta[key]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def sum_losses(graph: fx.Graph, place: Place = nowhere) -> None:
    """Writes means and sums of losses as a sum of row losses, divided by the global count.

    A mean over chunks would weigh chunks by their number and not by their valid rows; a sum over
    chunks divided once is the mean. All rows ignored gives 0 / 0 = NaN, as in eager.
    """
    modes = contexts(graph)
    for node in outside_transforms(graph):
        new = None
        # The context decides the types of the values made here.
        with place("vocab", _place_of(node)), in_context(modes[node]):
            new = _as_sum(graph, node)
        if new is not None:
            _replace(node, new)
    eliminate_dead_code(graph)  # what only the old form read would be one more reader of the logits


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
    logits, labels, weight = given.pop("input"), given.pop("target"), given.get("weight")
    fake, fake_labels = tensor_value(logits), tensor_value(labels)
    if fake is None or fake_labels is None or fake.ndim < 2:
        return None
    is_soft = fake_labels.is_floating_point()  # probabilities
    is_written_out = is_soft and fake.dtype == sum_dtype(fake.dtype)
    layout = _layout_of(logits)
    if layout is None or (is_soft and layout.parts > 1):
        return None
    if reduction == "none" and not is_written_out and layout.source is logits:
        return None
    with graph.inserting_before(node):
        if is_soft:
            kept = _with_classes_last(graph, labels, layout.order)
        else:
            kept = _permuted(graph, labels, layout.labels_order())
        losses = []
        for source, given_labels in layout.pairs(graph, kept, is_soft):
            if is_written_out:
                losses.append(_soft_losses(graph, source, given_labels, **given))
            else:
                losses.append(add_call(graph, target, source, given_labels, **given, reduction="none"))
        rows = losses[0] if len(losses) == 1 else add_call(graph, torch.stack, losses, -1)
        if reduction == "none":
            return _unpermuted(graph, rows, layout, kept, fake_labels if not is_soft else None)
        if reduction == "sum":
            return _sum_over(graph, rows, None)
        if is_soft:  # every row counts
            return _sum_over(graph, rows, _numel(graph, rows))
        return _sum_over(graph, rows, _valid_weight(graph, labels, weight, given.get("ignore_index", -100)))


def _valid_weight(graph: fx.Graph, labels: fx.Node, weight: fx.Node | None, ignore: int) -> fx.Node:
    """What a mean divides by: the number of labels that are not ignored, or the sum of their weights."""
    valid = add_call(graph, torch.ne, labels, ignore)
    if weight is None:
        return add_call(graph, "sum", valid)
    first = add_call(graph, "reshape", add_call(graph, torch.mul, labels, valid), -1)  # 0 where ignored
    weights = add_call(graph, torch.index_select, weight, 0, first)
    flat = add_call(graph, "reshape", valid, -1)
    return add_call(graph, "sum", add_call(graph, torch.mul, weights, flat))


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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the logits of a loss come from: ``logits == links(source).permute(order)``.

    Attributes:
        source: the classes are its last dimension; with ``parts`` > 1, those of several codebooks side by side.
        order: of the dimensions of the source (split into its parts, if there are some) in the logits.
        links: pointwise functions in between, last one first.
        parts: how many rows of the loss one row of the source holds.
    """

    source: fx.Node
    order: tuple[int, ...]
    links: tuple[fx.Node, ...] = ()
    parts: int = 1

    def labels_order(self) -> tuple[int, ...]:
        """The order that brings labels, which have no classes, into that of the source."""
        last = len(self.order) - 1
        rest = [dim for dim in self.order if dim != last]
        return _inverse_order(tuple(rest))

    def pairs(self, graph: fx.Graph, labels: fx.Node, is_soft: bool) -> list[tuple[fx.Node, fx.Node]]:
        """Logits ``[N, C]`` and their labels ``[N]`` (or ``[N, C]``), for each part."""
        current = self.source
        for link in reversed(self.links):
            current = _linked(graph, link, current)
        if self.parts == 1:
            return [(_flat_rows(graph, current, 1), _flat_rows(graph, labels, int(is_soft)))]
        width = tensor_value(current).shape[-1] // self.parts  # type: ignore[union-attr]
        by_part = add_call(graph, "reshape", labels, (-1, self.parts))
        pairs = []
        for part in range(self.parts):
            columns = slice(part * width, (part + 1) * width)
            logits = add_call(graph, operator.getitem, current, (Ellipsis, columns))
            given = add_call(graph, operator.getitem, by_part, (slice(None), part))
            pairs.append((_flat_rows(graph, logits, 1), given))
        return pairs


_MOST_PARTS = 32  # codebooks a head: each becomes a loss of its own


def _layout_of(logits: fx.Node) -> _Layout | None:
    """The layout of logits whose classes are dimension 1; None if they are not the last one of their source."""
    ndim = tensor_value(logits).ndim  # type: ignore[union-attr]
    order, current = tuple(range(ndim)), logits
    links: list[fx.Node] = []
    found: _Layout | None = None
    while True:
        if order[1] == ndim - 1:
            if found is None or order != found.order:
                found = _Layout(current, order, tuple(links))
            if (parts := _parts_of(current)) is not None:
                return dataclasses.replace(parts, order=order, links=tuple(links))
        swapped, operand = _order_of(current), current.args[0] if current.args else None
        if not isinstance(operand, fx.Node) or tensor_value(operand) is None:
            return found
        if swapped is not None:
            order = tuple(swapped[dim] for dim in order)
        elif _is_link(current, order[1]):
            links.append(current)
        else:
            return found
        current = operand


def _parts_of(node: fx.Node) -> _Layout | None:
    """The layout of ``[..., K * C].view(..., K, C)`` or ``.view(-1, C)``."""
    while node.args and isinstance(node.args[0], fx.Node) and _keeps_rows(node):
        node = node.args[0]
    source = node.args[0] if node.args else None
    if node.target not in _VIEWS or not isinstance(source, fx.Node):
        return None
    fake, wide = tensor_value(node), tensor_value(source)
    if fake is None or wide is None or wide.ndim < 2:
        return None
    width, whole = fake.shape[-1], wide.shape[-1]
    if not isinstance(width, int) or not isinstance(whole, int) or width >= whole or whole % width:
        return None
    parts = whole // width
    return _Layout(source, (), (), parts) if parts <= _MOST_PARTS else None


_VIEWS = (
    "view",
    "reshape",
    "unflatten",
    torch.reshape,
    torch.unflatten,
    aten.view.default,
    aten.reshape.default,
)


_PERMUTES = frozenset(("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t"))


def _order_of(node: fx.Node) -> tuple[int, ...] | None:
    """The order in which a transpose or permute puts the dimensions of its operand; None for other nodes."""
    fake, name = tensor_value(node), _plain_name(node)
    if fake is None or node.kwargs:
        return None
    is_attribute = node.target is getattr and node.args[1] in ("mT", "T")
    is_call = name in _PERMUTES and all(isinstance(x, (int, tuple, list)) for x in node.args[1:])
    if not is_attribute and not is_call:
        return None
    labelled = torch.empty(tuple(range(2, 2 + fake.ndim)), device="meta")
    moved = getattr(labelled, str(node.args[1]) if is_attribute else name)
    moved = moved if is_attribute else moved(*node.args[1:])
    return tuple(size - 2 for size in moved.shape)


def _plain_name(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return node.target.overloadpacket.__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _with_classes_last(graph: fx.Graph, labels: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """Soft labels in the order of the logits' source, from before they were brought into that of the loss."""
    own = _layout_of(labels)
    if own is None or own.order != order or own.parts > 1:
        return _permuted(graph, labels, _inverse_order(order))
    current = own.source
    for link in reversed(own.links):
        current = _linked(graph, link, current)
    return current


def _permuted(graph: fx.Graph, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    if order == tuple(range(len(order))):
        return node
    return add_call(graph, "permute", node, order)


def _flat_rows(graph: fx.Graph, node: fx.Node, kept: int) -> fx.Node:
    """``[B, S, ...]`` → ``[N, ...]`` with the last ``kept`` dimensions as they are."""
    rank = tensor_value(node).ndim - kept  # type: ignore[union-attr]
    return node if rank == 1 else add_call(graph, "flatten", node, 0, rank - 1)


def _unpermuted(
    graph: fx.Graph, rows: fx.Node, layout: _Layout, labels: fx.Node, like: torch.Tensor | None
) -> fx.Node:
    """Losses of rows in the shape in which the loss gives them."""
    if like is None:  # soft labels: as many as there are rows
        if tensor_value(labels).ndim == 2:  # type: ignore[union-attr]
            return rows
        labels = add_call(graph, "select", labels, -1, 0)
    shaped = rows if tensor_value(labels).ndim == 1 and layout.parts == 1 else None  # type: ignore[union-attr]
    shaped = shaped or add_call(graph, "reshape_as", rows, labels)
    return _permuted(graph, shaped, _inverse_order(layout.labels_order()))


# Pointwise functions of rows: ``links`` between a head and what reads its logits.

_POINTWISE_NAMES = (
    "float double half bfloat16 to type contiguous clone tanh sigmoid neg clamp mul truediv div add sub "
    "masked_fill pow exp log softplus logsigmoid"
)
_POINTWISE_LINKS = frozenset(_POINTWISE_NAMES.split())
_CLASS_LINKS = frozenset(("log_softmax", "softmax"))


def _is_link(node: fx.Node, classes: int, rank: int = 0) -> bool:
    """Whether a node is a function of each row of its first operand, in any order of dimensions.

    Args:
        classes: the dimension of the classes in this node's value.
        rank: the most dimensions that its other operands have.
    """
    name, others = _plain_name(node), node.all_input_nodes[1:]
    if any((fake := tensor_value(n)) is not None and fake.ndim > rank for n in others) or not node.args:
        return False
    if not isinstance(node.args[0], fx.Node) or writes_in_place(node):
        return False
    if name in _CLASS_LINKS:
        dim, ndim = _dim_of(node), tensor_value(node).ndim  # type: ignore[union-attr]
        return dim is not None and dim % ndim == classes % ndim
    return name in _POINTWISE_LINKS


def _dim_of(node: fx.Node) -> int | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim if isinstance(dim, int) else None


def _linked(graph: fx.Graph, link: fx.Node, operand: fx.Node) -> fx.Node:
    """A link's function of another operand, the classes of which come last."""
    args, kwargs = link.args[1:], dict(link.kwargs)
    if _plain_name(link) in _CLASS_LINKS:
        args, kwargs = args[1:], {key: given for key, given in kwargs.items() if key != "dim"}
        args = (-1, *args)
    current = add_call(graph, link.target, operand, *args, **kwargs)
    for key in ("nn_module_stack", "stack_trace"):
        if key in link.meta:
            current.meta[key] = link.meta[key]
    return current


def _sum_plain_loss(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    given = dict(bound.arguments)
    reduction, weight = given.pop("reduction", "mean"), given.get("weight")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    is_lost = (
        node.target is F.l1_loss and weight is not None
    )  # torch forgets the weight wherever it traces (2.13)
    if reduction == "none" and not is_lost:
        return None
    with graph.inserting_before(node):
        if is_lost:
            error = add_call(graph, torch.abs, add_call(graph, torch.sub, given["input"], given["target"]))
            losses = add_call(graph, torch.mul, error, weight)
        else:
            losses = add_call(graph, node.target, **given, reduction="none")
        if reduction == "none":
            return losses
        if reduction == "sum":
            return _sum_over(graph, losses, None)
        if reduction == "batchmean":
            return _sum_over(graph, losses, _size(graph, given["input"], 0))
        if weight is not None and node.target in _WEIGHTED_MEANS:
            return add_call(graph, torch.div, _sum_over(graph, losses, None), add_call(graph, "sum", weight))
        return _sum_over(graph, losses, _numel(graph, losses))


def _numel(graph: fx.Graph, losses: fx.Node) -> fx.Node | int:
    """The number of elements, not read from the losses themselves, which would have to outlive their loop."""
    wanted = tensor_value(losses).numel()  # type: ignore[union-attr]
    if isinstance(wanted, int):
        return wanted
    for node in graph.find_nodes(op="placeholder"):
        fake = tensor_value(node)
        found = fake.numel() if fake is not None else 0
        if isinstance(found, torch.SymInt) and expression(found) == expression(wanted):
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


def scatter_one_hots(graph: fx.Graph, place: Place = nowhere) -> None:
    """``one_hot(y, V)`` → zeros with ones scattered into them, which each row does alone.

    The operator looks at all labels to see whether they are less than V; so does ``scatter``.
    """
    modes = contexts(graph)
    for node in outside_transforms(graph):
        labels = node.args[0] if node.args else None
        classes = node.args[1] if len(node.args) > 1 else node.kwargs.get("num_classes")
        fake = tensor_value(labels) if isinstance(labels, fx.Node) else None
        if _plain_name(node) != "one_hot" or fake is None or not isinstance(classes, int) or classes < 1:
            continue
        with place("vocab", _place_of(node)), graph.inserting_before(node), in_context(modes[node]):
            index = add_call(graph, "unsqueeze", labels, -1)
            wide = add_call(graph, "expand", index, *[-1] * fake.ndim, classes)
            _replace(node, add_call(graph, "scatter", add_call(graph, torch.zeros_like, wide), -1, index, 1))


def stack_last(graph: fx.Graph, place: Place = nowhere) -> None:
    """``stack([p, q], 0).mean(0)`` → ``stack([p, q], -1).mean(-1)``: divergences from several teachers.

    A new first dimension would move the rows. Done where all that reads the stack, or a pointwise function of
    it, reduces that dimension, reduces everything or takes a member.
    """
    modes = contexts(graph)
    for node in outside_transforms(graph):
        if node.target in (torch.stack, aten.stack.default):
            with place("vocab", _place_of(node)):
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


_REDUCTIONS_OVER = frozenset(("sum", "mean", "logsumexp", "amax", "amin", "max", "min", "prod", "var", "std"))


def _is_moved_reader(node: fx.Node) -> bool:
    """Whether what reads a stack can read one whose new dimension is the last."""
    name, source = _plain_name(node), node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if fake is None or len(node.all_input_nodes) > 1:
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[1], int)
    if name in _POINTWISE_LINKS and not writes_in_place(node):
        return all(map(_is_moved_reader, node.users)) and bool(node.users)
    if name not in _REDUCTIONS_OVER or node.kwargs.keys() - {"dim", "keepdim", "dtype"}:
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
        elif _plain_name(user) in _REDUCTIONS_OVER and (args or "dim" in kwargs):
            args, kwargs = (-1, *args[1:]), {key: given for key, given in kwargs.items() if key != "dim"}
        with graph.inserting_before(user), in_context(modes[user]):
            moved = add_call(graph, user.target, new, *args, **kwargs)
        if _plain_name(user) in _POINTWISE_LINKS and user.target is not operator.getitem:
            _move_readers(graph, user, moved, modes)
            graph.erase_node(user)
        else:
            _replace(user, moved)


def hoist_row_slices(graph: fx.Graph, place: Place = nowhere) -> None:
    """``linear(x, w)[:, :-1]`` → ``linear(x[:, :-1], w)``: losses that shift the logits.

    Before: ``logits = linear(x, w).float(); loss(logits[:, :-1], ...)``. After: the same chain on
    the sliced rows of ``x``, for this use of the logits only. Slices of any dimensions but the last, narrows
    and members of chunks are hoisted, through what works on each row and through flattened batches.
    """
    with place("vocab", ""):
        _slice_before_permuting(graph)
        _split_cuts(graph)
    modes = contexts(graph)
    for node in outside_transforms(graph):
        with place("vocab", _place_of(node)):
            _hoist(graph, node, modes)
    eliminate_dead_code(graph)


def _hoist(graph: fx.Graph, node: fx.Node, modes: dict[fx.Node, Context]) -> None:
    chain = _sliced_chain(node)
    if chain is None or any(modes.get(link) != modes.get(chain[0]) for link in chain):
        return
    mode, place = modes[chain[0]], node
    if modes[node] != mode:  # the slice lies behind an autocast region: the clones go where the logits are
        place = chain[0].next
        if modes[node].grad != mode.grad or len(node.all_input_nodes) > 1 or tensor_value(chain[0]) is None:
            return
    head, links = chain[-1], chain[-2::-1]
    with graph.inserting_before(place), in_context(mode):
        rows = head.args[0]
        for link in links:
            if _plain_name(link) in _FLATTENS:
                rows = _reshaped_rows(graph, link, rows)
        current = add_call(graph, head.target, _sliced(graph, node, rows), *head.args[1:], **head.kwargs)
        clones = [(head, current)]
        for link in links:
            if _plain_name(link) not in _FLATTENS:
                current = _linked(graph, link, current)
                clones.append((link, current))
    for link, clone in clones:
        for key in ("nn_module_stack", "stack_trace"):
            if key in link.meta:
                clone.meta[key] = link.meta[key]
        clone.meta[CLONE_OF] = link.meta.get(CLONE_OF, link)
        modes[clone] = mode
    node.replace_all_uses_with(current)
    graph.erase_node(node)


def _slice_before_permuting(graph: fx.Graph) -> None:
    """``x.transpose(1, 2)[..., :-1]`` → ``x[:, :-1].transpose(1, 2)``."""
    for node in outside_transforms(graph):
        permuted = node.args[0] if node.args else None
        if node.target is not operator.getitem or not isinstance(permuted, fx.Node):
            continue
        order = _order_of(permuted)
        parts = _index_parts(node.args[1], len(order)) if order is not None else None
        if order is None or parts is None or not any(map(_is_cut, parts)):
            continue
        with graph.inserting_before(node):
            index = tuple(parts[order.index(dim)] for dim in range(len(order)))
            new = add_call(graph, operator.getitem, permuted.args[0], index)
            _replace(node, _permuted(graph, new, order))


def _split_cuts(graph: fx.Graph) -> None:
    """``logits[:, :-1, :V]`` → ``logits[:, :-1][..., :V]``, ``logits[:, -1]`` → ``logits[:, -1:].squeeze(1)``.

    Slices of rows are hoisted by themselves, and those of columns are links of a chain if spelled so.
    """
    modes = contexts(graph)
    for node in outside_transforms(graph):
        source, parts = _cut_parts(node)
        if source is None or parts is None or _chain_from(source) is None:
            continue
        *rows, columns = parts
        kept = [slice(i, i + 1 or None) if isinstance(i, int) else i for i in rows]
        steps: list[tuple[Any, Any]] = [(operator.getitem, tuple(kept))] if any(map(_is_cut, kept)) else []
        steps += [(operator.getitem, (Ellipsis, columns))] if _is_cut(columns) else []
        steps += [("squeeze", dim) for dim in reversed(range(len(rows))) if isinstance(rows[dim], int)]
        if len(steps) == 1 and (node.target, node.args[1]) == steps[0]:
            continue
        with graph.inserting_before(node), in_context(modes[node]):
            current = source
            for target, argument in steps:
                current = add_call(graph, target, current, argument)
                current.meta |= {
                    k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")
                }
        _replace(node, current)
    eliminate_dead_code(graph)


def _cut_parts(node: fx.Node) -> tuple[fx.Node | None, list[Any] | None]:
    """A tensor and the slice or the index of each of its dimensions that a node takes, columns as a slice."""
    source = node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or node.kwargs or fake is None or fake.ndim < 2:
        return None, None
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        columns = index[-1] if _are_columns(index[-1]) else None
        parts = _index_parts((*index[:-1], _FULL) if columns is not None else index, fake.ndim, picks=True)
        is_known = parts is not None and len(parts) == fake.ndim and isinstance(parts[-1], slice)
        if columns is not None and parts is not None:  # but for those of all rows, which are read as they are
            is_known = len(index) == fake.ndim or Ellipsis in index
            parts = [*parts[:-1], columns] if any(map(_is_cut, parts[:-1])) else None
        return source, parts if is_known and any(map(_is_cut, parts or ())) else None
    if _plain_name(node) == "narrow" and len(node.args) == 4:
        dim, start, length = node.args[1:]
        is_columns = isinstance(dim, int) and dim % fake.ndim == fake.ndim - 1
        if is_columns and isinstance(start, int) and isinstance(length, int) and start >= 0:
            return source, [*[_FULL] * (fake.ndim - 1), slice(start, start + length)]
    return None, None


_LINEAR = (F.linear, aten.linear.default)
_FLATTENS = frozenset(("flatten", "view", "reshape"))
_PARTS = frozenset(("chunk", "split", "tensor_split"))
_FULL = slice(None, None, None)


def _sliced_chain(node: fx.Node) -> list[fx.Node] | None:
    """The links from a tensor whose rows are sliced back to the linear that made it, last link first."""
    source = _sliced_source(node)
    return None if source is None else _chain_from(source)


def _chain_from(source: fx.Node) -> list[fx.Node] | None:
    """The links from logits back to the linear that made them."""
    chain: list[fx.Node] = []
    current: Any = source
    while isinstance(current, fx.Node) and (fake := tensor_value(current)) is not None and fake.ndim > 1:
        chain.append(current)
        operand = current.args[0] if current.args else None
        if not isinstance(operand, fx.Node):
            return None
        if current.target in _LINEAR:
            wide = tensor_value(operand)
            widths = [fake.shape[-1], wide.shape[-1]] if wide is not None else []
            return (
                chain if widths and all(map(is_known, widths)) and hint(widths[0]) > hint(widths[1]) else None
            )
        if not (_keeps_rows(current) or _is_link(current, fake.ndim - 1, rank=1) or _cuts_columns(current)):
            return None
        current = operand
    return None


def _sliced_source(node: fx.Node) -> fx.Node | None:
    """What a node takes rows of: slices of any dimensions but the last."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs:
        return None
    fake, name = tensor_value(source), _plain_name(node)
    if node.target is operator.getitem and fake is None:
        return _parted_source(source)
    if fake is None or fake.ndim < 2:
        return None
    if node.target is operator.getitem:
        parts = _index_parts(node.args[1], fake.ndim)
        is_rows = parts is not None and parts[-1] == _FULL and any(map(_is_cut, parts))
        return source if is_rows else None
    if name in ("narrow", "slice") and len(node.args) > 2 and isinstance(node.args[1], int):
        return source if node.args[1] % fake.ndim != fake.ndim - 1 else None
    return None


def _are_columns(part: Any) -> bool:
    """Whether a part of an index picks columns by their numbers."""
    fake = tensor_value(part) if isinstance(part, fx.Node) else None
    return fake is not None and fake.ndim == 1 and fake.dtype == torch.int64


def _is_cut(part: Any) -> bool:
    if isinstance(part, fx.Node):
        return True
    return part not in (_FULL, slice(0, None, None))


def _parted_source(node: fx.Node) -> fx.Node | None:
    """What ``chunk`` or ``split`` cuts along another dimension than the last."""
    source = node.args[0] if node.args else None
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if _plain_name(node) not in _PARTS or fake is None or not isinstance(source, fx.Node):
        return None
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return source if isinstance(dim, int) and dim % fake.ndim != fake.ndim - 1 else None


def _index_parts(index: Any, ndim: int, picks: bool = False) -> list[Any] | None:
    """The slice of each dimension that an index takes, with ``picks`` its place; None if it does anything else."""
    parts = list(index) if isinstance(index, tuple) else [index]
    known = (slice, int) if picks else (slice,)
    if (
        any(
            part is not Ellipsis and (not isinstance(part, known) or isinstance(part, bool)) for part in parts
        )
        or parts.count(Ellipsis) > 1
    ):
        return None
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    full = [_FULL] * (ndim - len(parts) + (Ellipsis in parts))
    return [*parts[:at], *full, *parts[at + 1 :]]


def _sliced(graph: fx.Graph, node: fx.Node, rows: Any) -> fx.Node:
    """The slice that a node takes of logits, of the rows that the logits are made of."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    fake = tensor_value(source)
    if fake is None:
        parts = add_call(graph, source.target, rows, *source.args[1:], **source.kwargs)
        return add_call(graph, operator.getitem, parts, node.args[1])
    if node.target is operator.getitem:
        index = _index_parts(node.args[1], fake.ndim)
        assert index is not None
        while index and not _is_cut(index[-1]):
            index.pop()
        return add_call(graph, operator.getitem, rows, tuple(index))
    dim: Any = node.args[1]
    return add_call(graph, node.target, rows, dim % fake.ndim, *node.args[2:])


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a reshape leaves the last dimension as it is, and says what becomes of the others."""
    if _plain_name(node) not in _FLATTENS or node.kwargs:
        return False
    fake, source = tensor_value(node), tensor_value(node.args[0])  # type: ignore[arg-type]
    if fake is None or source is None or not isinstance(fake.shape[-1], int):
        return False
    if not is_same_size(fake.shape[-1], source.shape[-1]):
        return False
    if _plain_name(node) != "flatten":
        return len(_sizes_of(node)) == fake.ndim
    end = node.args[2] if len(node.args) > 2 else -1
    return isinstance(end, int) and end % source.ndim != source.ndim - 1


def _sizes_of(node: fx.Node) -> list[Any]:
    sizes: Any = node.args[1:]
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


def _reshaped_rows(graph: fx.Graph, node: fx.Node, rows: Any) -> fx.Node:
    """The reshape of logits, done to the rows that they are made of."""
    if _plain_name(node) == "flatten":
        start = node.args[1] if len(node.args) > 1 else 0
        ndim = tensor_value(node.args[0]).ndim  # type: ignore[arg-type, union-attr]
        return add_call(graph, "flatten", rows, start % ndim, node.args[2] % ndim)  # type: ignore[operator]
    width = tensor_value(rows).shape[-1]  # type: ignore[union-attr]
    sizes = [-1 if size == -1 else size for size in _sizes_of(node)[:-1]]
    return add_call(graph, "reshape", rows, (*sizes, width))


def _cuts_columns(node: fx.Node) -> bool:
    """Whether a node takes a slice of the last dimension alone."""
    source = node.args[0]
    fake = tensor_value(source) if isinstance(source, fx.Node) else None
    if node.target is not operator.getitem or fake is None or not isinstance(node.args[1], tuple):
        return False
    parts = _index_parts(node.args[1], fake.ndim)
    return parts is not None and node.args[1][0] is Ellipsis and not any(map(_is_cut, parts[:-1]))
