"""What a stage is: one rewrite of a graph, declared with what must come before it, and what it is for others.

:data:`mst_fx.pipeline.STAGES` is the list of all of them; :mod:`mst_fx.runner` runs them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx

from mst_fx.context import PassContext
from mst_fx.options import Options


class Scope(enum.Enum):
    """What a stage is given."""

    PROGRAM = "program"  # the program's graph, with those of its checkpointed layers
    TOP = "top"  # the program's graph alone; its copy has those of its checkpointed layers in common with it
    EACH_GRAPH = "each graph"  # one graph after the other, those of checkpointed layers before the program's


class When(enum.Enum):
    """When a stage runs."""

    CAPTURED = "captured"  # on the graph that Dynamo captured, before autograd
    JOINT = "joint"  # on the graph of forward and backward pass, before it is cut in two


@dataclasses.dataclass(frozen=True)
class Helper:
    """A rewrite that makes a stage possible, or cleans up behind it; thrown away with it if it does not fire."""

    name: str
    run: Callable[[PassContext], Any]
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A rewrite.

    Attributes:
        name: for the options, the log and the report.
        run: changes ``context.gm``. Of a captured graph this is a copy, which is thrown away if nothing came of it: if
            the stage returns False, or, where it returns nothing, has put no rewrite into the report. Raises
            :class:`~mst_fx.errors.Refusal`, or refuses one place of several (``context.refuse``). Of a joint graph
            it gets a :class:`~mst_fx.context.JointContext`.
        scope, when: which graphs it gets.
        matches: whether there is anything to do; asked before anything is copied, must change nothing.
        prepared_by, followed_by: run on the same copy before and after it.
        wanted: of a stage of the joint graph, whether the options, or what stands in the captured graph, ask for it; if none of
            them does, nothing is hooked in.
        is_cacheable: of a stage of the joint graph, that it does the same to the same graph whenever it runs, and tells nobody.
        only_if_changed: runs where an earlier stage has put a rewrite into the report.
        in_place: no copy is made, and a failure costs the whole program: what comes after counts on this stage.
        is_vital: a failure is raised: other processes count on it.
        needs, gives: facts about the graph, by name; what one stage needs, an earlier one has given
            (:func:`check_order`).
    """

    name: str
    run: Callable[[Any], Any]
    scope: Scope = Scope.PROGRAM
    when: When = When.CAPTURED
    matches: Callable[[PassContext], bool] | None = None
    prepared_by: tuple[Helper, ...] = ()
    followed_by: tuple[Helper, ...] = ()
    only_if_changed: bool = False
    in_place: bool = False
    wanted: Callable[[Options, fx.GraphModule], bool] | None = None
    is_cacheable: bool = False
    is_vital: bool = False
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()

    @property
    def parts(self) -> tuple[Helper | Stage, ...]:
        """The stage among its helpers, in the order in which they run."""
        return (*self.prepared_by, self, *self.followed_by)


class OrderError(Exception):
    """Stages in an order in which they cannot work; raised when the list is imported."""


def check_order(stages: Sequence[Stage], when: When, optional: Collection[str] = ()) -> None:
    """Checks that each stage, and each helper, needs only what an earlier one has given.

    What helpers give is gone behind their stage: where it did not fire, they were thrown away.

    Args:
        optional: the stages that a user may leave out.

    Raises:
        OrderError: else; for two stages of one name, one of another time, or a name in ``optional`` of no stage.
    """
    given: set[str] = set()
    names = [stage.name for stage in stages]
    twice = {name for name in names if names.count(name) > 1}
    unknown = set(optional) - set(names)
    if twice or unknown:
        raise OrderError(f"stages: two of the names {sorted(twice)}, none of the names {sorted(unknown)}")
    for stage in stages:
        if stage.when is not when:
            raise OrderError(
                f"the stage {stage.name} runs on the {stage.when.value} graph, not the {when.value} one"
            )
        here = set(given)
        for part in stage.parts:
            missing = part.needs - here
            if missing:
                raise OrderError(
                    f"the stage {stage.name}: {part.name} needs {', '.join(sorted(missing))}, which nothing before it gives"
                )
            here |= part.gives
        given |= stage.gives
