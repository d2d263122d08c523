"""``mst_fx.watch``: what happens to a program that compiles with mst by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from torch import fx

from mst_fx.diagnose.doctor import advise, said_of
from mst_fx.diagnose.estimate import estimate_memory
from mst_fx.diagnose.facts import facts_of
from mst_fx.diagnose.findings import Diagnosis, diagnosis_of, logits_outside
from mst_fx.diagnose.lines import lines_of
from mst_fx.listeners import on_eager_checkpoint, on_graph, on_logits, on_plan
from mst_fx.report import MemoryPlan, Refused, Report
from mst_fx.torch_api.dynamo import Ending, compilation, wrapped_modules

T = TypeVar("T")


class LastAttempts(Generic[T]):
    """Something of each captured graph.

    Dynamo may compile a frame again from the start: of each frame, the last attempt counts. An attempt
    may have several graphs (DDPOptimizer splits).
    """

    def __init__(self) -> None:
        self._attempts: dict[Hashable, tuple[int, list[T]]] = {}

    def add(self, item: T) -> None:
        key, count = compilation() or (len(self._attempts), 0)
        known, items = self._attempts.get(key, (count, []))
        self._attempts[key] = (count, [*items, item] if known == count else [item])

    def __iter__(self) -> Iterator[T]:
        for _, items in self._attempts.values():
            yield from items


@contextlib.contextmanager
def watch() -> Iterator[Diagnosis]:
    """Watches a program that compiles with mst by itself, and says what happened.

    ::

        with mst_fx.watch() as report:
            trainer.train()  # any code that runs the first step
        print(report, *report.findings, sep="\\n")

    Yields:
        a report that is filled when the context ends, with its findings. Graphs that were compiled before
        are not in it.
    """
    total = Diagnosis()
    graphs: LastAttempts[Diagnosis] = LastAttempts()
    plans: LastAttempts[MemoryPlan | Refused] = LastAttempts()
    places: list[str] = []
    eager: list[str] = []

    def note_graph(captured: fx.GraphModule, new: fx.GraphModule, report: Report) -> None:
        graphs.add(_observed(captured, new, report))

    def note_logits(place: str) -> None:
        places.append(place)

    def note_checkpoint(ending: Ending) -> None:
        eager.append(said_of(ending))

    with (
        on_graph.listening(note_graph),
        on_plan.listening(plans.add),
        on_logits.listening(note_logits),
        on_eager_checkpoint.listening(note_checkpoint),
    ):
        yield total
    for found in graphs:
        total.add(found)
    for plan in plans:
        if isinstance(plan, MemoryPlan):
            total.plans.append(plan)
        else:
            total.refusals.append(plan)
    total.logits_used += dict.fromkeys(places)
    total.eager_checkpoints += dict.fromkeys(eager)
    if not total.graphs:
        total.uncalled += sorted({type(module).__name__ for module in wrapped_modules()})
    total.findings += advise(total)


def _observed(captured: fx.GraphModule, new: fx.GraphModule, report: Report) -> Diagnosis:
    """What is known of one graph, before and after the passes."""
    found = diagnosis_of(report)
    found.facts.append(facts_of(captured, report))
    chunk_bytes = {rewrite.body: rewrite.chunk_bytes for rewrite in report.rewrites if rewrite.body}
    outside = sum(map(logits_outside, report.refusals))
    found.memory_before = estimate_memory(captured, {}).with_loss_outside(outside)
    found.memory_after = estimate_memory(new, chunk_bytes).with_loss_outside(outside)
    found.lines_before.append(tuple(lines_of(captured)))
    found.lines_after.append(tuple(lines_of(new)))
    return found
