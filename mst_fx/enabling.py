"""``mst_fx.enable``: ordinary ``torch.compile``, which others may call, uses the passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import fx

from mst_fx.compiling import mst
from mst_fx.options import Options, make_options
from mst_fx.process import State
from mst_fx.torch_api.inductor import redirect_inductor


class _Enabled(State):
    """The calls that are in force, the innermost last."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[enable] = []

    def add(self, call: enable) -> None:
        self.calls.append(call)
        redirect_inductor(_compile)

    def remove(self, call: enable) -> None:
        self.calls = [other for other in self.calls if other is not call]
        if not self.calls:
            redirect_inductor(None)

    def reset(self) -> None:
        self.calls = []
        redirect_inductor(None)


_ENABLED = _Enabled()


class enable:
    """Makes ``torch.compile(model)`` do what ``torch.compile(model, backend="mst")`` does.

    For code that calls ``torch.compile`` itself and knows no backend but torch's own, such as
    ``TrainingArguments(torch_compile=True)``. Inductor's ``mode`` and ``options`` and ``fullgraph`` keep
    their meaning; other backends are left alone. Works from the call on, until :meth:`disable` or, in a
    ``with`` statement, the end of the block. The innermost of several decides.

    Only compilations count: what was compiled before stays as it is, and so does what was compiled
    meanwhile (``torch.compiler.reset()`` forgets both).

    Args:
        options: see :class:`~mst_fx.options.Options`.

    Raises:
        OptionError: for bad options.
    """

    def __init__(self, options: Mapping[str, Any] | Options | None = None) -> None:
        self._options = make_options(options)
        _ENABLED.add(self)

    def disable(self) -> None:
        """Undoes this call; others stay enabled. May be called more than once."""
        _ENABLED.remove(self)

    def __enter__(self) -> enable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    options = _ENABLED.calls[-1]._options
    options = dataclasses.replace(options, inductor={**options.inductor, **patches})
    return mst(gm, example_inputs, options=options)
