"""The stages that run on the joint graph of forward and backward pass: where it is known what is kept between the two.

A stage gets a :class:`JointContext`. One that fails, or makes a graph that is not well-formed, leaves the graph as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from mst_fx.errors import defect
from mst_fx.options import Options
from mst_fx.stage import Stage
from mst_fx.torch_api import joint, trace
from mst_fx.version import __version__


@dataclasses.dataclass
class JointContext:
    """One stage over one joint graph.

    Attributes:
        graph: ATen operators, functional; its outputs are those of the forward pass, then the gradients. It is changed in
            place.
        options: the user's.
    """

    graph: fx.Graph
    options: Options


def hooked(stages: Sequence[Stage], options: Options) -> contextlib.AbstractContextManager[None]:
    """The joint graphs that are compiled inside of the block go through the stages; without any, nothing is hooked in."""
    if not stages:
        return contextlib.nullcontext()
    change = functools.partial(_run, stages, options)
    return joint.changed_joint_graphs(change, _key(stages, options), options.inner)


def _run(stages: Sequence[Stage], options: Options, graph: fx.Graph) -> None:
    if not joint.has_backward(graph):
        return
    for stage in stages:
        backup = joint.copied(graph)
        try:
            if stage.run(JointContext(graph, options)) is not False:
                graph.lint()
                if graph.owning_module is not None:
                    trace.write(f"mst_fx_after_{stage.name}", lambda: str(graph))
        except Exception as error:
            if options.strict:
                raise
            joint.restore(graph, backup)
            defect(f"skipped the {stage.name} pass for a graph", error)


def _key(stages: Sequence[Stage], options: Options) -> str:
    """What a compiled graph depends on: our version, the options, the stages and the text of the files they are in."""
    found = hashlib.sha256(repr((__version__, options, [stage.name for stage in stages])).encode())
    for stage in stages:
        found.update(Path(inspect.getfile(stage.run)).read_bytes())
    return found.hexdigest()
