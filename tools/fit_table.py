"""What ``mst-fx fit`` says of some models and sizes of devices, as tables (benchmarks/fit.md); no device is needed.

python -m tools.fit_table --out benchmarks/fit
"""

from __future__ import annotations

import argparse
import dataclasses
import time
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
MODEL, RANK = "llama3-8b", 16
CHOICES_AT = 65536


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the first table.

    Attributes:
        lora: rank; 0: all is trained.
        host: GiB; 0: none.
        park: whether AdamW's states are parked.
    """

    card: str
    lora: int = 0
    host: int = 0
    park: bool = False


# With memory of the host where without it something fits, and where parked states let it.
ROWS = (
    *(Row(card, lora) for lora in (0, RANK) for card in CARDS),
    *(Row(card, host=128) for card in ("80", "141")),
    *(Row(card, RANK, 128) for card in CARDS),
    *(Row(card, host=host, park=True) for host in (128, 512) for card in ("48", "80", "141")),
)


def predict(row: Row) -> dict[str, Any]:
    """What is said of it, and the seconds that it took to say so."""
    memory, device = CARDS[row.card]
    start = time.perf_counter()
    subject = subject_of(MODEL, Shape(dtype=torch.bfloat16), row.lora)
    found = forecast(subject, Setting(device, int(memory * GIB), row.host * GIB, park=row.park))
    given = {"memory": memory, "device": device, "took": time.perf_counter() - start}
    return {"model": MODEL, **dataclasses.asdict(row), **given, **_parts(found)}


def _parts(found: Forecast) -> dict[str, Any]:
    ways = [dataclasses.asdict(way) for way in found.ways]
    return {"ways": ways, "resident": found.resident, "parked": found.parked, "stepping": found.stepping}


def choices(model: str) -> list[dict[str, Any]]:
    """What a layer may keep."""
    found = forecast(subject_of(model, Shape(dtype=torch.bfloat16)), Setting("H200", 2**50), [CHOICES_AT])
    return [{"model": model, **dataclasses.asdict(choice)} for choice in found.choices]


def table(results: list[dict[str, Any]]) -> str:
    """A line a model and card: the longest of each way, the plan's step there, and what the forecast took."""
    columns = ("model", "trained", "card, GiB", "given", "host, GiB", *WAYS)
    lines: list[Any] = [(*columns, "the plan's step there, s", "of", "the forecast took, s")]
    for r in results:
        planned = r["ways"][-1]
        step = next((p["seconds"] for p in planned["points"] if p["seq"] == planned["longest"]), None)
        lines.append(
            (
                r["model"],
                f"LoRA, rank {r['lora']}" if r["lora"] else f"all, AdamW{', parked' * r['park']}",
                r["card"],
                f"{r['memory']:.1f}",
                r["host"] or "–",
                *(f"{way['longest']:,}" if way["longest"] else "–" for way in r["ways"]),
                "–" if step is None else f"{step:,.0f}" if step >= 1000 else f"{step:.3g}",
                r["device"],
                f"{r['took']:.0f}",
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
    of_layer = choices(MODEL)
    results: list[dict[str, Any]] = []
    for row in ROWS:
        results.append(predict(row))
        print(results[-1], flush=True)
        text = f"{table(results)}\n\n## What a layer of {MODEL} may keep\n\n{table_of_choices(of_layer)}"
        write_results(arguments.out.parent, arguments.out.name, [*results, *of_layer], text)


if __name__ == "__main__":
    main()
