"""What ``torch.compile(model, backend="mst")`` calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from mst_fx.bodies.body import with_bodies_alive
from mst_fx.equal_layers import fold_equal_layers
from mst_fx.equal_stretches import fold_equal_stretches
from mst_fx.errors import OptionError
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.joint import hooked
from mst_fx.logits.put_back import put_logits
from mst_fx.options import Options, make_options
from mst_fx.passes import overlap
from mst_fx.passes.mask_breaks import cross_masks
from mst_fx.pipeline import JOINT_STAGES, Result, run_passes
from mst_fx.process import Said, only_new_garbage
from mst_fx.ranks.faults import MEMBERS, guarded
from mst_fx.repeated_parts import repeated_parts, why_none
from mst_fx.switch import NAME, is_off
from mst_fx.together import compile_together, run_together, with_same_batches
from mst_fx.torch_api.dynamo import settle_floats
from mst_fx.torch_api.inductor import (
    AS_ORDERED,
    compile_graph,
    compile_plainly,
    mode_patches,
    unknown_patches,
)

log = logging.getLogger("mst_fx")

_SAID = Said()


def mst(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrites a graph that Dynamo captured and compiles it.

    Found through the entry point group ``torch_dynamo_backends``; no import is needed. Under ``MST_FX=0`` the graph goes to
    ``inner`` as it is.

    Args:
        gm, example_inputs: from Dynamo.
        options: see :class:`~mst_fx.options.Options`.
        mode: as of ``torch.compile``, passed on to Inductor; or as the option ``mode`` says.

    Raises:
        OptionError: for bad options.
        Refusal: with ``strict=True``, for the first refusal.
        GroupError: with ``sequence_parallel``, on all ranks of the group, where they cannot work on one sequence.
    """
    checked = make_options(options)
    mode = mode or checked.mode
    as_ordered = AS_ORDERED if overlap.is_wanted(checked, gm) else {}
    patches = {**as_ordered, **mode_patches(mode), **checked.inductor}
    _check_patches(patches)
    if is_off():
        if _SAID.is_new("off"):
            log.warning("%s=0: nothing is rewritten, graphs go to %s as they are", NAME, checked.inner)
        return compile_plainly(gm, example_inputs, checked.inner, patches)
    with _timed(gm), only_new_garbage():
        return _compiled(gm, example_inputs, checked, mode, patches)


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    checked: Options,
    mode: str | None,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    if checked.inner != "eager":
        settle_floats(graphs_of(gm))
    crossing = cross_masks(gm, example_inputs, checked)
    group = checked.group

    def passed(options: Options = checked) -> Result:
        return run_passes(gm, crossing.inputs, options, mode, crossing)

    def compiled_graph() -> Callable[..., Any]:
        fold = fold_equal_layers if checked.memory is None else fold_equal_stretches
        folded, layers = fold(result.gm, checked, patches)
        with hooked(JOINT_STAGES, checked, result.gm, are_alike):
            compiled = compile_graph(folded, crossing.inputs, checked.inner, patches, layers, repetitions)
        return with_bodies_alive(compiled, (*result.bodies, *layers.values()))

    are_alike = True
    find = functools.partial(repeated_parts, strict=checked.strict)
    repetitions = None if why_none(checked, patches) else find
    if group is None:
        result = passed()
        compiled = compiled_graph()
    else:
        kept = dataclasses.replace(checked, logits="keep")
        with MEMBERS.of(group).waiting():
            result, are_alike = run_together(
                group, gm, checked, lambda may_take: passed(checked if may_take else kept)
            )
            compiled = with_same_batches(compile_together(group, compiled_graph), group, result.gm)
        compiled = guarded(compiled, group)
    compiled = crossing.put_masks(compiled, bool(result.taken_logits))
    outputs = crossing.outputs or result.outputs
    return crossing.open_masks(put_logits(compiled, result.taken_logits, outputs))


@contextlib.contextmanager
def _timed(gm: fx.GraphModule) -> Iterator[None]:
    """Says that a graph is compiled, which may take a minute, before it is and afterwards."""
    nodes = sum(node.op.startswith("call_") for graph in graphs_of(gm) for node in graph.nodes)
    log.info("compiling a graph of %s nodes …", f"{nodes:,}")
    start = time.perf_counter()
    yield
    log.info(
        "… compiled in %.1f s (the insides of loops come with the first step)", time.perf_counter() - start
    )


def _check_patches(patches: Mapping[str, Any]) -> None:
    for name, close in unknown_patches(patches).items():
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise OptionError(f"mst option 'inductor': torch._inductor.config has no {name!r}{hint}")
