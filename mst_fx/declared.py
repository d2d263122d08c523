"""Operators of other libraries of which somebody said that they are row-wise.

The rule table (:mod:`mst_fx.rows.rules`) knows ATen. Into an operator of a library nobody can look: whoever knows it says where its rows
are. ``rows/rules_of_declared`` makes a rule of that, and proves the operator's gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mst_fx.errors import did_you_mean
from mst_fx.process import State
from mst_fx.torch_api.ops import OpOverload, OpOverloadPacket, operator_of, schema_of


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What was said of an operator.

    Attributes:
        row_args: the arguments that hold rows.
        sums: the results, by their position, that are sums over rows.
    """

    row_args: tuple[str, ...]
    sums: tuple[int, ...]


class Declarations(State):
    """What was said of operators, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Declaration] = {}

    def add(self, operator: Any, said: Declaration) -> None:
        """
        Raises:
            ValueError: if something else was said of that operator before.
        """
        if self._known.setdefault(operator, said) != said:
            known = self._known[operator]
            raise ValueError(
                f"{operator} was declared before, with row_args={known.row_args} and sums={known.sums}, "
                f"and now with row_args={said.row_args} and sums={said.sums}"
            )

    def of(self, operator: Any) -> Declaration | None:
        return self._known.get(operator)

    def __len__(self) -> int:
        return len(self._known)

    def reset(self) -> None:
        self._known.clear()


DECLARED = Declarations()


def declare_row_wise(op: Any, row_args: str | Sequence[str], *, sums: int | Sequence[int] = ()) -> None:
    """Says of an operator of a library that it works on each row alone, so that mst-fx may run it on chunks of rows.

    For operators that nobody can look into, such as a linear with packed 4-bit weights. To be called before the model is compiled: what was compiled
    before stays as it is, until ``torch.compiler.reset()``::

        mst_fx.declare_row_wise(torch.ops.lib.linear4bit, row_args="x")    # linear4bit(x, packed, absmax) -> Tensor

    What is said by it:

    - The arguments in ``row_args`` have rows in all dimensions but the last (the first of them: ``[*, features]``; others ``[*]`` or
      ``[*, features]``), and so have the results. ``*`` may be of any sizes: ``[B, S, H]`` may come as ``[1, chunk, H]``.
    - Row i of each result depends on row i of these arguments, and on the other arguments, which all rows share; not on other rows, nor
      on how many there are. Nothing is drawn at random, and nothing else is done.

    Of the gradient nothing is said: the operator's registered backward is run, and proved row-wise operator by operator. If it calls
    an operator of the library, that one is declared, too::

        mst_fx.declare_row_wise(torch.ops.lib.linear4bit_backward, row_args="grad")

    Of such a one it is also said that it is linear in the gradient, as derivatives are: ranks that work on one sequence (``sequence_parallel``)
    give it P times the gradient.

    A wrong word gives wrong numbers, silently. :func:`mst_fx.check_row_wise` tries an operator on tensors of yours.

    Args:
        op: what ``torch.library.custom_op`` made, or ``torch.ops.lib.name`` (with an overload where there are several).
        row_args: the name of the argument that holds rows, or the names; none, for an operator that is given no rows (one that unpacks a
            weight, inside of a ``torch.autograd.Function``): then it is said that it does nothing but to give its value.
        sums: positions of results that are no rows but sums over all of them, as a bias's gradient is.

    Raises:
        TypeError: if ``op`` is no operator.
        ValueError: if the operator writes to an argument or draws random numbers, has no such argument or result, has a rule
            of its own, or was declared otherwise before.
    """
    operator = operator_of(op)
    if operator is None:
        raise TypeError(
            f"declare_row_wise takes an operator, such as torch.ops.lib.name.default, not {_described(op)}"
        )
    schema = schema_of(operator)
    said = Declaration(
        row_args=(row_args,) if isinstance(row_args, str) else tuple(row_args),
        sums=(sums,) if isinstance(sums, int) else tuple(sums),
    )
    if operator.namespace == "mst_fx" or torch.Tag.pointwise in operator.tags:
        raise ValueError(f"{operator} has a rule of its own")
    if schema.is_mutable or any(x.alias_info is not None for x in schema.returns):
        raise ValueError(
            f"{operator} writes to an argument, or gives a view of one, and cannot run in chunks"
        )
    if torch.Tag.nondeterministic_seeded in operator.tags:
        raise ValueError(f"{operator} draws random numbers, and cannot run in chunks")
    names = [x.name for x in schema.arguments if "Tensor" in str(x.type)]
    for name in said.row_args:
        if name not in names:
            hint = did_you_mean(name, names) or f"; it has {', '.join(names)}"
            raise ValueError(f"{operator} has no argument {name!r} that is a tensor{hint}")
    if any(str(x.type) != "Tensor" for x in schema.returns) or not schema.returns:
        raise ValueError(f"{operator} gives something else than tensors")
    if any(not 0 <= position < len(schema.returns) for position in said.sums):
        raise ValueError(f"{operator} has {len(schema.returns)} results, and sums is {said.sums}")
    DECLARED.add(operator, said)


def _described(op: Any) -> str:
    if isinstance(op, OpOverloadPacket):
        return f"{op}, which has several: name one, such as {op}.{op.overloads()[0]}"
    return type(op).__name__


def is_declared(target: Any) -> bool:
    """Whether a target of a node is a declared operator."""
    operator = operator_of(target) if isinstance(target, (OpOverload, OpOverloadPacket)) else None
    return operator is not None and DECLARED.of(operator) is not None
