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

from mst_fx import report
from mst_fx.bodies.body import Body
from mst_fx.chunk_rows import as_on
from mst_fx.errors import BudgetError
from mst_fx.fit.parts import Key, Parts, Whole, outputs_of, parts_with, together
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.options import Options
from mst_fx.passes.mask_breaks import cross_masks
from mst_fx.passes.memory_plan import planned_layers
from mst_fx.pipeline import run_passes
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.joint_graph import JointGraph, bytes_of, storages
from mst_fx.plan.layers import layers_of
from mst_fx.plan.room import Room
from mst_fx.plan.search import by_number, fastest, host_beside
from mst_fx.torch_api.dynamo import BackendCompilerFailed, settle_floats
from mst_fx.torch_api.gpu_attention import GpuAttention
from mst_fx.torch_api.inductor import compile_graph
from mst_fx.torch_api.joint import changed_joint_graphs, copied, has_backward


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
        layers: that do the same, the layers that keep least first.
        seconds: of copies to the host and back that nothing hides.
    """

    whole: Whole
    layers: tuple[report.Planned, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step of one length.

    Attributes:
        known: the parts of the traced layers, by what they keep.
        choices: of each traced layer, by the same: on the device, and then on the host.
        stands_for: which traced layer each layer of the model is like.
        outputs: bytes of what the forward pass returns beside its losses: a plan expects that somebody holds it.
        unplanned: the parts of the traced layers where each is checkpointed by the model itself.
    """

    known: Mapping[Key, Parts]
    choices: tuple[Mapping[Key, Choice], ...]
    stands_for: tuple[int, ...]
    outputs: int
    unplanned: Parts

    def checkpointed(self) -> Whole:
        """What a step without a plan takes, all of whose layers are checkpointed."""
        keys: list[Key] = [(0, False)] * len(self.stands_for)
        return together({(0, False): self.unplanned}, self.stands_for, keys)

    def every(self, choice: int) -> Whole:
        """What a step takes all of whose layers take one choice, on the device: of 0 nothing but its start is kept."""
        return together(self.known, self.stands_for, [(choice, False)] * len(self.stands_for))

    def least(self, host: int) -> int:
        """The bytes of a step's peak that no plan is below: each layer checkpointed, and on the host while there is room.

        Args:
            host: bytes that may be kept there.
        """
        keys: list[Key] = []
        for like in self.stands_for:
            sent = self.choices[like].get((0, True))
            is_sent = sent is not None and sent.host_bytes <= host
            host -= sent.host_bytes if sent is not None and is_sent else 0
            keys.append((0, is_sent))
        return together(self.known, self.stands_for, keys).peak + self.outputs

    def plan(self, room: Room, host_size: int = 0) -> Planned | None:
        """The fastest that fits, as :mod:`mst_fx.passes.memory_plan` finds it; None if none does.

        Args:
            room: of which inputs, parameters and states are taken.
            host_size: bytes that may be kept on the host.
        """
        every = [tuple(self.choices[like].values()) for like in self.stands_for]
        host = host_beside(every, room, host_size)
        try:
            taken, _ = fastest(every, room, host, lambda those: self._with(those).peak + self.outputs)
        except BudgetError:
            return None
        chosen = by_number(every, taken)
        seconds = host.seconds(sum(choice.host_bytes for choice in chosen))
        return Planned(self._with(chosen), planned_layers(chosen, room), seconds)

    def _with(self, chosen: Sequence[Choice]) -> Whole:
        key_of = {choice: key for choices in self.choices for key, choice in choices.items()}
        return together(self.known, self.stands_for, [key_of[choice] for choice in chosen])


def traced_step(
    model: nn.Module, inputs: Mapping[str, Tensor], traced: int, stands_for: Sequence[int], has_host: bool
) -> TracedStep:
    """A step of a model, from few of its layers.

    Args:
        model: of ``traced`` layers, on ``meta``.
        stands_for: which of these each layer of the whole model is like.
        has_host: whether layers may keep on the host.

    Raises:
        CannotTell: if the layers are not found in the graph.
    """
    graph, bodies = trace(model, inputs)
    joint = JointGraph(graph)
    found = layers_of(joint)
    layers = found[:-1]
    if len(layers) != traced:
        raise CannotTell(f"{len(layers)} layers were found in the graph of a model of {traced}")
    wanted = joint.kept_anyway
    every = [choices_of(layer, wanted) for layer in layers]
    # What the last layer keeps is read at once, and the one before it is there for the copies of others to end beside it.
    may_send = [has_host and index < traced - 2 for index in range(traced)]
    levels = range(max(map(len, every)))
    keys: list[Key] = [(level, False) for level in levels]
    keys += [(level, True) for level in levels if any(may_send)]
    known = {
        (level, on_host): parts_with(
            graph,
            [_nth(those, level, on_host and sends) for those, sends in zip(every, may_send, strict=True)],
            found[-1].start,
        )
        for level, on_host in keys
    }
    unplanned = parts_with(graph, [those[0] for those in every], found[-1].start, is_planned=False)
    placed = [
        {key: _nth(those, *key) for key in keys if key[0] < len(those) and (sends or not key[1])}
        for those, sends in zip(every, may_send, strict=True)
    ]
    outputs = sum(bytes_of(node) for node in storages(outputs_of(joint)))
    del bodies  # named by the graph up to here
    return TracedStep(known, tuple(placed), tuple(stands_for), outputs, unplanned)


def _nth(those: Sequence[Choice], number: int, on_host: bool) -> Choice:
    found = those[min(number, len(those) - 1)]
    return found.on_host() if on_host else found
