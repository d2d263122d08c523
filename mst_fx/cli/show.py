"""``mst-fx explain``, ``diff`` and ``doctor``: what the backend would do to a model.

``explain`` prints the report as a table; ``diff`` the nodes that went and those that came, and the bodies of the loops; ``doctor``
says why little was saved.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterator

import torch

from mst_fx.alike import grouped, together
from mst_fx.chunk_rows import as_on
from mst_fx.cli.lines import Line, write
from mst_fx.diagnose.explain import explain
from mst_fx.diagnose.findings import Diagnosis
from mst_fx.diagnose.model_of import Subject, build_subject
from mst_fx.diagnose.page import make_page
from mst_fx.diagnose.programs import said_of
from mst_fx.diagnose.watch import watch
from mst_fx.errors import ProgramError, Refusal, SubjectError
from mst_fx.report import Report, Rewrite, human_bytes
from mst_fx.torch_api.dynamo import BackendCompilerFailed
from mst_fx.torch_api.fakes import quiet_fakes


def run(arguments: argparse.Namespace) -> int:
    """Prints what was asked for.

    Raises:
        SubjectError, OptionError: for a mistake in the command line.
        ProgramError: a program of the user's raised.
        Refusal: with the option ``strict``.
    """
    subject, report = _explained(arguments)
    if getattr(arguments, "html", None):
        arguments.html.write_text(make_page(subject.title, report), encoding="utf-8")
        print(f"wrote {arguments.html}")
    elif arguments.json:
        print(report.to_json())
    else:
        lines = {"explain": _table_lines, "diff": _diff_lines, "doctor": _doctor_lines}[arguments.command]
        write([*_head_lines(subject), *lines(report)])
    return 0


def _explained(arguments: argparse.Namespace) -> tuple[Subject, Diagnosis]:
    """Builds what was named and explains it; what it prints itself goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr), _quiet(arguments.verbose):
        try:
            subject = build_subject(
                arguments.model,
                arguments.overrides,
                batch=arguments.batch,
                seq=arguments.seq,
                dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
                checkpointing=arguments.checkpointing,
                labels=not arguments.no_labels,
                full_size=arguments.full_size,
            )
            return subject, _report(arguments, subject)
        except ProgramError:
            if arguments.verbose:
                traceback.print_exc()
            raise


def _report(arguments: argparse.Namespace, subject: Subject) -> Diagnosis:
    device = arguments.device or ("cuda" if subject.is_meta else None)
    try:
        with as_on(device) if device else contextlib.nullcontext():
            if getattr(arguments, "as_is", False):
                torch.compiler.reset()
                with watch() as report:
                    subject.fn(*subject.args, **subject.kwargs)
                return report
            return explain(subject.fn, arguments.options)(*subject.args, **subject.kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, Refusal):
            raise error.inner_exception from None
        raise
    except Exception as error:
        if subject.is_meta:
            text = " ".join(str(error).split())[:300]
            raise SubjectError(
                f"{arguments.model} cannot be traced without memory: {type(error).__name__}: {text}; a class with --set"
                " and without --full-size runs it small"
            ) from error
        raise ProgramError(said_of(arguments.model, error)) from error


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Without what torch and transformers say about tensors that have no memory, or about trying."""
    if verbose:
        yield
        return
    with warnings.catch_warnings(), quiet_fakes():
        warnings.simplefilter("ignore")
        yield


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
    for finding in report.findings:
        yield "bold yellow", f"{finding.cause}: {finding.evidence}"
        yield "green", f"  fix: {finding.fix}"


def _diff_lines(report: Report) -> Iterator[Line]:
    """Rewrites of equal structure share a body; the nodes of the first of them stand for all."""
    alike: dict[tuple[str, str, str], list[Rewrite]] = {}
    for rewrite in report.rewrites:
        alike.setdefault((rewrite.kind, rewrite.body, rewrite.form), []).append(rewrite)
    for (kind, body_key, form), rewrites in alike.items():
        first = rewrites[0]
        names = grouped(rewrites, lambda r: r.name, lambda r: None)
        yield "bold cyan", f"{kind} {', '.join(together([r.name for r in group]) for group in names)}"
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
    for refused_kind, name, reason in report.refused():
        yield "yellow", f"refused {refused_kind} {name}: {reason}"
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
