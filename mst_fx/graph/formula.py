"""Formulas: the two graphs of a ``torch.autograd.Function``, inside of bodies.

A body's gradient is that of its forward graph, so that graph has to know which backward belongs to a Function::

    outs, saved = forward(x.detach(), ...)
    outs = mst_fx.with_gradient(outs, saved, [x, ...], key)  # gives outs; its gradient is the Function's backward

What both graphs do to rows is proved in :mod:`mst_fx.rows.function` before there is a formula.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.process import Named


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """A Function on folded rows, as ATen graphs.

    Attributes:
        forward: ``(n, *args)`` → ``(*outs, *saved)``; all that goes in is contiguous.
        backward: ``(n, *gradients of outs, *saved)`` → the gradients of those args that get one.
        outs: how many results there are.
        row_dim: where the rows lie in the first one.
        has_gradient: for each arg, whether the backward graph gives its gradient (``None`` otherwise).
        fixed: the results that the Function marks as not differentiable.
        is_tuple: whether it returns a tuple rather than its one result.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    outs: int
    row_dim: int
    has_gradient: tuple[bool, ...]
    fixed: frozenset[int]
    is_tuple: bool

    @functools.cached_property
    def key(self) -> str:
        """Names the formula by content."""
        shapes = [
            [str(node.meta.get("val")) for node in gm.graph.nodes] for gm in (self.forward, self.backward)
        ]
        rest = (self.outs, self.row_dim, self.has_gradient, sorted(self.fixed), self.is_tuple)
        content = repr((self.forward.code, self.backward.code, shapes, rest))
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def apply(self, n: Any, args: Sequence[Tensor]) -> Any:
        """What the Function gives for its tensor operands."""
        args = [arg.contiguous() for arg in args]
        values = self.forward(n, *(arg.detach() for arg in args))
        tracked = [arg for arg, has in zip(args, self.has_gradient, strict=True) if has]
        found = torch.ops.mst_fx.with_gradient(values[: self.outs], values[self.outs :], tracked, self.key)
        outs = tuple(out.detach() if index in self.fixed else out for index, out in enumerate(found))
        return outs if self.is_tuple else outs[0]


# Nodes name formulas by key; the body whose graph they are in keeps them alive.
# Of one content only the one that its key names may be used, or the key would lose it.
FORMULAS: Named[Formula] = Named()


def named_in(gm: fx.GraphModule) -> tuple[Formula, ...]:
    """The formulas that a body's forward graph names."""
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.mst_fx.with_gradient.default)
    return tuple(FORMULAS[str(node.args[3])] for node in nodes)


@torch.library.custom_op(
    "mst_fx::with_gradient",
    mutates_args=(),
    schema="(Tensor[] outs, Tensor[] saved, Tensor[] args, str key) -> Tensor[]",
)
def with_gradient(outs: list[Tensor], saved: list[Tensor], args: list[Tensor], key: str) -> list[Tensor]:
    return [out.clone() for out in outs]


@with_gradient.register_fake
def _(outs: list[Tensor], saved: list[Tensor], args: list[Tensor], key: str) -> list[Tensor]:
    return [torch.empty_like(out) for out in outs]


def without_op(outs: list[Tensor], saved: list[Tensor], args: list[Tensor], key: str) -> list[Tensor]:
    """The op's decomposition, below autograd: nothing of it is left in what is compiled."""
    return [torch.ops.aten.alias.default(out) for out in outs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    outs, saved, _, key = inputs
    ctx.formula, ctx.counts = FORMULAS[key], (len(outs), len(saved))
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    formula: Formula = ctx.formula
    assert all(grad is not None for grad in grads)  # zeros where a result is not used, as for the Function
    given, saved = [grad.contiguous() for grad in grads], [x.contiguous() for x in ctx.saved_tensors]
    found = formula.backward(given[0].shape[formula.row_dim], *given, *saved)
    outs, kept = ctx.counts
    return [None] * outs, [None] * kept, list(found), None


with_gradient.register_autograd(_backward, setup_context=_setup)
