"""What people read of a sweep: docs/models.md, and lines for a terminal."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from tools.sweep.attempt import Outcome

KINDS = ("mlp", "vocab", "attention")

_LEAD = """\
# Models

Is your model covered? Every architecture with a causal language model in transformers was made tiny and trained
for one step with `backend="mst"`, beside eager. Where a cell has a number, so many places of that kind were
rewritten. The last column says what was left as it was, and why; such places run as they would
without mst-fx. Architectures that share code (most fine-tunes and forks of Llama, Qwen, Mistral, Gemma) are
covered as the one they share it with. For the very model that you train, `mst-fx explain` says the same;
[Limits](limits.md) has the reasons at length. By Inductor's kernels on a GPU:
[models-h200.md](../benchmarks/models-h200.md).
"""

_SECTIONS = (
    ("Everything is rewritten", lambda outcome: outcome.is_whole),
    ("Rewritten in part", lambda outcome: outcome.status == "right" and bool(outcome.rewrites)),
    ("Nothing is rewritten", lambda outcome: outcome.status == "right"),
    ("Wrong, or failing under mst alone", lambda outcome: outcome.status in ("wrong", "crash")),
    ("Not tried", lambda outcome: True),
)


def page(outcomes: Sequence[Outcome], source: str) -> str:
    """docs/models.md: lead, versions and command, and a table for each kind of end.

    Args:
        source: the name of the file that the outcomes come from.
    """
    versions = sorted({", ".join(f"{k} {v}" for k, v in outcome.versions.items()) for outcome in outcomes})
    parts = [
        _LEAD,
        f"Tried with {'; '.join(versions)}:\n\n<!-- not run: hours; tests/tools/test_sweep.py tries some -->\n"
        f"```sh\npython -m tools.sweep {source} --jobs 2\n```\n",
    ]
    left = sorted(outcomes, key=lambda outcome: outcome.name)
    for title, belongs in _SECTIONS:
        group = [outcome for outcome in left if belongs(outcome)]
        left = [outcome for outcome in left if outcome not in group]
        if group:
            parts.append(f"## {title} ({len(group)})\n\n{_table(group)}\n")
    return "\n".join(parts)


def _table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| architecture | attention | MLPs | head | left as it was, and why |", "| --- " * 5 + "|"]
    for outcome in outcomes:
        counts = [str(outcome.rewrites.get(kind) or "–") for kind in ("attention", "mlp", "vocab")]
        family = "" if outcome.family == "causal" else f" ({outcome.family})"
        lines.append(f"| `{outcome.name}`{family} | {' | '.join(counts)} | {_cell(_left(outcome))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<=\d)\.(?=\d)", "·", text).replace("|", "\\|") or "–"


def _left(outcome: Outcome) -> str:
    """What was left, each reason once, with how many places it is true of."""
    if outcome.status != "right":
        found = f"{outcome.status}: {outcome.why}".strip(": ")
        return f"{found}; the plain compiler: {outcome.peer}" if outcome.peer else found
    reasons: collections.Counter[str] = collections.Counter()
    for kind, name, reason, cause in outcome.refusals:
        place = re.sub(r"\.\d+(?=\.|$)", "", name).split("layers.")[-1]
        reasons[f"experts `{place}`" if cause == "experts" else f"{kind} `{place}`: {_plain(reason)}"] += 1
    if outcome.given:
        reasons["attention whose mask or bias, of S² elements, is no formula and stays"] = outcome.given
    if outcome.silent:
        reasons[f"{len(outcome.silent)} values of S×S elements"] += 1
    return "; ".join(f"{count} × {text}" if count > 1 else text for text, count in reasons.items())


def _plain(reason: str) -> str:
    """A reason without the names of nodes and folders: ``linear_3 (linear) …`` → ``linear …``."""
    reason = re.sub(r"\b\w+ \((\w+)\)", r"\1", reason)
    reason = re.sub(r"\S*[/\\]", "", reason)
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)[:140]


def line(outcome: Outcome) -> str:
    """An architecture in one line, for a terminal."""
    counts = " ".join(f"{kind} {outcome.rewrites.get(kind, 0)}" for kind in KINDS)
    flags = [f"{len(outcome.silent)} silent S×S"] if outcome.silent else []
    flags += [f"doubtful: {', '.join(outcome.doubtful)}"] if outcome.doubtful else []
    flags += [outcome.why] if outcome.why else []
    flags += [f"the plain compiler: {outcome.peer}"] if outcome.peer else []
    numbers = f"{counts} graphs {outcome.graphs} error {outcome.error:.0e} {outcome.seconds:.0f} s"
    return (
        f"{outcome.name:24} {outcome.status:8} {numbers} refused {len(outcome.refusals)} {'; '.join(flags)}"
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    statuses = collections.Counter(outcome.status for outcome in outcomes)
    counted = [f"{count:4} {status}" for status, count in statuses.most_common()]
    for text, found in (
        ("rewritten wholly", [o for o in outcomes if o.is_whole]),
        ("with S×S values and no refusal", [o for o in outcomes if o.silent]),
        ("with refusals of what is no MLP and no head", [o for o in outcomes if o.doubtful]),
    ):
        counted.append(f"{len(found):4} {text}")
    return "\n".join(counted)
