"""Time and memory of training on one GPU, mst beside its peers, in one run.

    python -m tools.bench --seq 16384,32768                       # Llama3-8B, 8 layers, all contenders
    python -m tools.bench --model mistral-7b --window 4096 --seq 65536 --only mst+ckpt
    python -m tools.bench --documents 4096 --seq 65536 --only mst+ckpt
    python -m tools.bench --lora 16 --seq 32768 --only eager+ckpt,liger+ckpt,mst+ckpt     # PEFT's LoRA
    python -m tools.bench --level mlp --seq 65536                 # one MLP; --level head: one head with its loss
    python -m tools.bench --level experts --model qwen3-30b-a3b   # norm, router and experts of one layer
    python -m tools.bench --model gpt-oss-20b --layers 4 --only "mst+ckpt,eager+ckpt[attention=flex_attention;experts=batched_mm]"
    python -m tools.bench --only mst+ckpt --seq 32768 --kernels mst+ckpt --alive mst+ckpt  # where time and memory go
    python -m tools.bench --only "mst,mst[chunk_rows=8192],mst[mode=reduce-overhead]"      # variants
    python -m tools.bench --cpu                                   # a small size that runs anywhere

Each contender has a process of its own that builds, compiles and warms up. Then they take turns: a turn is
one step that does not count and ``--steps`` that do, and in ``--rounds`` rounds everybody has a turn. Who
waits holds no parameters (they are made anew from the seed). A step is forward and backward of a model with
random bfloat16 weights on the text of Python's standard library, gradients made anew
(``set_to_none=True``), no optimizer. What fails or outlasts its time is reported, and the others go on.

``liger-kernel`` and ``cut-cross-entropy`` are needed for the contenders that are named after them, PEFT for LoRA.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.bench.contenders import BLOCKS, CONTENDERS, Contender, find_contender, model_flops
from tools.bench.models import MODELS, config_of
from tools.bench.runner import Case, make_runner
from tools.bench.tables import GIB, markdown_table, numbers, write_results
from tools.draw import draw
from tools.meters.apart import Worker

# Of the H200 for bf16 matmuls of random data, measured; what the arithmetic column is held against.
PEAK_FLOPS = 790e12


class _Entrant:
    """A contender in a process of its own, and what it has measured.

    Attributes:
        error: why it takes part no more.
    """

    def __init__(self, name: str, contender: Contender, case: Case, folder: Path) -> None:
        self.name = name
        self.result: dict[str, Any] = {}
        self.turns: list[dict[str, float]] = []
        self.error = ""
        log = folder / f"{case.level}-{case.seq}-{name}.log"
        self._worker = Worker(make_runner, contender, case, log=log)
        self.ask, self.stop = self._worker.ask, self._worker.stop

    def answer(self, limit: float) -> Any:
        """The result; None after an error or ``limit`` seconds."""
        try:
            return self._worker.answer(limit)
        except RuntimeError as error:
            self.error = str(error)
            return None


def compare(
    case: Case,
    contenders: dict[str, Contender],
    arguments: argparse.Namespace,
    save: Callable[[Sequence[_Entrant]], None],
) -> list[_Entrant]:
    """Runs all contenders of a case and fills their results; ``save`` gets them after each round."""
    end = time.monotonic() + arguments.budget
    arguments.out.mkdir(parents=True, exist_ok=True)
    finished: list[_Entrant] = []
    for names in _batches(list(contenders), arguments.together):
        workers = [_Entrant(name, contenders[name], case, arguments.out) for name in names]
        for worker in workers:
            worker.ask("warm_up")
        for worker in workers:
            found = worker.answer(min(arguments.limit, end - time.monotonic()))
            if found is not None:
                worker.result = found
            print(f"  {worker.name}: {found or worker.error.strip().splitlines()[-1]}", flush=True)
        finished += workers
    for _ in range(arguments.rounds):
        for worker in _alive(finished):
            worker.ask("turn", arguments.steps)
            worker.turns += worker.answer(end - time.monotonic()) or []
        save(finished)
    for kind in ("kernels", "alive"):
        for worker in _alive(finished):
            if worker.name not in getattr(arguments, kind).split(","):
                continue
            worker.ask("profile", kind)
            text = worker.answer(end - time.monotonic())
            path = arguments.out / f"{kind}-{case.level}-{case.seq}-{worker.name}.txt"
            path.write_text(f"{text or worker.error}\n")
    for worker in finished:
        worker.stop()
    return finished


def _alive(workers: Sequence[_Entrant]) -> Iterator[_Entrant]:
    return (worker for worker in workers if not worker.error)


def _batches(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def summary(worker: _Entrant, case: Case) -> dict[str, Any]:
    """One contender's line: bytes, seconds, and ``error`` if it has none."""
    found = {"contender": worker.name, **dataclasses.asdict(case), **worker.result}
    if worker.error:
        found["error"] = worker.error
    if worker.turns:
        seconds = [turn["seconds"] for turn in worker.turns]
        peak = max(turn["peak_bytes"] for turn in worker.turns)
        before = max(turn["before_bytes"] for turn in worker.turns)
        found |= {
            "step_seconds": statistics.median(seconds),
            "fastest_seconds": min(seconds),
            "slowest_seconds": max(seconds),
            "peak_bytes": peak,
            "above_before_bytes": peak - before,
            "above_before_and_gradients_bytes": peak - before - worker.result["gradient_bytes"],
            "steps": len(seconds),
        }
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results of one case as Markdown."""
    first = results[0]
    case = Case(**{field.name: first[field.name] for field in dataclasses.fields(Case)})
    # Arithmetic is counted for one MLP and full causal attention.
    is_dense = not hasattr(config_of(case.model, case.seq), "num_experts_per_tok")
    special = case.documents or case.window or case.lora or not is_dense
    head = ["contender", "s a step (fastest – slowest)", "peak GiB", "above parameters", "and gradients"]
    head += ["TFLOP/s", "of peak"] if case.level == "model" and not special else []
    lines: list[Sequence[Any]] = [
        [*head, "first step s", "norm" if case.level in ("mlp", "experts") else "loss", "gradient norm"]
    ]
    for r in results:
        if "step_seconds" not in r:
            lines.append([f"{r['contender']} (failed)", *[None] * (len(lines[0]) - 1)])
            continue
        spread = f"{r['step_seconds']:.4f} ({r['fastest_seconds']:.4f} – {r['slowest_seconds']:.4f})"
        memory = [r[f"{part}_bytes"] / GIB for part in ("peak", "above_before", "above_before_and_gradients")]
        speed = []
        if "TFLOP/s" in head:
            config = config_of(case.model, case.seq, **case.overrides)
            again = r["contender"].startswith("mst")
            flops = [model_flops(config, case.seq, recompute_mlp=x) for x in (False, again)]
            speed = [flops[0] / r["step_seconds"] / 1e12, flops[1] / r["step_seconds"] / PEAK_FLOPS]
        rest = [r["first_step_seconds"], f"{r['loss']:.5f}", f"{r['gradient_norm']:.5g}"]
        lines.append([r["contender"], spread, *memory, *speed, *rest])
    title = f"{case.model}, {case.level}" + (f", {case.layers} layers" if case.level == "model" else "")
    more = [f"window {case.window}"] * bool(case.window)
    more += [f"documents of {case.documents}"] * bool(case.documents)
    more += [f"LoRA of rank {case.lora}"] * bool(case.lora)
    more += [f"dropout {case.lora_dropout}"] * bool(case.lora_dropout)
    failed = [f"{r['contender']}:\n\n```\n{r['error'].strip()[-1500:]}\n```" for r in results if "error" in r]
    return "\n\n".join(
        [f"### {', '.join([title, f'{case.seq:,} tokens', *more])}", markdown_table(lines), *failed]
    )


def _save(
    out: Path,
    name: str,
    case: Case,
    earlier: Sequence[dict[str, Any]],
    tables: Sequence[str],
    workers: Sequence[_Entrant],
) -> None:
    """Writes what is there so far, so that a run that is cut short leaves it."""
    mine = [summary(worker, case) for worker in workers]
    write_results(out, name, [*earlier, *mine], "\n\n".join([*tables, table(mine)]))


def main() -> None:
    arguments = _arguments()
    known = CONTENDERS if arguments.level == "model" else BLOCKS[arguments.level]
    names = arguments.only.split(",") if arguments.only else list(known)
    try:
        contenders = {name: find_contender(name, known) for name in names}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if arguments.cpu:
        tiny = "tiny-moe" if arguments.level == "experts" else "tiny"
        arguments.model, arguments.layers, arguments.seq = tiny, 2, [1024]
    name = arguments.name or arguments.level
    results: list[dict[str, Any]] = []
    tables: list[str] = []
    for seq in arguments.seq:
        settings = {
            key: getattr(arguments, key)
            for key in ("level", "model", "layers", "window", "documents", "lora", "lora_dropout")
        }
        case = Case(seq=seq, device="cpu" if arguments.cpu else "cuda", **settings)
        print(f"{case}", flush=True)

        save = functools.partial(_save, arguments.out, name, case, results, tables)
        workers = compare(case, contenders, arguments, save)
        save(workers)
        results += [summary(worker, case) for worker in workers]
        tables.append(table(results[-len(workers) :]))
        print(tables[-1], flush=True)
    if len(arguments.seq) > 1:
        draw(results, arguments.out / f"{name}.png", f"{arguments.model}, {arguments.layers} layers")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--level", choices=("model", "mlp", "experts", "head"), default="model")
    add("--model", choices=sorted(MODELS), default="llama3-8b", help="whose shapes")
    add("--layers", type=int, default=8)
    add("--seq", type=numbers, default=[16384, 32768], help="tokens, separated by commas")
    add("--window", type=int, default=0, help="keys a sliding window shows")
    add("--documents", type=int, default=0, help="tokens of each of the packed documents")
    add("--lora", type=int, default=0, help="rank of PEFT's LoRA on all linear layers but the head")
    add("--lora-dropout", type=float, default=0.0, help="of the adapters' inputs")
    add("--only", help=f"contenders, separated by commas: {', '.join(CONTENDERS)}; of blocks: {BLOCKS_TEXT}")
    add("--rounds", type=int, default=2)
    add("--steps", type=int, default=3, help="steps of a turn that count")
    add("--together", type=int, default=1, help="contenders that compile at the same time; memory permitting")
    add("--kernels", default="", help="contenders of which to write what runs in a step")
    add("--alive", default="", help="contenders of which to write what is alive at the peak")
    add("--limit", type=float, default=180, help="seconds a contender may take to warm up")
    add("--budget", type=float, default=1800, help="seconds a table may take")
    add("--out", type=Path, default=Path("bench-out"))
    add("--name", default="", help="of the files with the results")
    add("--cpu", action="store_true", help="a small size on the CPU")
    return parser.parse_args()


BLOCKS_TEXT = "; ".join(f"{level}: {', '.join(known)}" for level, known in BLOCKS.items())


if __name__ == "__main__":
    main()
