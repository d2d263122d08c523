"""``mst-fx fit MODEL --memory 80GiB``: what would fit, said without a device."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from mst_fx.cli import typed
from mst_fx.cli.lines import write
from mst_fx.diagnose.fit_model import subject_of
from mst_fx.diagnose.model_of import Shape
from mst_fx.errors import SubjectError
from mst_fx.fit.forecast import LEAST, OPTIMIZERS, Forecast, Point, Setting, Subject, Way, forecast
from mst_fx.fit.traced import CannotTell
from mst_fx.options import bytes_in
from mst_fx.plan.costs import known_devices
from mst_fx.report import human_bytes


def run(arguments: argparse.Namespace) -> int:
    """Prints what was asked for.

    Raises:
        SubjectError: for a mistake in the command line, or a model that cannot be told about.
    """
    write(fit_lines(arguments, arguments.overrides))
    return 0


def fit_lines(arguments: argparse.Namespace, overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """What is printed: styles and lines.

    Raises:
        SubjectError: for a mistake in the command line, or a model that cannot be told about.
    """
    setting = _setting(arguments)
    if arguments.lora < 0:
        raise SubjectError(f"--lora is at least 0, not {arguments.lora}")
    shape = Shape(overrides=overrides, batch=arguments.batch, dtype=getattr(torch, arguments.dtype))
    with warnings.catch_warnings(), _quiet(arguments.verbose):
        warnings.simplefilter("ignore")
        subject = subject_of(arguments.model, shape, arguments.lora)
        try:
            found = forecast(subject, setting, _lengths(arguments.seq))
        except (CannotTell, SubjectError) as error:
            raise SubjectError(f"nothing can be said of {arguments.model}: {error}") from error
        except Exception as error:
            if arguments.verbose:
                raise
            text = " ".join(str(error).split())[:300]
            raise SubjectError(
                f"nothing can be said of {arguments.model}: {type(error).__name__}: {text} (--verbose shows where)"
            ) from error
    if arguments.json:
        said = {"model": arguments.model, "title": subject.title, **dataclasses.asdict(setting)}
        return [("", json.dumps({**said, **dataclasses.asdict(found)}, indent=2))]
    return list(_lines(subject, setting, found))


def _setting(arguments: argparse.Namespace) -> Setting:
    memory, host = bytes_in(arguments.memory), bytes_in(arguments.host) if arguments.host else None
    assert memory is not None  # the command line has looked at it
    device = arguments.device.upper()
    if device not in known_devices():
        raise SubjectError(f"--device is {arguments.device!r}; known: {', '.join(known_devices())}")
    if arguments.optimizer not in OPTIMIZERS:
        raise SubjectError(f"--optimizer is {arguments.optimizer!r}; allowed: {', '.join(OPTIMIZERS)}")
    if not arguments.park:
        return Setting(device, memory, host, arguments.optimizer)
    bucket = bytes_in(arguments.park)
    assert bucket is not None
    if host is None:
        raise SubjectError("--park needs --host: the bytes of the host that states, and a plan, may take")
    return Setting(device, memory, host, arguments.optimizer, park=True, bucket=bucket)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [typed.count(part) for part in text.split(",") if part]
    except argparse.ArgumentTypeError:
        lengths = [0]
    if any(length < LEAST for length in lengths):
        raise SubjectError(
            f"--seq is {text!r}; allowed: tokens, {LEAST:,} or more, with commas, as in 16K,64K"
        )
    return lengths


class _quiet:
    """The loggers of mst-fx and torch are silent: what is traced is never run."""

    def __init__(self, verbose: bool) -> None:
        self.level = logging.NOTSET if verbose else logging.CRITICAL

    def __enter__(self) -> None:
        logging.disable(self.level)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)


def _lines(subject: Subject, setting: Setting, found: Forecast) -> Iterator[tuple[str, str]]:
    yield "bold", subject.title
    trained = "" if found.trained == found.parameters else f" ({found.trained:,} are trained)"
    yield (
        "",
        f"{setting.optimizer}{trained}, {human_bytes(setting.memory)} of one {setting.device}: parameters and states take"
        f" {human_bytes(found.resident)}, gradients {human_bytes(found.gradients)}",
    )
    if setting.park:
        yield (
            "",
            f"parked: {human_bytes(found.parked)} of states on the host, of which a plan has the rest; {human_bytes(found.stepping)} of"
            " states on the device while the optimizer steps",
        )
    yield "", ""
    lengths = sorted({point.seq for way in found.ways for point in way.points})
    searched = any(way.longest is not None for way in found.ways)
    head = ["", *(["longest"] if searched else []), *(f"at {length:,}" for length in lengths)]
    rows = [[way.name, *_longest(way, searched), *(_cell(way, n) for n in lengths)] for way in found.ways]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for style, row in (("bold", head), *(("", row) for row in rows)):
        yield style, "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield "", ""
    for point in found.ways[-1].points:
        yield "", f"the plan at {point.seq:,} tokens: " + "; ".join(map(str, point.plan))
    yield "", ""
    yield from (("dim", line) for line in notes(setting))


def _longest(way: Way, searched: bool) -> list[str]:
    return [f"{way.longest:,}" if way.longest else "nothing fits"] if searched else []


def _cell(way: Way, length: int) -> str:
    point = next((p for p in way.points if p.seq == length), None)
    return "–" if point is None else cell_of(point)


def cell_of(point: Point) -> str:
    host = f" + {point.host / 2**30:.1f} on the host" if point.host else ""
    return f"{point.seconds:.3g} s, {point.peak / 2**30:.1f} GiB{host}"


def notes(setting: Setting) -> Iterator[str]:
    """What the figures are, and what they do not see."""
    yield "All of it is predicted: nothing was run. Lengths are multiples of 1,024 tokens, seconds a step with the optimizer's."
    yield (
        "Not seen: fragments of the allocator, and what the driver takes beside it (about 1 GiB): give --memory less than the device has."
    )
    yield "adamw is the fused one; foreach=True needs one more copy of what is trained while it steps."
    if setting.device == "A100":
        yield "Seconds on an A100 are from its data sheet, and were not measured."
    if setting.park:
        yield (
            "Parked states: parameters are taken to step in the model's order, as one group; what finds no place on the host is on the device."
        )
    if setting.host:
        yield "Copies to the host and back are taken to run at the link's rate beside the rest, and to cost time only where they outlast it."
        yield "The longest sequences are those of layers alone: in groups they reach further, which --seq looks at."
