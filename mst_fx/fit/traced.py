"""A step under mst-fx, from the joint graph of few layers: traced by Dynamo, rewritten by the passes, with chunks as on a GPU, and no further.

The model is made of memory that is never written to or read, so that nothing of it is there but its sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mst_fx import report
from mst_fx.bodies.body import Body
from mst_fx.chunk_rows import as_on
from mst_fx.errors import BudgetError
from mst_fx.fit.parts import Key, Parts, Whole, parts_with, together, whole_of
from mst_fx.graph.subgraphs import graphs_of
from mst_fx.options import Options
from mst_fx.passes.mask_breaks import cross_masks
from mst_fx.passes.memory_plan import are_fastest, faster, fastest_choices, planned_layers, unchunking_of
from mst_fx.pipeline import run_passes
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.costs import device_of
from mst_fx.plan.joint_graph import JointGraph
from mst_fx.plan.layers import layers_of
from mst_fx.plan.recompute import on_trial
from mst_fx.plan.room import Room
from mst_fx.plan.search import by_number, fastest, host_beside
from mst_fx.plan.unchunk import Unchunking
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


class FewLayers:
    """The joint graph of few layers, what each of them may keep, and the parts of steps with that, which are made when somebody asks.

    Attributes:
        choices: of each layer, on the device and then on the host.
        every: of each layer, on the device.
    """

    def __init__(self, graph: fx.Graph, bodies: tuple[Body, ...], count: int, has_host: bool) -> None:
        """
        Args:
            bodies: that the graph names; they live as long as this.
            count: layers of the model.
            has_host: whether layers may keep on the host.

        Raises:
            CannotTell: if the layers are not found in the graph.
        """
        self._graph, self._bodies = graph, bodies
        self._joint = JointGraph(graph)
        self._layers = layers_of(self._joint)
        if len(self._layers) != count + 1:
            raise CannotTell(
                f"{max(len(self._layers) - 1, 0)} layers were found in the graph of a model of {count}"
            )
        self._wanted = self._joint.kept_anyway
        self.every = [choices_of(layer, self._wanted) for layer in self._layers[:-1]]
        # What the last layer keeps is read at once, and the one before it is there for the copies of others to end beside it.
        self._sends = [has_host and index < count - 2 for index in range(count)]
        self.choices = [
            self._by_key(those, sends) for those, sends in zip(self.every, self._sends, strict=True)
        ]
        self._known: dict[Key, Parts] = {}

    def _by_key(self, those: Sequence[Choice], sends: bool) -> dict[Key, Choice]:
        found = {Key(level): choice for level, choice in enumerate(those)}
        if sends:
            found |= {Key(level, on_host=True): choice.on_host() for level, choice in enumerate(those)}
        return found

    @functools.cached_property
    def unchunking(self) -> Unchunking | None:
        """None if no loop can be un-chunked."""
        return unchunking_of(self._joint, self._layers, self._wanted, strict=False)

    @functools.cached_property
    def unchunked(self) -> list[dict[Key, Choice]]:
        """Of each layer, what it may keep without its loops."""
        every = self.unchunking.choices if self.unchunking is not None else [[] for _ in self.every]
        return [{Key(level, unchunked=True): choice for level, choice in enumerate(those)} for those in every]

    def parts(self, key: Key) -> Parts:
        """Of a step all of whose layers take a choice, or the last that there is, and that on the host if they can."""
        if key not in self._known:
            chosen = [self._choice(index, key) for index in range(len(self.every))]
            unchunking = self.unchunking if key.unchunked else None
            self._known[key] = parts_with(self._graph, chosen, self._layers[-1].start, unchunking)
        return self._known[key]

    @functools.cached_property
    def unplanned(self) -> Parts:
        """Of a step each of whose layers is checkpointed by the model itself."""
        least = [those[0] for those in self.every]
        return parts_with(self._graph, least, self._layers[-1].start, is_planned=False)

    def key_of(self, choice: Choice) -> Key:
        """Of one of ``choices`` or ``unchunked``."""
        every = self.unchunked if choice.layer.unchunked else self.choices
        return next(key for those in every for key, each in those.items() if each is choice)

    def _choice(self, index: int, key: Key) -> Choice:
        those = self.unchunked[index] if key.unchunked else self.choices[index]
        on_host = key.on_host and self._sends[index]
        last = sum(each.on_host == on_host for each in those) - 1
        if last < 0:  # no loop of it can be un-chunked
            return self.every[index][-1]
        return those[Key(min(key.level, last), on_host, key.unchunked)]


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
        few: the layers that were traced.
        stands_for: which of them each layer of the model is like.
    """

    few: FewLayers
    stands_for: tuple[int, ...]

    def checkpointed(self) -> Whole:
        """What a step without a plan takes, all of whose layers are checkpointed."""
        return together(lambda _: self.few.unplanned, self.stands_for, [Key(0)] * len(self.stands_for))

    def taking(self, keys: Sequence[Key]) -> Whole:
        """What a step takes whose layers take these choices; those on the host come first."""
        return together(self.few.parts, self.stands_for, keys)

    def least(self, host: int) -> int:
        """The bytes of a step's peak that no plan is below: each layer checkpointed, and on the host while there is room.

        Args:
            host: bytes that may be kept there.
        """
        keys = []
        for like in self.stands_for:
            sent = self.few.choices[like].get(Key(0, on_host=True))
            is_sent = sent is not None and sent.host_bytes <= host
            host -= sent.host_bytes if sent is not None and is_sent else 0
            keys.append(Key(0, is_sent))
        return self.taking(keys).peak

    @property
    def start(self) -> int:
        """Bytes of the rows that a layer starts with: what a checkpoint keeps."""
        return self.few.every[0][0].bytes

    def plan(self, room: Room, host_size: int = 0) -> Planned | None:
        """The fastest that fits, of layers each for itself, as :mod:`mst_fx.passes.memory_plan` finds it; None if none does.

        Args:
            room: of which inputs, parameters and states are taken.
            host_size: bytes that may be kept on the host.
        """
        every = [tuple(self.few.choices[like].values()) for like in self.stands_for]
        host = host_beside(every, room, host_size)
        try:
            taken, _ = fastest(every, room, host, self._peak_with)
        except BudgetError:
            return None
        chosen = self._unchunked(by_number(every, taken), room)
        seconds = host.seconds(sum(choice.host_bytes for choice in chosen))
        return Planned(self._with(chosen), planned_layers(chosen, room), seconds)

    def _unchunked(self, chosen: list[Choice], room: Room) -> list[Choice]:
        """The same, or where everything fits what is faster: layers without loops."""
        every = [self.few.every[like] for like in self.stands_for]
        unchunking = self.few.unchunking if are_fastest(chosen, every, device_of(room.device)) else None
        if unchunking is None:
            return chosen
        more = [unchunking.choices[like] for like in self.stands_for]
        again = [unchunking.again[like] for like in self.stands_for]
        found = faster(every, more, again, room, self._peak_with)
        return chosen if found is None else found[0]

    def _peak_with(self, chosen: Sequence[Choice]) -> int:
        return self._with(chosen).peak

    def _with(self, chosen: Sequence[Choice]) -> Whole:
        key_of = {choice: self.few.key_of(choice) for choice in set(chosen)}
        return self.taking([key_of[choice] for choice in chosen])


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
    return TracedStep(FewLayers(*trace(model, inputs), traced, has_host), tuple(stands_for))


def plan_of_all(model: nn.Module, inputs: Mapping[str, Tensor], room: Room, host_size: int) -> Planned | None:
    """The plan that the compiler would take, groups of layers included, from the graph of all of them; None if none fits.

    It takes as long as the layers are many: a minute or two of 32.

    Args:
        model: whole, on ``meta``.
        room, host_size: as of :meth:`TracedStep.plan`.

    Raises:
        CannotTell: as :func:`trace`.
    """
    graph, bodies = trace(model, inputs)
    joint = JointGraph(graph)
    wanted = joint.kept_anyway
    choices = [choices_of(layer, wanted) for layer in layers_of(joint)[:-1]]
    try:
        chosen, _ = fastest_choices(joint, choices, room, host_size)
    except BudgetError:
        return None
    whole = whole_of(on_trial(graph, chosen)[0])
    seconds = host_beside(choices, room, host_size).seconds(sum(choice.host_bytes for choice in chosen))
    del bodies  # the graph names them until here
    return Planned(whole, planned_layers(chosen, room), seconds)
