"""The longest sequence that trains on this GPU: predicted from two short runs, then tried.

    python -m tools.max_context --only mst+ckpt --out bench-out          # Llama3-8B, 32 layers, AdamW
    python -m tools.max_context --only eager,mst+ckpt --verify none      # bytes a token, and the prediction
    python -m tools.max_context --only mst+ckpt --resume bench-out/max-context.json   # what is known is not run
    python -m tools.max_context --only mst+ckpt --optimizer in-backward --cap 74.5    # in 80 GB
    python -m tools.max_context --model gemma2-9b --extrapolate-layers 4,8 --seq 131072,163840 --verify none
    python -m tools.max_context --only "mst[memory=auto]" --optimizer parked --layers 4 --just 1000448   # one step, no prediction
    python -m tools.max_context --cpu-smoke                              # the script's own test

Parameters, gradients and AdamW states of the parameters' type (bfloat16) are allocated, and the step is
made. Each run is the first step of a new process, one sequence long, its states allocated before; seconds
are without those that Dynamo and Inductor report for compiling, but include autotuning and the compiling
of loop bodies.

Prediction: the peaks of forward, backward and optimizer step grow with the length, each on its own line,
through two lengths (``--seq``); the first line that reaches the usable bytes is the limit. Usable is what is
free when the process starts, less half a GiB that kernels loaded later take, or ``--cap``; torch's allocator
gets no more. Short lengths mislead: with no more rows than a chunk nothing is chunked, and mst's chunks of the head grow with the length once that makes V / d_model of
them (131,072 tokens of Llama3-8B); while gradients take more than what is saved for the backward pass,
backward peaks at its end, later at its start. A backward line flatter than what is saved is therefore warned
about. ``--extrapolate-layers`` makes long short runs cheap: bytes are taken as linear in the layers, too.

Verification: a step at the predicted length (after each failure 2 % less), and one that runs out of memory
at 1.05 times that. If that one trains, it is the answer, and 1.05 times it is tried. A shorter length
that ran out of memory stands for a longer one. ``--budget`` bounds all runs together; the table says what
was not tried.

Bound: (usable - parameters - gradients - states) / (layers x hidden x 2 bytes), which is one bfloat16 hidden
row a layer a token. Gradients that come while saved rows go do not add to them, so that more than
the bound is possible.

``--optimizer parked`` keeps AdamW's states on the host but while it steps (``mst_fx.park``); its first step, which makes them, is in the seconds. ``--just`` makes a step at each length that
it names, and predicts nothing.

``--optimizer in-backward`` steps a parameter when its gradient is there and drops the gradient, and the
bound counts one gradient, the largest. A compiled backward pass hands over all gradients at its end,
though: they are alive together, whatever the hooks do. "At the first gradient" is what is allocated
above parameters and states when the first hook runs: in eager mode saved rows and one gradient, in a compiled
model all gradients. Liger's tiled MLP has a gradient a tile, and is stepped as often: its loss is another one
from the second step on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.contenders import CONTENDERS, find_contender
from tools.bench.models import MODELS
from tools.bench.tables import GIB, numbers, write_results
from tools.max_context.forecast import Result, bound, predict, round_down, usable_bytes
from tools.max_context.search import default_lengths, last_line, search, short_runs, trained
from tools.max_context.tables import tables
from tools.max_context.train import measure
from tools.meters.apart import call_apart

# Fragmentation would differ between contenders without it.
_ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}
DEFAULT_CONTENDERS = "eager,eager+ckpt,liger-tiled+ckpt,mst+ckpt"


class _Runs:
    """Runs :func:`measure` in new processes, within the budget; what earlier files tell is not run again."""

    def __init__(self, arguments: argparse.Namespace, changed: Callable[[], None]) -> None:
        self._arguments = arguments
        self._changed = changed
        self._end = time.monotonic() + arguments.budget
        self._known: list[Result] = []
        for path in arguments.resume:
            for entry in json.loads(path.read_text())["results"]:
                self._known += [*entry["tried"], *entry["attempts"]]

    def __call__(
        self, into: list[Result], contender: str, layers: int, seq: int, cap: float | None
    ) -> Result:
        arguments = self._arguments
        request = {
            "model": arguments.model,
            "contender": contender,
            "layers": layers,
            "seq": seq,
            "optimizer": arguments.optimizer,
            "kernel": arguments.kernel,
            "lora": arguments.lora,
            "options": arguments.options if find_contender(contender, CONTENDERS).way == "mst" else {},
            "cap": cap,
            "device": "cpu" if arguments.cpu_smoke else "cuda",
            "steps": arguments.steps,
            "alive": arguments.alive,
        }
        for run in [*into, *self._known]:
            if run["request"] == request and "error" not in run:
                result, is_known = run, True
                break
        else:
            result, is_known = {**self._run(request), "request": request}, False
        if result not in into:
            into.append(result)
        print(_describe(contender, result) + (" (known)" if is_known else ""), flush=True)
        self._changed()
        return result

    def _run(self, request: dict[str, Any]) -> Result:
        left = self._end - time.monotonic()
        case = {"layers": request["layers"], "seq": request["seq"]}
        if left < 15:
            return {**case, "error": "not run: the time is used up"}
        start = time.monotonic()
        try:
            result = call_apart(measure, timeout=left, env=_ENVIRONMENT, **request)
        except RuntimeError as error:
            result = {**case, "error": str(error)}
        return {**result, "process_seconds": time.monotonic() - start}


def _describe(contender: str, result: Result) -> str:
    text = f"{contender:18s} {result['layers']:3d} layers {result['seq']:8,d} tokens  "
    seconds = f"{result.get('process_seconds', 0):.0f} s"
    if "error" in result:
        return f"{text}failed: {last_line(result['error'])}"
    if "oom" in result:
        return f"{text}out of memory: {result['oom']}, process {seconds}"
    peak = max(phase["peak_bytes"] for phase in result["phases"].values())
    return f"{text}peak {peak / GIB:.2f} GiB, step {result['step_seconds']:.1f} s, process {seconds}"


def examine(entry: Result, runs: _Runs, arguments: argparse.Namespace) -> None:
    """Fills a contender's entry: short runs, forecast, verification."""
    name, layers, cap, multiple = entry["contender"], entry["layers"], entry["cap"], arguments.multiple
    if arguments.just:
        for seq in arguments.just:
            runs(entry["attempts"], name, layers, seq, cap)
        entry["note"] = "nothing predicted"
        return
    lengths = arguments.seq or default_lengths(find_contender(name, CONTENDERS))
    points: list[Result] = []
    for count in arguments.extrapolate_layers or [layers]:
        found = short_runs(
            lengths,
            # Without the cap: peaks do not depend on it.
            functools.partial(lambda count, seq: runs(entry["tried"], name, count, seq, None), count),
            multiple,
        )
        right = sorted((run for run in found if trained(run)), key=lambda run: run["seq"])
        if len(right) < 2:
            entry["note"] = "no two lengths trained"
            if "error" in found[-1]:
                entry["note"] += f": {last_line(found[-1]['error'])}"
            return
        points += right
    entry["points"], entry["gpu"] = points, points[-1]["gpu"]
    usable = usable_bytes(points[-1], cap)
    forecast = predict(points, layers, usable)
    hidden = MODELS[arguments.model][1]["hidden_size"]
    length = forecast.length * (1 - arguments.margin)
    entry |= {
        "usable": usable,
        "forecast": dataclasses.asdict(forecast),
        "bound": bound(forecast, usable, layers, hidden, arguments.optimizer),
        "predicted": round_down(length, multiple) if math.isfinite(length) else 0,
    }
    start = arguments.length or entry["predicted"]
    if arguments.verify == "none" or start <= 0:
        entry["note"] = "" if start > 0 else "does not fit at any length"
        return
    result = search(
        start,
        lambda seq: runs(entry["attempts"], name, layers, seq, cap),
        above=arguments.verify == "both",
        multiple=multiple,
    )
    entry["found"], entry["note"] = dataclasses.asdict(result), result.note


def main() -> None:
    arguments = _arguments()
    names = arguments.only.split(",")
    for name in names:
        try:
            find_contender(name, CONTENDERS)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    entries: list[Result] = []

    def save() -> None:
        # Without write_results, which asks CUDA for the GPU's name: this process must hold nothing of it yet.
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": {}, "results": entries}, indent=2)
        (arguments.out / f"{arguments.name}.json").write_text(text + "\n")

    runs = _Runs(arguments, save)
    for name in names:
        entry: Result = {
            "contender": name,
            "model": arguments.model,
            "layers": arguments.layers or MODELS[arguments.model][1]["num_hidden_layers"],
            "optimizer": f"{arguments.optimizer}, {arguments.kernel}",
            "cap": arguments.cap * GIB if arguments.cap else None,
            "verify": arguments.verify,
            "tried": [],
            "points": [],
            "attempts": [],
            "note": "",
        }
        entries.append(entry)
        examine(entry, runs, arguments)
        save()
    text = tables(entries, arguments.beside)
    write_results(arguments.out, arguments.name, entries, text)
    print(f"\n{text}")


def _pair(text: str) -> tuple[int, int]:
    low, high = sorted(numbers(text))
    if not 0 < low < high:
        raise ValueError
    return low, high


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="llama3-8b")
    parser.add_argument(
        "--only",
        help=f"of {', '.join(CONTENDERS)}, and variants of them, mst[memory=auto]; {DEFAULT_CONTENDERS}",
    )
    parser.add_argument("--beside", help="the contender whose length others are divided by (the first)")
    parser.add_argument("--layers", type=int, help="of the model (as published)")
    parser.add_argument("--extrapolate-layers", type=_pair, help="two numbers of layers for the short runs")
    parser.add_argument("--seq", type=_pair, help="tokens of the two short runs (by contender)")
    parser.add_argument(
        "--just", type=numbers, help="tokens, with commas: a step at each, and nothing predicted"
    )
    parser.add_argument("--length", type=int, help="where verification starts, instead of the prediction")
    parser.add_argument("--verify", choices=("none", "step", "both"), default="both")
    parser.add_argument("--optimizer", choices=("adamw", "parked", "in-backward"), default="adamw")
    parser.add_argument("--lora", type=int, default=0, help="rank of PEFT's LoRA on all linear layers (none)")
    parser.add_argument("--kernel", choices=("fused", "loop"), default="fused", help="loop: foreach=False")
    parser.add_argument("--cap", type=float, help="GiB that torch may take (80 GB: 74.5)")
    parser.add_argument("--margin", type=float, default=0.005, help="of the prediction, left free")
    parser.add_argument("--multiple", type=int, default=1024, help="lengths are multiples of it")
    parser.add_argument("--steps", type=int, default=1, help="the last one is timed")
    parser.add_argument(
        "--alive", action="store_true", help="say the largest blocks at a run's peak (in the JSON)"
    )
    parser.add_argument("--options", type=json.loads, default={}, help="of mst, as JSON")
    parser.add_argument("--budget", type=float, default=560, help="seconds all runs may take together")
    parser.add_argument("--resume", type=Path, action="append", default=[], help="a JSON file of before")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--name", default="max-context", help="of the files in --out")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny model on the CPU, bytes made up")
    arguments = parser.parse_args()
    if arguments.cpu_smoke:
        arguments.model, arguments.multiple = "tiny", 64
        arguments.seq = arguments.seq or (256, 384)
        arguments.cap = arguments.cap or 5 / 1024
        arguments.options = {"inner": "aot_eager", "chunk_rows": 64, **arguments.options}
    arguments.only = arguments.only or ("eager,mst+ckpt" if arguments.cpu_smoke else DEFAULT_CONTENDERS)
    arguments.beside = arguments.beside or arguments.only.split(",")[0]
    return arguments


if __name__ == "__main__":
    main()
