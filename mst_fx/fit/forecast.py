"""What fits: for each way to train the longest sequence, and what a step takes at some lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import Tensor, nn

from mst_fx.fit.eager import EagerStep, eager_step
from mst_fx.fit.parked import stepping
from mst_fx.fit.traced import CannotTell, TracedStep, plan_of_all, traced_step
from mst_fx.fit.traced import Planned as PlannedStep
from mst_fx.plan.costs import device_of
from mst_fx.plan.room import Room
from mst_fx.report import Planned

# Elements that share one scale, in states of 8 bits (bitsandbytes); smaller parameters keep 32 bits.
_BLOCK_OF_STATES, _LEAST_8BIT = 256, 4096
EAGER, EAGER_CHECKPOINTED = "eager", "eager, checkpointed"
MST, MST_PLANNED = "mst, checkpointed", "mst with a plan"
WAYS = (EAGER, EAGER_CHECKPOINTED, MST, MST_PLANNED)
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
# Those of torch.optim: parked, they step in buckets.
_IN_BUCKETS = ("adamw", "sgd")
# Lengths are multiples of it, and none is shorter than the least: below it attention stays as it was, and so no plan is made.
_MULTIPLE = 1024
LEAST = 2 * _MULTIPLE
_LONGEST = 2**24
_TRIES = 14
_NEAR = 1 / 64  # of the length, where peaks jump
_SHRINKS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is asked about.

    Attributes:
        title: what it is, in one line.
        kinds: of each layer, what tells it from others.
        build: makes it on ``meta``, in training mode, of so many layers, the first ones; checkpointed or not.
        inputs: of a step of so many tokens, on ``meta``.
    """

    title: str
    kinds: tuple[Hashable, ...]
    build: Callable[[int, bool], nn.Module]
    inputs: Callable[[int], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where, and with what.

    Attributes:
        device: a name that :func:`~mst_fx.plan.costs.device_of` knows.
        memory: bytes that may be allocated on it.
        host: bytes of the host's memory that parked states and a plan may use; None: none.
        optimizer: one of :data:`OPTIMIZERS`.
        park: whether its states are on the host in forward and backward pass (``mst_fx.park``), as far as they find place there; a plan
            has the rest.
        bucket: bytes of states that come to the device together when it steps.
    """

    device: str
    memory: int
    host: int | None = None
    optimizer: str = "adamw"
    park: bool = False
    bucket: int = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Point:
    """What a step takes at one length.

    Attributes:
        peak: bytes allocated at its highest moment.
        seconds: of forward and backward pass and the optimizer's step.
        plan: what its layers do, and make again; of a plan.
    """

    seq: int
    peak: int
    seconds: float
    plan: tuple[Planned, ...] = ()

    @property
    def host(self) -> int:
        """Bytes that layers keep on the host."""
        return sum(each.layers * each.host_bytes for each in self.plan)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        longest: tokens; 0 if nothing fits, None if it was not asked.
        points: at the lengths that were asked, where they fit.
    """

    name: str
    longest: int | None
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a layer may keep, at one length.

    Attributes:
        again: what is made again, in words.
        bytes: that are kept, the layer's start included.
        flops: that are made again.
    """

    seq: int
    again: str
    bytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What :func:`forecast` says.

    Attributes:
        parameters, trained: elements of all parameters, and of those that are trained.
        resident: bytes of parameters, buffers and optimizer states that are on the device in forward and backward pass.
        gradients: bytes of all gradients.
        parked: bytes of optimizer states that are on the host meanwhile.
        stepping: bytes of states on the device at the highest moment of the optimizer's step.
        choices: of a layer in the middle, at the longest of the lengths that were asked, the least first.
    """

    parameters: int
    trained: int
    resident: int
    gradients: int
    parked: int
    stepping: int
    ways: tuple[Way, ...]
    choices: tuple[Kept, ...]


def forecast(subject: Subject, setting: Setting, lengths: Sequence[int] = ()) -> Forecast:
    """What fits.

    Args:
        lengths: tokens at which each way is looked at; without any, the longest of each way.

    Raises:
        CannotTell: if the model is of a form that is not understood.
    """
    return _Forecaster(subject, setting).run(lengths)


def forecasts(subject: Subject, settings: Sequence[Setting]) -> list[Forecast]:
    """:func:`forecast` for several settings, such as sizes of devices, which share what is traced of the model.

    Raises:
        CannotTell: if the model is of a form that is not understood.
    """
    of_settings = [_Forecaster(subject, setting) for setting in settings]
    shared: dict[bool, _Forecaster] = {}
    for each in of_settings:
        each.share(shared.setdefault(each.host > 0, each))
    return [each.run(()) for each in of_settings]


class _Forecaster:
    def __init__(self, subject: Subject, setting: Setting) -> None:
        self.subject, self.setting = subject, setting
        self.device = device_of(setting.device)
        self.models = {way: subject.build(len(subject.kinds), way == EAGER_CHECKPOINTED) for way in WAYS[:2]}
        parameters = list(self.models[EAGER].parameters())
        trained = [p for p in parameters if p.requires_grad]
        self.parameters, self.trained = (sum(p.numel() for p in each) for each in (parameters, trained))
        self.gradients = sum(p.nbytes for p in trained)
        buffers = sum(b.nbytes for b in self.models[EAGER].buffers())
        states = [state_bytes(p, setting.optimizer) for p in trained]
        host, size = setting.host or 0, setting.bucket if setting.optimizer in _IN_BUCKETS else None
        self.stepping = stepping(trained, states, host if setting.park else 0, size)
        self.weights = sum(p.nbytes for p in parameters) + buffers
        self.resident = self.weights + self.stepping.resident
        self.host = host - self.stepping.host
        self.traced, self.stands_for = stand_ins(subject.kinds, spare=int(self.host > 0))
        self.asked: frozenset[int] = frozenset()
        self._steps: dict[int, TracedStep] = {}
        self._eager_steps: dict[tuple[str, int], EagerStep] = {}

    def share(self, other: _Forecaster) -> None:
        """Takes what another one traces, of the same subject; it depends on nothing else but whether there is memory of a host."""
        self._steps, self._eager_steps = other._steps, other._eager_steps

    def run(self, lengths: Sequence[int]) -> Forecast:
        self.asked = frozenset(lengths)
        asked = sorted(self.asked)
        longest: dict[str, int] = {}
        if not asked:
            for way in WAYS:
                longest[way] = self._longest(way, max([*longest.values(), 8 * _MULTIPLE]))
            asked = sorted({n for n in longest.values() if n})
        ways = [
            Way(way, longest.get(way), tuple(p for n in asked if (p := self._point(way, n)) is not None))
            for way in WAYS
        ]
        choices = self._choices(asked[-1]) if asked else ()
        return Forecast(
            parameters=self.parameters,
            trained=self.trained,
            resident=self.resident,
            gradients=self.gradients,
            parked=self.stepping.host,
            stepping=self.stepping.peak,
            ways=tuple(ways),
            choices=choices,
        )

    def _longest(self, way: str, start: int) -> int:
        if self._at_most(LEAST, 0) > self.setting.memory:
            return 0
        # What was traced costs nothing. A length that does not fit, tried for another way or device, would end the search on a line.
        is_mst = way in (MST, MST_PLANNED)
        known = list(self._steps) if is_mst else [seq for of, seq in self._eager_steps if of == way]
        fitting = [seq for seq in known if self._peak(way, seq) <= self.setting.memory]
        starts = fitting if len(fitting) > 1 else [start, 2 * start]
        found = longest_below(lambda seq: self._peak(way, seq), self.setting.memory, starts)
        # A plan is one of several that are looked at, and the very last that fits need not be among them.
        for share in _SHRINKS if way == MST_PLANNED else ():
            seq = int(found * share // _MULTIPLE) * _MULTIPLE
            if seq < LEAST or self._point(way, seq) is not None:
                return seq if seq >= LEAST else 0
        return 0 if way == MST_PLANNED else found

    def _taken(self, seq: int) -> int:
        """Bytes that are there when a step begins."""
        return self.resident + sum(x.nbytes for x in dict.fromkeys(self.subject.inputs(seq).values()))

    def _peak(self, way: str, seq: int) -> int:
        """With least kept."""
        if way in (EAGER, EAGER_CHECKPOINTED):
            made = self._eager(way, seq).peak
        else:
            step = self._step(seq)
            made = step.least(self.host) if way == MST_PLANNED else step.checkpointed().peak
        return self._at_most(seq, made)

    def _at_most(self, seq: int, made: int) -> int:
        """The peak of forward and backward pass, or where the optimizer steps."""
        return max(self._taken(seq) + made, self.weights + self.stepping.peak + self.gradients)

    def _point(self, way: str, seq: int) -> Point | None:
        layers: tuple[Planned, ...] = ()
        copies = 0.0
        if way in (EAGER, EAGER_CHECKPOINTED):
            step = self._eager(way, seq)
            made, cost = step.peak, step.cost
        elif way == MST:
            whole = self._step(seq).checkpointed()
            made, cost = whole.peak, whole.cost
        else:
            room = Room(self.setting.device, self.setting.memory, self._taken(seq))
            plan = self._plan(seq, room)
            if plan is None:
                return None
            made, cost, layers, copies = plan.whole.peak, plan.whole.cost, plan.layers, plan.seconds
        peak = self._at_most(seq, made)
        if peak > self.setting.memory:
            return None
        seconds = cost.seconds(self.device) + copies + self.stepping.seconds(self.device)
        return Point(seq, peak, seconds, layers)

    def _plan(self, seq: int, room: Room) -> PlannedStep | None:
        """Of layers each for itself; at a length that was asked, where none of these fits, of groups too."""
        step = self._step(seq)
        plan = step.plan(room, self.host)
        least = step.least(self.host) - len(self.subject.kinds) * step.start  # with no start kept at all
        if plan is None and seq in self.asked and least <= room.most:
            model = self.subject.build(len(self.subject.kinds), False)
            plan = plan_of_all(model, self.subject.inputs(seq), room, self.host)
        return plan

    def _eager(self, way: str, seq: int) -> EagerStep:
        if (way, seq) not in self._eager_steps:
            self._eager_steps[way, seq] = eager_step(self.models[way], self.subject.inputs(seq))
        return self._eager_steps[way, seq]

    def _step(self, seq: int) -> TracedStep:
        if seq not in self._steps:
            model = self.subject.build(self.traced, False)
            _check_sizes(self.models[EAGER], model, self.stands_for)
            self._steps[seq] = traced_step(
                model, self.subject.inputs(seq), self.traced, self.stands_for, self.host > 0
            )
        return self._steps[seq]

    def _choices(self, seq: int) -> tuple[Kept, ...]:
        step = self._step(seq)
        middle = step.few.every[self.stands_for[len(self.stands_for) // 2]]
        return tuple(Kept(seq, str(choice), choice.bytes, choice.cost.flops) for choice in middle)


def state_bytes(parameter: Tensor, optimizer: str) -> int:
    """Bytes of an optimizer's states of a parameter, in its own type: of Adam two, of SGD (without momentum) none.

    Raises:
        ValueError: for an optimizer that is none of :data:`OPTIMIZERS`.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is not known; allowed: {', '.join(OPTIMIZERS)}")
    if optimizer == "sgd":
        return 0
    count = parameter.numel()
    if optimizer == "adamw":
        return 2 * parameter.nbytes
    scales = -(-count // _BLOCK_OF_STATES) * 4
    return 2 * (count + scales if count >= _LEAST_8BIT else count * 4)


def stand_ins(kinds: Sequence[Hashable], spare: int = 0) -> tuple[int, tuple[int, ...]]:
    """How many layers are traced, and which of them each layer is like: the first, the last, and those between by their kind.

    Args:
        spare: layers before the last that stand for none.
    """
    count = len(kinds)
    for traced in range(3 + spare, count):
        inside = list(enumerate(kinds))[1 : traced - 1 - spare]
        between = {kind: index for index, kind in reversed(inside)}
        if set(kinds[1 : count - 1]) <= between.keys() and kinds[traced - 1] == kinds[-1]:
            inner = [between[kind] for kind in kinds[1 : count - 1]]
            return traced, (0, *inner, traced - 1)
    return count, tuple(range(count))


def longest_below(peak: Callable[[int], int], limit: int, starts: Sequence[int]) -> int:
    """The longest sequence, in multiples of 1,024 tokens, whose peak is at most ``limit``; 0 if not even 2,048 tokens fit.

    Peaks grow almost linearly with the length: a line through the two nearest lengths that were tried leads to the next. Where that leads
    nowhere (they jump where the host is full), halves do, to a sixty-fourth.

    Args:
        starts: two lengths, or more, that are tried first.
    """
    tried = {seq: peak(seq) for seq in starts}
    before, is_halved = math.inf, False
    for _ in range(_TRIES):
        fits = max((seq for seq, size in tried.items() if size <= limit), default=0)
        fails = min((seq for seq, size in tried.items() if size > limit), default=_LONGEST)
        if fails - fits <= _MULTIPLE or fails <= LEAST:
            break
        is_halved = is_halved or (fails < _LONGEST and fails - fits > before / 2)
        before = fails - fits
        if is_halved and before < _NEAR * fits:
            break
        guess = (fits + fails) / 2 if is_halved else min(_on_a_line(tried, limit), 4 * max(tried))
        seq = int(guess // _MULTIPLE) * _MULTIPLE
        if seq == fits:  # what the line says, but for one step
            break
        seq = min(max(seq, fits + _MULTIPLE, LEAST), fails - _MULTIPLE)
        tried[seq] = peak(seq)
    return max((seq for seq, size in tried.items() if size <= limit), default=0)


def _on_a_line(tried: Mapping[int, int], limit: int) -> float:
    """The length that has the limit's peak, on the line through the two whose peaks are nearest to it."""
    first, second = sorted(tried, key=lambda seq: abs(tried[seq] - limit))[:2]
    slope = (tried[second] - tried[first]) / (second - first)
    return first + (limit - tried[first]) / slope if slope > 0 else math.inf


def _check_sizes(whole: nn.Module, few: nn.Module, stands_for: Sequence[int]) -> None:
    """Layers that stand for others have as many parameters.

    Raises:
        CannotTell: if not.
    """
    of_all, of_few = (
        _layer_sizes(each, count) for each, count in ((whole, len(stands_for)), (few, max(stands_for) + 1))
    )
    if of_all != [of_few[like] for like in stands_for] if of_few else of_all:
        raise CannotTell("the layers differ by more than the config's lists of their kinds say")


def _layer_sizes(model: nn.Module, count: int) -> list[int]:
    """Parameters of each layer: of the largest list of as many modules."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    sizes = [[sum(p.numel() for p in layer.parameters()) for layer in each] for each in lists]
    return max(sizes, key=sum, default=[])
