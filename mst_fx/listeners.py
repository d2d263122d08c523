"""The door to those who watch: what the pipeline and deferred logits say, to whoever listens.

The core does not know its listeners. It tells what happened where it happened, and a listener costs nobody a run:
its exceptions are logged, and go no further.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec

from torch import fx

from mst_fx.process import State
from mst_fx.report import MemoryPlan, Refused, Report
from mst_fx.torch_api.checkpoints import watch_checkpoints
from mst_fx.torch_api.dynamo import Ending

log = logging.getLogger("mst_fx")

P = ParamSpec("P")


class Listeners(State, Generic[P]):
    """Those who want to know of one kind of event; from any thread.

    Args:
        event: its name, for the log.
    """

    def __init__(self, event: str) -> None:
        super().__init__()
        self._event = event
        self._lock = threading.Lock()
        self._listeners: tuple[Callable[P, object], ...] = ()
        self._own: tuple[Callable[P, object], ...] = ()

    def add(self, listener: Callable[P, object]) -> None:
        """From now on; one that listens already is not added again."""
        with self._lock:
            if all(x is not listener for x in self._listeners):
                self._listeners += (listener,)

    def add_own(self, listener: Callable[P, object]) -> None:
        """From now on, and also after :meth:`reset`: to be called while mst-fx is imported."""
        self.add(listener)
        self._own += (listener,)

    def reset(self) -> None:
        with self._lock:
            self._listeners = self._own

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def remove(self, listener: Callable[P, object]) -> None:
        with self._lock:
            self._listeners = tuple(x for x in self._listeners if x is not listener)

    @contextlib.contextmanager
    def listening(self, listener: Callable[P, object]) -> Iterator[None]:
        """Listens inside of the context."""
        self.add(listener)
        try:
            yield
        finally:
            self.remove(listener)

    def tell(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls every listener, in the order in which they were added."""
        for listener in self._listeners:
            try:
                listener(*args, **kwargs)
            except Exception as error:
                log.warning(
                    "mst-fx: who listens to %s failed: %s: %s", self._event, type(error).__name__, error
                )
                log.debug("the defect", exc_info=True)


# A graph went through the passes: as Dynamo captured it, as it is compiled, and the report of this graph alone. Told
# while the graph is compiled, on the thread and under the modes of its compilation.
on_graph: Listeners[fx.GraphModule, fx.GraphModule, Report] = Listeners("graphs")

# The backward pass of a graph is planned: the plan, or why there is none. Told while its graph of both passes is compiled.
on_plan: Listeners[MemoryPlan | Refused] = Listeners("memory plans")

# Deferred logits are computed in full; for "file:line in function".
on_logits: Listeners[str] = Listeners("deferred logits")

# A graph breaks inside of a checkpointed layer, which Dynamo then runs eagerly.
on_eager_checkpoint: Listeners[Ending] = Listeners("checkpointed layers")
watch_checkpoints(on_eager_checkpoint.tell)
