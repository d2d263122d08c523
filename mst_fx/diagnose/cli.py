"""The console script ``mst-fx``: what the backend would do to a model.

``mst-fx explain MODEL`` prints the report as a table; ``mst-fx diff MODEL`` prints the nodes that went
and those that came, and the bodies of the loops; ``mst-fx doctor MODEL`` says why little was saved; ``mst-fx fit MODEL`` says what
would fit on a device.
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mst_fx.diagnose import fit_cli
from mst_fx.diagnose.explain import explain
from mst_fx.diagnose.findings import Diagnosis
from mst_fx.diagnose.model_of import Shape, Subject, SubjectError, build_subject
from mst_fx.diagnose.page import make_page
from mst_fx.diagnose.watch import watch
from mst_fx.errors import OptionError, Refusal
from mst_fx.options import make_options
from mst_fx.report import Report, Rewrite, human_bytes
from mst_fx.torch_api.dynamo import BackendCompilerFailed
from mst_fx.version import __version__

# A line of output: its style (a rich one; "" for none) and its text.
Line = tuple[str, str]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_USER_ERROR = 2

_DESCRIPTION = "Says what torch.compile(model, backend='mst') does to a model."
_EPILOG = """\
MODEL is one of
  LlamaForCausalLM    a model class of transformers
  LlamaConfig         a config class of transformers
  module:function     your own: a function without arguments that returns (fn_or_module, args, kwargs)

Models of transformers get random weights and small sizes, unless --full-size is given; --set overrides both:
  mst-fx explain LlamaForCausalLM --set hidden_size=128 --set num_hidden_layers=4 --seq 4096
  mst-fx diff BertForMaskedLM --batch 4 --seq 512 --option chunk_rows=128

Exit codes: 0; 1 for a refusal under --option strict=True; 2 for a mistake in the command line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: the arguments, without the program's name; those of the process if not given.
    """
    arguments = _parser().parse_args(argv)
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        logging.getLogger("mst_fx").setLevel(logging.DEBUG)
    try:
        if arguments.command == "fit":
            _write(fit_cli.fit_lines(arguments, _pairs(arguments.set, "--set")))
            return 0
        subject, report = _run(arguments)
        if getattr(arguments, "html", None):
            arguments.html.write_text(make_page(subject.title, report), encoding="utf-8")
            print(f"wrote {arguments.html}")
        elif arguments.json:
            print(report.to_json())
        else:
            lines = {"explain": _table_lines, "diff": _diff_lines, "doctor": _doctor_lines}[arguments.command]
            _write([*_head_lines(subject), *lines(report)])
    except (SubjectError, OptionError) as error:
        return _fail(str(error), _USER_ERROR)
    except Refusal as refusal:
        return _fail(f"refused: {refusal}", 1)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            return _fail(str(error), _USER_ERROR)
        # The reader (head, less) has seen enough; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(arguments: argparse.Namespace) -> tuple[Subject, Diagnosis]:
    """Builds what was named and explains it."""
    options = make_options(_pairs(arguments.option, "--option"))
    shape = Shape(
        overrides=_pairs(arguments.set, "--set"),
        batch=arguments.batch,
        seq=arguments.seq,
        dtype=getattr(torch, arguments.dtype),
        checkpointing=arguments.checkpointing,
        labels=not arguments.no_labels,
        full_size=arguments.full_size,
    )
    subject = build_subject(arguments.model, shape)
    try:
        if getattr(arguments, "as_is", False):
            torch.compiler.reset()
            with watch() as report:
                subject.fn(*subject.args, **subject.kwargs)
            return subject, report
        return subject, explain(subject.fn, options)(*subject.args, **subject.kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, Refusal):
            raise error.inner_exception from None
        raise
    except Exception as error:
        if arguments.verbose:
            raise
        text = " ".join(str(error).split())
        raise SubjectError(
            f"{arguments.model} cannot be run: {type(error).__name__}: {text} (--verbose shows where)"
        ) from error


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("model", metavar="MODEL", help="a class of transformers, or module:function")
    shared.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the model's config"
    )
    shared.add_argument("--batch", type=_count, default=1, metavar="N", help="sequences a batch (1)")
    shared.add_argument("--seq", type=_count, default=1024, metavar="N", help="tokens a sequence (1024)")
    shared.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (float32)")
    shared.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    shared.add_argument("--no-labels", action="store_true", help="call it without labels: no loss")
    shared.add_argument("--full-size", action="store_true", help="keep the sizes of the config's defaults")
    shared.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the mst backend"
    )
    shared.add_argument("--json", action="store_true", help="print the report as JSON")
    shared.add_argument("--verbose", action="store_true", help="log what the passes do; show tracebacks")
    parser = argparse.ArgumentParser(
        "mst-fx",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mst-fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{explain,diff,doctor,fit}")
    for name, text in (
        ("explain", "print a table of what is rewritten and what is refused, and why"),
        ("diff", "print the rewritten nodes, before and after, and the bodies of the loops"),
        ("doctor", "say why little was saved, and what to do about it"),
    ):
        command = commands.add_parser(
            name,
            parents=[shared],
            help=text,
            description=f"{text.capitalize()}.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "diff":
            command.add_argument(
                "--html", type=Path, metavar="FILE", help="write a page with the graphs side by side instead"
            )
        if name == "doctor":
            command.add_argument(
                "--as-is", action="store_true", help="run it as it is, a function that compiles by itself"
            )
    text = "say what would fit on a device, and how long a step would take"
    fit = commands.add_parser(
        "fit",
        help=text,
        description=f"{text.capitalize()}; no device is needed.",
        epilog=fit_cli.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit_cli.add_arguments(fit, "NAME=VALUE")
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer ≥ 1")
    return value


def _pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """``["chunk_rows=128"]`` → ``{"chunk_rows": 128}``; what is no Python literal is a string.

    Raises:
        SubjectError: there is no ``=``.
    """
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise SubjectError(f"{flag} takes NAME=VALUE, not {text!r}")
        try:
            pairs[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name.strip()] = value
    return pairs


def _head_lines(subject: Subject) -> Iterator[Line]:
    yield "bold", subject.title
    if subject.shrunk:
        changes = ", ".join(f"{name} {old:,} → {new:,}" for name, (old, new) in subject.shrunk.items())
        yield "dim", f"shrunk (--full-size and --set change that): {changes}"
    yield "", ""


def _table_lines(report: Diagnosis) -> Iterator[Line]:
    for line in str(report).splitlines():
        style = "bold" if line.startswith("kind ") else "yellow" if line.startswith("refused ") else ""
        yield style, line
    if report.findings:
        causes = ", ".join(finding.cause for finding in report.findings)
        yield "", f"mst-fx doctor says more about: {causes}"


def _diff_lines(report: Report) -> Iterator[Line]:
    """Rewrites of equal structure share a body; the nodes of the first of them stand for all."""
    alike: dict[tuple[str, str, str], list[Rewrite]] = {}
    for rewrite in report.rewrites:
        alike.setdefault((rewrite.kind, rewrite.body, rewrite.form), []).append(rewrite)
    for (kind, body_key, form), rewrites in alike.items():
        first = rewrites[0]
        yield "bold cyan", f"{kind} {', '.join(r.name for r in rewrites)}"
        if form:
            yield "cyan", f"  {form}: {first.why}"
        if not form or first.chunks > 1:
            chunks = f"{first.rows:,} rows as {first.chunks} chunks of ≤ {first.chunk_rows:,}"
            yield "cyan", f"  {chunks}" if form else f"  {chunks} ({first.why})"
        inside, chunk = human_bytes(first.intermediate_bytes), human_bytes(first.chunk_bytes)
        gradient = {
            "forward": "in the forward loop",
            "recompute": "by recomputing the inside",
            "native": "torch's own",
            "none": "none",
        }
        yield "cyan", f"  inside: {inside} before, {chunk} after; gradient: {gradient[first.gradient]}"
        for node in first.before:
            yield "red", f"- {_short(node)}"
        for node in first.after:
            yield "green", f"+ {_short(node)}"
        yield "", ""
        if not body_key:
            continue
        yield "bold magenta", f"body {body_key}"
        for line in report.bodies[body_key].strip().splitlines():
            text = line.strip()
            if text and not text.startswith(("#", "class ")):
                yield "", f"  {text}" if text.startswith("def ") else f"      {text}"
        yield "", ""
    for refused in report.refusals:
        yield "yellow", f"refused {refused.kind} {refused.name}: {refused.reason}"
    yield "bold", f"{report.graphs} graph(s): {report.summary()}"


def _doctor_lines(report: Diagnosis) -> Iterator[Line]:
    yield "bold", f"{report.graphs} graph(s): {report.summary()}"
    if not report.findings:
        yield "green", "nothing in the way was found"
    for finding in report.findings:
        yield "", ""
        yield "bold yellow", finding.cause
        yield "", f"  {finding.evidence}"
        yield "green", f"  fix: {finding.fix}"


def _short(node: str) -> str:
    """A node's text without what the diff does not need."""
    text = re.sub(r" : \[num_users=\d+\]", "", node)
    return re.sub(r", kwargs = \{\}\)$", ")", text)


def _write(lines: Sequence[Line]) -> None:
    """Prints lines: in colour on a terminal, plain in a pipe or under ``NO_COLOR``.

    Raises:
        SubjectError: colours are wanted and rich is not installed.
    """
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        for _, text in lines:
            print(text)
        sys.stdout.flush()
        return
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError as error:
        raise SubjectError("colours need rich: pip install rich, or set NO_COLOR=1") from error
    console = Console()
    for style, text in lines:
        console.print(Text(text, style=style), soft_wrap=True)


def _fail(message: str, code: int) -> int:
    print(f"mst-fx: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
