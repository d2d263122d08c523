"""What gradient accumulation costs a compiled model: peaks of a first micro-batch, and of a second.

    python -m tools.bench.accumulation --out bench-out/accumulation

A backward pass that was compiled whole hands over all parameter gradients when it ends, so that they are
alive beside the ones from before. Compiled layer by layer (``layer.compile(backend="mst")``), a layer's are
added before the next layer's come. Peaks above the parameters, of a small Llama with gradient checkpointing,
on the CPU, by the exact malloc meter, each way in a process of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tools.bench.models import Shape, make_llama, text_tokens
from tools.bench.tables import MIB, markdown_table, write_results
from tools.meters.cpu import call_metered, malloc_meter

# Wide and short: parameters are what counts.
SHAPE = Shape(hidden=512, intermediate=2048, heads=8, kv_heads=4, vocabulary=4096, layers=8)
OPTIONS = {"chunk_rows": 128, "vocab_chunk_rows": 128}
WAYS = ("eager", "whole", "layers")


def measure(way: str, seq: int) -> dict[str, Any]:
    """Two micro-batches; called in a process of its own under the malloc meter."""
    torch.set_num_threads(1)
    model = make_llama(SHAPE, seq, "cpu", torch.float32, checkpoint=True)
    if way == "whole":
        model.compile(backend="mst", options=OPTIONS)
    elif way == "layers":
        for layer in model.model.layers:
            layer.compile(backend="mst", options=OPTIONS)
    ids = text_tokens(seq, SHAPE.vocabulary).view(1, seq)

    def micro_batch() -> float:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        return float(loss.detach())

    micro_batch()  # compiles
    model.zero_grad(set_to_none=True)
    meter = malloc_meter()
    meter.reset()
    level = meter.current()
    loss = micro_batch()
    gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    first = meter.peak() - level
    meter.reset()
    micro_batch()
    second = meter.peak() - level
    return {"way": way, "gradient": gradient_bytes, "first": first, "second": second, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, default=Path("bench-out/accumulation"))
    arguments = parser.parse_args()
    results = [call_metered(measure, way, arguments.seq, timeout=1200) for way in arguments.ways.split(",")]
    lines: list[Any] = [("compiled", "gradients MiB", "first micro-batch", "second", "of gradients", "loss")]
    for r in results:
        sizes = [f"{r[key] / MIB:.1f}" for key in ("gradient", "first", "second")]
        lines.append((r["way"], *sizes, f"{r['second'] / r['gradient']:.2f}", f"{r['loss']:.6f}"))
    text = markdown_table(lines)
    write_results(arguments.out.parent, arguments.out.name, results, text)
    print(text)


if __name__ == "__main__":
    main()
