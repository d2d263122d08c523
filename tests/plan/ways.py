"""One capture of a model, compiled with several memory plans: Dynamo and the rewrites are most of what a plan's test costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from torch import fx, nn

from mst_fx import compiling
from mst_fx.errors import BudgetError
from mst_fx.joint import hooked
from mst_fx.options import make_options
from mst_fx.stage import Stage
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
            gm: fx.GraphModule, inputs: Sequence[Any], _: str, patches: Mapping[str, Any], layers: Any
        ) -> Callable[..., Any]:
            assert not layers
            compiled: list[Callable[..., Any]] = []
            for stages, more in ways:
                chosen = make_options({**options, **more})
                with hooked(stages, chosen, gm):
                    try:
                        compiled.append(alone(gm, inputs, chosen.inner, {**patches, **chosen.inductor}))
                    except BudgetError as error:
                        self.errors.append(error)
                        compiled.append(_never)
            return lambda *args: compiled[self.now](*args)

        monkeypatch.setattr(compiling, "compile_graph", compiled_in_each)
        self.run = compile_mst(model, {**options, "layers": "each"})


def _never(*_: Any) -> Any:
    raise AssertionError("there was too little memory for this way")
