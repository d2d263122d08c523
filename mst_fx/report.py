"""What mst-fx did to a program: rewrites, refusals, and the difference of the graphs."""

from __future__ import annotations

import dataclasses
import difflib
import html
import json
import re
from typing import Any

from mst_fx.alike import grouped, together
from mst_fx.errors import Cause


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One region that became a loop over chunks of rows.

    Attributes:
        kind: "attention", "mlp" or "vocab"; "mask": one that other graphs read crosses the break as vectors; of sequences over ranks
            "sequence" (an embedding behind which each rank has its tokens; chunks are the ranks) and "exchange" (around an attention).
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
        shared_bytes: of the mask, where other places read it too: it is in ``intermediate_bytes`` of the first of them alone.
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
    shared_bytes: int = 0

    def cells(self) -> tuple[str, ...]:
        """Of a table, but for the name: kind, what it is, rows, chunks, inside, a chunk, gradient."""
        what = " (logits deferred)" if self.deferred else f" ({self.form})" if self.form else ""
        inside = max(self.intermediate_bytes, self.shared_bytes)
        return (
            self.kind,
            what,
            f"{self.rows:,}",
            f"{self.chunks:,} x {self.chunk_rows:,}",
            human_bytes(inside) + (", shared" if self.shared_bytes else ""),
            human_bytes(inside // self.chunks if self.shared_bytes and self.chunks > 1 else self.chunk_bytes),
            self.gradient,
        )


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
class Planned:
    """Layers of a memory plan that do the same.

    Attributes:
        layers: how many.
        again: what their backward passes make again, beside casts: "nothing", "norms", "3 mm + attention" (with the norms); and
            "MLP un-chunked" where there are no loops, which would make their inside again (that is not counted here).
        kept_bytes: that one layer keeps, its first rows included.
        host_bytes: how many of them in the host's memory.
        flops: floating-point operations that one layer makes again.
        seconds: that they take, by the figures of the device.
    """

    layers: int
    again: str
    kept_bytes: int
    host_bytes: int
    flops: float
    seconds: float

    def __str__(self) -> str:
        there = ""
        if self.host_bytes:
            is_all = self.host_bytes == self.kept_bytes
            there = " on the host" if is_all else f", {human_bytes(self.host_bytes)} of it on the host"
        return (
            f"{self.layers} layers keep {human_bytes(self.kept_bytes)}{there}, make again: {self.again}"
            f" ({self.flops / 1e9:.3g} GFLOP, {self.seconds * 1e3:.3g} ms)"
        )


@dataclasses.dataclass(frozen=True)
class Alive:
    """Values of the same name that are alive together.

    Attributes:
        name: of the nodes that made them, without a number.
        module: path of their modules, a ``*`` for the number of a layer; "" if unknown.
        count, bytes: of all of them.
    """

    name: str
    module: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The bytes alive over a step, beside its inputs, from a walk over the graph of both passes.

    Attributes:
        forward, backward: while each call runs.
        kept: between the two passes.
        largest: what is most at the highest moment, the most first.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    kept: int
    largest: tuple[Alive, ...]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the backward pass of one graph finds kept, and what it makes again.

    Attributes:
        layers: in order of what they keep, the least first.
        budget: bytes that may be allocated at the peak of a step.
        taken: bytes that were when it was planned.
        peak: bytes that will be, as far as the plan sees.
        before, after: the step without it, all kept that is worth keeping, and with it; None where nobody listened when it was made.
    """

    layers: tuple[Planned, ...]
    budget: int
    taken: int
    peak: int
    before: Timeline | None = dataclasses.field(default=None, repr=False)
    after: Timeline | None = dataclasses.field(default=None, repr=False)

    def parts(self) -> dict[str, Any]:
        """For JSON: of the step over time what is alive at its peak."""
        found = dataclasses.asdict(dataclasses.replace(self, before=None, after=None))
        if self.after is not None:
            found["alive_at_peak"] = [dataclasses.asdict(each) for each in self.after.largest]
        return {name: value for name, value in found.items() if name not in ("before", "after")}

    def __str__(self) -> str:
        lines = [f"memory plan: {human_bytes(self.peak)} at the peak, of {human_bytes(self.budget)}"]
        lines += [f"  {each}" for each in self.layers]
        return "\n".join(lines)


@dataclasses.dataclass(repr=False)
class Report:
    """The sum over all graphs of a program.

    Attributes:
        rewrites, refusals: in graph order.
        fits: what fits in one chunk.
        bodies: the ATen text of each body, once, by key.
        graphs: how many graphs were captured.
        seconds: what the passes took.
        stage_seconds: what each stage took, where it had something to do.
        plans: the memory plan of each graph that has one.
        before, after: the code of each graph; "" for both where nothing was rewritten.
    """

    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    refusals: list[Refused] = dataclasses.field(default_factory=list)
    fits: list[Fit] = dataclasses.field(default_factory=list)
    bodies: dict[str, str] = dataclasses.field(default_factory=dict)
    graphs: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    plans: list[MemoryPlan] = dataclasses.field(default_factory=list)
    before: list[str] = dataclasses.field(default_factory=list)
    after: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        """Adds what is in the report of other graphs."""
        self.rewrites += other.rewrites
        self.refusals += other.refusals
        self.fits += other.fits
        self.bodies |= other.bodies
        self.graphs += other.graphs
        self.seconds += other.seconds
        for name, seconds in other.stage_seconds.items():
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + seconds
        self.plans += other.plans
        self.before += other.before
        self.after += other.after

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
        """All of it but the graphs' code, as JSON."""
        return json.dumps({**self.parts(), "bodies": self.bodies}, indent=2)

    def parts(self) -> dict[str, Any]:
        """What :meth:`to_json` says before the bodies' texts."""
        return {
            "graphs": self.graphs,
            "seconds": round(self.seconds, 3),
            "rewrites": [dataclasses.asdict(rewrite) for rewrite in self.rewrites],
            "refusals": [dataclasses.asdict(refused) for refused in self.refusals],
            **({"plans": [plan.parts() for plan in self.plans]} if self.plans else {}),
        }

    def summary(self) -> str:
        """One line: how much of which kind."""
        kinds = sorted({rewrite.kind for rewrite in self.rewrites})
        counts = [f"{sum(r.kind == kind for r in self.rewrites)} {kind}" for kind in kinds]
        saved = sum(r.intermediate_bytes - r.chunk_bytes for r in self.rewrites)
        text = f"rewrote {', '.join(counts) or 'nothing'}; refused {len(self.refusals)}"
        return f"{text}; un-chunked insides would take {human_bytes(saved)} more" if saved else text

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of :data:`COLUMNS`; rewrites of equal layers in one row."""
        groups = grouped(self.rewrites, lambda r: r.name, lambda r: r.cells())
        found = []
        for group in groups:
            kind, what, *cells = group[0].cells()
            found.append((kind, together([r.name for r in group]) + what, *cells))
        return found

    def refused(self) -> list[tuple[str, str, str]]:
        """Kind, name and reason; those of equal layers in one."""
        groups = grouped(self.refusals, lambda r: r.name, lambda r: (r.kind, re.sub(r"_\d+\b", "", r.reason)))
        return [(group[0].kind, together([r.name for r in group]), group[0].reason) for group in groups]

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows()] if self.rewrites else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines += [f"refused {kind} {name}: {reason}" for kind, name, reason in self.refused()]
        lines += [str(plan) for plan in self.plans]
        lines.append(f"{self.graphs} graph(s): {self.summary()}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.graphs} graph(s): {self.summary()}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        table = [f"<tr>{''.join(f'<th>{name}</th>' for name in COLUMNS)}</tr>"]
        table += [
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows()
        ]
        refused = [
            f"<li>refused {kind} <code>{html.escape(name)}</code>: {html.escape(reason)}</li>"
            for kind, name, reason in self.refused()
        ]
        return "".join(
            (
                f"<p>{html.escape(repr(self)[1:-1])}</p>",
                f"<table>{''.join(table)}</table>" if self.rewrites else "",
                f"<ul>{''.join(refused)}</ul>" if refused else "",
            )
        )


COLUMNS = ("kind", "name", "rows", "chunks", "inside", "a chunk", "gradient")


def human_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
