"""What is row-wise: a rule a dispatched ATen operator, applied while the operators run on fakes.

A *row* is one token. While a graph is analysed, and again when a body is traced, every tensor
that holds rows is *folded*: its leading dimensions that make up the rows become ``[1, ..., n]``,
with ``n`` a symbolic integer that equals no other size. :class:`RowTracer` watches the operators
run and gives each result a *label*:

``Row(dim)``
    Row ``i`` of the result depends on row ``i`` of the labelled operands and on unlabelled ones only.
``SUMMED``
    A sum over rows: the results of two chunks add up to the result of both.
``None``
    No dependence on any row.

Each file of rules ends with its table, by overload; here they are one.

An operator without a rule, or whose rule does not hold, raises :class:`~mst_fx.errors.Refusal`.
"""

from __future__ import annotations

from typing import Any

import torch

import mst_fx.graph.formula  # noqa: F401  (registers the op)
from mst_fx.rows.labels import Call, Label, Rule
from mst_fx.rows.rules_of_picks import PICK_RULES
from mst_fx.rows.rules_of_products import PRODUCT_RULES
from mst_fx.rows.rules_of_reductions import REDUCTION_RULES
from mst_fx.rows.rules_of_shapes import SHAPE_RULES

aten = torch.ops.aten


def _with_gradient(call: Call) -> list[Label]:
    """Gives its first operands; the gradient was proved with the formula (:mod:`mst_fx.rows.function`)."""
    return [call.label(tensor) for tensor in call.args[0]]


# Of our own operators, where one comes before the proof.
_OWN_RULES: dict[Any, Rule] = {torch.ops.mst_fx.with_gradient.default: _with_gradient}

RULES: dict[Any, Rule] = {
    **_OWN_RULES,
    **SHAPE_RULES,
    **PRODUCT_RULES,
    **REDUCTION_RULES,
    **PICK_RULES,
}

OF_SUMS = frozenset({aten.view.default, aten.alias.default, aten.detach.default})

CONSTANT_FILLS = frozenset(
    {
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.scalar_tensor.default,
    }
)
