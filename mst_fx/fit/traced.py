"""A step under mst-fx, from the joint graph of few layers: traced by Dynamo, rewritten by the passes, with chunks as on a GPU, and no further.

The model is made of memory that is never written to or read, so that nothing of it is there but its sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mst_fx.bodies.body import Body
from mst_fx.chunk_rows import as_on
from mst_fx.errors import BudgetError
from mst_fx.fit.parts import Parts, Whole, outputs_of, parts_with, together
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.options import Options
from mst_fx.passes.mask_breaks import cross_masks
from mst_fx.passes.memory_plan import fastest, host_beside
from mst_fx.pipeline import run_passes
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.joint_graph import JointGraph, bytes_of, storages
from mst_fx.plan.layers import layers_of
from mst_fx.plan.room import Room
from mst_fx.torch_api.dynamo import BackendCompilerFailed, settle_floats
from mst_fx.torch_api.gpu_attention import GpuAttention
from mst_fx.torch_api.inductor import compile_graph
from mst_fx.torch_api.joint import changed_joint_graphs, copied, has_backward, must_save


class CannotTell(ValueError):
    """Of this model nothing can be said; the message is one sentence."""


class NoBackward(CannotTell):
    """Nothing needs a gradient."""


class _Traced(Exception):
    """Ends a compilation: what was wanted is there."""


def joint_graph_of(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str) -> fx.Graph:
    """The joint graph of a Dynamo graph as ``inner`` would get it; nothing is compiled.

    Args:
        inner: "inductor" or "aot_eager".

    Raises:
        NoBackward: if there is none.
    """
    found: list[fx.Graph] = []

    def keep(graph: fx.Graph) -> None:
        if has_backward(graph):
            found.append(copied(graph))
            raise _Traced

    with contextlib.suppress(_Traced), changed_joint_graphs(keep, "fit", inner):
        compile_graph(gm, example_inputs, inner, {})
    if not found:
        raise NoBackward("the model has no backward pass")
    return found[0]


def trace(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[fx.Graph, tuple[Body, ...]]:
    """The joint graph of a step under mst-fx as Inductor would get it, and the bodies that it names.

    Args:
        model: on ``meta``, in training mode; moved to the CPU, but never to its memory.
        inputs: on ``meta``.

    Raises:
        CannotTell: if Dynamo does not make one graph of it, or nothing needs a gradient.
    """
    model.to_empty(device="cpu")
    arguments = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in inputs.items()}
    graphs: list[fx.Graph] = []
    bodies: list[Body] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        options = Options()
        settle_floats(graphs_of(gm))
        crossing = cross_masks(gm, example_inputs, options)
        result = run_passes(gm, crossing.inputs, options, None, crossing)
        bodies.extend(result.bodies)
        with GpuAttention():
            graphs.append(joint_graph_of(result.gm, crossing.inputs, "inductor"))
        raise _Traced

    torch.compiler.reset()
    try:
        with as_on("cuda"):
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**arguments)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Traced):
            raise error.inner_exception from None
    finally:
        torch.compiler.reset()
    return graphs[0], tuple(bodies)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan for all layers.

    Attributes:
        whole: what it takes.
        again: how many layers make what again, in words, the layers that keep least first.
        kept: bytes that each of them keeps.
    """

    whole: Whole
    again: tuple[tuple[int, str, int], ...]


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step of one length.

    Attributes:
        known: the parts of the traced layers, by the number of the choice that they take.
        choices: of each traced layer.
        stands_for: which traced layer each layer of the model is like.
        outputs: bytes of what the forward pass returns beside its losses: a plan expects that somebody holds it.
    """

    known: tuple[Parts, ...]
    choices: tuple[tuple[Choice, ...], ...]
    stands_for: tuple[int, ...]
    outputs: int

    def every(self, choice: int) -> Whole:
        """What a step takes all of whose layers take one choice: of 0 each is checkpointed."""
        return self._with([choice] * len(self.stands_for))

    def plan(self, room: Room) -> Planned | None:
        """The fastest that fits, as :mod:`mst_fx.passes.memory_plan` finds it; None if none does.

        Args:
            room: of which inputs, parameters and states are taken.
        """
        of_all = [self.choices[like] for like in self.stands_for]
        host = host_beside(of_all, room, 0)
        try:
            taken, _ = fastest(of_all, room, host, lambda trial: self._with(trial).peak + self.outputs)
        except BudgetError:
            return None
        return Planned(self._with(taken), self._said(taken))

    def _with(self, taken: Sequence[int]) -> Whole:
        return together(self.known, self.stands_for, taken)

    def _said(self, taken: Sequence[int]) -> tuple[tuple[int, str, int], ...]:
        chosen = [self.choices[like][index] for like, index in zip(self.stands_for, taken, strict=True)]
        words = [(str(choice), choice.bytes) for choice in chosen]
        return tuple((words.count(each), *each) for each in sorted(dict.fromkeys(words), key=lambda w: w[1]))


def traced_step(
    model: nn.Module, inputs: Mapping[str, Tensor], traced: int, stands_for: Sequence[int]
) -> TracedStep:
    """A step of a model, from few of its layers.

    Args:
        model: of ``traced`` layers, on ``meta``.
        stands_for: which of these each layer of the whole model is like.

    Raises:
        CannotTell: if the layers are not found in the graph.
    """
    graph, bodies = trace(model, inputs)
    joint = JointGraph(graph)
    found = layers_of(joint)
    layers = found[:-1]
    if len(layers) != traced:
        raise CannotTell(f"{len(layers)} layers were found in the graph of a model of {traced}")
    wanted = {node for node in joint.forward if must_save(node)} | joint.reads_written
    choices = [choices_of(layer, wanted) for layer in layers]
    most = max(map(len, choices))
    known = [
        parts_with(graph, [those[min(number, len(those) - 1)] for those in choices], found[-1].start)
        for number in range(most)
    ]
    del bodies  # named by the graph up to here
    outputs = sum(bytes_of(node) for node in storages(outputs_of(joint)))
    return TracedStep(tuple(known), tuple(map(tuple, choices)), tuple(stands_for), outputs)
