"""What is rewritten in each architecture of transformers, and whether the numbers are eager's.

    python tools/sweep.py OUT.jsonl --jobs 2                  # tries all that OUT.jsonl has not
    python tools/sweep.py OUT.jsonl --table docs/models.md    # the page that users read
    python tools/sweep.py OUT.jsonl --summary                 # what needs looking into

One step of a tiny random model (:mod:`tools.sweep_configs`), eager and with ``backend="mst"``, in a process of
its own with a time limit; where mst fails, plain ``aot_eager`` says whether that is mst's fault. Each
architecture is a line of JSON, appended when it is done; of several lines the last counts. A sweep that was cut
short goes on where it was; ``--redo crash,wrong`` tries those again. It runs on the CPU, takes some ten seconds
an architecture and a core, and is no part of CI.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._guards import CompileContext

import mst_fx
import mst_fx.backend
from mst_fx.graph.names import module_path
from mst_fx.graph.values import tensors_of
from mst_fx.pipeline import run_passes
from mst_fx.report import Refused, Report
from mst_fx.version import __version__
from tools.sweep_configs import FAMILIES, LENGTH, architectures, make_inputs, make_model

# Chunks so small that all of a tiny model's places are worth one.
OPTIONS = {"inner": "aot_eager", "chunk_rows": 16, "vocab_chunk_rows": 16, "attention_chunk_rows": 16}
KINDS = ("mlp", "vocab", "attention")

# Relative errors that count as right: float64 models go through float32 in places.
_TOLERANCES = {torch.float64: 3e-6, torch.float32: 2e-4}
_MLPS = re.compile(r"MLP|Mlp|FeedForward|FFN|Experts|MoE|Moe|Router|Gate")

Step = tuple[Tensor, dict[str, Tensor]]  # a loss, and the gradients of all parameters


@dataclasses.dataclass
class Outcome:
    """One architecture.

    Attributes:
        status: "right", "wrong", "crash", "aot_eager fails too", "eager fails", "not built", "timeout" or "died".
        model: the class.
        made: types and attention it was tried with, e.g. "float64, sdpa, batch 2".
        why: what failed.
        error: the largest relative error of loss and gradients.
        graphs: how many graphs Dynamo made.
        rewrites: how many, by kind.
        deferred: logits are computed on first use.
        refusals: kind, place, reason and cause of each.
        squares: nodes of the rewritten graphs that make values with two dimensions of the sequence's length.
        doubtful: refusals of places that are no MLP and no head.
        versions: of torch, transformers and mst-fx.
    """

    name: str
    family: str
    status: str
    model: str = ""
    made: str = ""
    why: str = ""
    error: float = 0.0
    graphs: int = 0
    rewrites: dict[str, int] = dataclasses.field(default_factory=dict)
    deferred: bool = False
    refusals: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    squares: list[str] = dataclasses.field(default_factory=list)
    doubtful: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mst-fx": __version__,
        }
    )

    @property
    def silent(self) -> list[str]:
        """S×S values that are left though no attention was refused."""
        return [] if any(kind == "attention" for kind, *_ in self.refusals) else self.squares

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left as it was."""
        return self.status == "right" and not self.refusals and not self.squares and bool(self.rewrites)


# One architecture


def attempt(name: str, family: str) -> Outcome:
    """Two sequences; one where plain ``aot_eager`` fails with two."""
    outcome = _attempt(name, family, batch=2)
    if outcome.status == "aot_eager fails too":
        outcome = _attempt(name, family, batch=1)
    return outcome


def _attempt(name: str, family: str, batch: int) -> Outcome:
    start = time.perf_counter()
    outcome = Outcome(name, family, "not built")
    made = _make(outcome, batch)
    if made is not None:
        _compare(outcome, *made)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _make(outcome: Outcome, batch: int) -> tuple[nn.Module, dict[str, Any], Step] | None:
    """The model, its inputs and an eager step, in the first way of making it that works."""
    for dtype in (torch.float64, torch.float32):
        for attention in ("sdpa", "eager"):
            try:
                model = make_model(outcome.name, outcome.family, dtype, attention)
            except Exception as error:
                outcome.why = outcome.why or _first_line(error)
                continue
            try:
                inputs = make_inputs(model, outcome.family, batch)
                truth = _step(model, model, inputs)
                if not torch.isfinite(truth[0]):
                    raise ValueError("the loss is not finite")
            except Exception as error:
                outcome.status, outcome.why = "eager fails", _first_line(error)
                continue
            outcome.model, outcome.why = type(model).__name__, ""
            outcome.made = f"{str(dtype).removeprefix('torch.')}, {attention}, batch {batch}"
            return model, inputs, truth
    return None


def _compare(outcome: Outcome, model: nn.Module, inputs: dict[str, Any], truth: Step) -> None:
    """A step under mst against eager's, and plain ``aot_eager``'s where mst's is not right."""
    seen = _Seen()
    bar = _TOLERANCES[next(p.dtype for p in model.parameters() if p.is_floating_point())]
    found = None
    with mock.patch.object(mst_fx.backend, "run_passes", seen.watching(run_passes)):
        try:
            found = _compiled_step(model, inputs, backend="mst", options=OPTIONS)
        except Exception as error:
            outcome.why = _first_line(error)
    outcome.graphs = counters["stats"]["unique_graphs"]
    _describe(outcome, seen, model)
    outcome.error = _error(truth, found) if found is not None else float("inf")
    if outcome.error <= bar:
        outcome.status = "right"
        return
    outcome.status = "crash" if found is None else "wrong"
    try:
        plain = _error(truth, _compiled_step(model, inputs, backend="aot_eager"))
    except Exception:
        plain = float("inf")
    if plain >= max(bar, 0.3 * outcome.error):  # infinite for both, where both crash
        outcome.status = "aot_eager fails too"
    elif found is not None and outcome.error <= 10 * _sensitivity(model, inputs, truth) + bar:
        outcome.status = "right"


def _compiled_step(model: nn.Module, inputs: dict[str, Any], **how: Any) -> Step:
    torch._dynamo.reset()
    counters.clear()
    return _step(model, torch.compile(model, **how), inputs)


def _step(model: nn.Module, run: Callable[..., Any], inputs: dict[str, Any]) -> Step:
    model.zero_grad(set_to_none=True)
    out = run(**inputs)
    loss = getattr(out, "loss", None)
    loss = out[0].float().pow(2).mean() if loss is None else loss
    loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def _error(truth: Step, found: Step) -> float:
    """The largest error of loss and gradients, relative to each; a gradient that is zero but for rounding is
    held against the largest of all."""
    (loss, grads), (other_loss, others) = truth, found
    largest = max((float(grad.norm()) for grad in grads.values()), default=0.0)
    errors = [float((loss - other_loss).abs()) / max(float(loss.abs()), 1e-30)]
    for name in grads.keys() | others.keys():
        grad, other = grads.get(name), others.get(name)
        difference = torch.sub(_or_zero(grad, other), _or_zero(other, grad))
        norm = 0.0 if grad is None else float(grad.norm())
        errors.append(float(difference.norm()) / max(norm, 1e-4 * largest, 1e-30))
    return max(float("inf") if error != error else error for error in errors)


def _or_zero(grad: Tensor | None, like: Tensor | None) -> Tensor:
    if grad is not None:
        return grad
    assert like is not None
    return torch.zeros_like(like)


def _sensitivity(model: nn.Module, inputs: dict[str, Any], truth: Step) -> float:
    """What weights that differ by half a unit in float32's last place change: ill-conditioned models exist."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.mul_(1 + 6e-8 * noise.to(weight.dtype))
    return _error(truth, _step(model, model, inputs))


class _Seen:
    """What the passes did to each graph. Dynamo may capture a frame again: its last attempt counts."""

    def __init__(self) -> None:
        self._attempts: dict[Any, tuple[int, list[Any]]] = {}

    def watching(self, passes: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = passes(*args, **kwargs)
            context = CompileContext.try_get()
            key, attempt = (context.compile_id, context.attempt) if context else (len(self._attempts), 0)
            known, results = self._attempts.get(key, (attempt, []))
            self._attempts[key] = (attempt, [*results, result] if known == attempt else [result])
            return result

        return run

    def results(self) -> Iterator[Any]:
        for _, results in self._attempts.values():
            yield from results


def _describe(outcome: Outcome, seen: _Seen, model: nn.Module) -> None:
    report = Report()
    for result in seen.results():
        report.rewrites += result.report.rewrites
        report.refusals += result.report.refusals
        outcome.squares += _squares(result.gm)
    outcome.rewrites = dict(collections.Counter(rewrite.kind for rewrite in report.rewrites))
    outcome.deferred = any(rewrite.deferred for rewrite in report.rewrites)
    outcome.refusals = [(r.kind, r.name, r.reason[:300], r.cause.value) for r in report.refusals]
    outcome.doubtful = [f"{r.kind} {r.name}" for r in report.refusals if _is_doubtful(r, model)]


def _squares(gm: fx.GraphModule) -> list[str]:
    """The nodes, those of sub-graphs too, that make values of S×S elements."""
    found = []
    for graph in (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)):
        for node in graph.nodes:
            is_call = node.op in ("call_function", "call_method")
            if is_call and any(list(fake.shape).count(LENGTH) >= 2 for fake in tensors_of(node)):
                target = (
                    node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
                )
                found.append(f"{target} {module_path(node)}".strip())
    return found


def _is_doubtful(refused: Refused, model: Any) -> bool:
    """Whether a place that was refused is no MLP and no head, by the classes of the modules it lies in."""
    if refused.kind == "attention" or not refused.name:
        return False
    modules = dict(model.named_modules())
    parts = refused.name.split(".")
    inside = [modules.get(".".join(parts[:end])) for end in range(1, len(parts) + 1)]
    if refused.kind == "mlp":
        return not any(_MLPS.search(type(module).__name__) for module in inside if module is not None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None and inside[-1] is not None and inside[-1] is not head


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# Many architectures


@dataclasses.dataclass
class _Job:
    name: str
    process: Any
    connection: Connection
    end: float


def sweep(names: Iterable[str], family: str, jobs: int, timeout: float) -> Iterator[Outcome]:
    """Tries architectures, each in a process that begins with what this one has imported.

    Args:
        names: is read as processes become free.
        timeout: seconds an architecture.
    """
    waiting, running = iter(names), list[_Job]()
    while True:
        while len(running) < jobs and (name := next(waiting, None)) is not None:
            running.append(_start(name, family, timeout))
        if not running:
            return
        wait([job.connection for job in running], timeout=max(0.0, running[0].end - time.monotonic()))
        for job in list(running):
            outcome = _outcome(job, family)
            if outcome is not None:
                running.remove(job)
                job.process.kill()
                job.process.join()
                yield outcome


def _start(name: str, family: str, timeout: float) -> _Job:
    context: Any = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, family, writer), daemon=True)
    process.start()
    writer.close()
    return _Job(name, process, reader, time.monotonic() + timeout)


def _run(name: str, family: str, connection: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    connection.send(attempt(name, family))


def _outcome(job: _Job, family: str) -> Outcome | None:
    """What became of a job; None while it runs."""
    if job.connection.poll():
        try:
            return job.connection.recv()
        except EOFError:  # the process ended without a word
            job.process.join()
            return Outcome(job.name, family, "died", why=f"exit code {job.process.exitcode}")
    late = time.monotonic() > job.end
    return Outcome(job.name, family, "timeout") if late else None


def load(path: Path) -> dict[tuple[str, str], Outcome]:
    """The last line of each architecture, by family and name."""
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = (Outcome(**json.loads(line)) for line in lines)
    return {(outcome.family, outcome.name): outcome for outcome in outcomes}


# What people read

_LEAD = """\
# Models

Is your model covered? Every architecture with a causal language model in transformers was made tiny and trained
for one step with `backend="mst"`, beside eager. Where a cell has a number, so many places of that kind were
rewritten. The last column says what was left as it was, and why; such places run as they would
without mst-fx. Architectures that share code (most fine-tunes and forks of Llama, Qwen, Mistral, Gemma) are
covered as the one they share it with. For the very model that you train, `mst-fx explain` says the same;
[Limits](limits.md) has the reasons at length.
"""

_SECTIONS = (
    ("Everything is rewritten", lambda outcome: outcome.is_whole),
    ("Rewritten in part", lambda outcome: outcome.status == "right" and bool(outcome.rewrites)),
    ("Nothing is rewritten", lambda outcome: outcome.status == "right"),
    ("Wrong, or failing under mst alone", lambda outcome: outcome.status in ("wrong", "crash")),
    ("Not tried", lambda outcome: True),
)


def page(outcomes: Sequence[Outcome], source: str) -> str:
    """docs/models.md: lead, versions and command, and a table for each kind of end.

    Args:
        source: the name of the file that the outcomes come from.
    """
    versions = sorted({", ".join(f"{k} {v}" for k, v in outcome.versions.items()) for outcome in outcomes})
    parts = [
        _LEAD,
        f"Tried with {'; '.join(versions)}:\n\n```sh\npython tools/sweep.py {source} --jobs 2\n```\n",
    ]
    left = sorted(outcomes, key=lambda outcome: outcome.name)
    for title, belongs in _SECTIONS:
        rows = [outcome for outcome in left if belongs(outcome)]
        left = [outcome for outcome in left if outcome not in rows]
        if rows:
            parts.append(f"## {title} ({len(rows)})\n\n{_table(rows)}\n")
    return "\n".join(parts)


def _table(rows: Sequence[Outcome]) -> str:
    lines = ["| architecture | attention | MLPs | head | left as it was, and why |", "| --- " * 5 + "|"]
    for outcome in rows:
        counts = [str(outcome.rewrites.get(kind) or "–") for kind in ("attention", "mlp", "vocab")]
        family = "" if outcome.family == "causal" else f" ({outcome.family})"
        lines.append(f"| `{outcome.name}`{family} | {' | '.join(counts)} | {_cell(_left(outcome))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<=\d)\.(?=\d)", "·", text).replace("|", "\\|") or "–"


def _left(outcome: Outcome) -> str:
    """What was left, each reason once, with how many places it is true of."""
    if outcome.status != "right":
        return f"{outcome.status}: {outcome.why}".strip(": ")
    found: collections.Counter[str] = collections.Counter()
    for kind, name, reason, cause in outcome.refusals:
        place = re.sub(r"\.\d+(?=\.|$)", "", name).split("layers.")[-1]
        found[f"experts `{place}`" if cause == "experts" else f"{kind} `{place}`: {_plain(reason)}"] += 1
    if outcome.silent:
        found[f"{len(outcome.silent)} values of S×S elements"] += 1
    return "; ".join(f"{count} × {text}" if count > 1 else text for text, count in found.items())


def _plain(reason: str) -> str:
    """A reason without the names of nodes and folders: ``linear_3 (linear) …`` → ``linear …``."""
    reason = re.sub(r"\b\w+ \((\w+)\)", r"\1", reason)
    reason = re.sub(r"\S*[/\\]", "", reason)
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)[:140]


def line(outcome: Outcome) -> str:
    """An architecture in one line, for a terminal."""
    counts = " ".join(f"{kind} {outcome.rewrites.get(kind, 0)}" for kind in KINDS)
    flags = [f"{len(outcome.silent)} silent S×S"] if outcome.silent else []
    flags += [f"doubtful: {', '.join(outcome.doubtful)}"] if outcome.doubtful else []
    flags += [outcome.why] if outcome.why else []
    numbers = f"{counts} graphs {outcome.graphs} error {outcome.error:.0e} {outcome.seconds:.0f} s"
    return (
        f"{outcome.name:24} {outcome.status:8} {numbers} refused {len(outcome.refusals)} {'; '.join(flags)}"
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    statuses = collections.Counter(outcome.status for outcome in outcomes)
    counted = [f"{count:4} {status}" for status, count in statuses.most_common()]
    for text, found in (
        ("rewritten wholly", [o for o in outcomes if o.is_whole]),
        ("with S×S values and no refusal", [o for o in outcomes if o.silent]),
        ("with refusals of what is no MLP and no head", [o for o in outcomes if o.doubtful]),
    ):
        counted.append(f"{len(found):4} {text}")
    return "\n".join(counted)


def _pending(args: argparse.Namespace, known: dict[tuple[str, str], Outcome]) -> Iterator[str]:
    end = time.monotonic() + 60 * args.limit_minutes
    again = set(args.redo.split(","))
    for name in args.only.split(",") if args.only else architectures(args.family):
        before = known.get((args.family, name))
        if (before is None or before.status in again or "all" in again) and time.monotonic() < end:
            yield name


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="file of JSON lines")
    parser.add_argument("--family", choices=FAMILIES, default="causal")
    parser.add_argument("--only", default="", metavar="NAME,…")
    parser.add_argument("--redo", default="", metavar="STATUS,…", help='"all": whatever it was')
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=240, metavar="SECONDS", help="an architecture")
    parser.add_argument("--limit-minutes", type=float, default=1e6, help="begins no architecture after that")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="writes the page instead")
    parser.add_argument("--summary", action="store_true", help="prints what is known instead")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    known = load(args.out)
    if args.table is not None:
        args.table.write_text(page(list(known.values()), args.out.name))
        return
    if args.summary:
        print("\n".join(line(outcome) for outcome in known.values()))
    else:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        attempt("llama", "causal")  # warms what every process would import and cache anew
        torch._dynamo.reset()
        for outcome in sweep(_pending(args, known), args.family, args.jobs, args.timeout):
            with args.out.open("a") as out:
                out.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            print(line(outcome), flush=True)
    print(summary(list(load(args.out).values())))


if __name__ == "__main__":
    main()
