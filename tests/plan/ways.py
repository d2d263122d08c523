"""One capture of a model, compiled with several memory plans: Dynamo and the rewrites are most of what a plan's test costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from torch import fx, nn

from mst_fx import compiling
from mst_fx.context import JointContext
from mst_fx.errors import BudgetError
from mst_fx.joint import hooked
from mst_fx.options import make_options
from mst_fx.plan.choices import Choice, choices_of
from mst_fx.plan.groups import may_join
from mst_fx.plan.joint_graph import JointGraph, is_attention
from mst_fx.plan.layers import layers_of
from mst_fx.plan.recompute import make_again
from mst_fx.repeated_parts import repeated_parts, why_none
from mst_fx.stage import Stage, When
from mst_fx.torch_api.inductor import compile_graph
from tests.helpers import SMALL_CHUNKS, compile_mst

PLAIN: tuple[Sequence[Stage], dict[str, Any]] = ((), {})
STRICT = {"strict": True}


class Ways:
    """A model under mst, captured and rewritten once, its graphs compiled with the joint stages of each of several ways.

    Args:
        ways: stages and options of each; asked for the next when a graph is compiled. ``inner`` among the options compiles the graph.
        options: of the capture and the bodies, and of each way that says nothing else.

    Attributes:
        now: the way that runs.
        errors: of ways for which there was too little memory; they cannot run.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model: nn.Module,
        ways: Iterable[tuple[Sequence[Stage], dict[str, Any]]],
        options: dict[str, Any] = SMALL_CHUNKS,
    ) -> None:
        self.now, alone = 0, compile_graph
        self.errors: list[BudgetError] = []

        def compiled_in_each(
            gm: fx.GraphModule,
            inputs: Sequence[Any],
            _: str,
            patches: Mapping[str, Any],
            layers: Any,
            __: Any,
        ) -> Callable[..., Any]:
            assert not layers
            compiled: list[Callable[..., Any]] = []
            for stages, more in ways:
                chosen = make_options({**options, **more})
                with hooked(stages, chosen, gm):
                    try:
                        config = {**patches, **chosen.inductor}
                        parts = None if why_none(chosen, config) else repeated_parts
                        compiled.append(alone(gm, inputs, chosen.inner, config, repetitions=parts))
                    except BudgetError as error:
                        self.errors.append(error)
                        compiled.append(_never)
            return lambda *args: compiled[self.now](*args)

        monkeypatch.setattr(compiling, "compile_graph", compiled_in_each)
        self.run = compile_mst(model, {**options, "layers": "each"})


def _never(*_: Any) -> Any:
    raise AssertionError("there was too little memory for this way")


class Grouped:
    """A stage that takes one choice for every layer, in groups of so many, and remembers what it did.

    Args:
        is_sent: whether what the early layers keep is on the host.
    """

    def __init__(self, index: int, size: int, is_sent: bool = False) -> None:
        self.index, self.size, self.is_sent = index, size, is_sent
        self.chosen: list[Choice] = []

    def __call__(self, context: JointContext) -> None:
        joint = JointGraph(context.graph)
        every = [choices_of(layer, joint.kept_anyway) for layer in layers_of(joint)[:-1]]
        chosen = [those[min(self.index, len(those) - 1)] for those in every]
        assert may_join(joint, every) == [False, *[True] * (len(chosen) - 1)]
        self.chosen = [c.without_start() if i % self.size else c for i, c in enumerate(chosen)]
        if self.is_sent:
            last = (len(chosen) - 1) // self.size * self.size
            self.chosen = [c.on_host() if i < last else c for i, c in enumerate(self.chosen)]
        make_again(joint, self.chosen)
        self.attention = sum(map(is_attention, context.graph.nodes))


def way_of(grouped: Grouped) -> tuple[Sequence[Stage], dict[str, Any]]:
    return (Stage("memory", grouped.__call__, when=When.JOINT),), STRICT
