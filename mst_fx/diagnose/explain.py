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


def explain(fn: Callable[..., Any], options: Mapping[str, Any] | Options | None = None) -> Explain:
    """Says what ``torch.compile(fn, backend="mst", options=options)`` rewrites.

    Args:
        fn: a function or module; it is run once, un-compiled, on the arguments of what is returned.
        options: as of ``torch.compile(..., backend="mst", options=...)``.

    Returns:
        To be called with the arguments of ``fn``: gives a report over all graphs that Dynamo captures, with its
        findings (:class:`~mst_fx.diagnose.findings.Diagnosis`).

    Raises:
        OptionError: for bad options.
    """
    return Explain(fn, make_options(options))


@dataclasses.dataclass(frozen=True, repr=False)
class Explain:
    """What :func:`explain` returns."""

    fn: Callable[..., Any]
    options: Options

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return f"<mst_fx.explain of {name}: call it with the arguments of {name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Diagnosis:
        captured: LastAttempts[Timeline] = LastAttempts()

        def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            if self.options.memory is not None:
                _note_capture(gm, example_inputs, captured)
                return mst(gm, example_inputs, options=dataclasses.replace(self.options, inner="aot_eager"))
            crossing = cross_masks(gm, example_inputs, self.options)
            run_passes(gm, crossing.inputs, self.options, crossing=crossing)
            # Runs as captured, but for masks that later graphs get: the inner compiler is not what is asked about.
            compiled = compile_graph(crossing.gm, crossing.inputs, "aot_eager", {})
            return crossing.open_masks(crossing.put_masks(compiled, False))

        torch.compiler.reset()
        with watch() as report, silent():
            torch.compile(self.fn, backend=compiler)(*args, **kwargs)
        torch.compiler.reset()
        report.captured += captured
        return report


def _note_capture(
    gm: fx.GraphModule, example_inputs: Sequence[Any], captured: LastAttempts[Timeline]
) -> None:
    """What is planned is the graph of both passes, as rewritten; this is the one without mst-fx."""
    with contextlib.suppress(Refusal, NoBackward):  # a graph without layers, or of inference, has no timeline
        graph = joint_graph_of(copy_tree(gm), example_inputs, "aot_eager")
        captured.add(timeline_of(with_most_kept(graph)))
