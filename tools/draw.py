"""Pictures of what ``tools.bench`` measured: memory and time of a step against the length of the sequence.

    python -m tools.draw benchmarks/h200.json --out docs/h200.png
    python -m tools.draw --longest benchmarks/max-context-h200.json --out docs/longest-h200.png

The second is the longest sequence that was trained on, of each model.
``tools.bench`` draws what it measured at several lengths by itself; this is for files that hold several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30

# Peers in muted colours, mst in one that stands out; checkpointing is a broken line.
_STYLES = {
    "eager": ("tab:gray", "-"),
    "eager+ckpt": ("tab:gray", "--"),
    "inductor": ("tab:brown", "-"),
    "liger+ckpt": ("tab:blue", "--"),
    "liger-tiled+ckpt": ("tab:cyan", "--"),
    "mst": ("tab:red", "-"),
    "mst+ckpt": ("darkred", "--"),
}
_NAMES = {
    "eager": "eager",
    "eager+ckpt": "eager, checkpointed",
    "liger-tiled+ckpt": "Liger, tiled MLPs, checkpointed",
}
_NAMES |= {"mst+ckpt": "mst, checkpointed"}


@contextlib.contextmanager
def panels(path: Path, title: str, across: str, labels: tuple[str, str]) -> Iterator[Any]:
    """Two axes beside each other, of powers of two ``across``; the legend, and the PNG, are made when the context ends."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, label in zip(axes, labels, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel(across)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    yield axes
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(results: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Two panels, peak GiB and seconds a step against tokens, a line a contender.

    Args:
        results: as in the JSON that it writes; contenders without a style, and failures, are left out.
        path: of the PNG.
    """
    lengths = sorted({r["seq"] for r in results})
    with panels(path, title, "tokens", ("peak GiB", "s a step")) as axes:
        for panel, (key, unit) in zip(axes, (("peak_bytes", GIB), ("step_seconds", 1.0)), strict=True):
            for name, (color, line) in _STYLES.items():
                mine = sorted(
                    (r["seq"], r[key] / unit) for r in results if r["contender"] == name and key in r
                )
                if mine:
                    panel.plot(*zip(*mine, strict=True), color=color, linestyle=line, marker="o", label=name)
            panel.set_yscale("log", base=2)
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.yaxis.set_major_formatter("{x:g}")


def longest(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Of each model the tokens of the longest step that ran, by contender, as ``tools.max_context`` writes them."""
    found: dict[str, dict[str, int]] = {}
    for result in results:
        if result.get("found"):
            of_model = found.setdefault(result["model"], {})
            of_model[result["contender"]] = max(
                of_model.get(result["contender"], 0), result["found"]["length"]
            )
    return found


def draw_longest(lengths: dict[str, dict[str, int]], path: Path, title: str) -> None:
    """A bar for each model and contender, as long as its longest sequence.

    Args:
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.4), layout="constrained")
    place, ticks = 0.0, []
    for model, of_model in lengths.items():
        start = place
        for name in (name for name in _NAMES if name in of_model):
            tokens, color = of_model[name], _STYLES[name][0]
            axes.barh(place, tokens, color=color, height=0.86)
            axes.text(tokens, place, f" {tokens:,}  {_NAMES[name]}", va="center", fontsize=9)
            place += 1
        ticks.append(((start + place - 1) / 2, model))
        place += 0.7
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(max(of_model.values()) for of_model in lengths.values()))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def whole_steps(tables: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """A model's plain training steps, without window, documents or LoRA, that did not fail; one a contender and length."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for table in tables.values():
        for result in table["results"]:
            special = any(result.get(key) for key in ("window", "documents", "lora"))
            is_plain = result["level"] == "model" and result["model"] == model and not special
            if is_plain and "error" not in result:
                found.setdefault((result["contender"], result["seq"]), result)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON with the tables of several runs")
    parser.add_argument("--longest", action="store_true", help="FILE is that of tools.max_context")
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--out", type=Path, default=Path("bench.png"))
    arguments = parser.parse_args()
    found = json.loads(arguments.file.read_text())
    if arguments.longest:
        gpu = found["environment"]["gpu"]
        title = f"The longest sequence that trains on one {gpu}, tokens: all layers, AdamW, bfloat16"
        draw_longest(longest(found["results"]), arguments.out, title)
        return
    results = whole_steps(found["tables"], arguments.model)
    if not results:
        raise SystemExit(f"{arguments.file} has no training step of {arguments.model}")
    gpu = found["environment"].get("gpu", "CPU")
    draw(
        results,
        arguments.out,
        f"{arguments.model}'s shape, {results[0]['layers']} layers, bfloat16, one {gpu}",
    )


if __name__ == "__main__":
    main()
