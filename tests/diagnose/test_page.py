"""``mst-fx diff --html``: what the page says, and that a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import nn

import mst_fx
from mst_fx.cli import main as cli
from mst_fx.diagnose.findings import Diagnosis, Line, Memory
from mst_fx.diagnose.page import make_page
from mst_fx.report import Refused, human_bytes
from tests.helpers import SMALL_CHUNKS, ToyLM, report_of, token_batch

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_VOID = ("meta", "br", "line", "circle", "path")

needs_browser = pytest.mark.skipif(
    _CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"
)


class _Page(HTMLParser):
    """Checks that tags nest, and gathers text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == [], "a tag is left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def having(self, *classes: str) -> list[dict[str, str]]:
        wanted = set(classes)
        return [
            attributes for _, attributes in self.found if wanted <= set(attributes.get("class", "").split())
        ]


class ToyAttention(nn.Module):
    """Layers with attention and MLPs, and a head with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Embedding(96, 32)
        self.mixes = nn.ModuleList(nn.Linear(32, 96) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4)
        )
        self.head = nn.Linear(32, 96)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        x = self.entry(labels)
        for mix, mlp in zip(self.mixes, self.mlps, strict=True):
            q, k, v = mix(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.fixture(scope="module")
def report() -> Diagnosis:
    return report_of(ToyLM(layers=2), None, **token_batch(2, 120))


@pytest.fixture(scope="module")
def text(report: Diagnosis) -> str:
    return make_page("a toy <script>alert(1)</script>", report)


@pytest.mark.slow
def test_everything_is_in_it(report: Diagnosis, text: str) -> None:
    page = _Page(text)
    said = " ".join(page.text)
    assert report.rewrites and all(rewrite.name in said for rewrite in report.rewrites)
    for kind in ("mlp", "vocab"):
        loops = [r for r in report.rewrites if r.kind == kind]
        assert len(page.having("region", kind, "came")) == len(loops), "each loop is highlighted once"
        assert len(page.having("region", kind, "went")) >= len(loops)
    assert "loop of 15 × 16 rows" in said
    assert all(f'id="body-{key}"' in text for key in report.bodies)
    targets = {attributes["href"] for tag, attributes in page.found if tag == "a"}
    assert targets == {f"#body-{key}" for key in report.bodies}
    assert "estimate" in said and "no measurement" in said


def test_nothing_else_is_needed(text: str) -> None:
    page = _Page(text)
    assert not re.search(r"https?:|//cdn|@import|url\(", text)
    assert not [
        tag for tag, attributes in page.found if "src" in attributes or tag in ("link", "img", "iframe")
    ]
    assert "prefers-color-scheme: dark" in text


def test_what_models_say_is_escaped(text: str) -> None:
    assert "<script>alert" not in text and "a toy &lt;script&gt;" in text
    evil = Diagnosis(refusals=[Refused("<q1>", "<q2>", "a <q3> & more")])
    evil.lines_before = evil.lines_after = [(Line("<q4>", "<q5>", "f(<q6>)", "<q7>", "<q8>", 0),)]
    page = make_page("", evil)
    assert "<q" not in page and all(f"&lt;q{i}&gt;" in page for i in (1, 2, 3, 5, 6, 7, 8))


def test_chart_has_the_peaks(report: Diagnosis, text: str) -> None:
    ((_, chart),) = [x for x in _Page(text).found if x[0] == "svg"]
    before, after = report.memory_before.peak, report.memory_after.peak
    assert (
        chart["aria-label"] == f"memory over a step: before {human_bytes(before)}, after {human_bytes(after)}"
    )
    heights = {}
    for name in ("before", "after"):
        (path,) = re.findall(rf'<path class="{name}" d="([^"]+)"', text)
        heights[name] = [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", path)]
    floor = max(heights["before"])
    ratio = (floor - min(heights["after"])) / (floor - min(heights["before"]))
    assert ratio == pytest.approx(after / before, abs=0.01), "heights are to scale"


def test_no_gradient_no_backward() -> None:
    model, inputs = ToyLM(layers=1), token_batch(2, 120)

    with torch.no_grad():
        page = make_page("no gradient", report_of(model, None, **inputs))
    assert "backward</text>" not in page and "forward</text>" in page
    assert "nothing to estimate" in make_page("empty", Diagnosis())


def test_memory_of_graphs_in_turn() -> None:
    first, second = Memory((3, 2), (4,), 2), Memory((5,), (6,), 1)
    assert first.then(second) == Memory((3, 2, 7), (8, 4), 3)


@pytest.fixture(scope="module")
def planned() -> Diagnosis:
    model = ToyAttention()
    labels = torch.randint(96, (2, 256))
    roomy = mst_fx.explain(model, {**SMALL_CHUNKS, "memory": "8GiB"})(labels)
    (plan,) = roomy.plans
    assert plan.before is not None
    # Less than with all kept and loops in chunks, by a fifth.
    budget = plan.taken + int(0.8 * max(*plan.before.forward, *plan.before.backward))
    return mst_fx.explain(model, {**SMALL_CHUNKS, "memory": budget})(labels)


@pytest.mark.slow
def test_a_plan_has_a_curve_and_what_is_alive_at_its_peak(planned: Diagnosis) -> None:
    text = make_page("planned", planned)
    page = _Page(text)
    (plan,) = planned.plans
    assert plan.before is not None and plan.after is not None and len(planned.captured) == 1
    heights = {}
    for name in ("before", "after", "planned"):
        (path,) = re.findall(rf'<path class="{name}" d="([^"]+)"', text)
        heights[name] = min(float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", path))
    assert heights["before"] < heights["after"] < heights["planned"], "y grows downwards"
    peak = max(*plan.after.forward, *plan.after.backward)
    assert plan.taken + peak == plan.peak
    assert f"planned {human_bytes(peak)}" in text
    shown = page.having("alive")
    assert len(shown) == 3 and ["open" in each for each in shown] == [False, False, True]
    said = " ".join(page.text)
    for one in plan.after.largest:
        assert one.name in said and human_bytes(one.bytes) in said


@pytest.mark.slow
def test_what_is_alive_adds_up(planned: Diagnosis) -> None:
    (plan,) = planned.plans
    for line in (plan.before, plan.after, *planned.captured):
        assert line is not None
        peak = max(*line.forward, *line.backward)
        sizes = [one.bytes for one in line.largest]
        assert sizes == sorted(sizes, reverse=True) and 0 < len(sizes) <= 5
        assert peak / 3 < sum(sizes) <= peak
        assert 0 < line.kept <= peak
    said = json.loads(planned.to_json())["plans"][0]
    assert {"before", "after"}.isdisjoint(said) and len(said["alive_at_peak"]) <= 5


@pytest.mark.slow
def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.html"
    arguments = ["diff", "LlamaForCausalLM", "--seq", "512", "--checkpointing"]
    assert cli.main([*arguments, "--html", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    text = path.read_text()
    page = _Page(text)
    names = [f"model.layers.{i}.mlp" for i in range(2)]
    assert all(f"<code>{name}</code>: " in text for name in names), "a region in each checkpointed layer"
    assert len(page.having("region", "mlp", "came")) == 2
    first = re.findall(
        r'<div class="region attention came"><div class="head">.*?</div>\s*<div[^>]*><b>(\w+)<', text
    )
    assert [name.startswith("attention_default") for name in first] == [True, True], "the op, not its getitem"
    assert cli.main([*arguments, "--html", str(tmp_path / "no" / "out.html")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


# A real browser

_TRY = """<script>
document.getElementById("toggle").click();
const box = document.getElementById("chart").getBoundingClientRect();
const at = {clientX: box.left + box.width / 2, clientY: box.top + 50};
document.getElementById("chart").dispatchEvent(new PointerEvent("pointermove", at));
document.body.dataset.width = document.documentElement.scrollWidth;
</script></body>"""


def _chromium(*arguments: str) -> str:
    assert _CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1400"]
    done = subprocess.run(
        [_CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.browser
@needs_browser
def test_a_browser_runs_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", _TRY))
    dom = _chromium("--virtual-time-budget=2000", "--dump-dom", f"file://{path}")
    assert re.search(r'id="readout">here: before [\d.]+ [KM]iB, after [\d.]+ [KM]iB<', dom)
    assert ">fold all<" in dom
    folded = re.findall(r"<details class=[^>]*>", dom.split("Bodies of the loops")[0])
    assert folded and all("open" in tag for tag in folded)
    assert int(re.findall(r'data-width="(\d+)"', dom)[0]) <= 1200, "nothing sticks out at the right"


# In a frame: headless windows are not as narrow as a telephone.
_MEASURE = """<script>
const right = Math.max(...[...document.querySelectorAll("td, th, pre, .line, .tile, text")]
  .filter((x) => x.getClientRects().length).map((x) => x.getBoundingClientRect().right));
const left = Math.min(...[...document.querySelectorAll("text")].filter((x) => x.getClientRects().length).map((x) => x.getBoundingClientRect().left));
const heights = [...document.querySelectorAll("text")].filter((x) => x.getClientRects().length).map((x) => x.getBoundingClientRect().height);
const cut = [...document.querySelectorAll("td, .line, .plan")].filter((x) => x.scrollWidth > x.clientWidth + 1 && x.clientWidth).map((x) => x.outerHTML.slice(0, 200));
parent.postMessage({ right, left, cut, least: Math.min(...heights), wide: document.documentElement.scrollWidth }, "*");
</script></body>"""
_FRAME = """<body><iframe src="page.html" style="border:0;width:{width}px;height:2000px"></iframe><script>
addEventListener("message", (event) => { document.body.dataset.found = JSON.stringify(event.data); });
</script></body>"""


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut(text: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(text.replace("</body>", _MEASURE))
    (tmp_path / "frame.html").write_text(_FRAME.replace("{width}", str(width)))
    dom = _chromium("--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'frame.html'}")
    found = json.loads(html.unescape(re.findall(r'data-found="([^"]*)"', dom)[0]))
    assert found["wide"] <= width and found["right"] <= width and found["left"] >= 0, found
    assert found["cut"] == [], "columns that are cut, or have to be scrolled"
    assert found["least"] >= 10, "labels of the chart, in pixels"


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize(("scheme", "background"), [(1, (255, 255, 255)), (0, (20, 23, 26))])
def test_a_browser_shows_it(text: str, tmp_path: Path, scheme: int, background: tuple[int, ...]) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(text)
    _chromium(f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", f"file://{path}")
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
    assert tuple(pixels[2, 2]) == background
    curves = {1: ((194, 65, 12), (15, 118, 110)), 0: ((251, 146, 60), (45, 212, 191))}[scheme]
    for color in curves:
        assert (abs(pixels - color).sum(-1) <= 6).sum() > 100, f"no curve in {color}"
