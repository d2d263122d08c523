"""Time and memory of training on one GPU, mst beside its peers, in one run.

    python tools/bench.py --seq 16384,32768                       # Llama3-8B, 8 layers, all contenders
    python tools/bench.py --model mistral-7b --window 4096 --seq 65536 --only mst+ckpt
    python tools/bench.py --documents 4096 --seq 65536 --only mst+ckpt
    python tools/bench.py --lora 16 --seq 32768 --only eager+ckpt,liger+ckpt,mst+ckpt     # PEFT's LoRA
    python tools/bench.py --level mlp --seq 65536                 # one MLP; --level head: one head with its loss
    python tools/bench.py --only mst+ckpt --seq 32768 --kernels mst+ckpt --alive mst+ckpt  # where time and memory go
    python tools/bench.py --only "mst,mst[chunk_rows=8192],mst[mode=reduce-overhead]"      # variants
    python tools/bench.py --cpu                                   # a small size that runs anywhere

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
import logging
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from tools.bench_support import GIB, markdown_table, numbers, text_tokens, write_results
from tools.contenders import (
    BLOCKS,
    CONTENDERS,
    MODELS,
    Contender,
    block,
    compiled,
    config_of,
    find_contender,
    loss_function,
    make_model,
    model_flops,
)
from tools.draw import draw
from tools.gpu_profile import describe_peak, kernel_table

# Of the H200 for bf16 matmuls of random data, measured; what the arithmetic column is held against.
PEAK_FLOPS = 790e12


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contenders of a table run.

    Attributes:
        level: "model", "mlp" or "head".
        model: of :data:`tools.contenders.MODELS`.
        seq: tokens; rows of a block.
        window: of a sliding window, 0: none.
        documents: tokens of each packed document, 0: one document.
        lora: rank of LoRA, 0: all parameters train.
        lora_dropout: of the adapters' inputs, in [0, 1).
    """

    level: str
    model: str
    layers: int
    seq: int
    window: int = 0
    documents: int = 0
    lora: int = 0
    lora_dropout: float = 0.0
    device: str = "cuda"

    @property
    def overrides(self) -> dict[str, Any]:
        window = {"sliding_window": self.window} if self.window else {}
        return {"num_hidden_layers": self.layers, **window}

    @property
    def adapters(self) -> dict[str, Any]:
        return {"lora": self.lora, "lora_dropout": self.lora_dropout}


# In the process of a contender


class _Parameters:
    """The parameters of a model, which can be let go and made anew."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [p.data for p in module.parameters()]
        self._bytes = [p.untyped_storage().nbytes() for p in self._tensors]
        # Norms and biases are constants.
        self._constants = [float(p.flatten()[0]) if p.ndim == 1 else None for p in self._tensors]

    def drop(self) -> None:
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def make(self) -> None:
        torch.manual_seed(0)
        for tensor, size, constant in zip(self._tensors, self._bytes, self._constants, strict=True):
            tensor.untyped_storage().resize_(size)
            if constant is None:
                tensor.normal_(std=0.02)
            else:
                tensor.fill_(constant)


class Runner:
    """One contender: builds, warms up, measures."""

    def __init__(self, contender: Contender, case: Case) -> None:
        self._on_gpu = case.device == "cuda"
        if case.level == "model":
            self._model = make_model(
                case.model, contender, case.seq, case.device, **case.adapters, **case.overrides
            )
            self._step = self._training_step(contender, case)
        else:
            config = config_of(case.model, case.seq)
            wide = config.intermediate_size if case.level == "mlp" else config.vocab_size
            self._model = block(case.level, contender, config.hidden_size, wide, case.device)
            self._step = self._block_step(contender, case, config.hidden_size)
        self._parameters = _Parameters(self._model)
        self._leaves: list[Tensor] = list(self._model.parameters())

    def _training_step(self, contender: Contender, case: Case) -> Callable[[], Tensor]:
        loss = loss_function(self._model, contender)
        vocabulary = self._model.config.vocab_size  # type: ignore[union-attr]
        ids = text_tokens(case.seq, int(vocabulary)).view(1, case.seq).to(case.device)  # type: ignore[arg-type]
        more = {}
        if case.documents:
            more["position_ids"] = torch.arange(case.seq, device=case.device)[None] % case.documents

        def step() -> Tensor:
            found = loss(ids, **more)
            torch.autograd.backward(found)
            return found.detach()

        return step

    def _block_step(self, contender: Contender, case: Case, hidden: int) -> Callable[[], Tensor]:
        dtype = next(self._model.parameters()).dtype
        generator = torch.Generator(case.device).manual_seed(1)
        shape, options = (1, case.seq, hidden), {"device": case.device, "generator": generator}
        x = torch.randn(shape, dtype=dtype, **options).requires_grad_()  # type: ignore[call-overload]
        self._x = x
        run = compiled(self._model, contender)
        if case.level == "head":
            vocabulary = config_of(case.model, case.seq).vocab_size
            labels = torch.randint(vocabulary, (1, case.seq), **options)  # type: ignore[call-overload]

            def head_step() -> Tensor:
                x.grad = None
                loss: Tensor = run(x, labels)
                torch.autograd.backward(loss)
                return loss.detach()

            return head_step
        tangent = torch.randn(shape, dtype=dtype, **options)  # type: ignore[call-overload]

        def mlp_step() -> Tensor:
            x.grad = None
            out = run(x)
            out.backward(tangent)
            return torch.linalg.vector_norm(out.detach(), dtype=torch.float32)  # a check, not a loss

        return mlp_step

    def warm_up(self) -> dict[str, Any]:
        self._parameters.make()
        start = time.perf_counter()
        loss = self._once()
        first = time.perf_counter() - start
        norms = torch.stack(
            [
                torch.linalg.vector_norm(p.grad, dtype=torch.float32)
                for p in self._leaves
                if p.grad is not None
            ]
        )
        found = {
            "first_step_seconds": first,
            "loss": float(loss),
            "gradient_norm": float(torch.linalg.vector_norm(norms)),
            "parameter_bytes": sum(p.nbytes for p in self._leaves),
            "gradient_bytes": sum(p.grad.nbytes for p in self._leaves if p.grad is not None),
        }
        self.park()
        return found

    def park(self) -> None:
        self._model.zero_grad(set_to_none=True)
        if hasattr(self, "_x"):
            self._x.grad = None
        self._parameters.drop()

    def turn(self, steps: int) -> list[dict[str, float]]:
        self._parameters.make()
        self._once()
        found = []
        for _ in range(steps):
            self._model.zero_grad(set_to_none=True)
            base = 0
            if self._on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
            start = time.perf_counter()
            self._once()
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() if self._on_gpu else 0
            found.append({"seconds": seconds, "peak_bytes": peak, "before_bytes": base})
        self.park()
        return found

    def profile(self, kind: str) -> str:
        """What runs (``kind`` "kernels"), or what is alive at the peak ("alive")."""
        self._parameters.make()
        self._once()
        self._model.zero_grad(set_to_none=True)
        text = kernel_table(self._once) if kind == "kernels" else describe_peak(self._once)
        self.park()
        return text

    def _once(self) -> Tensor:
        loss = self._step()
        if self._on_gpu:
            torch.cuda.synchronize()
        return loss


def _serve(connection: Connection, contender: Contender, case: Case, log: str) -> None:
    """Answers requests: ("warm_up",), ("turn", steps), ("profile", kind); each with a result or an error."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.basicConfig()
    logging.getLogger("mst_fx").setLevel(logging.INFO)
    runner = None
    while True:
        request, *arguments = connection.recv()
        try:
            runner = runner or Runner(contender, case)
            connection.send((True, getattr(runner, request)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


# In the process that compares


class _Worker:
    """The other end of :func:`_serve`."""

    def __init__(self, name: str, contender: Contender, case: Case, folder: Path) -> None:
        self.name = name
        self.result: dict[str, Any] = {}
        self.turns: list[dict[str, float]] = []
        self.error = ""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        log = str(folder / f"{case.level}-{case.seq}-{name}.log")
        self._process = context.Process(target=_serve, args=(theirs, contender, case, log), daemon=True)
        self._process.start()

    def ask(self, *request: Any) -> None:
        self._connection.send(request)

    def answer(self, limit: float) -> Any:
        """The result; None, and the worker is stopped, after an error or ``limit`` seconds."""
        if not self._connection.poll(max(limit, 0.1)):
            self.error = f"took more than {limit:.0f} s"
        else:
            try:
                is_right, found = self._connection.recv()
            except EOFError:
                is_right, found = False, "the process died"
            if is_right:
                return found
            self.error = str(found)
        self.stop()
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def compare(
    case: Case,
    contenders: dict[str, Contender],
    arguments: argparse.Namespace,
    keep: Callable[[Sequence[_Worker]], None],
) -> list[_Worker]:
    """Runs all contenders of a case and fills their results; ``keep`` gets them after each round."""
    end = time.monotonic() + arguments.budget
    arguments.out.mkdir(parents=True, exist_ok=True)
    finished: list[_Worker] = []
    for names in _batches(list(contenders), arguments.together):
        workers = [_Worker(name, contenders[name], case, arguments.out) for name in names]
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
        keep(finished)
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


def _alive(workers: Sequence[_Worker]) -> Iterator[_Worker]:
    return (worker for worker in workers if not worker.error)


def _batches(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def summary(worker: _Worker, case: Case) -> dict[str, Any]:
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
    special = case.documents or case.window or case.lora
    head = ["contender", "s a step (fastest – slowest)", "peak GiB", "above parameters", "and gradients"]
    head += ["TFLOP/s", "of peak"] if case.level == "model" and not special else []
    rows: list[Sequence[Any]] = [
        [*head, "first step s", "loss" if case.level != "mlp" else "norm", "gradient norm"]
    ]
    for r in results:
        if "step_seconds" not in r:
            rows.append([f"{r['contender']} (failed)", *[None] * (len(rows[0]) - 1)])
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
        rows.append([r["contender"], spread, *memory, *speed, *rest])
    title = f"{case.model}, {case.level}" + (f", {case.layers} layers" if case.level == "model" else "")
    more = [f"window {case.window}"] * bool(case.window)
    more += [f"documents of {case.documents}"] * bool(case.documents)
    more += [f"LoRA of rank {case.lora}"] * bool(case.lora)
    more += [f"dropout {case.lora_dropout}"] * bool(case.lora_dropout)
    failed = [f"{r['contender']}:\n\n```\n{r['error'].strip()[-1500:]}\n```" for r in results if "error" in r]
    return "\n\n".join(
        [f"### {', '.join([title, f'{case.seq:,} tokens', *more])}", markdown_table(rows), *failed]
    )


def _keep(
    out: Path,
    name: str,
    case: Case,
    earlier: Sequence[dict[str, Any]],
    tables: Sequence[str],
    workers: Sequence[_Worker],
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
        arguments.model, arguments.layers, arguments.seq = "tiny", 2, [1024]
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

        keep = functools.partial(_keep, arguments.out, name, case, results, tables)
        workers = compare(case, contenders, arguments, keep)
        keep(workers)
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
    add("--level", choices=("model", "mlp", "head"), default="model")
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
