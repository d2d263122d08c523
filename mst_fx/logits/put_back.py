"""How deferred logits come into the place of an output of a compiled graph.

:mod:`mst_fx.logits.take_out` finds the outputs, and says where the inputs of their logits are found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.graph.subgraphs import attribute
from mst_fx.logits.source import Source
from mst_fx.logits.tensor import deferred_logits
from mst_fx.ops.port import enter_at_port


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an input of the logits' graph is found.

    Attributes:
        kind: "output" of the rewritten graph, "argument", or "attribute".
        index: which one; of attributes, their name.
        port: which output is the port that its gradient goes by (see :mod:`mst_fx.ops.port`); -1: none.
    """

    kind: str
    index: int | str
    port: int = -1


@dataclasses.dataclass(frozen=True)
class Deferral:
    """How the caller of a rewritten graph gets one of its outputs.

    Attributes:
        position: of the output.
        module: where attributes are found.
        compute: the graph of the logits, a function of ``inputs``.
        inputs: where they are found.
        rows: for each input whether it holds the logits' rows; None where they are not proved
            independent of each other.
        shape: ints, or ("output", index, dim): the size of an output's dimension.
        dtype, device: of the logits.
    """

    position: int
    module: torch.nn.Module
    compute: fx.GraphModule
    inputs: tuple[Origin, ...]
    rows: tuple[bool, ...] | None
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def deferring(
    function: Callable[..., Any], deferrals: Sequence[Deferral], outputs: int
) -> Callable[..., Any]:
    """Wraps a compiled graph: puts deferred logits in place and drops the extra outputs.

    Args:
        outputs: how many outputs the graph had before the rewrite.
    """
    if not deferrals:
        return function

    def run(*args: Any) -> Any:
        # Dynamo may hand over its list of arguments to be emptied: keep what the logits need.
        kept = arguments_of(deferrals, args)
        return defer_outputs(function(*args), kept, deferrals, outputs)

    return run


def arguments_of(deferrals: Sequence[Deferral], args: Sequence[Any]) -> list[dict[int | str, Any]]:
    """The arguments of a rewritten graph that each of its logits needs, by their index."""
    return [{x.index: args[int(x.index)] for x in d.inputs if x.kind == "argument"} for d in deferrals]


def defer_outputs(
    results: Sequence[Any], kept: Sequence[dict[int | str, Any]], deferrals: Sequence[Deferral], outputs: int
) -> tuple[Any, ...]:
    """The outputs of a graph with deferred logits in place.

    Args:
        results: of the rewritten graph.
        kept: see :func:`arguments_of`.
        outputs: how many outputs the graph had before the rewrite.
    """
    new = list(results[:outputs])
    exposed = set(range(outputs)) - {deferral.position for deferral in deferrals}
    entered: dict[int, Tensor] = {}  # rows by their port

    def found(origin: Origin, deferral: Deferral, arguments: dict[int | str, Any]) -> Any:
        if origin.kind == "attribute":
            return attribute(deferral.module, str(origin.index))
        if origin.kind == "argument":
            return arguments[origin.index]
        rows = results[int(origin.index)]
        if origin.port < 0:
            return rows
        if origin.port not in entered:
            entered[origin.port] = enter_at_port(results[origin.port], rows)
        return entered[origin.port]

    for deferral, arguments in zip(deferrals, kept, strict=True):
        inputs = [found(origin, deferral, arguments) for origin in deferral.inputs]
        shape = [
            size if isinstance(size, int) else results[size[1]].shape[size[2]] for size in deferral.shape
        ]
        is_exposed = [origin.kind != "output" or origin.index in exposed for origin in deferral.inputs]
        new[deferral.position] = _deferred(deferral, inputs, shape, is_exposed)
    return tuple(new)


def _deferred(
    deferral: Deferral, inputs: Sequence[Any], shape: Sequence[int], is_exposed: Sequence[bool]
) -> Tensor:
    unknown = [isinstance(x, Tensor) and x.is_inference() for x in inputs]
    if any(u and exposed for u, exposed in zip(unknown, is_exposed, strict=True)):
        return deferral.compute(*inputs)  # type: ignore[no-any-return]  # the caller can change them unseen
    like = torch.empty(shape, dtype=deferral.dtype, device="meta")
    return deferred_logits(Source(deferral.compute, inputs, deferral.rows, like, deferral.device, is_exposed))
