"""How long a sequence trains by the GPU's memory, as ``mst-fx fit`` says it (benchmarks/fit-cards.md); no device is needed.

python -m tools.fit_cards --out benchmarks/fit-cards
python -m tools.fit_cards --models llama3.2-1b
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mst_fx.diagnose.fit_model import subject_of
from mst_fx.diagnose.model_of import Shape
from mst_fx.fit.forecast import WAYS, Forecast, Setting, forecasts
from tools.bench.tables import GIB, markdown_table, write_results

# Of a card's GiB, those that tensors may take: the driver, the context and the allocator take about one.
CARDS = {12: 11.0, 16: 15.0, 24: 23.0, 40: 39.0, 48: 47.0, 80: 79.0, 141: 138.8}
MODELS = ("llama3.2-1b", "llama3.2-3b", "llama3-8b")
RANK = 16
_DEVICE = "H100"  # seconds are not said, and what fits does not hang on it


def predict(model: str, lora: int) -> list[dict[str, Any]]:
    """What is said of a model, for each card."""
    start = time.perf_counter()
    subject = subject_of(model, Shape(dtype=torch.bfloat16), lora)
    found = forecasts(subject, [Setting(_DEVICE, int(memory * GIB)) for memory in CARDS.values()])
    took = time.perf_counter() - start
    return [
        {"model": model, "lora": lora, "card": card, "memory": memory, "took": took, **_parts(each)}
        for (card, memory), each in zip(CARDS.items(), found, strict=True)
    ]


def _parts(found: Forecast) -> dict[str, Any]:
    ways = [{"name": way.name, "longest": way.longest} for way in found.ways]
    return {"ways": ways, **{k: v for k, v in dataclasses.asdict(found).items() if isinstance(v, int)}}


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a model and way, a column a card."""
    lines: list[Any] = [("model", "trained", "way", *(f"{card} GiB" for card in CARDS))]
    for model, lora in dict.fromkeys((r["model"], r["lora"]) for r in results):
        of_model = [r for r in results if (r["model"], r["lora"]) == (model, lora)]
        trained = f"LoRA, rank {lora}" if lora else "all, AdamW"
        for index, way in enumerate(WAYS):
            longest = [r["ways"][index]["longest"] for r in of_model]
            lines.append((model, trained, way, *(f"{n:,}" if n else "–" for n in longest)))
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, default=Path("bench-out/fit-cards"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results: list[dict[str, Any]] = []
    for model in arguments.models.split(","):
        for lora in (0, RANK):
            results += predict(model, lora)
            print(table(results[-len(CARDS) :]), f"{results[-1]['took']:.0f} s", flush=True)
            given = ", ".join(f"{memory} of {card}" for card, memory in CARDS.items())
            write_results(
                arguments.out.parent, arguments.out.name, results, f"GiB given: {given}\n\n{table(results)}"
            )
            gc.collect()


if __name__ == "__main__":
    main()
