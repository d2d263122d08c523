"""One sequence on several GPUs beside one GPU, in one run: seconds and memory of a step.

    python -m tools.bench.ranks --ranks 1,2 --seq 32768,131072                  # Llama3-8B, 8 layers, checkpointed
    python -m tools.bench.ranks --ranks 1,2 --model qwen2-7b --layers 4 --seq 65536
    python -m tools.bench.ranks --ranks 4 --seq 131072 --kernels 131072         # what runs in a step of each rank, with its gaps
    python -m tools.bench.ranks --ranks 2 --layers 32 --seq 458752 --shard --no-checkpoint --steps 0 --options '{"memory": "auto"}'
    python -m tools.bench.ranks --ranks 2 --layers 32 --seq 8192 --shard --no-checkpoint --steps 0 --plain   # compiled without mst
    python -m tools.bench.ranks --cpu                                           # a small size, gloo

For each number of ranks so many processes of this machine are started, a GPU each (gloo and the CPU with ``--cpu``). All build the same
random bfloat16 model and are given the same text; more than one compile it with ``sequence_parallel`` and ``average_gradients``. A step is
forward and backward pass with fresh gradients (``set_to_none=True``) that are the mean over the ranks, all of it timed; no optimizer.
Seconds are the median of the steps behind the first two (with ``--steps 0`` those of the first), from barrier to barrier; bytes are those
of the rank that takes most. What fails is reported, and the others go on.

``--shard``: each rank has a part of every parameter, which is gathered inside of the graph (examples/simple_fsdp.py), and of AdamW's states,
which are on the host while forward and backward pass run (``mst_fx.park``); the optimizer steps, and is in the seconds.

``--plain``: the peer, Inductor without mst on the same model. Each rank has all of the tokens then: what its first step takes is what compiling
takes without ``sequence_parallel``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.utils import parametrize

import mst_fx
from tools.bench.contenders import Contender, make_model
from tools.bench.models import MODELS, text_tokens
from tools.bench.tables import GIB, markdown_table, numbers, write_results
from tools.meters.gpu import kernel_table


class _Rank:
    """A process' model, and the steps that it makes together with the others.

    Attributes:
        group: of all ranks; None if there is one.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.group = dist.group.WORLD if dist.is_initialized() else None
        self._on_gpu = not arguments.cpu
        self.device = "cuda" if self._on_gpu else "cpu"
        contender = Contender("mst", checkpoint=arguments.checkpoint)
        self.model = make_model(
            arguments.model,
            contender,
            max(arguments.seq),
            self.device,
            num_hidden_layers=arguments.layers,
        )
        # transformers 5.17 sets one for checkpointing that breaks the graph behind the embedding.
        self.model.get_input_embeddings()._forward_hooks.clear()  # type: ignore[union-attr, operator]
        self._optimizer: torch.optim.Optimizer | None = None
        if arguments.shard:
            shard(self.model, init_device_mesh(self.device, (dist.get_world_size(),)))
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self._on_gpu)
            if self._on_gpu:
                mst_fx.park(self._optimizer)
        if arguments.plain:
            self.model.compile(backend="inductor")
            return
        options = dict(arguments.options)
        if self.group is not None:
            options |= {"sequence_parallel": self.group, "average_gradients": not arguments.shard}
        self.model.compile(backend="mst", options=options)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def _stepped(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.step(ids)
        if self._optimizer is not None:
            self._optimizer.step()
        return loss

    def _ids(self, seq: int) -> torch.Tensor:
        vocabulary = int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        return text_tokens(seq, vocabulary).view(1, seq).to(self.device)

    def settle(self) -> None:
        """All ranks, and what runs on their GPUs, are here."""
        if self._on_gpu:
            torch.cuda.synchronize()
        if self.group is not None:
            dist.barrier(self.group)
            if self._on_gpu:
                torch.cuda.synchronize()

    def measure(self, seq: int, steps: int) -> dict[str, Any]:
        """Steps of one length, compiled anew."""
        torch.compiler.reset()
        ids = self._ids(seq)
        seconds, peaks = [], []
        for _ in range(steps + 2 if steps else 1):
            self.model.zero_grad(set_to_none=True)
            before = 0
            if self._on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            self.settle()
            start = time.perf_counter()
            loss = self._stepped(ids)
            self.settle()
            seconds.append(time.perf_counter() - start)
            peaks.append((torch.cuda.max_memory_allocated() if self._on_gpu else 0, before))
        gradients = [_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).square()
        total = squares.sum()
        if self._optimizer is not None:
            dist.all_reduce(total, group=self.group)
        counted = slice(2 if steps else 0, None)
        peak, before = max(peaks[counted])
        size = sum(g.nbytes for g in gradients)
        return {
            "seq": seq,
            "first_step_seconds": seconds[0],
            "step_seconds": statistics.median(seconds[counted]),
            "peak_bytes": peak,
            "above_before_and_gradients_bytes": peak - before - size,
            "loss": float(loss),
            "gradient_norm": float(total.sqrt()),
        }

    def kernels(self, seq: int) -> str:
        ids = self._ids(seq)

        def step() -> None:
            self.step(ids)
            torch.cuda.synchronize()

        return kernel_table(step)


class _Gathered(torch.nn.Module):
    """A parameter of which each rank has a part; its gradient is the mean over all ranks, a part on each."""

    def forward(self, x: DTensor) -> torch.Tensor:
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Lets each rank keep a part of every parameter."""
    for module in [*model.modules()]:
        for name, value in [*module.named_parameters(recurse=False)]:
            setattr(module, name, torch.nn.Parameter(distribute_tensor(value.data, mesh, [Shard(0)])))
            parametrize.register_parametrization(module, name, _Gathered(), unsafe=True)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _run(rank: int, ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    """One process: measures each length, and writes what it found as soon as it is there."""
    logging.basicConfig()
    logging.getLogger("mst_fx").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not arguments.cpu:
        torch.cuda.set_device(rank)
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        dist.init_process_group(
            "gloo" if arguments.cpu else "nccl",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=arguments.limit),
        )
    member = _Rank(arguments)
    for seq in arguments.seq:
        found = member.measure(seq, arguments.steps)
        Path(folder, f"{rank}-{seq}.json").write_text(json.dumps(found))
        if seq in arguments.kernels:
            text = member.kernels(seq)
            (arguments.out / f"kernels-{arguments.model}-{seq}-{ranks}-{rank}.txt").write_text(f"{text}\n")
    if ranks > 1:
        dist.destroy_process_group()


def run(ranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The steps of so many ranks: a result a length, with ``error`` where they failed."""
    error = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _until_done(ranks, folder, arguments)
        except (ProcessException, TimeoutError) as failed:
            error = str(failed)
        found = []
        for seq in arguments.seq:
            paths = [Path(folder, f"{rank}-{seq}.json") for rank in range(ranks)]
            each = [json.loads(path.read_text()) for path in paths if path.exists()]
            case = {"ranks": ranks, "seq": seq, "model": arguments.model, "layers": arguments.layers}
            if len(each) < ranks:
                found.append({**case, "error": error})
                continue
            most = max(each, key=lambda result: result["peak_bytes"])
            found.append({**each[0], **case, **{key: most[key] for key in most if key.endswith("bytes")}})
    return found


def _until_done(ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    """
    Raises:
        TimeoutError: after ``--limit`` seconds.
        ProcessException: if a rank fails; the others are stopped.
    """
    context = spawn(_run, (ranks, folder, arguments), nprocs=ranks, join=False)
    end = time.monotonic() + arguments.limit
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{ranks} ranks took longer than {arguments.limit} s")


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown: each length's ranks beside the fewest."""
    head = ["tokens", "ranks", "s a step", "× as fast", "peak GiB a rank"]
    head += ["above parameters and gradients", "× of it", "first step s", "loss", "gradient norm"]
    lines: list[list[Any]] = [head]
    failed = []
    base: dict[int, dict[str, Any]] = {}
    for result in sorted(results, key=lambda each: (each["seq"], each["ranks"])):
        start = [f"{result['seq']:,}", str(result["ranks"])]
        if "error" in result:
            lines.append([*start, *[None] * (len(head) - 2)])
            failed.append(
                f"{result['ranks']} ranks, {result['seq']:,} tokens:\n\n```\n{result['error'].strip()[-1500:]}\n```"
            )
            continue
        first = base.setdefault(result["seq"], result)
        above = result["above_before_and_gradients_bytes"]
        of_first = first["above_before_and_gradients_bytes"]
        lines.append(
            [
                *start,
                f"{result['step_seconds']:.4f}",
                f"{first['step_seconds'] / result['step_seconds']:.3f}",
                *(
                    [result["peak_bytes"] / GIB, above / GIB, above / of_first]
                    if result["peak_bytes"]
                    else [None] * 3
                ),
                result["first_step_seconds"],
                f"{result['loss']:.5f}",
                f"{result['gradient_norm']:.5g}",
            ]
        )
    case = results[0]
    return "\n\n".join([f"### {case['model']}, {case['layers']} layers", markdown_table(lines), *failed])


def main() -> None:
    arguments = _arguments()
    if arguments.cpu:
        arguments.model, arguments.layers, arguments.seq = "tiny", 2, [1024]
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for ranks in arguments.ranks:
        results += run(ranks, arguments)
        text = table(results)
        write_results(arguments.out, arguments.name, results, text)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=numbers, default=[1, 2], help="processes, separated by commas")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3-8b", help="whose shapes")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=numbers, default=[32768], help="tokens, separated by commas")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument(
        "--no-checkpoint", dest="checkpoint", action="store_false", help="keep what layers made"
    )
    parser.add_argument(
        "--shard", action="store_true", help="parameters and AdamW's states, gathered in the graph"
    )
    parser.add_argument("--plain", action="store_true", help="Inductor without mst, all tokens on each rank")
    parser.add_argument("--options", type=json.loads, default={}, help="of mst, as JSON")
    parser.add_argument(
        "--kernels",
        type=numbers,
        default=[],
        help="lengths of whose steps is written what runs on each rank, and its gaps",
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds that one number of ranks may take")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--name", default="ranks", help="of the files")
    parser.add_argument("--cpu", action="store_true", help="a small size that runs anywhere")
    return parser.parse_args()


if __name__ == "__main__":
    main()
