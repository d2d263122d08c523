"""Written-out attention, step by step: what is done to its scores, whatever that is, up to their softmax and behind it.

    scores = matmul(q, kᵀ);  x = scores * scale;  x = where(buffer, x, fill) + bias;  weights = softmax(x, -1);  out = matmul(weights, v)
    → times scale, show buffer, add bias, softmax

Of masks and biases that are formulas of positions no S×S value is needed (:mod:`mst_fx.masks.understand`). What is left is run as it is
written, a chunk of queries at a time (:mod:`mst_fx.ops.masked`): the tensors stay, and the scores of all heads go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.graph.edit import add_call
from mst_fx.graph.modes import contexts
from mst_fx.graph.sizes import is_one, is_same
from mst_fx.graph.spelling import (
    EXPANDS,
    FLOAT_CASTS,
    MATMULS,
    SOFTMAXES,
    argument,
    is_identity_dropout,
    operation,
)
from mst_fx.graph.values import is_plain, storage_key, tensor_value, value
from mst_fx.graph.writes import storages_written_by, writes_in_place
from mst_fx.masks import sinks
from mst_fx.masks.constants import number_in
from mst_fx.masks.formula import AT_LEAST, HIDE, SHOW, SINK, SOFTMAX, TANH, WITH_NUMBER, WITH_TENSOR
from mst_fx.masks.scales import have_same_type
from mst_fx.masks.scores import is_of_scores, transposed


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that is done to scores or weights, as :mod:`mst_fx.ops.masked` names it."""

    how: str
    tensor: fx.Node | None = None
    number: float = 0.0


@dataclasses.dataclass(frozen=True)
class Steps:
    """An attention as its steps.

    Attributes:
        steps: first things first.
        dtype: of the product of query and key, to which autocast casts them.
        is_fused: it is torch's, of one mask.
    """

    steps: tuple[Step, ...]
    dtype: torch.dtype
    is_fused: bool = False

    @property
    def tensors(self) -> list[fx.Node]:
        return [step.tensor for step in self.steps if step.tensor is not None]

    def replaced(self, old: fx.Node, new: fx.Node) -> Steps:
        """With another node in the place of one."""
        steps = [dataclasses.replace(step, tensor=new) if step.tensor is old else step for step in self.steps]
        return dataclasses.replace(self, steps=tuple(steps))

    def attend(self, operands: Sequence[fx.Node], chunk: int) -> fx.Node:
        """The call of the operator, at the graph's insertion point.

        Args:
            operands: query, key and value.
            chunk: queries a chunk.
        """
        hows, numbers = [step.how for step in self.steps], [step.number for step in self.steps]
        target = torch.ops.mst_fx.masked_attention.default
        return add_call(
            operands[0].graph, target, *operands, self.tensors, hows, numbers, chunk, self.is_fused
        )

    def __str__(self) -> str:
        return ", ".join(f"{s.how} {s.tensor.name}" for s in self.steps if s.tensor is not None) or "none"


@dataclasses.dataclass(frozen=True)
class Stepped:
    """An attention that was found, and its nodes from scores to weights: nobody else reads them."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    inner: tuple[fx.Node, ...]
    steps: Steps


def stepped(out: fx.Node, mutated: Collection[int]) -> Stepped | None:
    """The attention whose output a node is; None: it is none, or something in it is not known here.

    Args:
        mutated: the storages that some node of the program writes to.
    """
    if operation(out) not in MATMULS or len(out.args) != 2 or out.kwargs:
        return None
    weights, values = out.args
    walk = _Walk(out, mutated)
    product = walk.back_from(weights)
    key = transposed(product.args[1]) if product is not None else None
    if product is None or key is None or not isinstance(values, fx.Node):
        return None
    query, scores = product.args[0], tensor_value(product)
    if scores is None or not isinstance(query, fx.Node) or not _fit(product, walk, (query, key, values), out):
        return None
    return Stepped(query, key, values, tuple(walk.inner), Steps(tuple(walk.steps[::-1]), scores.dtype))


class _Walk:
    """From the weights back to the product of query and key.

    Attributes:
        inner: the nodes so far.
        steps: what they do, last things first.
    """

    def __init__(self, out: fx.Node, mutated: Collection[int]) -> None:
        self._out, self._mutated = out, mutated
        self.inner: list[fx.Node] = []
        self.steps: list[Step] = []
        self._beside: set[fx.Node] = set()
        self._column = ""  # of the weights that is left out behind the softmax
        self._is_behind = True  # of the softmax

    def back_from(self, node: Any) -> fx.Node | None:
        """The product; None: something is not known, or somebody else reads it."""
        while isinstance(node, fx.Node) and self._is_read_alone(node):
            self.inner.append(node)
            if operation(node) in MATMULS:
                return None if self._is_behind or self._column or len(node.args) != 2 else node
            source = self._source(node)
            if source is None or not self._is_known(node, source):
                return None
            node = source
        return None

    def _is_read_alone(self, node: fx.Node) -> bool:
        fake = tensor_value(node)
        is_known = fake is not None and fake.ndim == 4 and is_plain(fake) and not writes_in_place(node)
        return is_known and readers(node) <= {self._out, *self.inner, *self._beside}

    def _is_known(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether no step gives another shape than it got, but for a sink's column."""
        was, fake = tensor_value(source), tensor_value(node)
        if was is None or fake is None or was.ndim != 4:
            return False
        return all(map(is_same, was.shape[:3], fake.shape[:3]))

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What a node was made of, whose step is noted; None: it is not known."""
        name = operation(node)
        if self._is_behind:
            column = sinks.dropped_column(node)
            if column is not None and not self._column:
                self._column = column
                return node.args[0]  # type: ignore[return-value]
            if name in SOFTMAXES:
                return self._softmax(node)
        elif name == "cat" and self._column:
            return self._sink(node)
        if name in FLOAT_CASTS:
            return self._cast(node)
        if name in ("contiguous", "clone") or is_identity_dropout(node):
            return self._operand(node, 0)
        if name == "tanh" and len(node.args) == 1:
            return self._noted(node, 0, Step(TANH))
        if name in ("where", "masked_fill"):
            return self._chosen(node)
        if name in ("max", "maximum"):
            return self._bounded(node)
        return self._arithmetic(node)

    def _noted(self, node: fx.Node, at: int, step: Step) -> fx.Node | None:
        self.steps.append(step)
        return self._operand(node, at)

    def _operand(self, node: fx.Node, at: int) -> fx.Node | None:
        source = node.args[at] if len(node.args) > at else None
        return source if isinstance(source, fx.Node) else None

    def _softmax(self, node: fx.Node) -> fx.Node | None:
        source = self._operand(node, 0)
        if source is None or argument(node, "dim") not in (-1, 3):
            return None
        self._is_behind = False
        self.steps.append(Step(SOFTMAX))
        self._cast_to(node, source)
        found = sinks.less_its_maximum(source)
        if found is None:
            return source
        before, inner = found
        # source → inner[0] … inner[-1] → before, each read by the one in front of it alone
        is_alone = all(readers(x) == {reader} for x, reader in zip(inner, (source, *inner), strict=False))
        if not is_alone or not self._is_read_alone(source):
            return None
        self.inner += [source, *inner]
        self._beside.update(inner)
        return before

    def _sink(self, node: fx.Node) -> fx.Node | None:
        found = sinks.joined(node, self._column)
        if found is None:
            return None
        self._column = ""
        self.steps.append(Step(SINK, found[1]))
        return found[0]

    def _cast(self, node: fx.Node) -> fx.Node | None:
        source = self._operand(node, 0)
        if source is not None:
            self._cast_to(node, source)
        if operation(node) == "type_as":  # may read the scores a second time, for their type
            self._beside.add(node)
        return source

    def _cast_to(self, node: fx.Node, source: fx.Node) -> None:
        """Notes a cast, where a node has another type than its source."""
        fake, was = tensor_value(node), tensor_value(source)
        if fake is not None and was is not None and fake.dtype != was.dtype:
            self.steps.append(Step(str(fake.dtype).removeprefix("torch.")))

    def _chosen(self, node: fx.Node) -> fx.Node | None:
        """Of ``where`` with a number, and ``masked_fill``."""
        if len(node.args) != 3 or node.kwargs:
            return None
        mask, source, fill = node.args
        how = SHOW
        if operation(node) == "masked_fill" or node.op == "call_method":
            mask, source = source, mask
        if operation(node) == "masked_fill":
            how = HIDE
        elif not isinstance(source, fx.Node) or number_in(source, self._mutated) is not None:
            source, fill, how = fill, source, HIDE
        number = number_in(fill, self._mutated)
        mask_fake = tensor_value(mask) if isinstance(mask, fx.Node) else None
        if mask_fake is None or mask_fake.dtype != torch.bool or number is None:
            return None
        if not isinstance(source, fx.Node) or not have_same_type(node, source):
            return None
        self.steps.append(Step(how, self._unexpanded(mask), number))  # type: ignore[arg-type]
        return source

    def _unexpanded(self, tensor: fx.Node) -> fx.Node:
        """What a tensor is the expansion of; ``mask.expand_as(scores)`` reads the scores for their sizes."""
        while operation(tensor) in EXPANDS and isinstance(source := tensor.args[0], fx.Node):
            fake, was = tensor_value(tensor), tensor_value(source)
            if fake is None or was is None or fake.requires_grad != was.requires_grad:
                break
            if set(tensor.users) <= {*self.inner}:
                self._beside.add(tensor)
            tensor = source
        return tensor

    def _bounded(self, node: fx.Node) -> fx.Node | None:
        """Of ``max`` with a tensor of one element."""
        source, least = self._operand(node, 0), self._operand(node, 1)
        if source is None or least is None or node.kwargs or not have_same_type(node, source):
            return None
        number = number_in(least, self._mutated)
        return None if number is None else self._noted(node, 0, Step(AT_LEAST, None, number))

    def _arithmetic(self, node: fx.Node) -> fx.Node | None:
        """Of a sum, a difference, a product or a quotient with a tensor or a number."""
        name = operation(node)
        if name not in WITH_TENSOR or len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        scores_second = name in ("add", "mul") and not self._may_be_scores(left, node)
        other, source = (left, right) if scores_second else (right, left)
        if not isinstance(source, fx.Node) or not self._may_be_scores(source, node):
            return None
        if isinstance(other, fx.Node) and tensor_value(other) is not None:
            self.steps.append(Step(WITH_TENSOR[name], self._unexpanded(other)))
            return source
        number = None if _changes(other) else number_in(other, self._mutated)
        if number is None:
            return None
        number, name = (-number, "add") if name == "sub" else (number, name)
        self.steps.append(Step(WITH_NUMBER[name], None, number))
        return source

    def _may_be_scores(self, operand: Any, node: fx.Node) -> bool:
        if not isinstance(operand, fx.Node) or not self._is_read_alone(operand):
            return False
        was, fake = tensor_value(operand), tensor_value(node)
        assert was is not None and fake is not None
        return all(map(is_same, was.shape, fake.shape)) and is_of_scores(operand)


def _changes(found: Any) -> bool:
    """Whether a number changes from step to step: no value of it may be written down."""
    return isinstance(found, fx.Node) and isinstance(value(found), (torch.SymFloat, torch.SymInt))


def readers(node: fx.Node) -> set[fx.Node]:
    """The readers of a node but for results of it that nobody reads: in the graph of a checkpointed layer Dynamo leaves those."""
    return {user for user in node.users if user.users or operation(user) != "getitem"}


def _fit(product: fx.Node, walk: _Walk, operands: tuple[fx.Node, ...], out: fx.Node) -> bool:
    """Whether all has four dimensions and one mode, no step reads scores, and nothing is written to between the first reader and the last."""
    fakes = [tensor_value(x) if isinstance(x, fx.Node) else None for x in (*operands, out)]
    if any(fake is None or fake.ndim != 4 or not is_plain(fake) for fake in fakes):
        return False
    scores = tensor_value(product)
    assert scores is not None
    tensors = [step.tensor for step in walk.steps if step.tensor is not None]
    sizes = list(scores.shape)
    if not all(is_spread(tensor_value(x), sizes) and x not in walk.inner for x in tensors):
        return False
    modes = contexts(out.graph)
    if len({(modes[x].grad, modes[x].inference, modes[x].level) for x in (*walk.inner, out)}) > 1:
        return False
    return not is_written_between(walk.inner, out, operands)


def is_spread(fake: Tensor | None, sizes: Sequence[Any]) -> bool:
    """Whether a value is ``[B or 1, H or 1, Q or 1, K or 1]``, or has fewer dimensions."""
    if fake is None or fake.ndim > 4:
        return False
    own = [1] * (4 - fake.ndim) + list(fake.shape)
    return all(is_one(size) or is_same(size, other) for size, other in zip(own, sizes, strict=True))


def is_written_between(inner: Collection[fx.Node], out: fx.Node, operands: Collection[fx.Node]) -> bool:
    """Whether what attention reads is written to after its first node, so that its last one would read something else."""
    read = {storage_key(fake) for x in operands if (fake := tensor_value(x)) is not None}
    return not read.isdisjoint(storages_written_by(_between(inner, out)))


def _between(inner: Collection[fx.Node], out: fx.Node) -> Iterator[fx.Node]:
    """The nodes from the first of some to another one."""
    is_inside = False
    for node in out.graph.nodes:
        is_inside |= node in inner
        if node is out:
            return
        if is_inside:
            yield node
