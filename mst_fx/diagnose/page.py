"""``mst-fx diff --html``: one self-contained page about a report.

The graphs before and after side by side, aligned by the names of their nodes, regions and what did not change
folded; the estimate of the memory of a step as a chart; refusals and findings.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from string import Template

from mst_fx.diagnose.findings import Diagnosis, Line, Memory
from mst_fx.report import Rewrite, human_bytes

_SHOWN = 4  # unchanged nodes in a row that are not worth folding
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 880, 300, 78, 26, 34  # of the chart, and its margins


def make_page(title: str, report: Diagnosis) -> str:
    """A page of HTML that needs nothing else: no network, light and dark.

    Args:
        report: of :func:`~mst_fx.explain` or :func:`~mst_fx.watch`.
    """
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        script=_SCRIPT,
        tiles="".join(_tiles(report)),
        chart=_chart(report.memory_before, report.memory_after),
        findings="".join(_findings(report)),
        rewrites=_rewrites(report),
        graphs="".join(_graphs(report)),
        bodies="".join(_bodies(report)),
    )


def _tiles(report: Diagnosis) -> Iterator[str]:
    before, after = report.memory_before.peak, report.memory_after.peak
    if before:
        note = "estimated peak of a step above parameters and their gradients"
        yield _tile(f"{human_bytes(before)} → {human_bytes(after)}", note)
    kinds = sorted({rewrite.kind for rewrite in report.rewrites})
    counts = [f"{sum(r.kind == kind for r in report.rewrites)} {kind}" for kind in kinds]
    yield _tile(str(len(report.rewrites)), f"rewritten: {', '.join(counts) or 'nothing'}")
    yield _tile(str(len(report.refusals)), "refused")
    yield _tile(str(report.graphs), "graphs captured")


def _tile(number: str, note: str) -> str:
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(note)}</span></div>'


# The chart


def _chart(before: Memory, after: Memory) -> str:
    top = max(before.peak, after.peak)
    if not top:
        return "<p>nothing to estimate</p>"
    ticks = _ticks(top)
    full = ticks[-1]
    parts = []
    for tick in ticks:
        y = _y(tick, full)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{human_bytes(tick)}</text>')
    has_backward = bool(before.backward or after.backward)
    for name, start, end in _phases(has_backward):
        x = _x((start + end) / 2)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{name}</text>')
    if has_backward:
        parts.append(
            f'<line class="middle" x1="{_x(0.5):.1f}" x2="{_x(0.5):.1f}" y1="{_TOP}" y2="{_y(0, full)}"/>'
        )
    curves = {"before": _curve(before, has_backward), "after": _curve(after, has_backward)}
    for name, curve in curves.items():
        parts.append(f'<path class="{name}" d="{_path(curve, full)}"/>')
    for name, memory in (("before", before), ("after", after)):
        x, y = max(curves[name], key=lambda point: point[1])
        anchor = "end" if x > 0.7 else "start"
        label = f"{name}: peak {human_bytes(memory.peak)}"
        parts.append(f'<circle class="{name}" cx="{_x(x):.1f}" cy="{_y(y, full):.1f}" r="3.5"/>')
        shift = -8 if anchor == "end" else 8
        parts.append(
            f'<text class="peak {name}" x="{_x(x) + shift:.1f}" y="{_y(y, full) - 7:.1f}" '
            f'text-anchor="{anchor}">{label}</text>'
        )
    # What the script needs to read values off: fractions of the step, and bytes.
    data = json.dumps({name: [[round(x, 4), y] for x, y in curve] for name, curve in curves.items()})
    return (
        f'<figure><svg id="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" data-left="{_LEFT}" '
        f'aria-label="memory over a step: before {human_bytes(before.peak)}, after {human_bytes(after.peak)}" '
        f"data-curves='{data}'>{''.join(parts)}"
        f'<line id="cursor" y1="{_TOP}" y2="{_y(0, full):.1f}" visibility="hidden"/></svg>'
        '<figcaption><i class="key before"></i>before <i class="key after"></i>after '
        '<output id="readout"></output><br>An <b>estimate</b> from a walk over the graph, above inputs, '
        "parameters and their gradients: what eager autograd would keep. Fused kernels keep less. It is no measurement."
        "</figcaption></figure>"
    )


def _ticks(top: int) -> list[int]:
    """From 0 to a round number above ``top``: 1, 2 or 5 times a power of two of bytes, in about four steps."""
    step = next(
        int(factor * 2.0**power)
        for power in itertools.count(0, 10)
        for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500)
        if factor * 2.0**power * 5 >= top
    )
    return list(range(0, top + step, step))


def _phases(has_backward: bool) -> list[tuple[str, float, float]]:
    return [("forward", 0, 0.5), ("backward", 0.5, 1)] if has_backward else [("forward", 0, 1)]


def _curve(memory: Memory, has_backward: bool) -> list[tuple[float, int]]:
    """(fraction of the step, bytes): forward is the first half, backward the second."""
    points = [(0.0, 0)]
    values = (memory.forward, memory.backward)
    for (_, start, end), half in zip(_phases(has_backward), values, strict=False):
        width = end - start
        points += [(start + width * (i + 1) / len(half), value) for i, value in enumerate(half)]
    return [*points, (1.0, 0)]


def _path(curve: Sequence[tuple[float, int]], full: int) -> str:
    corners = [f"{_x(x):.1f},{_y(value, full):.1f}" for x, value in curve]
    return f"M{' L'.join(corners)} Z"


def _x(fraction: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 8) * fraction


def _y(value: float, full: int) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / full


# The lists


def _findings(report: Diagnosis) -> Iterator[str]:
    for finding in report.findings:
        yield (
            f'<div class="finding"><b>{escape(finding.cause)}</b> {escape(finding.evidence)}'
            f"<div>fix: {escape(finding.fix)}</div></div>"
        )
    for refused in report.refusals:
        yield (
            f'<div class="refused"><b>refused</b> {escape(refused.kind)} <code>{escape(refused.name)}</code>: '
            f"{escape(refused.reason)}</div>"
        )


def _rewrites(report: Diagnosis) -> str:
    head = "".join(
        f"<th>{name}</th>" for name in ("kind", "name", "rows", "chunks", "inside", "a chunk", "gradient")
    )
    rows = "".join(
        f'<tr><td><i class="key {r.kind}"></i>{r.kind}</td><td><code>{escape(r.name)}</code>{_remark(r)}</td>'
        f"<td>{r.rows:,}</td><td>{r.chunks:,} × {r.chunk_rows:,}</td><td>{human_bytes(r.intermediate_bytes)}</td>"
        f"<td>{human_bytes(r.chunk_bytes)}</td><td>{r.gradient}</td></tr>"
        for r in report.rewrites
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else "<p>none</p>"


def _remark(rewrite: Rewrite) -> str:
    text = "logits deferred" if rewrite.deferred else rewrite.form
    return f" <span>({escape(text)})</span>" if text else ""


def _bodies(report: Diagnosis) -> Iterator[str]:
    for key, text in report.bodies.items():
        names = [rewrite.name for rewrite in report.rewrites if rewrite.body == key]
        yield (
            f'<details id="body-{key}"><summary><code>{key[:8]}</code> one chunk of {escape(", ".join(names))}</summary>'
            f"<pre>{escape(text.strip())}</pre></details>"
        )


# The graphs side by side


def _graphs(report: Diagnosis) -> Iterator[str]:
    pairs = list(zip(report.lines_before, report.lines_after, strict=True))
    for index, (before, after) in enumerate(pairs):
        title = f"graph {index}: {len(before)} nodes → {len(after)}"
        yield f'<section class="graph"><h3>{title}</h3><div class="sides">'
        yield "<div>before</div><div>after</div>"
        yield from _aligned(before, after, report.rewrites)
        yield "</div></section>"


def _aligned(before: Sequence[Line], after: Sequence[Line], rewrites: Sequence[Rewrite]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(
        a=[(x.key, x.text) for x in before], b=[(x.key, x.text) for x in after], autojunk=False
    )
    for tag, start, end, new_start, new_end in matcher.get_opcodes():
        old, new = before[start:end], after[new_start:new_end]
        if tag == "equal":
            yield _row("".join(_unchanged(old, start)), "".join(_unchanged(new, start)))
            continue
        yield _row("".join(_went(old, new, rewrites)), "".join(_came(new, old, rewrites)))


def _row(left: str, right: str) -> str:
    return f'<div class="side">{left}</div><div class="side">{right}</div>'


def _unchanged(lines: Sequence[Line], run: int) -> Iterator[str]:
    if len(lines) <= _SHOWN:
        yield from map(_line, lines)
        return
    yield f'<details class="same" data-run="{run}"><summary>{len(lines)} nodes unchanged</summary>'
    yield from map(_line, lines)
    yield "</details>"


def _went(old: Sequence[Line], new: Sequence[Line], rewrites: Sequence[Rewrite]) -> Iterator[str]:
    stay = {line.key for line in new}
    for rewrite, group in itertools.groupby(old, lambda line: _rewrite_of(line, old, rewrites, "before")):
        lines = list(group)
        if rewrite is not None:
            summary = (
                f"<b>{rewrite.kind}</b> <code>{escape(rewrite.name)}</code>: {_count(lines)}, "
                f"inside {human_bytes(rewrite.intermediate_bytes)}"
            )
            yield f'<details class="region {rewrite.kind} went"><summary>{summary}</summary>'
        elif len(lines) > _SHOWN:
            yield f'<details class="went"><summary>{_count(lines)} that nobody reads any more</summary>'
        for line in lines:
            yield _line(line, "" if line.key in stay else "went")
        if rewrite is not None or len(lines) > _SHOWN:
            yield "</details>"


def _came(new: Sequence[Line], old: Sequence[Line], rewrites: Sequence[Rewrite]) -> Iterator[str]:
    known = {line.key for line in old}
    owners = [_rewrite_of(line, [*old, *new], rewrites, "after") for line in new]
    for i in reversed(range(len(new) - 1)):
        if owners[i] is None and new[i].key not in known:
            owners[i] = owners[i + 1]  # an op of several results, before the result that took a node's place
    for rewrite, group in itertools.groupby(zip(owners, new, strict=True), lambda pair: pair[0]):
        if rewrite is not None:
            body = f' <a href="#body-{rewrite.body}">{rewrite.body[:8]}</a>' if rewrite.body else ""
            chunk = human_bytes(rewrite.chunk_bytes)
            what = f"loop of {rewrite.chunks:,} × {rewrite.chunk_rows:,} rows, a chunk {chunk}"
            if rewrite.chunks == 1:
                what = rewrite.form or rewrite.why
            head = f"<b>{rewrite.kind}</b> {escape(what)}{body}"
            yield f'<div class="region {rewrite.kind} came"><div class="head">{head}</div>'
        for _, line in group:
            yield _line(line, "" if line.key in known else "came")
        if rewrite is not None:
            yield "</div>"


def _count(lines: Sequence[Line]) -> str:
    return f"{len(lines)} node{'s' if len(lines) > 1 else ''}"


def _rewrite_of(line: Line, around: Sequence[Line], rewrites: Sequence[Rewrite], side: str) -> Rewrite | None:
    """The rewrite a node belongs to: by its name and operands, and by the layer where layers look alike."""
    named = [r for r in rewrites if _is_among(line, r.before if side == "before" else r.after)]
    modules = [x.module for x in around if x.key.rpartition(".")[0] == line.key.rpartition(".")[0]]
    near = [r for r in named if any(m.startswith(r.name) for m in modules)]
    return next(iter(near or named), None)


def _is_among(line: Line, nodes: Sequence[str]) -> bool:
    """Whether a node is one of ``%linear : [num_users=1] = …(args = (%x, %weight))``, by name and an operand."""
    for text in nodes:
        name, *operands = re.findall(r"%(\w+)", text)
        if name == line.name and (not operands or set(operands) & set(line.operands)):
            return True
    return False


def _line(line: Line, kind: str = "") -> str:
    style = f' style="padding-left:{1 + 1.2 * line.depth:.1f}em"' if line.depth else ""
    return (
        f'<div class="line {kind}" title="{escape(line.module)}"{style}><b>{escape(line.name)}</b> = '
        f"{escape(line.text)} <i>{escape(line.shape)}</i></div>"
    )


_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2024; --dim: #63696f; --line: #dfe2e6; --soft: #f5f6f8;
  --went: #fdeeee; --came: #e9f7ee; --before: #c2410c; --after: #0f766e; --mlp: #2563eb; --vocab: #9333ea;
  --attention: #b45309; --warn: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e6e8ea; --dim: #9aa1a8; --line: #31363c;
  --soft: #1c2024; --went: #3a1f20; --came: #163325; --before: #fb923c; --after: #2dd4bf; --mlp: #60a5fa;
  --vocab: #c084fc; --attention: #fbbf24; --warn: #352c14; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 24px; background: var(--bg); color: var(--fg);
  font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 16px; } h2 { font-size: 16px; margin: 32px 0 8px; }
h3 { font-size: 14px; font-weight: 600; }
code, pre, .line { font: 12px/1.55 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { background: var(--soft); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 20px; } .tile span, td span, figcaption { color: var(--dim); font-size: 13px; }
figure { margin: 0; max-width: 960px; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--dim); } svg .grid { stroke: var(--line); }
svg .middle, #cursor { stroke: var(--dim); stroke-dasharray: 3 3; }
path.before { fill: var(--before); fill-opacity: .14; stroke: var(--before); stroke-width: 1.5; }
path.after { fill: var(--after); fill-opacity: .35; stroke: var(--after); stroke-width: 1.5; }
circle.before { fill: var(--before); } circle.after { fill: var(--after); }
svg text.peak { font-weight: 600; paint-order: stroke; stroke: var(--bg); stroke-width: 4px; }
text.peak.before { fill: var(--before); } text.peak.after { fill: var(--after); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 6px 0 8px; }
td .key { margin-left: 0; } .key.before { background: var(--before); } .key.after { background: var(--after); }
.key.mlp { background: var(--mlp); } .key.vocab { background: var(--vocab); }
.key.attention { background: var(--attention); } #readout { margin-left: 16px; color: var(--fg); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th { text-align: left; color: var(--dim); }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); font-weight: normal; }
.finding, .refused { background: var(--warn); border-radius: 6px; padding: 8px 12px; margin: 6px 0; }
.sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); column-gap: 16px; }
.sides > div:not(.side) { color: var(--dim); border-bottom: 1px solid var(--line); }
.side { border-bottom: 1px solid var(--line); padding: 1px 0; }
.line { padding: 0 1em; overflow-wrap: anywhere; } .line b { font-weight: 600; } .line i { color: var(--dim); }
.line.went { background: var(--went); } .line.came { background: var(--came); }
summary { cursor: pointer; padding: 2px 8px; } details.same > summary { color: var(--dim); }
.region { border-left: 4px solid var(--dim); border-radius: 4px; margin: 3px 0; } .region > .head { padding: 2px 8px; }
.region.mlp { border-color: var(--mlp); } .region.vocab { border-color: var(--vocab); }
.region.attention { border-color: var(--attention); }
.region.went > summary, details.went > summary { background: var(--went); }
.region.came > .head { background: var(--came); }
a { color: var(--mlp); } pre { overflow-x: auto; background: var(--soft); padding: 12px; border-radius: 6px; }
button { font: inherit; color: var(--fg); background: var(--soft); border: 1px solid var(--line); border-radius: 6px; }
@media (max-width: 700px) { body { padding: 12px; } .sides { column-gap: 6px; } }
"""

_SCRIPT = """
const chart = document.getElementById("chart");
if (chart) {
  const curves = JSON.parse(chart.dataset.curves), left = +chart.dataset.left;
  const cursor = document.getElementById("cursor"), readout = document.getElementById("readout");
  const width = chart.viewBox.baseVal.width;
  const at = (curve, x) => curve.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best)[1];
  const human = (n) => { for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return n.toFixed(unit === "B" ? 0 : 1) + " " + unit; n /= 1024; } };
  chart.addEventListener("pointermove", (event) => {
    const x = (event.clientX - chart.getBoundingClientRect().left) / chart.clientWidth * width;
    const step = (x - left) / (width - left - 8);
    if (step < 0 || step > 1) return;
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
    readout.textContent = "here: before " + human(at(curves.before, step)) + ", after " + human(at(curves.after, step));
  });
}
const toggle = document.getElementById("toggle");
toggle.addEventListener("click", () => {
  const all = [...document.querySelectorAll(".graph details")], open = all.some((d) => !d.open);
  all.forEach((d) => { d.open = open; });
  toggle.textContent = open ? "fold all" : "unfold all";
});
// Both sides of what did not change open together, so that they stay aligned.
document.addEventListener("toggle", (event) => {
  const side = event.target.closest(".side");
  if (!side || !event.target.classList.contains("same")) return;
  for (const other of [side.previousElementSibling, side.nextElementSibling]) {
    const twin = other && other.querySelector(":scope > details.same");
    if (twin && twin.dataset.run === event.target.dataset.run) twin.open = event.target.open;
  }
}, true);
addEventListener("hashchange", () => { const d = document.getElementById(location.hash.slice(1)); if (d) d.open = true; });
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>mst-fx: $title</title><style>$style</style></head><body>
<h1>$title</h1>
<div class="tiles">$tiles</div>
<h2>Memory over a step</h2>
$chart
<h2>Rewrites</h2>
$rewrites
$findings
<h2>Graphs <button id="toggle">unfold all</button></h2>
$graphs
<h2>Bodies of the loops</h2>
$bodies
<script>$script</script></body></html>
""")
