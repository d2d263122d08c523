"""What was found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.bench.tables import GIB, markdown_table
from tools.max_context.forecast import Result
from tools.max_context.search import trained


def summary(entry: Result, beside: Result | None = None) -> Sequence[Any]:
    """A contender's line of the first table; ``beside``: the entry its length is divided by."""
    forecast, found = entry.get("forecast"), entry.get("found") or {}
    if not forecast:
        return (entry["contender"], entry["optimizer"], _cap(entry), *[None] * 8, entry["note"], None, None)
    slope = forecast["line"]["slope"]
    seconds = None
    for attempt in entry["attempts"]:
        if attempt["seq"] == found.get("length") and trained(attempt):
            seconds = attempt["step_seconds"]
    length = best_length(entry)
    ratio = None
    if beside is not None and length and (other := best_length(beside)):
        both = found.get("length") and (beside.get("found") or {}).get("length")
        ratio = f"{length / other:.2f} x" + ("" if both else " (predicted)")
    return (
        entry["contender"],
        entry["optimizer"],
        _cap(entry),
        entry["layers"],
        f"{slope:,.0f}",
        f"{slope / entry['layers']:,.0f}",
        f"{entry['bound']:,.0f}",
        f"{entry['predicted']:,}",
        f"{found['length']:,}" if found.get("length") else None,
        seconds,
        _failure(entry["verify"], found),
        entry["note"] or None,
        f"{length / entry['bound']:.3f}" + ("" if found.get("length") else " (predicted)"),
        ratio,
    )


SUMMARY_HEAD = (
    "contender",
    "optimizer",
    "cap GiB",
    "layers",
    "bytes a token",
    "bytes a token a layer",
    "bound",
    "predicted",
    "verified",
    "its step, s",
    "out of memory at 1.05 x",
    "note",
    "share of the bound",
)


def best_length(entry: Result) -> int:
    """Verified if there is one, else predicted; 0 if neither."""
    verified = (entry.get("found") or {}).get("length")
    return int(verified or entry.get("predicted") or 0)


def _failure(verify: str, found: Mapping[str, Any]) -> str:
    if verify != "both" or not found:
        return "not tried"
    if found["length"] is None or found["failed"] is None:
        return "not seen"
    return f"yes, at {found['failed']:,} ({found['failed'] / found['length']:.3f} x)"


def _cap(entry: Result) -> Any:
    return None if entry["cap"] is None else entry["cap"] / GIB


def parts(entry: Result) -> Sequence[Any]:
    """A contender's line of the second table: GiB at the longest length, by what holds them."""
    forecast, length = entry["forecast"], best_length(entry)
    fixed = forecast["line"]["fixed"] - forecast["parameter_bytes"] - forecast["state_bytes"]
    last = entry["points"][-1]
    own = None
    if "optimizer" in last["phases"]:
        phase = last["phases"]["optimizer"]
        own = (phase["peak_bytes"] - phase["before_bytes"]) / GIB
    first = last["at_first_gradient_bytes"]
    return (
        entry["contender"],
        length,
        entry["usable"] / GIB,
        forecast["parameter_bytes"] / GIB,
        forecast["state_bytes"] / GIB,
        forecast["gradient_bytes"] / GIB,
        forecast["phase"],
        fixed / GIB,
        forecast["line"]["slope"] * length / GIB,
        forecast["saved"]["slope"] * length / GIB,
        own,
        None if first is None else f"{first / GIB:.2f} ({last['layers']} layers, {last['seq']:,})",
    )


PARTS_HEAD = (
    "GiB of",
    "tokens",
    "usable",
    "parameters",
    "optimizer states",
    "gradients",
    "peak in",
    "fixed rest (gradients alive at the peak too)",
    "activations (slope x tokens)",
    "of which saved for backward",
    "the optimizer's temporaries",
    "at the first gradient (of)",
)


def runs_table(entry: Result) -> list[Sequence[Any]]:
    """A contender's lines of the third table, one a run."""
    lines: list[Sequence[Any]] = []
    for run in [*entry["tried"], *entry["attempts"]]:
        phases = run.get("phases", {})
        peaks = [phases[name]["peak_bytes"] / GIB if name in phases else None for name in _PHASES]
        lines.append(
            (
                entry["contender"],
                run["layers"],
                run["seq"],
                "trained" if phases else f"out of memory: {run['oom']}" if "oom" in run else "failed",
                phases["backward"]["before_bytes"] / GIB if phases else None,
                *peaks,
                run["reserved_bytes"] / GIB if phases else None,
                *(run.get(part, 0) / GIB if phases else None for part in ("parked_bytes", "lent_bytes")),
                run["retries"] if phases else None,
                run.get("step_seconds"),
                run.get("compile_seconds"),
                f"{run['loss']:.5f}" if phases else None,
                f"{run['gradient_norm']:.5g}" if phases else None,
            )
        )
    return lines


_PHASES = ("forward", "backward", "optimizer")
RUNS_HEAD = (
    "contender",
    "layers",
    "tokens",
    "outcome",
    "after forward GiB",
    *(f"{name} peak" for name in _PHASES),
    "reserved peak",
    "states on the host",
    "kept on the host by the plan",
    "allocator's retries",
    "step s",
    "compile s",
    "loss",
    "gradient norm",
)


def tables(entries: Sequence[Result], beside: str | None) -> str:
    """All of the Markdown."""
    others = {entry["contender"]: entry for entry in entries}
    reference = others.get(beside or "")
    head = (*SUMMARY_HEAD, f"length / {beside}'s")
    known = [entry for entry in entries if entry.get("forecast")]
    text = [f"{entries[0]['model']}; GPU: {entries[0].get('gpu')}" if entries else ""]
    text.append(markdown_table([head, *(summary(entry, reference) for entry in entries)]))
    text.append("What each part takes")
    text.append(markdown_table([PARTS_HEAD, *map(parts, known)]))
    text.append("Runs")
    text.append(markdown_table([RUNS_HEAD, *(row for entry in entries for row in runs_table(entry))]))
    text += [f"{e['contender']}: {w}" for e in known for w in e["forecast"]["warnings"]]
    for entry in entries:
        for run in [*entry["tried"], *entry["attempts"]]:
            if said := run.get("error") or run.get("message"):
                text.append(f"{entry['contender']}, {run['seq']:,}:\n\n```\n{said.strip()[-1500:]}\n```")
    return "\n\n".join(text)
