"""How many rows the products with weights of a graph have."""

from __future__ import annotations

from typing import Any

from torch import fx

from mst_fx.declared import DECLARED
from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.spelling import product_operands
from mst_fx.graph.values import tensor_value
from mst_fx.rows.checks import product
from mst_fx.rows.fold import fold_rank
from mst_fx.torch_api.ops import operator_of, schema_of


def row_counts(graph: fx.Graph) -> list[Any]:
    """The numbers of rows in a graph: those of the tensors that meet a weight matrix."""
    counts: list[Any] = []
    for node in graph.nodes:
        count = _rows_at_matrix(node)
        if count is None or not is_known(count):
            continue
        if hint(count) > 1 and not any(fold_rank([count], known) for known in counts):
            counts.append(count)
    return counts


def products_of_unknown_rows(graph: fx.Graph) -> list[fx.Node]:
    """The products with a matrix whose number of rows depends on data: how many tokens were picked."""
    return [
        node for node in graph.nodes if (count := _rows_at_matrix(node)) is not None and not is_known(count)
    ]


def _rows_at_matrix(node: fx.Node) -> Any:
    if (declared := _declared_rows(node)) is not None:
        return declared
    source, matrix = product_operands(node) or (None, None)
    if not isinstance(source, fx.Node) or not isinstance(matrix, fx.Node):
        return None
    operand, weight = tensor_value(source), tensor_value(matrix)
    if operand is None or weight is None or operand.ndim < 2 or weight.ndim != 2:
        return None
    return product(operand.shape[:-1])


def _declared_rows(node: fx.Node) -> Any:
    """The rows that a declared operator is given."""
    operator = operator_of(node.target) if node.op == "call_function" else None
    said = DECLARED.of(operator)
    if said is None or not said.row_args:
        return None
    names = [x.name for x in schema_of(operator).arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(said.row_args[0])
    operand = tensor_value(given) if isinstance(given, fx.Node) else None
    return None if operand is None or operand.ndim < 2 else product(operand.shape[:-1])
