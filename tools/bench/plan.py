"""What a memory plan costs and takes: seconds and peak of a step by the bytes that it may take, on a GPU.

    python -m tools.bench.plan --layers 8 --seq 32768,65536 --ways checkpoint,liger+ckpt,same+auto,none,eager,auto \\
        --out bench-out/plan

Each way is a process of its own: ``checkpoint`` is mst with every layer checkpointed, ``attention`` the same with a policy that keeps
attention's results (docs/memory.md), ``none`` mst without checkpointing; a contender of tools.bench is that one; everything else is a value of
the mst option ``memory``, with no checkpointing in the model, and of ``host_memory`` behind a ``+``: ``14GiB+auto``, ``14GiB+64GiB``; ``same`` is the
peak of ``checkpoint`` at that length. ``--copies`` profiles one step more: what copies to the host and back take, and how much of that no kernel hides. Forward and backward pass with fresh gradients, no optimizer; medians of the steps behind the first two.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import mst_fx
from mst_fx.diagnose.model_of import random_model
from mst_fx.ops.arena import ARENA
from tools.bench.contenders import CONTENDERS, loss_function, make_model
from tools.bench.models import CLASSES, MODELS, config_of, text_tokens
from tools.bench.tables import GIB, markdown_table, write_results
from tools.meters.apart import call_apart
from tools.meters.gpu import copies_of

_BY_FLAG = ("checkpoint", "attention")
_BASES = ("checkpoint", "liger+ckpt", "eager")


def keep_attention() -> Any:
    """For ``gradient_checkpointing_kwargs={"context_fn": keep_attention}``: attention's results are kept, all else is made again."""
    return create_selective_checkpoint_contexts([torch.ops.mst_fx.attention.default])


def _planned(way: str, model: str, config: Any) -> torch.nn.Module:
    """A model compiled by mst, whose checkpointing or plan the way says."""
    family, _ = MODELS[model]
    kind = getattr(transformers, f"{CLASSES[family]}ForCausalLM")
    net = random_model(kind, config, device="cuda", dtype=torch.bfloat16, checkpointing=False)
    if way in _BY_FLAG:
        more = {"context_fn": keep_attention} if way == "attention" else {}
        net.gradient_checkpointing_enable({"use_reentrant": False, **more})
    memory, _, host = ("", "", "") if way in (*_BY_FLAG, "none") else way.partition("+")
    net.compile(backend="mst", options={"memory": memory or None, "host_memory": host or "0"})
    return net


def measure(way: str, model: str, layers: int, seq: int, steps: int, copies: bool) -> dict[str, Any]:
    """Steps of one way."""
    config = config_of(model, seq, num_hidden_layers=layers)
    if way in CONTENDERS:
        net = make_model(model, CONTENDERS[way], seq, "cuda", num_hidden_layers=layers)
        loss_of = loss_function(net, CONTENDERS[way])
    else:
        net = _planned(way, model, config)
        loss_of = loss_function(net, CONTENDERS["eager"])  # it is compiled already
    ids = text_tokens(seq, config.vocab_size).view(1, seq).cuda()
    seconds = []

    def step() -> tuple[torch.Tensor, int]:
        before = torch.cuda.memory_allocated()
        loss = loss_of(ids)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return loss.detach(), kept

    with mst_fx.watch() as report:
        for _ in range(steps + 2):
            net.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss, kept = step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    net.zero_grad(set_to_none=True)
    return {
        "model": model,
        "layers": layers,
        "seq": seq,
        "way": way,
        "seconds": statistics.median(seconds[2:]),
        "first_seconds": seconds[0],
        "peak": peak,
        "promised": report.plans[0].peak if report.plans else None,
        "kept": kept,
        "loss": float(loss),
        "copies_ms": copies_of(step) if copies else None,
        "host": ARENA.size,
        "plan": [str(each) for each in report.plans[0].layers] if report.plans else [],
    }


def table(results: list[dict[str, Any]]) -> str:
    """A line a way; ratios against what is compared with at the same length."""
    bases = [base for base in _BASES if any(r["way"] == base for r in results)]
    lines: list[Any] = [
        (
            *("layers", "tokens", "memory", "s", *(f"of {base}" for base in bases)),
            *("peak GiB", "promised", "kept GiB", "on the host", "ms of copies, not hidden", "made again"),
        )
    ]
    for r in results:
        like = {b["way"]: b for b in results if (b["seq"], b["layers"]) == (r["seq"], r["layers"])}
        ratios = [f"{r['seconds'] / like[base]['seconds']:.3f}" if base in like else "" for base in bases]
        promised = f"{r['promised'] / GIB:.2f}" if r["promised"] else ""
        memory = [f"{r[part] / GIB:.2f}" for part in ("kept", "host")]
        copies = "{:.1f}, {:.1f}".format(*r["copies_ms"]) if r["copies_ms"] else ""
        lines.append(
            (
                *(r["layers"], f"{r['seq']:,}", r["way"], f"{r['seconds']:.3f}", *ratios),
                *(f"{r['peak'] / GIB:.2f}", promised, *memory, copies, "; ".join(r["plan"])),
            )
        )
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", default="32768", help="lengths, with commas")
    parser.add_argument("--ways", default="checkpoint,attention,none,auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--copies", action="store_true", help="profile copies to the host and back")
    parser.add_argument("--out", type=Path, default=Path("bench-out/plan"))
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    run = functools.partial(call_apart, measure, timeout=1200)
    for seq in map(int, arguments.seq.split(",")):
        for way in arguments.ways.split(","):
            if way.startswith("same"):
                peak = next(r["peak"] for r in results if r["way"] == "checkpoint" and r["seq"] == seq)
                way = way.replace("same", f"{peak / GIB:.3f}GiB")
            found = run(way, arguments.model, arguments.layers, seq, arguments.steps, arguments.copies)
            print(found, flush=True)
            results.append(found)
            write_results(arguments.out.parent, arguments.out.name, results, table(results))
    print(table(results))


if __name__ == "__main__":
    main()
