"""``mst-fx run script.py …``: a script as Python runs it, but that ``torch.compile`` means mst."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import runpy
import sys
from pathlib import Path
from types import TracebackType

from mst_fx.api import Diagnosis, enable, watch
from mst_fx.errors import SubjectError
from mst_fx.listeners import on_graph
from mst_fx.switch import NAME, is_off

# What accelerate, and so Hugging Face's Trainer, compiles with where the script does not say it; its launcher says "no" for that.
_ACCELERATE = "ACCELERATE_DYNAMO_BACKEND"

_NOTHING = (
    "nothing was compiled: the script calls no torch.compile, nor has accelerate or Hugging Face's Trainer prepared a model"
    ' in this process. model.compile() in it will do, or model.compile(backend="mst"), which needs no mst-fx run'
)


def run(arguments: argparse.Namespace) -> int:
    """Runs a script; returns its exit code.

    Raises:
        SubjectError: there is no such script.
        OptionError: for bad options.
    """
    script = arguments.script
    if not arguments.is_module and not Path(script).exists():
        raise SubjectError(f"there is no file {script}; a module is given as -m {script.removesuffix('.py')}")
    if not arguments.only_own and os.environ.get(_ACCELERATE, "no").lower() == "no":
        os.environ[_ACCELERATE] = "inductor"
    _say_progress(arguments.quiet)
    graphs: list[object] = []
    asks = arguments.report or arguments.report_to is not None
    with (
        enable(arguments.options),
        on_graph.listening(lambda captured, new, report: graphs.append(None)),
        watch() if asks else contextlib.nullcontext() as report,
    ):
        code = _run(script, arguments.args, arguments.is_module)
    if _is_first() and not graphs and code == 0:
        _say(f"{NAME}=0: nothing was rewritten" if is_off() else _NOTHING)
    if report is not None and _is_first():
        _report(report, arguments.report, arguments.report_to)
    return code


def _run(script: str, args: list[str], is_module: bool) -> int:
    """The script in this process, as ``__main__``; what it raises is shown as if nobody were between Python and it."""
    sys.argv = [script, *args]
    sys.path[0] = str(Path.cwd() if is_module else Path(script).resolve().parent)
    try:
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, (int, type(None))):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception as error:
        trace = _of_the_script(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def _of_the_script(trace: TracebackType | None) -> TracebackType | None:
    """A trace without the frames that run the script."""
    inner = trace
    while inner is not None and inner.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        inner = inner.tb_next
    return inner


def _is_first() -> bool:
    """Whether this is the rank that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    print(f"mst-fx: {text}", file=sys.stderr, flush=True)


def _report(report: Diagnosis, is_shown: bool, path: Path | None) -> None:
    text = "\n".join([str(report), *map(str, report.findings)])
    if path is not None:
        path.write_text(report.to_json() if path.suffix == ".json" else f"{text}\n", encoding="utf-8")
    if is_shown:
        print(text, file=sys.stderr, flush=True)


def _say_progress(is_quiet: bool) -> None:
    """One line before and after each graph is compiled, unless the script has set up logging for all."""
    logger = logging.getLogger("mst_fx")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    if not is_quiet and _is_first():
        logger.setLevel(logging.INFO)
