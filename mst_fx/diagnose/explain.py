"""``mst_fx.explain``: what the backend would do to a function, like ``torch._dynamo.explain``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.compiling import mst
from mst_fx.diagnose.findings import Diagnosis
from mst_fx.diagnose.warn import silent
from mst_fx.diagnose.watch import LastAttempts, watch
from mst_fx.errors import Refusal
from mst_fx.fit.traced import NoBackward, joint_graph_of
from mst_fx.graph.edit import copy_tree
from mst_fx.options import Options, make_options
from mst_fx.passes.mask_breaks import cross_masks
from mst_fx.pipeline import run_passes
from mst_fx.plan.timeline import timeline_of, with_most_kept
from mst_fx.report import Timeline
from mst_fx.torch_api.inductor import compile_graph


def explain(
    fn: Callable[..., Any], options: Mapping[str, Any] | Options | None = None
) -> Callable[..., Diagnosis]:
    """Says what ``torch.compile(fn, backend="mst", options=options)`` rewrites.

    Args:
        fn: a function or module; it is run once, un-compiled, on the arguments of the returned function.

    Returns:
        A function of the arguments of ``fn`` that returns a report over all graphs that Dynamo captures, with its
        findings (:class:`~mst_fx.diagnose.findings.Diagnosis`).

    Raises:
        OptionError: for bad options.
    """
    checked = make_options(options)

    captured: LastAttempts[Timeline] = LastAttempts()

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if checked.memory is not None:  # what is planned is the graph of both passes, as rewritten
            with contextlib.suppress(
                Refusal, NoBackward
            ):  # a graph without layers, or of inference, has no timeline
                graph = joint_graph_of(copy_tree(gm), example_inputs, "aot_eager")
                captured.add(timeline_of(with_most_kept(graph)))
            return mst(gm, example_inputs, options=dataclasses.replace(checked, inner="aot_eager"))
        crossing = cross_masks(gm, example_inputs, checked)
        run_passes(gm, crossing.inputs, checked, crossing=crossing)
        # Runs as captured, but for masks that later graphs get: the inner compiler is not what is asked about.
        compiled = compile_graph(crossing.gm, crossing.inputs, "aot_eager", {})
        return crossing.open_masks(crossing.put_masks(compiled, False))

    def run(*args: Any, **kwargs: Any) -> Diagnosis:
        torch.compiler.reset()
        with watch() as report, silent():
            torch.compile(fn, backend=compiler)(*args, **kwargs)
        torch.compiler.reset()
        report.captured += captured
        return report

    return run
