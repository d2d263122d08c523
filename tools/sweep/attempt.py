"""One step of a tiny random model, eager and with ``backend="mst"``; where mst fails, the plain compiler behind it says whose fault it is."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from mst_fx.diagnose.watch import LastAttempts
from mst_fx.graph.names import module_path
from mst_fx.graph.values import tensors_of
from mst_fx.listeners import on_graph
from mst_fx.report import Refused, Report
from mst_fx.version import __version__
from tools.sweep.configs import LENGTH, make_inputs, make_model

# Chunks so small that all of a tiny model's places are worth one.
OPTIONS = {"chunk_rows": 16, "vocab_chunk_rows": 16, "attention_chunk_rows": 16}

# Relative errors that count as right: float64 models go through float32 in places.
_TOLERANCES = {torch.float64: 3e-6, torch.float32: 2e-4}
_PEER = "peer fails too"
_MLPS = re.compile(r"MLP|Mlp|FeedForward|FFN|Experts|MoE|Moe|Router|Gate")

Step = tuple[Tensor, dict[str, Tensor]]  # a loss, and the gradients of all parameters


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is tried.

    Attributes:
        device: a name that torch knows.
        inner: the compiler behind mst, "aot_eager" or "inductor": the peer, too, where mst fails.
        length: tokens of a sequence; a number that no size of the models equals.
    """

    device: str = "cpu"
    inner: str = "aot_eager"
    length: int = LENGTH

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those that are tried, the most exact that the device's fused kernels take first."""
        return (torch.float64, torch.float32) if self.device == "cpu" else (torch.float32,)

    def __str__(self) -> str:
        """What is not as by default, in front of which a comma may stand."""
        default = Way()
        told = {
            self.device: default.device,
            self.inner: default.inner,
            f"{self.length} tokens": f"{LENGTH} tokens",
        }
        return "".join(f", {mine}" for mine, usual in told.items() if mine != usual)


@dataclasses.dataclass
class Outcome:
    """One architecture.

    Attributes:
        status: "right", "wrong", "crash", "peer fails too", "eager fails", "not built", "timeout" or "died".
        model: the class.
        made: types and attention it was tried with, e.g. "float64, sdpa, batch 2", and what is unusual about the way.
        why: what failed.
        peer: where mst was not right, how far off the plain compiler was, or what failed there.
        error: the largest relative error of loss and gradients.
        graphs: how many graphs Dynamo made.
        rewrites: how many, by kind.
        given: attentions whose mask or bias is no formula, and stays.
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
    peer: str = ""
    error: float = 0.0
    graphs: int = 0
    rewrites: dict[str, int] = dataclasses.field(default_factory=dict)
    given: int = 0
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
        """S×S values that are left though no attention was refused, nor runs with a mask that stays."""
        is_known = self.given or any(kind == "attention" for kind, *_ in self.refusals)
        return [] if is_known else self.squares

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left as it was, but for masks that stay."""
        return self.status == "right" and not self.refusals and not self.silent and bool(self.rewrites)


def attempt(name: str, family: str, way: Way = Way()) -> Outcome:
    """Two sequences; one where the plain compiler fails with two."""
    outcome = _attempt(name, family, way, batch=2)
    if outcome.status == _PEER:
        outcome = _attempt(name, family, way, batch=1)
    return outcome


def _attempt(name: str, family: str, way: Way, batch: int) -> Outcome:
    start = time.perf_counter()
    outcome = Outcome(name, family, "not built")
    made = _make(outcome, way, batch)
    if made is not None:
        _compare(outcome, way, *made)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def _make(outcome: Outcome, way: Way, batch: int) -> tuple[nn.Module, dict[str, Any], Step] | None:
    """The model, its inputs and an eager step, in the first way of making it that works."""
    for dtype, attention in itertools.product(way.dtypes, ("sdpa", "eager")):
        try:
            model = make_model(outcome.name, outcome.family, dtype, attention).to(way.device)
        except Exception as error:
            outcome.why = outcome.why or _first_line(error)
            continue
        try:
            inputs = make_inputs(model, outcome.family, batch, way.length)
            truth = _step(model, model, inputs)
            if not torch.isfinite(truth[0]):
                raise ValueError("the loss is not finite")
        except Exception as error:
            outcome.status, outcome.why = "eager fails", _first_line(error)
            continue
        outcome.model, outcome.why = type(model).__name__, ""
        outcome.made = f"{str(dtype).removeprefix('torch.')}, {attention}, batch {batch}{way}"
        return model, inputs, truth
    return None


def _compare(outcome: Outcome, way: Way, model: nn.Module, inputs: dict[str, Any], truth: Step) -> None:
    """A step under mst against eager's, and the plain compiler's where mst's is not right."""
    seen: LastAttempts[tuple[fx.GraphModule, Report]] = LastAttempts()
    bar = _TOLERANCES[next(p.dtype for p in model.parameters() if p.is_floating_point())]
    found = None
    with on_graph.listening(lambda captured, new, report: seen.add((new, report))):
        try:
            found = _compiled_step(model, inputs, backend="mst", options={**OPTIONS, "inner": way.inner})
        except Exception as error:
            outcome.why = _first_line(error)
    outcome.graphs = counters["stats"]["unique_graphs"]
    _describe(outcome, seen, model, way.length)
    outcome.error = _error(truth, found) if found is not None else float("inf")
    if outcome.error <= bar:
        outcome.status = "right"
        return
    outcome.status = "crash" if found is None else "wrong"
    try:
        plain = _error(truth, _compiled_step(model, inputs, backend=way.inner))
        outcome.peer = f"off by {plain:.1e}"
    except Exception as error:
        plain = float("inf")
        outcome.peer = _first_line(error)
    if plain >= max(bar, 0.3 * outcome.error):  # infinite for both, where both crash
        outcome.status = _PEER
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
            weight.mul_(1 + 6e-8 * noise.to(weight))
    return _error(truth, _step(model, model, inputs))


def _describe(
    outcome: Outcome, seen: Iterable[tuple[fx.GraphModule, Report]], model: nn.Module, length: int
) -> None:
    report = Report()
    for new, of_graph in seen:
        report.rewrites += of_graph.rewrites
        report.refusals += of_graph.refusals
        outcome.squares += _squares(new, length)
    outcome.rewrites = dict(collections.Counter(rewrite.kind for rewrite in report.rewrites))
    outcome.given = sum(rewrite.form == "given" for rewrite in report.rewrites)
    outcome.deferred = any(rewrite.deferred for rewrite in report.rewrites)
    outcome.refusals = [(r.kind, r.name, r.reason[:300], r.cause.value) for r in report.refusals]
    outcome.doubtful = [f"{r.kind} {r.name}" for r in report.refusals if _is_doubtful(r, model)]


def _squares(gm: fx.GraphModule, length: int) -> list[str]:
    """The nodes, those of sub-graphs too, that make values of S×S elements."""
    found = []
    for graph in (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)):
        for node in graph.nodes:
            is_call = node.op in ("call_function", "call_method")
            if is_call and any(list(fake.shape).count(length) >= 2 for fake in tensors_of(node)):
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
