"""One model, captured once, with the joint stages of several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from torch import nn

from mst_fx import backend
from mst_fx.joint import hooked
from mst_fx.options import make_options
from mst_fx.stage import Stage
from mst_fx.torch_api.inductor import compile_graph
from tests.helpers import SMALL_CHUNKS, compile_mst


class Ways:
    """A model under mst, captured and rewritten once, its graphs compiled with the joint stages of each of several ways.

    Args:
        ways: stages and options of each; asked for the next when a graph is compiled.

    Attributes:
        now: the way that runs.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model: nn.Module,
        ways: Iterable[tuple[Sequence[Stage], dict[str, Any]]],
    ) -> None:
        self.now, alone = 0, compile_graph

        def compiled_in_each(*args: Any) -> Callable[..., Any]:
            compiled = []
            for stages, more in ways:
                with hooked(stages, make_options({**SMALL_CHUNKS, **more})):
                    compiled.append(alone(*args))
            return lambda *args: compiled[self.now](*args)

        monkeypatch.setattr(backend, "compile_graph", compiled_in_each)
        self.run = compile_mst(model, SMALL_CHUNKS)


PLAIN: tuple[Sequence[Stage], dict[str, Any]] = ((), {})
