"""Where the rows of a tensor lie, and a call of an operator as its rule sees it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Protocol

import torch

from mst_fx.errors import Refusal
from mst_fx.torch_api.symbols import expression
from mst_fx.torch_api.tensors import storage_id, tree_leaves


@dataclasses.dataclass(frozen=True)
class Row:
    """The rows lie along dimension ``dim``."""

    dim: int


class _Summed(enum.Enum):
    SUMMED = "summed"


SUMMED = _Summed.SUMMED
Label = Row | _Summed | None


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A product of rows with a shared matrix: bytes a row that go in and come out."""

    in_bytes: int
    out_bytes: int


def is_same_size(size: int | torch.SymInt, rows: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression, without adding a guard."""
    if isinstance(size, torch.SymInt) and isinstance(rows, torch.SymInt):
        return bool(expression(size) == expression(rows))
    if isinstance(size, torch.SymInt) or isinstance(rows, torch.SymInt):
        return False
    return size == rows


class Tracer(Protocol):
    """Whoever runs operators, as their rules see it (:class:`mst_fx.rows.tracer.RowTracer`).

    Attributes:
        folds: whether the batch is folded into the rows, and sizes of 1 stand for it.
        folded: for how many dimensions of an operand, at most, a size of 1 stands before the rows.
        declared: the calls of operators that are known by a declaration alone (:mod:`mst_fx.declared`).
    """

    rows: torch.SymInt
    folds: bool
    folded: int
    matmuls: list[Matmul]
    declared: list[Call]

    def is_rows(self, size: int | torch.SymInt) -> bool: ...

    def label(self, value: Any) -> Label: ...

    def label_of_constant(self, func: Any, tensor: torch.Tensor) -> Label: ...


@dataclasses.dataclass(frozen=True)
class Call:
    """One dispatched call, and what rules ask of it."""

    tracer: Tracer
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def label(self, value: Any) -> Label:
        return self.tracer.label(value)

    def row_dim(self, value: torch.Tensor) -> int | None:
        label = self.tracer.label(value)
        return label.dim if isinstance(label, Row) else None

    def only_row_dim(self, value: torch.Tensor) -> int:
        """The row dimension of the one operand that may hold rows."""
        dim = self.row_dim(value)
        if dim is None:
            raise self.refusal("takes rows in an operand other than its first")
        return dim

    def refusal(self, what: str) -> Refusal:
        return Refusal(f"{self.func} {what}")


Rule = Callable[[Call], "Label | list[Label]"]


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor: Any) -> int:
    return storage_id(tensor)


def wrap(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim
