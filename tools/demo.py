"""Trains a small Llama on long text, eager and under mst: the same losses, a fraction of the memory.

``make demo``, or ``python -m tools.demo``. The tokenizer is trained on the spot, from the source of Python's standard library, which is
also the text. On a GPU, if there is one, sequences are longer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Threads that spin while they wait make everything twice as slow where another program runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib
import torch
import transformers
from matplotlib import pyplot
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from mst_fx.diagnose.model_of import random_model
from mst_fx.report import human_bytes
from tools import corpus
from tools.meters.cpu import Measurement, measure_cpu
from tools.meters.gpu import measure_cuda

matplotlib.use("agg")

VOCABULARY = 16_384
# The first steps of a run compile, and touch memory for the first time.
COLD_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the demo: what fits in a few minutes on the device."""

    device: str
    seq: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    steps: int


ON_CPU = Setup("cpu", seq=8_192, hidden=128, intermediate=512, layers=2, heads=2, steps=12)
ON_CUDA = Setup("cuda", seq=32_768, hidden=1_024, intermediate=4_096, layers=4, heads=8, steps=12)


@dataclasses.dataclass
class Run:
    """One training run.

    Attributes:
        seconds: of each step.
        memory: of the last step, which is not timed; above what was there when it began (weights,
            optimizer state).
    """

    name: str
    losses: list[float]
    seconds: list[float]
    memory: Measurement

    def tokens_per_second(self, seq: int) -> float:
        return seq / statistics.median(self.seconds[COLD_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, help="tokens a sequence")
    parser.add_argument("--steps", type=int, help="steps a run")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results (demo-out)")
    arguments = parser.parse_args()
    setup = ON_CPU
    if torch.cuda.is_available() and not arguments.cpu:
        setup = ON_CUDA
        # What eager's logits take at the full length does not fit in a small GPU.
        if torch.cuda.get_device_properties(0).total_memory < 32 * 2**30:
            setup = dataclasses.replace(setup, seq=setup.seq // 2)
    setup = dataclasses.replace(
        setup, seq=arguments.seq or setup.seq, steps=max(arguments.steps or setup.steps, COLD_STEPS + 2)
    )
    console = Console()
    begin = time.perf_counter()
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        batches = make_batches(setup, progress)
        model = random_model(LlamaForCausalLM, make_config(setup)).to(setup.device)
        runs = [
            train("eager", model, batches, setup, progress),
            train("mst", model, batches, setup, progress),
        ]
    seconds = time.perf_counter() - begin
    show(console, setup, model, runs, seconds)
    save(arguments.out, setup, model, runs, seconds)
    console.print(f"picture and numbers: {arguments.out / 'demo.png'}, {arguments.out / 'demo.json'}")


def make_config(setup: Setup) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setup.hidden,
        intermediate_size=setup.intermediate,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.heads,
        max_position_embeddings=setup.seq,
        use_cache=False,
    )


def make_batches(setup: Setup, progress: Progress) -> list[torch.Tensor]:
    """One batch ``[1, seq]`` of token ids a step, from the standard library's source files."""
    files = corpus.source_files()
    task = progress.add_task("reading Python's library", total=len(files), note="")
    texts = corpus.read(files, lambda: progress.advance(task))
    task = progress.add_task("training the tokenizer", total=1, note=f"{sum(map(len, texts)) / 1e6:.0f} MB")
    tokenizer = corpus.train_tokenizer(texts, VOCABULARY)
    progress.update(task, completed=1, note=f"{tokenizer.get_vocab_size():,} tokens")
    stream = corpus.token_stream(tokenizer, texts, setup.steps * setup.seq)
    return list(torch.tensor(stream).view(setup.steps, 1, setup.seq).to(setup.device))


def train(
    name: str, initial: torch.nn.Module, batches: list[torch.Tensor], setup: Setup, progress: Progress
) -> Run:
    """Trains a copy of a model, one batch a step; the last step runs under the memory meter."""
    model = copy.deepcopy(initial)
    if name == "mst":
        torch._dynamo.reset()
        model.compile(backend="mst")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    task = progress.add_task(
        f"training, {name}", total=len(batches), note="compiling" if name == "mst" else ""
    )
    meter = measure_cuda if setup.device == "cuda" else measure_cpu
    run = Run(name, [], [], Measurement())

    def step(ids: torch.Tensor) -> float:
        with torch.autocast("cuda", torch.bfloat16, enabled=setup.device == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for index, ids in enumerate(batches):
        is_last = index == len(batches) - 1
        start = time.perf_counter()
        with meter() if is_last else contextlib.nullcontext(run.memory) as run.memory:
            run.losses.append(step(ids))
        optimizer.zero_grad(set_to_none=True)
        if not is_last:
            run.seconds.append(time.perf_counter() - start)
        progress.update(task, advance=1, note=f"loss {run.losses[-1]:.3f}")
    if not progress.console.is_terminal:  # where no bar moves
        print(f"trained, {name}: {len(batches)} steps, loss {run.losses[-1]:.3f}", flush=True)
    return run


def loss_difference(runs: list[Run]) -> float:
    """The largest difference of two runs' losses at one step, relative to the first's."""
    return max(abs(a - b) / abs(a) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def show(console: Console, setup: Setup, model: torch.nn.Module, runs: list[Run], seconds: float) -> None:
    table = Table(
        title=f"Llama, {count_parameters(model) / 1e6:.1f} M weights, {setup.layers} layers, vocabulary {VOCABULARY:,},"
        f" sequence {setup.seq:,}, {setup.steps} steps, on {device_name(setup)}",
        caption="memory: peak of a step above weights and optimizer state, gradients included; "
        f"tokens/s: median of the steps after the first {COLD_STEPS}, so without compiling, on a quiet machine; "
        "Δ: the largest difference of the losses of a step, relative; "
        f"all of this took {seconds:.0f} s",
    )
    table.add_column("")
    for name in (
        "peak",
        "tokens/s",
        "first loss",
        "last loss",
        "max. Δ loss",
    ):
        table.add_column(name, justify="right")
    for run in runs:
        difference = f"{loss_difference(runs):.1e}" if run is runs[1] else ""
        table.add_row(
            run.name,
            human_bytes(run.memory.peak_bytes),
            f"{run.tokens_per_second(setup.seq):,.0f}",
            f"{run.losses[0]:.3f}",
            f"{run.losses[-1]:.3f}",
            difference,
        )
    console.print(table)


def device_name(setup: Setup) -> str:
    if setup.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def save(folder: Path, setup: Setup, model: torch.nn.Module, runs: list[Run], seconds: float) -> None:
    """Writes ``demo.json`` and ``demo.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "setup": dataclasses.asdict(setup)
        | {"vocabulary": VOCABULARY, "parameters": count_parameters(model)},
        "device": device_name(setup),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(seconds, 1),
        "max_relative_loss_difference": loss_difference(runs),
        "runs": {
            run.name: {
                "peak_bytes": run.memory.peak_bytes,
                "tokens_per_second": round(run.tokens_per_second(setup.seq), 1),
                "losses": run.losses,
                "step_seconds": [round(s, 3) for s in run.seconds],
            }
            for run in runs
        },
    }
    (folder / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw(folder / "demo.png", setup, runs)
    assert all(math.isfinite(loss) for run in runs for loss in run.losses)


def draw(path: Path, setup: Setup, runs: list[Run]) -> None:
    """The losses of both runs, and their memory over one step."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    styles = {"eager": {"color": "#c0392b", "lw": 2.5}, "mst": {"color": "#2471a3", "lw": 1.5, "ls": "--"}}
    for run in runs:
        left.plot(range(1, len(run.losses) + 1), run.losses, label=run.name, **styles[run.name])
        # Under the meter, time says little: only its order is drawn.
        end = run.memory.timeline[-1][0]
        share = [100 * at / end for at, _ in run.memory.timeline]
        mib = [count / 2**20 for _, count in run.memory.timeline]
        style = {**styles[run.name], "ls": "-", "lw": 1.2}
        right.step(
            share,
            mib,
            where="post",
            label=f"{run.name}, peak {human_bytes(run.memory.peak_bytes)}",
            **style,
        )
        right.fill_between(share, mib, step="post", alpha=0.2, color=style["color"])
    left.set(title="the same losses", xlabel="step", ylabel="loss")
    right.set(
        title="memory over one step", xlabel="% of the step", ylabel="MiB above weights and optimizer state"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(bottom=0)
    figure.suptitle(
        f"Llama, {setup.layers} layers, vocabulary {VOCABULARY:,}, sequence {setup.seq:,}, {device_name(setup)}"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
