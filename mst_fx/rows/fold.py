"""Tensors with their leading dimensions folded into rows, and nodes that run on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.graph.fill import call
from mst_fx.graph.formula import Formula
from mst_fx.graph.sizes import expression, hint, row_bytes, settled
from mst_fx.graph.spelling import EXPANDS, SIZED_VIEWS, is_identity_dropout, operation
from mst_fx.graph.values import is_plain, storage_key, tensor_value, tensors_of, value
from mst_fx.torch_api.symbolic_rows import RowGuards, symbolic_rows
from mst_fx.torch_api.symbols import guards_of


def fold_rank(shape: Sequence[Any], rows: Any) -> int:
    """How many leading dimensions hold the rows; 0 if they do not."""
    product, wanted = sympy.Integer(1), expression(rows)
    for rank, size in enumerate(shape, start=1):
        product = product * expression(size)
        if product == wanted or (not product.is_number and sympy.expand(product - wanted) == 0):
            return rank
        if isinstance(rows, torch.SymInt) and not product.is_number and _are_guarded_equal(rows, product):
            return rank
    return 0


def _are_guarded_equal(rows: torch.SymInt, product: Any) -> bool:
    """Whether a guard says that two numbers of rows are one, as a loss says of its logits and labels.

    If batch and length both change, each input has symbols of its own, and only products are known to be equal.
    """
    wanted = expression(rows)
    if wanted.is_number or product.free_symbols & wanted.free_symbols:
        return False
    pair = {product, wanted}
    return any(isinstance(guard, sympy.Eq) and set(guard.args) == pair for guard in guards_of(rows))


def split_rows(shape: Sequence[Any], rows: Any) -> tuple[int, tuple[int, ...]] | None:
    """How many leading dimensions hold the rows, and the sizes behind them; None if none do, or those are dynamic."""
    rank = fold_rank(shape, rows)
    rest = settled(shape[rank:])
    return None if not rank or any(isinstance(size, torch.SymInt) for size in rest) else (rank, rest)


_SAMPLE_ROWS = (2, 3, 64, 1_000_003)


def check_guards(folder: Folder) -> None:
    """Refuses what was traced under an assumption about its number of rows."""
    if not isinstance(expression(folder.n), sympy.Symbol):
        raise Refusal("depends on the number of rows")
    guards = RowGuards(folder.n)
    for failed in (guard for rows in _SAMPLE_ROWS for guard in guards.failed(rows)):
        raise Refusal(f"depends on the number of rows ({failed})")


class Folder:
    """Runs nodes on folded fakes in a private fake mode.

    Args:
        rows: the number of rows of the graph's tensors, an int or Dynamo's symbolic integer.
        avoid: sizes that the stand-in for the number of rows must not equal.
    """

    def __init__(self, rows: Any, avoid: Collection[int] = ()) -> None:
        self.rows = rows
        self.mode, self.n = symbolic_rows(avoid)

    def folded_shape(self, tensor: torch.Tensor, n: Any = None) -> tuple[Any, ...] | None:
        """``[B, S, H]`` → ``(1, n, H)``; None when the leading dimensions do not hold the rows."""
        found = split_rows(tensor.shape, self.rows)
        return found and (*[1] * (found[0] - 1), self.n if n is None else n, *found[1])

    def folded(self, tensor: torch.Tensor) -> torch.Tensor | None:
        shape = self.folded_shape(tensor)
        if shape is None or not is_plain(tensor):
            return None
        with self.mode:
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """A private fake of an operand that all rows share.

        Raises:
            Refusal: for dynamic sizes and for tensor subclasses.
        """
        shape, stride = settled(tensor.shape), settled(tensor.stride())
        if any(isinstance(size, torch.SymInt) for size in (*shape, *stride)):
            raise Refusal(f"a shared operand has the dynamic shape {shape}")
        if not is_plain(tensor):
            raise Refusal(f"an operand is a {type_name(tensor)}")
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)

    def run_node(
        self, node: fx.Node, read: Callable[[fx.Node], Any], formula: Formula | None = None, n: Any = None
    ) -> Any:
        """Runs ``node`` on folded operands; sizes in views follow from the node's own value.

        Args:
            formula: runs in place of a ``torch.autograd.Function``.
            n: the number of rows where that is not this folder's.
        """

        def arg(operand: fx.Node) -> Any:
            found = value(operand)
            if isinstance(found, (torch.SymFloat, torch.SymBool)):
                # Adds a guard to Dynamo's shape environment: another value compiles anew.
                return float(found) if isinstance(found, torch.SymFloat) else bool(found)
            return read(operand)

        if formula is not None:
            operands = [each for each in node.args if isinstance(each, fx.Node) and tensors_of(each)]
            return formula.apply(self.n if n is None else n, [arg(operand) for operand in operands])
        out = tensor_value(node)
        is_expand = operation(node) in EXPANDS
        if out is not None and (is_expand or operation(node) in SIZED_VIEWS) and not _is_dtype_view(node):
            shape = self.folded_shape(out)
            if shape is not None:
                source = arg(node.args[0])  # type: ignore[arg-type]
                return source.expand(shape) if is_expand else torch.reshape(source, shape)
        if is_identity_dropout(node):
            return arg(node.args[0])  # type: ignore[arg-type]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), arg)
        return call(node.op, node.target, args, kwargs)


def type_name(tensor: torch.Tensor) -> str:
    kind = type(tensor).__name__
    if type(tensor) is torch.Tensor and storage_key(tensor) is None:
        return "tensor inside of a torch.func transform"
    return kind if kind != "FakeTensor" else f"{tensor.layout} tensor"


def _is_dtype_view(node: fx.Node) -> bool:
    return len(node.args) > 1 and isinstance(node.args[1], torch.dtype)


def read_operand(operands: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    """The value of an operand of a node that runs on folded fakes.

    Raises:
        Refusal: if it is an integer that Dynamo keeps dynamic (row counts in views are not read).
    """
    if node in operands:
        return operands[node]
    if isinstance(value(node), torch.SymInt):
        raise Refusal(f"{node.name} is a dynamic integer")
    return value(node)


def bytes_a_row(node: fx.Node, rows: Any) -> int:
    """Bytes a row of a node's value."""
    return sum(row_bytes(fake, hint(rows)) for fake in tensors_of(node))
