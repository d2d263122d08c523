"""Runs of one model from several seeds, in several ways, on the same batches; see :mod:`tools.convergence`."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import Qwen2Config, Qwen2ForCausalLM

import mst_fx
from tools import corpus

WAYS = ("eager", "nudged", "mst", "plan")
RANKS = "ranks"
# What a plan may take of the memory that the way "mst" took: the least of these for which there is a plan.
_SHARES = (0.6, 0.7, 0.8, 0.9)
_HELD_OUT_EVERY = 20  # files

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        held_out: sequences.
        memory: that a plan may take; None: a share of what the way "mst" took, on a GPU.
        files: of the standard library that are read; None: all.
        options: of mst, in all ways.
        world: ranks of the way "ranks".
    """

    device: str
    seq: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    steps: int
    held_out: int
    rate: float
    memory: str | None = None
    files: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    world: int = 2

    @property
    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=self.seq,
            tie_word_embeddings=True,
            use_cache=False,
        )


ON_CPU = Setup("cpu", 1024, 96, 384, 2, 4, 2048, steps=300, held_out=16, rate=1e-3, memory="12MiB")
ON_CUDA = Setup("cuda", 16_384, 384, 1536, 6, 6, 16_384, steps=300, held_out=8, rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Data:
    """Token ids: ``train`` [steps, seq], ``held_out`` [sequences, seq]."""

    train: Tensor
    held_out: Tensor


def make_data(setup: Setup) -> Data:
    """Reads, trains the tokenizer on what is not held out, and encodes; always the same."""
    files = corpus.source_files()[: setup.files]
    held_out = corpus.read(files[::_HELD_OUT_EVERY])
    texts = corpus.read([file for index, file in enumerate(files) if index % _HELD_OUT_EVERY])
    tokenizer = corpus.train_tokenizer(texts, setup.vocabulary)
    train, other = (
        torch.tensor(corpus.token_stream(tokenizer, source, count * setup.seq)).view(count, setup.seq)
        for source, count in ((texts, setup.steps), (held_out, setup.held_out))
    )
    return Data(train, other)


def starting_weights(setup: Setup, seed: int, nudged: bool = False) -> dict[str, Tensor]:
    """Of a seed, on the CPU; nudged: each moved to the next number above or below it."""
    torch.manual_seed(seed)
    weights = {name: value.detach() for name, value in Qwen2ForCausalLM(setup.config).named_parameters()}
    if not nudged:
        return weights
    return {name: torch.nextafter(x, x + torch.randn_like(x)) for name, x in weights.items()}


def parameters_of(setup: Setup) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Qwen2ForCausalLM(setup.config).parameters())


def rate_at(step: int, steps: int) -> float:
    """Of the highest: up over the first twentieth of the steps, then down to a tenth along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def train(
    model: nn.Module, data: Data, setup: Setup, average: Callable[[nn.Module], None] | None = None
) -> Result:
    """Trains a model, a sequence a step: its losses, the first gradients' norm, the held-out loss, what it took.

    Args:
        average: makes the ranks' gradients one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(rate_at, steps=setup.steps))
    losses, norm, seconds = [], torch.zeros(()), 0.0
    _wait(setup)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for index, ids in enumerate(data.train):
        with _precision(setup):
            loss = model(input_ids=ids[None], labels=ids[None]).loss
        loss.backward()
        if average is not None:
            average(model)
        length = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
        if index == 0:  # which compiles
            _wait(setup)
            norm, seconds = length, time.perf_counter() - start
    _wait(setup)
    steps = (time.perf_counter() - start - seconds) / max(1, setup.steps - 1)
    peak = torch.cuda.max_memory_allocated() if setup.device == "cuda" else None  # before eager evaluates
    return {
        "losses": [round(x, 6) for x in torch.stack(losses).tolist()],
        "norm": float(f"{float(norm):.6g}"),
        "held_out": held_out_loss(model, data, setup),
        "first_seconds": round(seconds, 3),
        "step_seconds": round(steps, 5),
        "peak_bytes": peak,
    }


def held_out_loss(model: nn.Module, data: Data, setup: Setup) -> float:
    """The mean over the held-out sequences, by the model as it is written: the same ruler for all ways."""
    with torch.no_grad(), _precision(setup):
        found = [model.forward(input_ids=ids[None], labels=ids[None]).loss for ids in data.held_out]
    return float(torch.stack(found).double().mean())


def _precision(setup: Setup) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=setup.device == "cuda")


def _wait(setup: Setup) -> None:
    if setup.device == "cuda":
        torch.cuda.synchronize()


def runs_of(
    way: str,
    seeds: Sequence[int],
    data: Data,
    setup: Setup,
    options: dict[str, Any] | None = None,
    average: Callable[[nn.Module], None] | None = None,
) -> Iterator[Result]:
    """A way's run for each seed, compiled once.

    Args:
        options: of mst; None: eager.
    """
    torch._dynamo.reset()
    gc.collect()  # what the way before held, of which a plan would think that it stays
    model: Any = Qwen2ForCausalLM(setup.config)
    model = model.to(setup.device).train()
    data = Data(data.train.to(setup.device), data.held_out.to(setup.device))
    if options is not None:
        model.compile(backend="mst", options=options)
    for seed in seeds:
        start = starting_weights(setup, seed, way == "nudged")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
        with mst_fx.watch() as report:  # of what is compiled: all of it in the first step of the first seed
            found = train(model, data, setup, average)
        count = collections.Counter(rewrite.kind for rewrite in report.rewrites)
        plans = [str(plan) for plan in report.plans]
        yield {"way": way, "seed": seed, "rewritten": dict(sorted(count.items())), "plans": plans, **found}


def planned(seeds: Sequence[int], data: Data, setup: Setup, most: int | None) -> Iterator[Result]:
    """The way "plan": within ``setup.memory``, or the least share of ``most`` bytes for which there is a plan."""
    budgets = [setup.memory] if setup.memory or not most else [int(share * most) for share in _SHARES]
    for budget in budgets:
        options = {**setup.options, "memory": budget, "host_memory": "0"}
        try:
            for found in runs_of("plan", seeds, data, setup, options):
                yield {**found, "memory": budget}
            return
        except Exception as error:  # torch.compile makes its own of it
            if "BudgetError" not in f"{type(error)} {error}" or budget == budgets[-1]:
                raise


def _mean_over_ranks(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _rank(rank: int, seeds: Sequence[int], data: Data, setup: Setup, folder: str) -> None:
    """One of the processes of the way "ranks"; the first one's results count."""
    if setup.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // setup.world))
    kind = "nccl" if setup.device == "cuda" else "gloo"
    dist.init_process_group(kind, f"file://{folder}/meeting", rank=rank, world_size=setup.world)
    options = {**setup.options, "sequence_parallel": dist.group.WORLD}
    found = list(runs_of(RANKS, seeds, data, setup, options, _mean_over_ranks))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def on_ranks(seeds: Sequence[int], data: Data, setup: Setup) -> Iterator[Result]:
    """The way "ranks", in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (seeds, data, setup, folder), nprocs=setup.world)
        yield from torch.load(f"{folder}/found.pt")


def all_runs(ways: Sequence[str], seeds: Sequence[int], setup: Setup) -> Iterator[Result]:
    """The runs of each way, as they end."""
    data, most = make_data(setup), None
    for way in ways:
        if way == "plan":
            found = planned(seeds, data, setup, most)
        elif way == RANKS:
            found = on_ranks(seeds, data, setup)
        else:
            found = runs_of(way, seeds, data, setup, setup.options if way == "mst" else None)
        for result in found:
            most = result["peak_bytes"] if way == "mst" else most
            yield result
