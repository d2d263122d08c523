"""The stages that run on the joint graph of forward and backward pass: where it is known what is kept between the two.

A stage gets a :class:`~mst_fx.context.JointContext`. One that fails, or makes a graph that is not well-formed, leaves the graph as it was,
or raises, if it is vital.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from mst_fx.bodies.write_out import write_out
from mst_fx.context import JointContext
from mst_fx.errors import BudgetError, Refusal, defect
from mst_fx.graph.values import is_parameter, value
from mst_fx.listeners import on_plan
from mst_fx.options import Options
from mst_fx.report import MemoryPlan, Refused
from mst_fx.stage import Stage
from mst_fx.torch_api import joint, trace
from mst_fx.version import __version__

log = logging.getLogger("mst_fx")


def hooked(
    stages: Sequence[Stage], options: Options, gm: fx.GraphModule, are_alike: bool = True
) -> contextlib.AbstractContextManager[None]:
    """The joint graphs that are compiled inside of the block go through the stages that are wanted.

    Inductor's caches then tell what was compiled with these options from what was with others.

    Args:
        gm: the captured graph, rewritten.
        are_alike: as of :class:`~mst_fx.context.JointContext`.
    """
    stages = [stage for stage in stages if stage.wanted is None or stage.wanted(options, gm)]
    if not stages and options.inner != "inductor":
        return contextlib.nullcontext()
    change = functools.partial(_run, stages, options, gm.graph.find_nodes(op="placeholder"), are_alike)
    is_cacheable = all(stage.is_cacheable for stage in stages)
    return joint.changed_joint_graphs(change, _key(stages, options, are_alike), options.inner, is_cacheable)


def _run(
    stages: Sequence[Stage], options: Options, given: Sequence[fx.Node], are_alike: bool, graph: fx.Graph
) -> None:
    if not joint.has_backward(graph):
        return
    if options.memory is not None:
        _write_out(graph, options)
    parameters = tuple(at for at, node in enumerate(given) if is_parameter(value(node)))
    for stage in stages:
        back = None if options.strict or stage.is_vital else joint.way_back(graph)
        try:
            context = JointContext(
                graph, options, _tell, len(given), parameters, are_alike, is_told=on_plan.is_heard
            )
            if stage.run(context) is not False:
                graph.lint()
                if graph.owning_module is not None:
                    trace.write(f"mst_fx_after_{stage.name}", lambda: str(graph))
        except BudgetError:
            raise
        except Refusal as refusal:
            if back is None:
                raise
            back()
            log.warning("mst-fx: no %s plan for a graph: %s", stage.name, refusal)
            on_plan.tell(Refused(stage.name, "", str(refusal), refusal.cause))
        except Exception as error:
            if back is None:
                raise
            back()
            defect(f"skipped the {stage.name} pass for a graph", error)


def _write_out(graph: fx.Graph, options: Options) -> None:
    """Writes layers that were traced once out again, for the plan. (Checkpointed ones of a program without a plan stay operators.)"""
    back = joint.way_back(graph)
    try:
        write_out(graph)
    except Exception as error:
        if options.strict or options.group is not None:
            raise
        back()
        defect("plans nothing inside of layers that were traced once", error)


def _tell(plan: MemoryPlan) -> None:
    log.info("%s", plan)
    on_plan.tell(plan)


def _key(stages: Sequence[Stage], options: Options, are_alike: bool) -> str:
    """What a compiled graph depends on: our version, the options, the stages and the text of the files they are in."""
    names = [stage.name for stage in stages]
    known = (__version__, options, options.group, options.averaged_over, names, are_alike)
    found = hashlib.sha256(repr(known).encode())
    for stage in stages:
        found.update(Path(inspect.getfile(stage.run)).read_bytes())
    return found.hexdigest()
