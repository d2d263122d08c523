"""What the doctor has to know of each captured graph."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_fx.diagnose.findings import Facts
from mst_fx.errors import Cause
from mst_fx.graph.spelling import LOSSES, ROUTERS, operation
from mst_fx.graph.subgraphs import subgraphs
from mst_fx.graph.values import tensor_value
from mst_fx.report import Report
from mst_fx.torch_api.dynamo import compilation, ending_of, enters_compiled_code, is_transformed


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
        routes=_calls(gm, ROUTERS),
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


class _Running(NamedTuple):
    """A module whose code is on Python's stack.

    Attributes:
        is_compiled: Dynamo compiles this code: it is the module that is compiled, or one that it calls.
        skipped_at: file and line of its function, if Dynamo was to compile it and skipped it.
    """

    module: torch.nn.Module
    is_compiled: bool = False
    skipped_at: str = ""


def _caller() -> _Caller:
    """The vocabulary head of the eager model that calls the compiled code, and whose forward function runs.

    A head inside of the module that is compiled is not meant, even if Dynamo breaks the graph before it; unless Dynamo
    skipped the function that calls it, which then runs as Python does.
    """
    running = _running()
    trainer = "trl" if any(_forward_package(each.module) == "trl" for each in running) else ""
    compiled: set[int] = set()  # what the modules have that are called inside of the one that is looked at
    for module, is_compiled, skipped_at in running:
        if is_compiled:
            compiled |= {id(part) for part in module.modules()}
            continue
        path, head = _head_of(module)
        if head is None or id(head) in compiled or (skipped_at and _is_apart(module, head)):
            continue
        name = f"{type(module).__name__}.{path.replace('._orig_mod', '')}"
        return _Caller(name, head.weight.shape[0], skipped_at, trainer)
    return _Caller(trainer=trainer)


def _running() -> list[_Running]:
    """The modules whose code is on Python's stack, innermost first.

    A graph is compiled when its code is first called: who calls it is there.
    """
    inside: list[torch.nn.Module] = []  # the module that is compiled, and those that it calls
    outside: list[torch.nn.Module] = []  # whose own code runs eagerly and calls it
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
    skipped = [places.get(id(module), "") for module in inside]
    called = [_Running(module, not place, place) for module, place in zip(inside, skipped, strict=True)]
    return called + [_Running(module) for module in outside]


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


def _has_loss(gm: fx.GraphModule) -> bool:
    return _calls(gm, LOSSES)


def _calls(gm: fx.GraphModule, names: Collection[str]) -> bool:
    calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
    is_here = any(operation(node) in names for node in calls)
    return is_here or any(_calls(child, names) for _, child in subgraphs(gm))
