"""Runs operators under the rule table and follows the rows through them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import mst_fx.graph.grouped  # noqa: F401  (registers the operators)
from mst_fx.declared import DECLARED
from mst_fx.errors import Refusal
from mst_fx.rows.checks import is_pointwise, pointwise
from mst_fx.rows.labels import SUMMED, Call, Label, Matmul, Row, is_same_size, storage, tensors
from mst_fx.rows.rules import CONSTANT_FILLS, OF_SUMS, RULES
from mst_fx.rows.rules_of_declared import declared
from mst_fx.rows.rules_of_picks import nll_loss_parts
from mst_fx.torch_api.modes import TorchDispatchMode
from mst_fx.torch_api.ops import OpOverload, schema_of

aten = torch.ops.aten


class RowTracer(TorchDispatchMode):
    """Labels the results of every ATen operator that runs under it.

    Args:
        rows: the symbolic number of rows ``n``.
        takes_declared: whether operators may be known by a declaration alone: whoever says so sees to their gradients.

    Raises:
        Refusal: from the dispatched call, naming the operator, when no rule proves it row-wise.
    """

    folds = True

    def __init__(self, rows: torch.SymInt, takes_declared: bool = False) -> None:
        super().__init__()
        self.rows, self._takes_declared = rows, takes_declared
        self.declared: list[Call] = []
        self.matmuls: list[Matmul] = []
        self.folded = 0
        # Strong references: an id must not be reused while its label is kept.
        self._labels: dict[int, tuple[torch.Tensor, Label]] = {}
        self._protected: set[int] = set()

    def protect(self, tensor: torch.Tensor) -> None:
        """Marks an operand: what writes to its storage is refused."""
        self._protected.add(storage(tensor))

    def set_label(self, tensor: torch.Tensor, label: Label) -> None:
        """Says where the rows of an operand lie: the dimensions before them were folded."""
        if isinstance(label, Row):
            self.folded = max(self.folded, label.dim)
        self._labels[id(tensor)] = (tensor, label)

    def is_rows(self, size: int | torch.SymInt) -> bool:
        """Whether a size is the number of rows."""
        return is_same_size(size, self.rows)

    def label(self, value: Any) -> Label:
        entry = self._labels.get(id(value))
        return entry[1] if entry is not None else None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.nll_loss.default:  # composite, but on the meta device
            with self:
                return nll_loss_parts(*args, **kwargs)[0]
        out = func(*args, **kwargs)
        if not tensors(out):  # a property, such as prim.device
            return out
        labels = self._apply_rule(func, args, kwargs, out)
        for tensor, label in zip(tensors(out), labels, strict=True):
            if isinstance(label, Row) and not self.is_rows(tensor.shape[label.dim]):
                raise Refusal(f"{func} changes the number of rows")
            if label is not None:
                self._labels[id(tensor)] = (tensor, label)
        return out

    def _apply_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Label]:
        outs = tensors(out)
        inputs = tensors((args, kwargs))
        if all(self.label(tensor) is None for tensor in inputs):
            return [self.label_of_constant(func, tensor) for tensor in outs]
        if any(self.label(tensor) is SUMMED for tensor in inputs):
            if func in OF_SUMS:
                return [SUMMED]
            raise Refusal(f"{func} works on a sum over rows")
        if schema_of(func).is_mutable:
            self._check_write(func, args)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refusal(f"{func} draws random numbers")
        rule = RULES.get(func)
        if rule is None and is_pointwise(func):
            rule = pointwise
        if rule is None and (said := DECLARED.of(func)) is not None:
            if not self._takes_declared:
                raise Refusal(f"{func} was declared row-wise, which does for MLPs and heads alone")
            rule = functools.partial(declared, said)
        if rule is None:
            raise Refusal(f"{func} has no row-wise rule{way_out(func)}")
        call = Call(self, func, args, kwargs, out)
        labels = rule(call)
        if not isinstance(labels, list):
            labels = [labels] * len(outs)
        return labels

    def _check_write(self, func: Any, args: tuple[Any, ...]) -> None:
        """Only a composite operator's own temporary may be written to, and only by rows on rows."""
        target = args[0] if args else None
        if not (is_pointwise(func) and isinstance(target, torch.Tensor)):
            raise Refusal(f"{func} writes to its argument")
        if self.label(target) is None or storage(target) in self._protected:
            raise Refusal(f"{func} writes to its argument")

    def label_of_constant(self, func: Any, tensor: torch.Tensor) -> Label:
        """The label of a result of operands without rows: constant fills may have n rows."""
        if torch.Tag.nondeterministic_seeded in func.tags:  # each chunk would draw anew
            raise Refusal(f"{func} draws random numbers")
        dims = [d for d, size in enumerate(tensor.shape) if is_same_size(size, self.rows)]
        if not dims:
            return None
        if func in CONSTANT_FILLS and len(dims) == 1:
            return Row(dims[0])
        raise Refusal(f"{func} makes a tensor whose rows are not alike")


class GradientTracer(RowTracer):
    """Labels what the backward graph of a ``torch.autograd.Function`` does, where weights' gradients are made.

    There a product may contract the rows (``tangent.t() @ x``), and the sum over rows be transposed. Elsewhere that is
    nothing to chunk: a later operator would wait for all chunks.
    """

    def _apply_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Label]:
        labels = [self.label(tensor) for tensor in tensors((args, kwargs))]
        if labels == _CONTRACTIONS.get(func) or (func in _TRANSPOSES and labels == [SUMMED]):
            return [SUMMED]
        return super()._apply_rule(func, args, kwargs, out)


class SlotTracer(RowTracer):
    """Labels what experts make of their slots, where each slot's key picks what it meets: a row of a table, or a matrix of a stack.

    Elsewhere neither has a rule: a loop over rows would make the gradient of the whole table in each chunk.
    """

    def _apply_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Label]:
        found = [self.label(tensor) for tensor in tensors((args, kwargs))]
        if func is torch.ops.mst_fx.grouped_mm.default and found == [Row(0), None, None]:
            sizes = [tensor.shape[1] * tensor.element_size() for tensor in (args[0], out)]
            self.matmuls.append(Matmul(*sizes))
            return [Row(0)]
        if func is aten.index.Tensor and found == [None, Row(0)] and len(args[1]) == 1:
            return [Row(0)]
        return super()._apply_rule(func, args, kwargs, out)


def way_out(target: Any) -> str:
    """What to say of an operator of a library, of which nothing is known."""
    if not isinstance(target, OpOverload) or target.namespace in ("aten", "prims", "prim", "mst_fx"):
        return ""
    return "; if each row of its result needs the same row alone, mst_fx.declare_row_wise says so"


_CONTRACTIONS: dict[Any, list[Label]] = {
    aten.mm.default: [Row(1), Row(0)],
    aten.bmm.default: [Row(2), Row(1)],
}
_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
