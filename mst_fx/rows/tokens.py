"""Where the tokens of sequences lie in a value, followed through a program, its heads and flattened batches too.

The analysis of a region (:mod:`mst_fx.rows.analysis`) folds the batch into the rows and knows leading rows alone. Who hands
each rank of a group its own tokens of every sequence has to know more: ``[B, S, E]`` → ``[B, S, H, D]`` → ``[B, H, S, D]`` has them in
other dimensions, and ``[B·S, E]`` those of one sequence behind those of another. Such a place is a label :class:`Tokens`.

The proof is that of the rule table: a node runs on fakes whose tokens are a symbolic number ``n``, in ``[B, n, E]`` or ``[B·n, E]``, and each
ATen operator that runs is asked for its rule. Nothing is folded away, so that what works along the batch or the heads is row-wise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mst_fx.declared import DECLARED
from mst_fx.errors import Refusal
from mst_fx.graph.fill import call
from mst_fx.graph.modes import Context, autocast_contexts
from mst_fx.graph.sizes import expression, settled
from mst_fx.graph.values import is_plain, tensors_of, value
from mst_fx.rows.fold import Folder, type_name
from mst_fx.rows.gradient_of_declared import SeesNoNumbers, prove_gradient
from mst_fx.rows.labels import SUMMED, Call, Label, Row, tensors, wrap
from mst_fx.rows.linear import is_linear
from mst_fx.rows.rules import CONSTANT_FILLS
from mst_fx.rows.rules_of_reductions import REDUCTION_RULES
from mst_fx.rows.tracer import GradientTracer, RowTracer
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.symbolic_rows import symbolic_rows
from mst_fx.torch_api.symbols import SYMBOLIC
from mst_fx.torch_api.tensors import tree_leaves, tree_map_only

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
# May take away a dimension before the tokens.
_NARROWS = frozenset({aten.select.int, aten.unbind.int, *REDUCTION_RULES})


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A place of tokens: ``batch · count`` of them along ``dim``, those of one sequence after those of another."""

    dim: int
    batch: int
    count: int

    def sized(self, shape: Sequence[Any], count: Any) -> tuple[Any, ...]:
        """A shape with another number of tokens."""
        return tuple(self.batch * count if dim == self.dim else size for dim, size in enumerate(shape))


Found = Tokens | Any  # Tokens, SUMMED, or None: no token has any influence


def moved(place: Tokens, shape: Sequence[int], to: Sequence[int]) -> Tokens | None:
    """Where the tokens lie once a value was given another shape, its elements in their order; None if no dimension has them.

    They are found by what lies behind them: as many elements a token as before.
    """
    inner, behind = _product(shape[place.dim + 1 :]), 1
    for dim in reversed(range(len(to))):
        if behind == inner and to[dim] % place.count == 0 and to[dim] > 1:
            return Tokens(dim, to[dim] // place.count, place.count)
        behind *= to[dim]
    return None


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


class TokenTracer(RowTracer):
    """Labels what nodes make of tokens, in any dimension."""

    folds = False

    def set_label(self, tensor: torch.Tensor, label: Label) -> None:
        super().set_label(tensor, label)
        self.folded = 0

    def sequences(self, size: int | torch.SymInt) -> int:
        """How many sequences' tokens a size is; 0: it is none of them."""
        quotient = expression(size) / expression(self.rows)
        return int(quotient) if quotient.is_Integer else 0

    def is_rows(self, size: int | torch.SymInt) -> bool:
        return self.sequences(size) > 0

    def label_of_constant(self, func: Any, tensor: torch.Tensor) -> Label:
        if any(not expression(size).is_number for size in tensor.shape):
            places = [dim for dim, size in enumerate(tensor.shape) if self.is_rows(size)]
            if func not in CONSTANT_FILLS or len(places) != 1:
                raise Refusal(f"{func} makes a tensor whose rows are not alike")
            return Row(places[0])
        return super().label_of_constant(func, tensor)

    def _apply_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Label]:
        found = [self.label(tensor) for tensor in tensors((args, kwargs))]
        known: list[Label] = [label for label in found if isinstance(label, Row)]
        if func in _VIEWS and known:
            return [self._viewed(Call(self, func, args, kwargs, out))]
        if func is torch.ops.mst_fx.experts_loop.default:
            return [_of_experts(Call(self, func, args, kwargs, out))]
        if func is aten.embedding.default and found[0] is None and known:
            return [known[0]]
        if func is aten.index_select.default and found == [None, Row(0)]:
            return [Row(wrap(args[1], args[0].ndim))]
        if func is aten.index.Tensor and found[0] is None and len(known) == 1 and len(args[1]) == 1:
            return known  # of a table
        labels = super()._apply_rule(func, args, kwargs, out)
        return [self._narrowed(func, t, label) for t, label in zip(tensors(out), labels, strict=True)]

    def _viewed(self, call: Call) -> Label:
        source, out = call.args[0], tensors(call.out)[0]
        dim, inner = call.only_row_dim(source), sympy.Integer(1)
        for size in source.shape[dim + 1 :]:
            inner = inner * expression(size)
        behind = sympy.Integer(1)
        for place in reversed(range(out.ndim)):
            if behind == inner and self.is_rows(out.shape[place]):
                return Row(place)
            behind = behind * expression(out.shape[place])
        raise call.refusal(f"mixes rows with other dimensions ({source.shape} to {out.shape})")

    def _narrowed(self, func: Any, out: torch.Tensor, label: Label) -> Label:
        """Where the tokens are if a dimension before them is gone: no other one has their number."""
        if func not in _NARROWS or not isinstance(label, Row):
            return label
        if label.dim < out.ndim and self.is_rows(out.shape[label.dim]):
            return label
        places = [dim for dim, size in enumerate(out.shape) if self.is_rows(size)]
        return Row(places[0]) if len(places) == 1 else label


class _TokenGradients(SeesNoNumbers, GradientTracer, TokenTracer):
    """Labels what the backward of a declared operator makes of tokens; refuses what is not linear in the gradient."""

    def __init__(self, rows: torch.SymInt) -> None:
        super().__init__(rows, takes_declared=True)
        self._of_gradient: dict[int, torch.Tensor] = {}

    def note_tangent(self, tangent: torch.Tensor) -> None:
        self._of_gradient[id(tangent)] = tangent

    def _apply_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Label]:
        labels = super()._apply_rule(func, args, kwargs, out)
        if any(map(self._depends, tensors((args, kwargs)))):
            if not is_linear(func, args, kwargs, self._depends):
                raise Refusal(f"{func} is not known to be linear in the gradient")
            for tensor in tensors(out):
                self.note_tangent(tensor)
        return labels

    def _depends(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._of_gradient


def _need_gradients(readings: Mapping[fx.Node, Sequence[Tokens | None]]) -> tuple[bool, bool]:
    """Whether operands with tokens, and those that are read whole, need gradients."""
    needed = {True: False, False: False}
    for operand, labels in readings.items():
        for x, label in zip(tensors_of(operand), labels, strict=True):
            needed[label is not None] |= x.requires_grad
    return needed[True], needed[False]


def _of_experts(call: Call) -> Label:
    """Of ``mst_fx.experts_loop(rows, slots, keys, …)``: what a row gets depends on that row and on its own slots (:mod:`mst_fx.rows.slots`)."""
    rows, slots, key, *_ = call.args
    for tensor in (*rows, *slots, key):
        # Not [N·k], whose rows would be taken for those of k sequences.
        if call.label(tensor) != Row(0) or expression(tensor.shape[0]) != expression(rows[0].shape[0]):
            raise call.refusal("has rows, slots or keys that do not lie by tokens")
    return Row(0)


class Prover:
    """Runs nodes on fakes with a symbolic number of tokens.

    Args:
        avoid: sizes that the number that stands in for it must not equal.
    """

    def __init__(self, avoid: Collection[int]) -> None:
        self._avoid = avoid
        self._known: dict[str, list[Found] | Refusal] = {}
        self._mode, self._n = symbolic_rows(avoid)

    def prove(
        self, node: fx.Node, readings: Mapping[fx.Node, Sequence[Tokens | None]], context: Context
    ) -> list[Found]:
        """The label of each tensor that a node gives, if these labels are those of the tensors of its operands.

        Raises:
            Refusal: if it is not row-wise, or gives something that is not the value of the node with other tokens.
        """
        key = self._key(node, readings, context)
        if key not in self._known:
            try:
                self._known[key] = self._prove(node, readings, context)
            except Refusal as refusal:
                self._known[key] = refusal
            if not isinstance(
                expression(self._n), sympy.Symbol
            ):  # the node fixed it: its result is void, and so is n
                self._known[key] = Refusal("depends on the number of rows")
                self._mode, self._n = symbolic_rows(self._avoid)
        found = self._known[key]
        if isinstance(found, Refusal):
            raise found
        return found

    def _key(self, node: fx.Node, readings: Mapping[fx.Node, Any], context: Context) -> str:
        def described(operand: fx.Node) -> Any:
            return _Text(f"<{_described(value(operand))} {readings.get(operand)}>")

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), described)
        gradients = _need_gradients(readings) if len(DECLARED) else ()
        return repr((node.op, node.target, args, kwargs, _described(value(node)), context, gradients))

    def _prove(self, node: fx.Node, readings: Mapping[fx.Node, Any], context: Context) -> list[Found]:
        tracer = TokenTracer(self._n, takes_declared=True)
        counts = {label.count for labels in readings.values() for label in labels if label is not None}
        assert len(counts) == 1
        operands = {operand: self._fakes(operand, labels, tracer) for operand, labels in readings.items()}

        def read(operand: fx.Node) -> Any:
            found = operands[operand] if operand in operands else value(operand)
            if isinstance(found, torch.SymInt):
                (found,) = settled([found])
            if isinstance(found, SYMBOLIC):
                raise Refusal(f"{operand.name} is a dynamic number")
            return found

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        modes = torch.no_grad(), enable_python_dispatcher(), self._mode, autocast_contexts(context.autocast)
        with modes[0], modes[1], modes[2], modes[3], tracer:
            try:
                results = call(node.op, node.target, args, kwargs)
            except Refusal:
                raise
            except Exception as error:
                message = [*str(error).strip().splitlines(), repr(error)][0]
                raise Refusal(f"does not run on other numbers of tokens: {message}") from None
        found = self._checked(node, results, tracer, counts.pop())
        for each in tracer.declared if context.grad else ():
            prove_gradient(each, Folder(self._n, self._avoid), *_need_gradients(readings), _TokenGradients)
        return found

    def _fakes(self, operand: fx.Node, labels: Sequence[Tokens | None], tracer: TokenTracer) -> Any:
        found = iter(labels)

        def fake(x: torch.Tensor) -> torch.Tensor:
            label, shape = next(found), settled(x.shape)
            if not is_plain(x):
                raise Refusal(f"{operand.name} is a {type_name(x)}")
            if label is not None:
                shape = label.sized(shape, self._n)
            with self._mode:
                if label is None:
                    new = torch.empty_strided(shape, settled(x.stride()), dtype=x.dtype, device=x.device)
                else:
                    new = torch.empty(shape, dtype=x.dtype, device=x.device)
            tracer.protect(new)
            if label is not None:
                tracer.set_label(new, Row(label.dim))
            return new

        return tree_map_only(torch.Tensor, fake, value(operand))

    def _checked(self, node: fx.Node, results: Any, tracer: TokenTracer, count: int) -> list[Found]:
        known, leaves = tree_leaves(value(node)), tree_leaves(results)
        if len(known) != len(leaves):
            raise Refusal("gives another structure")
        labels: list[Found] = []
        for was, now in zip(known, leaves, strict=True):
            if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
                raise Refusal("gives something else than tensors")
            label = tracer.label(now)
            place = None
            if isinstance(label, Row):
                place = Tokens(label.dim, tracer.sequences(now.shape[label.dim]), count)
            shape = settled(was.shape) if place is None else place.sized(settled(was.shape), self._n)
            same = len(shape) == now.ndim and all(
                expression(a) == expression(b) for a, b in zip(shape, now.shape, strict=True)
            )
            if place is not None and same:
                same = int(settled(was.shape)[place.dim]) == place.batch * count
            if not same or was.dtype != now.dtype or was.device != now.device:
                raise Refusal(f"gives {tuple(now.shape)} of {tuple(was.shape)}")
            labels.append(label if label is SUMMED else place)
        return labels


class _Text(tuple[Any, ...]):
    """Stands for an operand in the key of a node; a tuple that ``map_arg`` leaves alone."""

    def __new__(cls, text: str) -> _Text:
        return super().__new__(cls, (text,))


def _described(found: Any) -> list[Any]:
    return [
        (str(x.dtype), tuple(map(str, x.shape)), tuple(map(str, x.stride())), str(x.device), type(x).__name__)
        if isinstance(x, torch.Tensor)
        else str(x)
        for x in tree_leaves(found)
    ]
