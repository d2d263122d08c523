"""The proof of the gradient of an operator that was declared row-wise.

Nobody said anything of it: the backward that the operator has in autograd runs on folded rows, under the rules. Rows must get rows, and what they
share a sum over rows, as with a ``torch.autograd.Function`` (:mod:`mst_fx.rows.function`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mst_fx.errors import Refusal
from mst_fx.graph.sizes import expression
from mst_fx.rows.fold import Folder, check_guards
from mst_fx.rows.labels import SUMMED, Call, Label, Row, is_same_size, tensors
from mst_fx.rows.tracer import GradientTracer, RowTracer
from mst_fx.torch_api.symbols import SYMBOLIC
from mst_fx.torch_api.tensors import tree_map_only


def prove_gradient(
    call: Call,
    folder: Folder,
    of_rows: bool,
    of_shared: bool,
    tracer_of: Callable[[torch.SymInt], SeesNoNumbers] | None = None,
) -> None:
    """Proves that gradients of chunks are gradients of all rows.

    Args:
        call: a call of a declared operator, on folded rows; or on tokens, as that tracer labels them.
        folder: for this proof alone.
        of_rows, of_shared: whether the tensors with rows, and those without, need gradients.
        tracer_of: makes one for so many rows, that sees no numbers (:class:`SeesNoNumbers`); None: of folded rows.

    Raises:
        Refusal: names the operator of the backward that is not row-wise.
    """
    if not (of_rows or of_shared):
        return
    try:
        tracer = (tracer_of or FoldedGradients)(folder.n)
        _run(call, folder, of_rows, of_shared, tracer)
        check_guards(folder)
    except Refusal as refusal:
        raise Refusal(f"in the gradient of {call.func}: {refusal}", refusal.cause) from None
    except Exception as error:
        message = [*str(error).strip().splitlines(), repr(error)][0]
        raise Refusal(f"the gradient of {call.func} does not run on folded rows: {message}") from None


def _run(call: Call, folder: Folder, of_rows: bool, of_shared: bool, tracer: SeesNoNumbers) -> None:
    leaves: list[torch.Tensor] = []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        label = call.label(x)
        needed = x.is_floating_point() and (of_shared if label is None else of_rows)
        if label is None:
            new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        else:
            new = torch.empty(_sizes(x, call, folder), dtype=x.dtype, device=x.device)
        new.requires_grad_(needed)
        tracer.set_label(new, label)
        tracer.protect(new)
        leaves.extend([new] * needed)
        return new

    with folder.mode, torch.enable_grad():
        args, kwargs = tree_map_only(torch.Tensor, leaf, (call.args, call.kwargs))
        with tracer:
            found = tensors(call.func(*args, **kwargs))
        outs = [x for x in found if x.requires_grad]
        if not outs or not leaves:
            return
        tangents = [torch.empty_like(x) for x in outs]
        for out, tangent in zip(outs, tangents, strict=True):
            label = tracer.label(out)
            tracer.set_label(tangent, label if isinstance(label, Row) else None)
            tracer.protect(tangent)
            tracer.note_tangent(tangent)
        with tracer:
            grads = torch.autograd.grad(outs, leaves, tangents, allow_unused=True)
    for x, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            _check(tracer.label(x), x, tracer.label(grad), grad)


class SeesNoNumbers(RowTracer):
    """Refuses what computes with the number of rows: a backward is Python that is run on each chunk, and would see the chunk's."""

    def note_tangent(self, tangent: torch.Tensor) -> None:
        """Is told of each gradient that arrives."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        numbers = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, SYMBOLIC)]
        if numbers:
            raise Refusal(f"{func} is given the number of rows")
        return super().__torch_dispatch__(func, types, args, kwargs)


class FoldedGradients(SeesNoNumbers, GradientTracer):
    """A backward on folded rows."""

    def __init__(self, rows: torch.SymInt) -> None:
        super().__init__(rows, takes_declared=True)


def _sizes(x: torch.Tensor, call: Call, folder: Folder) -> list[Any]:
    rows = expression(call.tracer.rows)
    return [
        int(expression(size) / rows) * folder.n if call.tracer.is_rows(size) else int(size)
        for size in x.shape
    ]


def _check(label: Label, x: torch.Tensor, found: Label, grad: torch.Tensor) -> None:
    wanted = SUMMED if label is None else label
    what = "a sum over rows" if label is None else "rows"
    if found != wanted or x.ndim != grad.ndim or not all(map(is_same_size, x.shape, grad.shape)):
        raise Refusal(f"the gradient of {tuple(x.shape)} is not {what}")
