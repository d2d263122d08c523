"""Means and sums of losses as a sum of row losses, divided by the global count.

Before::

    loss = cross_entropy(logits, labels)                  # or any loss with a mean or a sum of its own

After::

    losses = cross_entropy(logits, labels, reduction="none")
    loss = losses.sum() / (labels != -100).sum()

A mean over chunks would weigh chunks by their number and not by their valid rows; a sum over chunks divided once is the
mean. All rows ignored gives 0 / 0 = NaN, as in eager. Left alone: losses with ``size_average`` or ``reduce``, and logits
whose classes are not the last dimension of anything that they are made of.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, eliminate_dead_code, replace_with
from mst_fx.graph.modes import contexts, in_context, outside_transforms
from mst_fx.graph.sizes import sum_dtype
from mst_fx.graph.spelling import (
    LABEL_LOSSES,
    PLAIN_LOSSES,
    SIZED_VIEWS,
    WEIGHTED_MEANS,
    given_arguments,
    operation,
)
from mst_fx.graph.values import tensor_value
from mst_fx.rows.links import inverse_order, is_link, leaves_last_dim, linked, order_of, permuted
from mst_fx.torch_api.symbols import expression

_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


def run(context: PassContext) -> None:
    """Writes the losses of a graph as sums of row losses."""
    graph = context.graph
    modes = contexts(graph)
    for node in outside_transforms(graph):
        new = None
        # The context decides the types of the values made here.
        with context.at("vocab", node), in_context(modes[node]):
            new = _as_sum(graph, node)
        if new is not None:
            replace_with(node, new)
    eliminate_dead_code(graph)  # what only the old form read would be one more reader of the logits


def _as_sum(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    name = operation(node)
    if name in LABEL_LOSSES:
        return _sum_cross_entropy(graph, node)
    if name in PLAIN_LOSSES and node.target is getattr(F, name, None):  # not ATen's
        return _sum_plain_loss(graph, node)
    if name == "mean" and len(node.args) == 1:
        source = node.args[0]
        if not node.kwargs and isinstance(source, fx.Node) and tensor_value(source) is not None:
            with graph.inserting_before(node):
                return _sum_over(graph, source, _numel(graph, source))
    return None


def _loss_arguments(node: fx.Node) -> tuple[Any, dict[str, Any], str] | None:
    """The function of a loss with labels, its arguments by name, and its reduction; None if it has an old-style one."""
    function = getattr(F, operation(node))
    given = given_arguments(node)
    if given is None or "out" in given:
        return None
    if node.target is not function:  # ATen's
        given = {"input": given.pop("self"), **given}
        return function, given, _REDUCTIONS[given.pop("reduction", 1)]
    reduction = given.pop("reduction", "mean")
    old_style = given.pop("size_average", None), given.pop("reduce", None)
    return None if old_style != (None, None) else (function, given, reduction)


def _sum_cross_entropy(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    loss = _cross_entropy(node)
    if loss is None:
        return None
    with graph.inserting_before(node):
        labels = loss.ordered_labels(graph)
        row_losses = loss.row_losses(graph, labels)
        if loss.reduction == "none":
            return _unpermuted(graph, row_losses, loss.layout, labels, loss.is_soft)
        return _sum_over(graph, row_losses, loss.count(graph, row_losses))


def _cross_entropy(node: fx.Node) -> _CrossEntropy | None:
    """A loss with labels; None if it stays as it is."""
    found = _loss_arguments(node)
    if found is None:
        return None
    function, given, reduction = found
    logits, labels = given.pop("input"), given.pop("target")
    fake, fake_labels = tensor_value(logits), tensor_value(labels)
    if fake is None or fake_labels is None or fake.ndim < 2:
        return None
    is_soft = fake_labels.is_floating_point()
    is_written_out = is_soft and fake.dtype == sum_dtype(fake.dtype)
    layout = _layout_of(logits)
    if layout is None or (is_soft and layout.parts > 1):
        return None
    if reduction == "none" and not is_written_out and layout.source is logits:
        return None
    return _CrossEntropy(function, labels, layout, reduction, is_soft, is_written_out, given)


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
        scaled = add_call(graph, torch.mul, target, 1 - label_smoothing)
        target = add_call(graph, torch.add, scaled, label_smoothing / classes)
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
        return inverse_order(tuple(rest))

    def pairs(self, graph: fx.Graph, labels: fx.Node, is_soft: bool) -> list[tuple[fx.Node, fx.Node]]:
        """Logits ``[N, C]`` and their labels ``[N]`` (or ``[N, C]``), for each part."""
        current = self.source
        for link in reversed(self.links):
            current = linked(graph, link, current)
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


@dataclasses.dataclass(frozen=True)
class _CrossEntropy:
    """A loss of logits and labels.

    Attributes:
        function: of torch.
        layout: of the logits.
        is_soft: the labels are probabilities.
        is_written_out: it is made of simpler operators than ``function``.
        given: the other arguments of ``function``, by their names.
    """

    function: Any
    labels: fx.Node
    layout: _Layout
    reduction: str
    is_soft: bool
    is_written_out: bool
    given: dict[str, Any]

    def ordered_labels(self, graph: fx.Graph) -> fx.Node:
        """The labels in the order of the rows of the logits' source."""
        if self.is_soft:
            return _with_classes_last(graph, self.labels, self.layout.order)
        return permuted(graph, self.labels, self.layout.labels_order())

    def row_losses(self, graph: fx.Graph, labels: fx.Node) -> fx.Node:
        """The losses of rows: ``[N]``, of several codebooks ``[N, K]``."""
        losses = []
        for logits, part in self.layout.pairs(graph, labels, self.is_soft):
            if self.is_written_out:
                losses.append(_soft_losses(graph, logits, part, **self.given))
            else:
                losses.append(add_call(graph, self.function, logits, part, **self.given, reduction="none"))
        return losses[0] if len(losses) == 1 else add_call(graph, torch.stack, losses, -1)

    def count(self, graph: fx.Graph, row_losses: fx.Node) -> fx.Node | int | None:
        """What the sum of the losses of rows is divided by; None if it is not."""
        if self.reduction == "sum":
            return None
        if self.is_soft:  # every row counts
            return _numel(graph, row_losses)
        weight, ignored = self.given.get("weight"), self.given.get("ignore_index", -100)
        return _valid_weight(graph, self.labels, weight, ignored)


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
        swapped, operand = order_of(current), current.args[0] if current.args else None
        if not isinstance(operand, fx.Node) or tensor_value(operand) is None:
            return found
        if swapped is not None:
            order = tuple(swapped[dim] for dim in order)
        elif is_link(current, order[1]):
            links.append(current)
        else:
            return found
        current = operand


def _parts_of(node: fx.Node) -> _Layout | None:
    """The layout of ``[..., K * C].view(..., K, C)`` or ``.view(-1, C)``."""
    while node.args and isinstance(node.args[0], fx.Node) and leaves_last_dim(node):
        node = node.args[0]
    source = node.args[0] if node.args else None
    if operation(node) not in SIZED_VIEWS or not isinstance(source, fx.Node):
        return None
    fake, wide = tensor_value(node), tensor_value(source)
    if fake is None or wide is None or wide.ndim < 2 or fake.dtype != wide.dtype:  # a view of other bits
        return None
    width, whole = fake.shape[-1], wide.shape[-1]
    if not isinstance(width, int) or not isinstance(whole, int) or width >= whole or whole % width:
        return None
    parts = whole // width
    return _Layout(source, (), (), parts) if parts <= _MOST_PARTS else None


def _with_classes_last(graph: fx.Graph, labels: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """Soft labels in the order of the logits' source, from before they were brought into that of the loss."""
    own = _layout_of(labels)
    if own is None or own.order != order or own.parts > 1:
        return permuted(graph, labels, inverse_order(order))
    current = own.source
    for link in reversed(own.links):
        current = linked(graph, link, current)
    return current


def _flat_rows(graph: fx.Graph, node: fx.Node, trailing: int) -> fx.Node:
    """``[B, S, ...]`` → ``[N, ...]`` with the last ``trailing`` dimensions as they are."""
    rank = tensor_value(node).ndim - trailing  # type: ignore[union-attr]
    return node if rank == 1 else add_call(graph, "flatten", node, 0, rank - 1)


def _unpermuted(
    graph: fx.Graph, row_losses: fx.Node, layout: _Layout, labels: fx.Node, is_soft: bool
) -> fx.Node:
    """Losses of rows in the shape in which the loss gives them."""
    if is_soft:  # as many labels as there are rows
        if tensor_value(labels).ndim == 2:  # type: ignore[union-attr]
            return row_losses
        labels = add_call(graph, "select", labels, -1, 0)
    shaped = row_losses if tensor_value(labels).ndim == 1 and layout.parts == 1 else None  # type: ignore[union-attr]
    shaped = shaped or add_call(graph, "reshape_as", row_losses, labels)
    return permuted(graph, shaped, inverse_order(layout.labels_order()))


def _sum_plain_loss(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = given_arguments(node)
    if given is None:
        return None
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
        if weight is not None and operation(node) in WEIGHTED_MEANS:
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
