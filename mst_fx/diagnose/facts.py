"""What the doctor has to know of each captured graph; kept only while somebody watches."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.diagnose.estimate import estimate_memory
from mst_fx.errors import Cause
from mst_fx.graph.names import module_path, target_name
from mst_fx.graph.subgraphs import called_graph, subgraphs
from mst_fx.graph.values import tensor_value, tensors_of
from mst_fx.report import Facts, Line, Report
from mst_fx.torch_api.dynamo import compilation, ending_of, enters_compiled_code, is_transformed

_LOSSES = ("cross_entropy", "nll_loss")
_LONGEST = 200  # characters of a node's text
_KINDS = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


class Watcher:
    """The reports of the graphs that are captured while it watches.

    Dynamo may compile a frame again from the start: of each frame, the last attempt counts. An attempt
    may have several graphs (DDPOptimizer splits).
    """

    def __init__(self) -> None:
        self._attempts: dict[Any, tuple[int, list[Report]]] = {}

    def add(self, report: Report) -> None:
        key, attempt = compilation() or (len(self._attempts), 0)
        known, reports = self._attempts.get(key, (attempt, []))
        self._attempts[key] = (attempt, [*reports, report] if known == attempt else [report])

    def total(self) -> Report:
        total = Report()
        for _, reports in self._attempts.values():
            for report in reports:
                total.add(report)
        return total


_watchers: list[Watcher] = []


@contextlib.contextmanager
def watching() -> Iterator[Watcher]:
    """A watcher of all graphs that go through the passes inside of the context."""
    watcher = Watcher()
    _watchers.append(watcher)
    try:
        yield watcher
    finally:
        _watchers.remove(watcher)


def observe(gm: fx.GraphModule, new: fx.GraphModule, report: Report) -> None:
    """Adds what is known of one graph, before and after the passes, to all who watch."""
    if not _watchers:
        return
    report.facts.append(facts_of(gm, report))
    chunk_bytes = {rewrite.body: rewrite.chunk_bytes for rewrite in report.rewrites if rewrite.body}
    report.memory_before = estimate_memory(gm, {})
    report.memory_after = estimate_memory(new, chunk_bytes)
    report.lines_before.append(tuple(_lines(gm)))
    report.lines_after.append(tuple(_lines(new)))
    for watcher in _watchers:
        watcher.add(report)


def facts_of(gm: fx.GraphModule, report: Report) -> Facts:
    """The facts of one graph, while it is compiled.

    Args:
        gm: as Dynamo captured it.
        report: of this graph alone.
    """
    ending = ending_of(gm)
    inputs = [tensor_value(node) for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = [x for x in inputs if x is not None]
    takes_rows = any(x.requires_grad and not isinstance(x, torch.nn.Parameter) for x in tensors)
    caller = _caller() if takes_rows or ending.kind else _Caller()
    return Facts(
        compile_id=str((compilation() or ("",))[0] or ""),
        ended=ending.reason,
        ended_at=ending.place,
        ended_by=ending.kind,
        has_head="vocab" in report.kinds(),
        has_loss=_has_loss(gm) or _reduces_logits(report),
        takes_rows=takes_rows,
        routes=_calls(gm, ("topk", "one_hot")),
        dtensors=sum(type(x).__name__ == "DTensor" for x in tensors),
        caller_head=caller.head,
        caller_width=caller.width,
        skipped_at=caller.skipped_at,
        trainer=caller.trainer,
    )


def _reduces_logits(report: Report) -> bool:
    """Whether a head of the graph ends in it, whatever its loss is called."""
    done = [r for r in report.rewrites if r.kind == "vocab" and r.body]
    fits = [fit for fit in report.fits if fit.kind == "vocab"]
    left = [r for r in report.refusals if r.kind == "vocab" and r.cause not in (Cause.IS_OUTPUT, Cause.BREAK)]
    return bool(done or fits or left)


class _Caller(NamedTuple):
    """Of the eager code that calls compiled code, as the fields of :class:`Facts` say."""

    head: str = ""
    width: int = 0
    skipped_at: str = ""
    trainer: str = ""


def _caller() -> _Caller:
    """The vocabulary head of the eager model that calls the compiled code, and whose forward function runs.

    A graph is compiled when its code is first called: who calls it is on Python's stack. A head inside of the module
    that is compiled is not meant, even if Dynamo breaks the graph before it; unless Dynamo skipped the function that
    calls it, which then runs as Python does.
    """
    inside: list[torch.nn.Module] = []  # the module that is compiled, and those that it calls
    outside: list[torch.nn.Module] = []  # whose own code runs eagerly and calls it, innermost first
    places: dict[int, str] = {}  # where the function of a module begins; "" if Dynamo wrote it
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner: Any = frame.f_locals.get("self") if code.co_argcount else None
        if enters_compiled_code(code):
            inside, outside = inside + outside, []
        elif issubclass(type(owner), torch.nn.Module):
            is_call = code.co_name in ("_wrapped_call_impl", "_call_impl")  # of the module that is compiled
            (inside if is_call and not outside else outside).append(owner)
            if not is_call:  # a decorator may run as Python does around what Dynamo wrote
                place = "" if is_transformed(code) else f"{code.co_filename}:{code.co_firstlineno}"
                places[id(owner)] = place and places.get(id(owner), place)
        frame = frame.f_back
    trainers = [package for owner in inside + outside if (package := _forward_package(owner)) == "trl"]
    trainer = "".join(trainers[:1])
    compiled: set[int] = set()  # what the modules have that are called inside of the one that is looked at
    for index, owner in enumerate(inside + outside):
        is_skipped = index < len(inside) and bool(places.get(id(owner)))
        name, head = _head_of(owner) if is_skipped or index >= len(inside) else ("", None)
        if head is not None and id(head) not in compiled and not (is_skipped and _is_apart(owner, head)):
            path = name.replace("._orig_mod", "")
            at = places[id(owner)] if is_skipped else ""
            return _Caller(f"{type(owner).__name__}.{path}", head.weight.shape[0], at, trainer)
        if not is_skipped and index < len(inside):
            compiled |= {id(part) for part in owner.modules()}
    return _Caller(trainer=trainer)


def _is_apart(owner: torch.nn.Module, head: torch.nn.Module) -> bool:
    """Whether a module of the user's, inside of one that runs eagerly, has the head: Dynamo compiles it by itself."""
    parts = [m for m in owner.modules() if m is not owner and not type(m).__module__.startswith("torch.")]
    return any(part is head for other in parts for part in other.modules())


def _forward_package(module: torch.nn.Module) -> str:
    """The package of a forward function that somebody has put into a module."""
    forward = module.__dict__.get("forward")
    function = getattr(forward, "__func__", forward)
    return str(getattr(function, "__globals__", {}).get("__name__", "")).partition(".")[0]


def _head_of(module: torch.nn.Module) -> tuple[str, torch.nn.Linear | None]:
    """The path of a linear that has the shape of an embedding beside it."""
    tables = {tuple(m.weight.shape) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear) and tuple(child.weight.shape) in tables:
            return name, child
    return "", None


def _lines(gm: fx.GraphModule, prefix: str = "", depth: int = 0) -> Iterator[Line]:
    """The nodes of a graph but its inputs; those of a checkpointed layer after the call of it."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr") or (node.op == "output" and depth):
            continue
        name = "return" if node.op == "output" else node.name
        text = _short(str(node.args[0])) if node.op == "output" else _call_text(node)
        shapes = ", ".join(_shape(tensor) for tensor in tensors_of(node)) if node.op != "output" else ""
        operands = tuple(operand.name for operand in node.all_input_nodes)
        yield Line(prefix + name, name, text, shapes, module_path(node), depth, operands)
        inner = called_graph(gm, node)
        if inner is not None:
            yield from _lines(inner, f"{prefix}{node.args[0].target}.", depth + 1)


def _call_text(node: fx.Node) -> str:
    arguments = [str(x) for x in node.args] + [f"{key}={x}" for key, x in node.kwargs.items()]
    return _short(f"{target_name(node)}({', '.join(arguments)})")


def _short(text: str) -> str:
    """With readable names of parameters and inputs, and not too long."""
    text = re.sub(r"\bl_(?:self|args|kwargs)_(\w+?)_(?=\W|$)", lambda m: _dotted(m[1]), text)
    text = re.sub(r"\bl_(\w+?)_(?=\W|$)", r"\1", text)
    text = re.sub(r"\[(?:-?\d+, ){8,}-?\d+\]", "[…]", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…)"


def _dotted(name: str) -> str:
    """``modules_model_modules_layers_modules_0_parameters_weight`` → ``model.layers.0.weight``."""
    return re.sub(r"(?:^|_)(?:modules|parameters|buffers)_", ".", name).strip(".")


def _shape(tensor: torch.Tensor) -> str:
    kind = re.sub(
        r"(float|bfloat|int|uint|complex)(\d+)", lambda m: _KINDS[m[1]] + m[2], str(tensor.dtype)[6:]
    )
    return f"{kind}[{', '.join(map(str, tensor.shape))}]"


def _has_loss(gm: fx.GraphModule) -> bool:
    return _calls(gm, _LOSSES)


def _calls(gm: fx.GraphModule, names: tuple[str, ...]) -> bool:
    calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
    is_here = any(part in target_name(node) for node in calls for part in names)
    return is_here or any(_calls(child, names) for _, child in subgraphs(gm))
