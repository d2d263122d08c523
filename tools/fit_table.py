"""What ``mst-fx fit`` says of some models and sizes of devices, as tables (benchmarks/fit.md); no device is needed.

python -m tools.fit_table --out benchmarks/fit
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch

from mst_fx.diagnose.fit_model import subject_of
from mst_fx.diagnose.model_of import Shape
from mst_fx.fit.forecast import WAYS, Forecast, Setting, forecast
from tools.bench.tables import GIB, markdown_table, write_results

# What a card has for tensors, GiB, and the device whose seconds are said.
CARDS = {"24": (23.0, "H100"), "48": (47.0, "H100"), "80": (79.0, "H100"), "141": (138.8, "H200")}
SUBJECTS = (("llama3-8b", 0), ("llama3-8b", 16))
HOSTS = (0, 128)  # GiB; with some the largest cards alone, and all parameters
CHOICES_AT = 65536


def predict(model: str, lora: int, card: str, host: int) -> dict[str, Any]:
    """A line of the first table."""
    memory, device = CARDS[card]
    subject = subject_of(model, Shape(dtype=torch.bfloat16), lora)
    found = forecast(subject, Setting(device, int(memory * GIB), host * GIB))
    given = {"card": card, "memory": memory, "device": device, "host": host}
    return {"model": model, "lora": lora, **given, **_parts(found)}


def _parts(found: Forecast) -> dict[str, Any]:
    return {"ways": [dataclasses.asdict(way) for way in found.ways], "resident": found.resident}


def choices(model: str) -> list[dict[str, Any]]:
    """What a layer may keep."""
    found = forecast(subject_of(model, Shape(dtype=torch.bfloat16)), Setting("H200", 2**50), [CHOICES_AT])
    return [{"model": model, **dataclasses.asdict(choice)} for choice in found.choices]


def table(results: list[dict[str, Any]]) -> str:
    """A line a model and card: the longest of each way, and the plan's step there."""
    lines: list[Any] = [
        ("model", "trained", "card, GiB", "given", "host, GiB", *WAYS, "the plan's step there, s", "of")
    ]
    for r in results:
        planned = r["ways"][-1]
        step = next((p["seconds"] for p in planned["points"] if p["seq"] == planned["longest"]), None)
        lines.append(
            (
                r["model"],
                f"LoRA, rank {r['lora']}" if r["lora"] else "all, AdamW",
                r["card"],
                f"{r['memory']:.1f}",
                r["host"] or "–",
                *(f"{way['longest']:,}" if way["longest"] else "–" for way in r["ways"]),
                "–" if step is None else f"{step:.3g}",
                r["device"],
            )
        )
    return markdown_table(lines)


def table_of_choices(found: list[dict[str, Any]]) -> str:
    lines: list[Any] = [("made again", "bytes a token a layer", "MFLOP again a token a layer", "at tokens")]
    lines += [
        (c["again"], f"{c['bytes'] / c['seq']:,.0f}", f"{c['flops'] / c['seq'] / 1e6:.1f}", f"{c['seq']:,}")
        for c in found
    ]
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out/fit"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    of_layer = choices("llama3-8b")
    results: list[dict[str, Any]] = []
    for host, (model, lora), card in itertools.product(HOSTS, SUBJECTS, CARDS):
        if not host or (not lora and card in ("80", "141")):
            results.append(predict(model, lora, card, host))
            print(results[-1], flush=True)
            text = (
                f"{table(results)}\n\n## What a layer of llama3-8b may keep\n\n{table_of_choices(of_layer)}"
            )
            write_results(arguments.out.parent, arguments.out.name, [*results, *of_layer], text)


if __name__ == "__main__":
    main()
