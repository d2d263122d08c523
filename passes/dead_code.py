"""What nobody reads goes: a loss that nobody returns is not worth a loop."""

from __future__ import annotations

from mst_fx.context import PassContext
from mst_fx.graph.edit import eliminate_dead_code


def run(context: PassContext) -> None:
    """Removes the dead nodes of the program."""
    eliminate_dead_code(context.graph)
