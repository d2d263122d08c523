"""torch's structured trace (``TORCH_TRACE``), which tlparse shows.

Tried with torch 2.11.0 and 2.13.0: ``torch._logging.trace_structured`` with the artifacts that Inductor's own passes write, and its
logger, which has no handler while nobody traces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import fx
from torch._logging._internal import trace_log, trace_structured


@contextlib.contextmanager
def graphs(name: str, gm: fx.GraphModule) -> Iterator[Callable[[fx.GraphModule], None]]:
    """Writes a graph as it is when the block begins, and as it is when the block says so, into the trace.

    Both are written, or none: ``mst_fx_before_NAME`` and ``mst_fx_after_NAME``.
    """
    before = _text(gm) if trace_log.handlers else ""

    def after(new: fx.GraphModule) -> None:
        if before:
            write(f"mst_fx_before_{name}", lambda: before)
            write(f"mst_fx_after_{name}", lambda: _text(new))

    yield after


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def write(name: str, text: Callable[[], str]) -> None:
    """Writes a text into the trace, if there is one."""
    if trace_log.handlers:
        trace_structured(
            "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
        )
