"""``mst_fx.check_row_wise``: tries whether an operator is as row-wise as it was declared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_fx.declared import DECLARED, Declaration
from mst_fx.torch_api.ops import operator_of, schema_of
from mst_fx.torch_api.tensors import tree_leaves

_EPS = 16  # of a type's rounding: chunks may add up in another order
_FACTOR = 8  # by which other rows are changed


def check_row_wise(op: Any, *args: Any, **kwargs: Any) -> None:
    """Tries a declared operator on tensors of yours: nothing is proved by it, but a wrong declaration hardly passes.

    It is run forward, and backward where an argument requires gradients: on all rows; with half of the rows changed, which must leave the
    others' results and gradients as they were; and in two chunks, whose results, and sums of gradients, must be those of all rows. Take
    sizes as in your model, the type that you train in, and rows that are not alike: no zeros, no ones.

    Args:
        op: as given to :func:`mst_fx.declare_row_wise`.
        args, kwargs: what it is called with.

    Raises:
        ValueError: says what differs; or that the operator was not declared, or that there are fewer than four rows.
    """
    operator = operator_of(op)
    said = DECLARED.of(operator)
    if said is None:
        raise ValueError(f"{op} was not declared: mst_fx.declare_row_wise says which arguments hold its rows")
    if not said.row_args:
        raise ValueError(f"{operator} was declared to be given no rows: there is nothing to try")
    names = [x.name for x in schema_of(operator).arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    trial = _Trial(operator, said, given)
    trial.others_do_not_matter()
    trial.chunks_are_alike()


class _Trial:
    def __init__(self, operator: Any, said: Declaration, given: dict[str, Any]) -> None:
        self.operator, self.said, self.given = operator, said, given
        first = given[said.row_args[0]]
        self.lead = first.ndim - 1
        self.count = first.shape[: self.lead].numel()
        if self.count < 4:
            raise ValueError(f"{operator} is tried on at least 4 rows, not {self.count}")
        # [1, ..., rows, features], as loops give them
        self.operands = {
            name: self._flat(given[name]) for name in said.row_args if isinstance(given[name], Tensor)
        }
        self.tangents: list[Tensor] | None = None
        self.whole = self._run(self.operands)

    def _flat(self, x: Tensor) -> Tensor:
        return x.detach().reshape(*[1] * (self.lead - 1), self.count, *x.shape[self.lead :])

    def _run(self, operands: dict[str, Tensor], at: slice = slice(None)) -> dict[str, tuple[bool, Tensor]]:
        """Results and gradients by what they are, each with whether it holds rows.

        Args:
            operands: those that hold rows.
            at: which rows of the tangents these are.
        """
        given, leaves = self._arguments(operands)
        outs = [x for x in tree_leaves(self.operator(**given)) if isinstance(x, Tensor)]
        holds = [position not in self.said.sums for position in range(len(outs))]
        found = {f"result {i}": (h, x.detach()) for i, (h, x) in enumerate(zip(holds, outs, strict=True))}
        first = operands[self.said.row_args[0]].shape
        for name, (is_rows, x) in found.items():
            if is_rows and x.shape[: self.lead] != first[: self.lead]:
                raise ValueError(
                    f"{self.operator} is not row-wise: {name} is {tuple(x.shape)} for {tuple(first)}"
                )
        wanted = [(h, x) for h, x in zip(holds, outs, strict=True) if x.requires_grad]
        if not leaves or not wanted:
            return found
        if self.tangents is None:
            self.tangents = [_random_like(x) for _, x in wanted]
        tangents = [self._at(x, at) if h else x for (h, _), x in zip(wanted, self.tangents, strict=True)]
        grads = torch.autograd.grad(
            [x for _, x in wanted], list(leaves.values()), tangents, allow_unused=True
        )
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                found[f"the gradient of {name}"] = (name in self.said.row_args, grad)
        return found

    def _arguments(self, operands: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the operator is given, and those of it that get gradients."""
        given, leaves = dict(self.given), {}
        for name, x in self.given.items():
            if isinstance(x, Tensor):
                given[name] = operands[name] if name in operands else x.detach()
                if x.requires_grad and x.is_floating_point():
                    given[name] = leaves[name] = given[name].clone().requires_grad_()
        return given, leaves

    def _at(self, x: Tensor, at: slice) -> Tensor:
        return x[(slice(None),) * (self.lead - 1) + (at,)]

    def others_do_not_matter(self) -> None:
        half = self.count // 2
        changed = {
            name: torch.cat(
                [self._at(x, slice(half)), self._changed(self._at(x, slice(half, None)))], self.lead - 1
            )
            for name, x in self.operands.items()
        }
        found = self._run(changed)
        for name, (is_rows, x) in self.whole.items():
            if is_rows:
                before, after = (self._at(each, slice(half)) for each in (x, found[name][1]))
                if not torch.equal(before, after) and _differ(before, after):
                    raise ValueError(
                        f"{self.operator} is not row-wise: {name} of some rows changes with other rows"
                    )

    @staticmethod
    def _changed(x: Tensor) -> Tensor:
        return x.flip(-1) * _FACTOR if x.is_floating_point() else x.flip(-1)

    def chunks_are_alike(self) -> None:
        third = max(1, self.count // 3)
        parts = [
            self._run({name: self._at(x, at) for name, x in self.operands.items()}, at)
            for at in (slice(third), slice(third, None))
        ]
        for name, (is_rows, x) in self.whole.items():
            of_parts = [part[name][1] for part in parts]
            joined = torch.cat(of_parts, self.lead - 1) if is_rows else of_parts[0] + of_parts[1]
            if joined.shape != x.shape:
                raise ValueError(
                    f"{self.operator} is not row-wise: {name} is {tuple(joined.shape)} in chunks, and {tuple(x.shape)} of all rows"
                )
            if _differ(x, joined):
                raise ValueError(f"{self.operator} is not row-wise: {name} is something else in chunks")


def _random_like(x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def _differ(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return not torch.equal(x, y)
    eps = torch.finfo(x.dtype).eps
    x, y = x.double(), y.double()
    return not bool((x - y).abs().max() <= _EPS * eps * x.abs().max())
