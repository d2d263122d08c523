"""Runs rewritten graphs as they are, without an outer compiler: fast, and close to what the passes did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mst_fx
from tests.helpers import relative_error

DIRECT = {"inner": "aot_eager", "chunk_rows": 7, "vocab_chunk_rows": 9}


def rewritten(fn: Any, options: dict[str, Any] | None = None) -> tuple[Callable[..., Any], mst_fx.Report]:
    """``fn`` under Dynamo with its graphs rewritten, and the report, which fills when it runs."""
    total = mst_fx.Report()

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        new, report = mst_fx.rewrite(gm, example_inputs, {**DIRECT, **(options or {})})
        total.add(report)
        return new

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend), total


def results(run: Callable[..., Any], args: Sequence[Any], module: nn.Module | None = None) -> list[Tensor]:
    """The outputs, then the gradients of a weighted sum of them: arguments' first, then parameters'."""
    leaves = [x for x in tree_leaves(list(args)) if isinstance(x, Tensor) and x.requires_grad]
    leaves += [p for p in (module.parameters() if module is not None else ()) if p.requires_grad]
    outputs = [out for out in tree_leaves(run(*args)) if isinstance(out, Tensor)]
    total: Any = 0
    for out in outputs:
        if out.requires_grad:
            weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape) if out.ndim else 1.0
            total = total + (out * weights).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if isinstance(total, Tensor) else ()
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=False)]
    return [out.detach() for out in outputs] + zeros


def worst(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error; what is 0 but for rounding is held against the largest."""
    assert [x.shape for x in found] == [x.shape for x in truth]
    assert [x.dtype for x in found] == [x.dtype for x in truth]
    if not truth:
        return 0.0
    largest = max(float(x.double().nan_to_num().norm()) for x in truth)
    errors = []
    for f, t in zip(found, truth, strict=True):
        norm = float(t.double().nan_to_num().norm())
        errors.append(relative_error(f, t) * (norm / largest if 0 < norm < 1e-9 * largest else 1.0))
    return max(errors)


def check(
    fn: Any,
    args: Sequence[Any],
    bar: float = 1e-9,
    options: dict[str, Any] | None = None,
    module: nn.Module | None = None,
) -> mst_fx.Report:
    """Outputs and gradients of the rewritten ``fn`` are eager's; returns what was done to it."""
    module = fn if isinstance(fn, nn.Module) else module
    truth = results(fn, args, module)
    run, report = rewritten(fn, options)
    assert worst(results(run, args, module), truth) <= bar
    return report
