"""What a pass is given: a graph that it may change, the options, and what the passes of one capture know in common."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from mst_fx.bodies.body import Body, BodyConfig
from mst_fx.errors import Cause, Refusal, defect
from mst_fx.graph.changing import Bounds
from mst_fx.graph.names import module_path
from mst_fx.graph.sizes import expression, hint
from mst_fx.options import Options
from mst_fx.report import MemoryPlan, Refused, Report, Rewrite
from mst_fx.rows.analysis import RowAnalysis, State
from mst_fx.rows.counts import row_counts
from mst_fx.rows.region import Region, RegionFinder, seeds
from mst_fx.rows.tokens import Tokens
from mst_fx.rows.weights import convolution_rows

if TYPE_CHECKING:
    from mst_fx.logits.put_back import TakenLogits


@dataclasses.dataclass
class Shared:
    """What the passes over the graphs of one capture know in common.

    Attributes:
        nodes: the analysis' results by the content of a node, for each number of rows.
        bodies: bodies by the structure of their region.
        bounds: which places fit in one chunk.
        numbers: the tensors that stand for numbers (:mod:`mst_fx.passes.scalars`).
        deferred_positions: of the outputs of the program that are logits to be taken out of it.
        starts: the matmuls at which logits start that are deferred without a loss in the graph.
        taken_logits: how the caller gets what was taken out.
        outputs: how many outputs the program had before that.
        cut_outputs: by their position, the outputs of which each rank of a group has its own tokens.
    """

    nodes: dict[str, dict[Any, State]] = dataclasses.field(default_factory=dict)
    bodies: dict[str, Body] = dataclasses.field(default_factory=dict)
    bounds: Bounds = dataclasses.field(default_factory=Bounds)
    numbers: set[fx.Node] = dataclasses.field(default_factory=set)
    deferred_positions: list[int] = dataclasses.field(default_factory=list)
    starts: set[fx.Node] = dataclasses.field(default_factory=set)
    taken_logits: tuple[TakenLogits, ...] = ()
    outputs: int = 0
    cut_outputs: dict[int, Tokens] = dataclasses.field(default_factory=dict)

    def copied(self, old: fx.Graph, new: fx.Graph) -> None:
        """Notes that a graph was copied: what is known of a node is so of its copy."""
        for known in (self.numbers, self.starts):
            if known:
                known |= {copy for node, copy in zip(old.nodes, new.nodes, strict=True) if node in known}


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A node that another one stands for while regions are looked for: what it was."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    new: fx.Node


@dataclasses.dataclass
class PassContext:
    """One stage over one graph.

    Attributes:
        gm: a copy that the stage may change; of a single graph it has the sub-graphs in common with the original.
        is_top: the graph is the program's, not a layer's under ``tag_activation_checkpoint``.
        config: how bodies are compiled.
        shared: what is known of the whole capture.
        example_inputs: of the program.
        report: where rewrites and refusals go.
        ending: where the graph ends, in words; "" at the end of the program's function.
        is_narrow: an earlier stage has found that nothing in the graph widens rows by a product any more.
        deferred_outputs: logits that a loop's loss consumed and that must be deferred.
        starts: as of :class:`Shared`, of this graph.
        clones: nodes that compute a part of another one's rows, and that one.
        exchanged: what a helper has exchanged for as long as regions are looked for.
    """

    gm: fx.GraphModule
    options: Options
    config: BodyConfig
    is_top: bool
    shared: Shared
    example_inputs: Any = ()
    report: Report = dataclasses.field(default_factory=Report)
    ending: str = ""
    is_narrow: bool = False
    deferred_outputs: list[fx.Node] = dataclasses.field(default_factory=list)
    starts: list[fx.Node] = dataclasses.field(default_factory=list)
    clones: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)
    exchanged: list[Exchanged] = dataclasses.field(default_factory=list)
    _analyses: dict[str, RowAnalysis] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def analyses(self) -> Iterator[RowAnalysis]:
        """One for each number of rows in the graph; made once until the graph is changed (:meth:`rewrote`)."""
        counts = row_counts(self.graph)
        for rows in convolution_rows(self.graph):
            if hint(rows) > 1 and not any(expression(rows) == expression(count) for count in counts):
                counts.append(rows)
        for rows in counts:
            if str(rows) not in self._analyses:
                known = self.shared.nodes.setdefault(str(rows), {})
                self._analyses[str(rows)] = RowAnalysis(self.gm, rows, known)
            yield self._analyses[str(rows)]

    def rewrote(self, rewrite: Rewrite) -> None:
        """Puts a rewrite into the report, before those that came earlier: places are rewritten last first."""
        self.report.rewrites.insert(0, rewrite)
        self._analyses.clear()

    def bulges(
        self, analysis: RowAnalysis, kind: str, free: Collection[fx.Node] = ()
    ) -> tuple[list[Region], list[fx.Node]]:
        """The bulges of a kind, last first, and the seeds of regions that are none of any kind.

        Args:
            free: values whose use as an output of the graph does not count.
        """
        finder = RegionFinder(analysis, free)
        regions, others = [], []
        for seed in seeds(analysis):
            region = None
            with self.at("graph", seed):
                region = finder.grow(seed)
            if region is None:
                if not analysis.states[seed].rowwise:  # a fault of ours
                    others.append(seed)
                continue
            found = finder.kind_of(region)
            if found == "mlp" and kind == "vocab" and self._is_cut_out(region):
                found = kind
            if found:
                finder.take(region)
            else:
                others.append(seed)
            if found == kind:
                regions.append(region)
        return regions, others

    def _is_cut_out(self, region: Region) -> bool:
        """Whether a region is a head of rows that were cut out of others, which no pass has seen before."""
        return not region.is_multiplied and not self.clones.keys().isdisjoint(region.nodes)

    def at(self, kind: str, node: fx.Node) -> contextlib.AbstractContextManager[None]:
        """:meth:`place`, named after a node."""
        return self.place(kind, module_path(node) or node.name)

    @contextlib.contextmanager
    def place(self, kind: str, name: str) -> Iterator[None]:
        """One place of several: a refusal or an exception of ours costs this place, not the pass.

        What runs inside must leave the graph as it was when it fails.

        Raises:
            Exception: any, with ``strict=True``.
        """
        try:
            yield
        except Refusal as refusal:
            self.refuse(kind, name, str(refusal), refusal.cause)
        except Exception as error:
            if self.options.strict:
                raise
            self.refuse(kind, name, defect(f"left {kind} {name} as it was", error), Cause.DEFECT)

    def refuse_all(self, refusals: Iterable[Refused]) -> None:
        """Notes refusals.

        Raises:
            Refusal: with ``strict=True``.
        """
        for refused in refusals:
            if self.options.strict:
                raise Refusal(f"{refused.kind} {refused.name}: {refused.reason}", refused.cause)
            self.report.refusals.append(refused)

    def refuse(self, kind: str, name: str, reason: str, cause: Cause = Cause.UNPROVED) -> None:
        """Notes a refusal.

        Raises:
            Refusal: with ``strict=True``.
        """
        self.refuse_all([Refused(kind, name, reason, cause)])


@dataclasses.dataclass
class JointContext:
    """One stage over one joint graph.

    Attributes:
        graph: ATen operators, functional; its outputs are those of the forward pass, then the gradients. It is changed in
            place.
        options: the user's.
        tell: takes what was planned.
        inputs: with how many the program was captured.
        parameters: which of them are parameters.
        are_alike: whether the graphs of all ranks of the group have the same calls, of other sizes.
        is_told: whether somebody listens for plans: what is for people alone is left out otherwise.
    """

    graph: fx.Graph
    options: Options
    tell: Callable[[MemoryPlan], None]
    inputs: int = 0
    parameters: tuple[int, ...] = ()
    are_alike: bool = True
    is_told: bool = True
