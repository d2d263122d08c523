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
from mst_fx.logits.source import RowsOfRank as RowsOfRank
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
class TakenLogits:
    """How the caller of a rewritten graph gets one of its outputs.

    Attributes:
        position: of the output.
        module: where attributes are found.
        compute: the graph of the logits, a function of ``inputs``.
        inputs: where they are found.
        holds_rows: for each input whether it holds the logits' rows; None where they are not proved
            independent of each other.
        shape: ints, or ("output", index, dim): the size of an output's dimension.
        dtype, device: of the logits.
        of_rank: which rows of the logits the inputs have; None: all.
    """

    position: int
    module: torch.nn.Module
    compute: fx.GraphModule
    inputs: tuple[Origin, ...]
    holds_rows: tuple[bool, ...] | None
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    of_rank: RowsOfRank | None = None


def put_logits(
    function: Callable[..., Any], taken_logits: Sequence[TakenLogits], outputs: int
) -> Callable[..., Any]:
    """Wraps a compiled graph: puts deferred logits in place and drops the extra outputs.

    Args:
        outputs: how many outputs the graph had before the rewrite.
    """
    if not taken_logits:
        return function

    def run(*args: Any) -> Any:
        # Dynamo may hand over its list of arguments to be emptied: hold on to what the logits need.
        arguments = arguments_of(taken_logits, args)
        return with_logits(function(*args), arguments, taken_logits, outputs)

    return run


def arguments_of(taken_logits: Sequence[TakenLogits], args: Sequence[Any]) -> list[dict[int | str, Any]]:
    """The arguments of a rewritten graph that each of its logits needs, by their index."""
    return [{x.index: args[int(x.index)] for x in d.inputs if x.kind == "argument"} for d in taken_logits]


def with_logits(
    results: Sequence[Any],
    all_arguments: Sequence[dict[int | str, Any]],
    taken_logits: Sequence[TakenLogits],
    outputs: int,
) -> tuple[Any, ...]:
    """The outputs of a graph with deferred logits in place.

    Args:
        results: of the rewritten graph.
        all_arguments: see :func:`arguments_of`.
        outputs: how many outputs the graph had before the rewrite.
    """
    new = list(results[:outputs])
    exposed = set(range(outputs)) - {logits.position for logits in taken_logits}
    entered: dict[int, Tensor] = {}  # rows by their port

    def found(origin: Origin, logits: TakenLogits, arguments: dict[int | str, Any]) -> Any:
        if origin.kind == "attribute":
            return attribute(logits.module, str(origin.index))
        if origin.kind == "argument":
            return arguments[origin.index]
        hidden = results[int(origin.index)]
        if origin.port < 0:
            return hidden
        if origin.port not in entered:
            entered[origin.port] = enter_at_port(results[origin.port], hidden)
        return entered[origin.port]

    for logits, arguments in zip(taken_logits, all_arguments, strict=True):
        inputs = [found(origin, logits, arguments) for origin in logits.inputs]
        shape = [size if isinstance(size, int) else results[size[1]].shape[size[2]] for size in logits.shape]
        is_exposed = [origin.kind != "output" or origin.index in exposed for origin in logits.inputs]
        new[logits.position] = _for_caller(logits, inputs, shape, is_exposed)
    return tuple(new)


def _for_caller(
    logits: TakenLogits, inputs: Sequence[Any], shape: Sequence[int], is_exposed: Sequence[bool]
) -> Tensor:
    unknown = [isinstance(x, Tensor) and x.is_inference() for x in inputs]
    if any(u and exposed for u, exposed in zip(unknown, is_exposed, strict=True)):
        return logits.compute(*inputs)  # type: ignore[no-any-return]  # the caller can change them unseen
    like = torch.empty(shape, dtype=logits.dtype, device="meta")
    rows = (logits.holds_rows, like, logits.device, is_exposed, logits.of_rank)
    return deferred_logits(Source(logits.compute, inputs, *rows))
