"""Runs stages over a program: copies, verifies, times, dumps, catches; a stage does nothing of that itself.

A stage works on a copy, which takes the place of the graph if it fired and whose graph is as the spec says
(:mod:`mst_fx.graph.verify`). A refusal or a defect leaves the graph as it was, and is in the report. ``TORCH_TRACE`` has the
graph before and after each stage that fired (``mst_fx_before_mlp``, …), for tlparse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from mst_fx.bodies.body import BodyConfig
from mst_fx.context import PassContext, Shared
from mst_fx.errors import Cause, GroupError, Refusal, defect
from mst_fx.graph import verify
from mst_fx.graph.edit import copy_graph, copy_tree, drop_unused_subgraphs, eliminate_dead_code
from mst_fx.graph.modes import outside_transforms
from mst_fx.graph.sizes import hint, is_known
from mst_fx.graph.subgraphs import function_graphs, graphs_of, is_function, subgraphs
from mst_fx.graph.values import tensors_of
from mst_fx.options import PASS_NAMES, Options
from mst_fx.report import Refused, Report
from mst_fx.stage import Scope, Stage
from mst_fx.torch_api import trace

log = logging.getLogger("mst_fx")


@dataclasses.dataclass
class Runner:
    """Runs stages over one program.

    Attributes:
        stages: in order; those of :attr:`mst_fx.options.Options.passes` run where the user wants them.
        report: gets what they did.
        ending: where Dynamo ended the graph, in words.
    """

    stages: Sequence[Stage]
    options: Options
    config: BodyConfig
    example_inputs: Sequence[Any]
    report: Report
    shared: Shared
    ending: str = ""

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        """All stages; returns the new program.

        Args:
            gm: may be changed.

        Raises:
            Exception: any, of a stage that runs in place; with ``strict=True`` of any stage.
        """
        wanted = filter(self._is_wanted, self.stages)
        for scope, group in itertools.groupby(wanted, lambda stage: stage.scope):
            each = self._tree if scope is Scope.EACH_GRAPH else self._all
            gm = each(gm, list(group), True)
        return gm

    def _is_wanted(self, stage: Stage) -> bool:
        return stage.name not in PASS_NAMES or stage.name in self.options.passes

    def _tree(self, gm: fx.GraphModule, stages: list[Stage], is_top: bool) -> fx.GraphModule:
        """Stages over single graphs: those that a graph refers to, and then itself."""
        free = set(outside_transforms(gm.graph))
        inside = {operand.target for n in gm.graph.nodes if n not in free for operand in n.all_input_nodes}
        functions = function_graphs(gm)  # a region may take a Function as a whole: what is left comes after
        for name, child in subgraphs(gm):
            if name in inside or name in functions:  # all of a torch.func transform is inside of it
                continue
            gm.set_submodule(name, self._tree(child, stages, False))
        gm = self._all(gm, stages, is_top)
        functions = function_graphs(gm) - inside
        for name, child in list(subgraphs(gm)):
            if name in functions:
                known = len(self.report.refusals)
                gm.set_submodule(name, self._tree(child, stages, False))
                self.report.refusals[known:] = _of_function(gm, name, self.report.refusals[known:])
        return gm

    def _all(self, gm: fx.GraphModule, stages: list[Stage], is_top: bool) -> fx.GraphModule:
        """Stages over one graph, or over the program."""
        is_narrow = False
        for stage in stages:
            if stage.only_if_changed and not self.report.rewrites:
                continue
            context = PassContext(gm, self.options, self.config, is_top, self.shared, self.example_inputs)
            context.ending, context.is_narrow = self.ending, is_narrow
            with self._caught(stage):
                if stage.matches is None or stage.matches(context):
                    gm = self._one(gm, stage, context)
                    is_narrow = context.is_narrow
        return gm

    @contextlib.contextmanager
    def _caught(self, stage: Stage) -> Iterator[None]:
        """What fails inside costs one stage, and is in the report."""
        try:
            yield
        except GroupError:
            raise  # all ranks of the group do
        except Exception as error:
            if self.options.strict or stage.in_place or stage.is_vital:
                raise
            is_refusal = isinstance(error, Refusal)
            text = str(error) if is_refusal else defect(f"skipped the {stage.name} pass for a graph", error)
            cause = error.cause if isinstance(error, Refusal) else Cause.DEFECT
            self.report.refusals.append(Refused(stage.name, "", text, cause))

    def _one(self, gm: fx.GraphModule, stage: Stage, context: PassContext) -> fx.GraphModule:
        """One stage over one graph; returns the graph if nothing came of it."""
        start = time.perf_counter()
        seen = verify.seen(gm) if verify.is_on() else None
        with trace.graphs(stage.name, gm) as after:
            if not stage.in_place:
                context.gm = self._copied(gm, stage.scope)
            for helper in stage.prepared_by:
                helper.run(context)
            done = stage.run(context)
            for helper in stage.followed_by:
                helper.run(context)
            has_fired = bool(context.report.rewrites) if done is None else bool(done)
            if has_fired:
                self._settle(context.gm, seen)
                after(context.gm)
        self._note(stage, context, has_fired, time.perf_counter() - start)
        return context.gm if has_fired or stage.in_place else gm

    def _copied(self, gm: fx.GraphModule, scope: Scope) -> fx.GraphModule:
        is_tree = scope is Scope.PROGRAM
        new = copy_tree(gm) if is_tree else copy_graph(gm)
        for old_graph, graph in (
            zip(graphs_of(gm), graphs_of(new), strict=True) if is_tree else [(gm.graph, new.graph)]
        ):
            self.shared.copied(old_graph, graph)
        return new

    def _settle(self, gm: fx.GraphModule, seen: verify.Seen | None) -> None:
        """Makes a changed graph whole, and verifies it."""
        eliminate_dead_code(gm.graph)
        drop_unused_subgraphs(gm)
        gm.graph.lint()
        if seen is not None:
            changed = {*self.shared.deferred_positions, *self.shared.cut_outputs}
            verify.check(seen, gm, changed)
        gm.recompile()

    def _note(self, stage: Stage, context: PassContext, has_fired: bool, seconds: float) -> None:
        """Puts what a stage did and said into the report, and into what is known in common."""
        log.debug("stage %s: %d rewrites, %.3f s", stage.name, len(context.report.rewrites), seconds)
        context.report.stage_seconds[stage.name] = seconds
        self.report.add(context.report)
        if has_fired and context.deferred_outputs:
            outputs: Any = context.graph.output_node().args[0]
            self.shared.deferred_positions = [list(outputs).index(node) for node in context.deferred_outputs]
            self.shared.starts.update(context.starts)


def _of_function(gm: fx.GraphModule, name: str, found: list[Refused]) -> list[Refused]:
    """The refusals of a graph of a ``torch.autograd.Function``.

    What a Function gives goes on in the graph; why it is not taken as a whole was said there. Wide outputs of its
    forward graph that it does not give are those that it saves for its backward.
    """
    functions = [n for n in gm.graph.nodes if is_function(n)]
    forwards = [n for n in functions if str(n.args[0].target) == name]
    saves = any(_gives_less(node) for node in forwards)
    others: list[Refused] = []
    for refused in found:
        if refused.cause is Cause.IS_OUTPUT and saves:
            reason = "the wide result is saved by a torch.autograd.Function for its own backward"
            others.append(dataclasses.replace(refused, reason=reason, cause=Cause.OPAQUE))
        elif refused.cause is not Cause.IS_OUTPUT:
            others.append(refused)
    return others


def _gives_less(function: fx.Node) -> bool:
    """Whether nothing that a Function gives is wider than its rows, so that what is wide stays inside of it."""
    operands = [x for n in function.all_input_nodes for x in tensors_of(n)]
    most = max((hint(x.numel()) for x in operands if x.ndim and is_known(x.numel())), default=0)
    return all(is_known(x.numel()) and hint(x.numel()) <= most for x in tensors_of(function))
