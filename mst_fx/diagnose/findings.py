"""What those who watch get beside the report: facts of the graphs, memory, nodes, and why less was saved than could be."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

from mst_fx.errors import Cause
from mst_fx.report import Refused, Report, Timeline, human_bytes


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one captured graph is, for the doctor.

    Attributes:
        compile_id: Dynamo's, e.g. "0/0"; graphs that DDPOptimizer has split share one.
        ended: why Dynamo ended the graph where it did; "" at the end of its function.
        ended_at: file and line of that.
        ended_by: the kind of that, as of :class:`mst_fx.torch_api.dynamo.Ending`.
        has_head: a vocabulary projection is in it, chunked or not.
        has_loss: what reduces logits is in it, a cross-entropy or anything else.
        takes_rows: it is given values that need a gradient and are no parameters: hidden rows.
        routes: it picks experts for rows (a top-k, or indices that become one-hot).
        dtensors: how many of its inputs are DTensors.
        caller_head: the vocabulary head of the model whose eager code calls what is compiled, e.g.
            "LlamaForCausalLM.lm_head"; "" if there is none.
        caller_width: how wide that head's logits are.
        skipped_at: file and line of the function that calls that head, if Dynamo was to compile it and skipped it.
        trainer: the library that has put a forward function of its own into the model, e.g. "trl".
    """

    compile_id: str
    ended: str
    ended_at: str
    ended_by: str
    has_head: bool
    has_loss: bool
    takes_rows: bool
    routes: bool
    dtensors: int
    caller_head: str = ""
    caller_width: int = 0
    skipped_at: str = ""
    trainer: str = ""


@dataclasses.dataclass(frozen=True)
class Memory:
    """An estimate of the bytes alive over a step, above inputs, parameters and their gradients.

    Attributes:
        forward, backward: after each node, in the order in which they run.
        kept: what is still alive between the two.
    """

    forward: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()
    kept: int = 0

    @property
    def peak(self) -> int:
        return max((*self.forward, *self.backward), default=0)

    def with_loss_outside(self, logits: int) -> Memory:
        """Of a step whose loss is made of an output of so many bytes, behind the graph: of as much again, and of its gradient."""
        return Memory((*self.forward, self.kept + 2 * logits), self.backward, self.kept) if logits else self

    def then(self, other: Memory) -> Memory:
        """Of a step that runs another graph after this one, and its backward pass before."""
        forward, backward = (tuple(n + self.kept for n in x) for x in (other.forward, other.backward))
        return Memory(self.forward + forward, backward + self.backward, self.kept + other.kept)


@dataclasses.dataclass(frozen=True)
class Line:
    """A node of a graph, to be shown.

    Attributes:
        key: unique in its graph, and the same before and after the passes.
        name, text, shape: as in ``name = text  shape``.
        module: path of its module.
        depth: 1 inside of a checkpointed layer, else 0.
        operands: names of the nodes it reads.
    """

    key: str
    name: str
    text: str
    shape: str
    module: str
    depth: int
    operands: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """Why less was saved than could be, and what to do about it.

    Attributes:
        cause: a name, e.g. "loss-behind-a-break".
        evidence: what was seen, in a sentence.
        fix: what to do, in a sentence.
    """

    cause: str
    evidence: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.evidence}\n  fix: {self.fix}"


@dataclasses.dataclass(repr=False)
class Diagnosis(Report):
    """The report of :func:`~mst_fx.explain` and :func:`~mst_fx.watch`.

    Attributes:
        facts: of each graph.
        memory_before, memory_after: an estimate.
        lines_before, lines_after: the nodes of each graph.
        captured: where there is a memory plan, the step of each graph as it was captured, without mst-fx.
        logits_used: where deferred logits were computed: "file:line in function".
        uncalled: classes of modules that ``torch.compile`` wrapped, where no graph was captured at all.
        eager_checkpoints: where a graph breaks inside of a checkpointed layer, which then runs eagerly: "file:line
            (reason)".
        findings: why less was saved than could be.
    """

    facts: list[Facts] = dataclasses.field(default_factory=list)
    memory_before: Memory = Memory()
    memory_after: Memory = Memory()
    lines_before: list[tuple[Line, ...]] = dataclasses.field(default_factory=list)
    lines_after: list[tuple[Line, ...]] = dataclasses.field(default_factory=list)
    captured: list[Timeline] = dataclasses.field(default_factory=list)
    logits_used: list[str] = dataclasses.field(default_factory=list)
    uncalled: list[str] = dataclasses.field(default_factory=list)
    eager_checkpoints: list[str] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        """Adds what is in the report of other graphs."""
        super().add(other)
        if not isinstance(other, Diagnosis):
            return
        self.facts += other.facts
        self.lines_before += other.lines_before
        self.lines_after += other.lines_after
        self.memory_before = self.memory_before.then(other.memory_before)
        self.memory_after = self.memory_after.then(other.memory_after)

    def parts(self) -> dict[str, Any]:
        peaks = {"before": self.memory_before.peak, "after": self.memory_after.peak}
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {**super().parts(), "estimated_peak_bytes": peaks, "findings": findings}

    def estimate(self) -> str:
        """A sentence on the step's peak, or nothing where nothing is saved."""
        before, after = self.memory_before.peak, self.memory_after.peak
        if before <= after:
            return ""
        outside = sum(logits_outside(refused) for refused in self.refusals)
        text = (
            f"estimate for a step's peak above parameters and their gradients: {human_bytes(before)} before, "
            f"{human_bytes(after)} after"
        )
        if outside:
            text += f"; at least 2 x {human_bytes(outside)} of either for a loss of the logits that leave the graph"
        return text

    def __str__(self) -> str:
        return "\n".join(filter(None, (super().__str__(), self.estimate())))

    def _repr_html_(self) -> str:
        peaks = {"before": self.memory_before.peak, "after": self.memory_after.peak}
        most = max(peaks.values()) or 1
        bars = [
            f"<div>{name} <span style='display:inline-block;height:1em;background:#0f766e;width:{24 * peak / most:.1f}em'></span>"
            f" {human_bytes(peak)}</div>"
            for name, peak in peaks.items()
        ]
        findings = [
            f"<li><b>{finding.cause}</b> {html.escape(finding.evidence)}<br>fix: {html.escape(finding.fix)}</li>"
            for finding in self.findings
        ]
        return "".join(
            (
                super()._repr_html_(),
                f"{''.join(bars)}<p>{html.escape(self.estimate())}</p>" if self.estimate() else "",
                f"<ul>{''.join(findings)}</ul>" if findings else "",
            )
        )


def logits_outside(refused: Refused) -> int:
    """Bytes of logits with a gradient that leave the graph of their head; whoever makes the loss takes them twice more."""
    is_left = refused.kind == "vocab" and refused.cause in (Cause.IS_OUTPUT, Cause.BREAK)
    return refused.kept_bytes if is_left else 0


def diagnosis_of(report: Report) -> Diagnosis:
    """The report of one graph, with room for what is known of it."""
    found = Diagnosis()
    found.add(report)
    return found
