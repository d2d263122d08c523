"""What mst-fx did to a program: rewrites, refusals, and the difference of the graphs."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

from mst_fx.errors import Cause


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One region that became a loop over chunks of rows.

    Attributes:
        kind: "attention", "mlp" or "vocab"; "mask": one that other graphs read crosses the break as vectors.
        name: path of the module, e.g. ``model.layers.0.mlp``.
        rows: rows at capture (by hint, where the number is symbolic).
        chunk_rows, chunks: rows a chunk has at most, and how many chunks that makes.
        intermediate_bytes: what the inside takes un-chunked: all its values of all rows.
        chunk_bytes: the same for one chunk.
        gradient: how gradients are computed: "recompute", "forward" (in the forward loop), "native" (by
            torch's own kernel) or "none".
        deferred: the logits output is computed only if somebody looks.
        body: key of the body; regions of equal structure share one; "" for attention.
        why: the reason for the chunk size.
        before, after: the nodes that went, and those that came.
        form: of an attention's mask: "causal", "full", "window 4096", "documents", or "general: " with
            the formula. Its ``intermediate_bytes`` are those of the mask (and scores) not made any more.
    """

    kind: str
    name: str
    rows: int
    chunk_rows: int
    chunks: int
    intermediate_bytes: int
    chunk_bytes: int
    gradient: str
    deferred: bool
    body: str
    why: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    form: str = ""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A place that looked like a bulge and was left as it was.

    Attributes:
        kind, name: as of a :class:`Rewrite`.
        reason: why, in words that name the node.
        cause: the kind of reason, for code.
        kept_bytes: what its wide result takes, where a gradient flows through it and it is more than a chunk; else 0.
    """

    kind: str
    name: str
    reason: str
    cause: Cause = Cause.UNPROVED
    kept_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Fit:
    """A bulge with no more rows than a chunk, left as it was."""

    kind: str
    name: str
    rows: int
    chunk_rows: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one captured graph is, for the doctor.

    Attributes:
        compile_id: Dynamo's, e.g. "0/0"; graphs that DDPOptimizer has split share one.
        ended: why Dynamo ended the graph where it did; "" at the end of its function.
        ended_at: file and line of that.
        ended_by: the kind of that, as of :class:`mst_fx.torch_api.inductor.Ending`.
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


@dataclasses.dataclass
class Report:
    """The sum over all graphs of a program.

    Attributes:
        rewrites, refusals: in graph order.
        fits: what fits in one chunk.
        bodies: the ATen text of each body, once, by key.
        graphs: how many graphs were captured.
        seconds: what the passes took.

    Only :func:`~mst_fx.explain` and :func:`~mst_fx.watch` fill these:

    Attributes:
        facts: of each graph.
        memory_before, memory_after: an estimate.
        lines_before, lines_after: the nodes of each graph.
        logits_used: where deferred logits were computed: "file:line in function".
        uncalled: classes of modules that ``torch.compile`` wrapped, where no graph was captured at all.
        eager_checkpoints: where a graph breaks inside of a checkpointed layer, which then runs eagerly: "file:line
            (reason)".
        findings: why less was saved than could be.
    """

    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    refusals: list[Refused] = dataclasses.field(default_factory=list)
    fits: list[Fit] = dataclasses.field(default_factory=list)
    bodies: dict[str, str] = dataclasses.field(default_factory=dict)
    graphs: int = 0
    seconds: float = 0.0
    before: list[str] = dataclasses.field(default_factory=list)
    after: list[str] = dataclasses.field(default_factory=list)
    facts: list[Facts] = dataclasses.field(default_factory=list)
    memory_before: Memory = Memory()
    memory_after: Memory = Memory()
    lines_before: list[tuple[Line, ...]] = dataclasses.field(default_factory=list)
    lines_after: list[tuple[Line, ...]] = dataclasses.field(default_factory=list)
    logits_used: list[str] = dataclasses.field(default_factory=list)
    uncalled: list[str] = dataclasses.field(default_factory=list)
    eager_checkpoints: list[str] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        self.rewrites += other.rewrites
        self.refusals += other.refusals
        self.fits += other.fits
        self.bodies |= other.bodies
        self.graphs += other.graphs
        self.seconds += other.seconds
        self.before += other.before
        self.after += other.after
        self.facts += other.facts
        self.lines_before += other.lines_before
        self.lines_after += other.lines_after
        self.memory_before = self.memory_before.then(other.memory_before)
        self.memory_after = self.memory_after.then(other.memory_after)

    def kinds(self) -> set[str]:
        """The kinds of places that were found, rewritten or not."""
        found = [x.kind for x in self.rewrites], [x.kind for x in self.refusals], [x.kind for x in self.fits]
        return set().union(*found)

    def diff(self) -> str:
        """The unified diff of the graphs' code, before and after."""
        texts = []
        for index, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            lines = difflib.unified_diff(
                before.splitlines(), after.splitlines(), f"graph {index}", f"graph {index} (mst)", lineterm=""
            )
            texts.append("\n".join(lines))
        return "\n".join(text for text in texts if text)

    def to_json(self) -> str:
        parts: dict[str, Any] = {
            "graphs": self.graphs,
            "seconds": round(self.seconds, 3),
            "rewrites": [dataclasses.asdict(rewrite) for rewrite in self.rewrites],
            "refusals": [dataclasses.asdict(refused) for refused in self.refusals],
            "estimated_peak_bytes": {"before": self.memory_before.peak, "after": self.memory_after.peak},
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "bodies": self.bodies,
        }
        return json.dumps(parts, indent=2)

    def summary(self) -> str:
        """One line: how much of which kind."""
        kinds = sorted({rewrite.kind for rewrite in self.rewrites})
        counts = [f"{sum(r.kind == kind for r in self.rewrites)} {kind}" for kind in kinds]
        saved = sum(r.intermediate_bytes - r.chunk_bytes for r in self.rewrites)
        text = f"rewrote {', '.join(counts) or 'nothing'}; refused {len(self.refusals)}"
        return f"{text}; un-chunked insides would take {human_bytes(saved)} more" if saved else text

    def __str__(self) -> str:
        rows = [("kind", "name", "rows", "chunks", "inside", "a chunk", "gradient")]
        rows += [
            (
                r.kind,
                r.name + (" (logits deferred)" if r.deferred else f" ({r.form})" if r.form else ""),
                str(r.rows),
                f"{r.chunks} x {r.chunk_rows}",
                human_bytes(r.intermediate_bytes),
                human_bytes(r.chunk_bytes),
                r.gradient,
            )
            for r in self.rewrites
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"refused {r.kind} {r.name}: {r.reason}" for r in self.refusals]
        lines.append(f"{self.graphs} graph(s): {self.summary()}")
        before, after = self.memory_before.peak, self.memory_after.peak
        if before > after:
            lines.append(
                f"estimate for a step's peak above parameters and their gradients: {human_bytes(before)} before, "
                f"{human_bytes(after)} after"
            )
        return "\n".join(lines)


def human_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
