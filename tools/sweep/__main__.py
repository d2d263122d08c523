"""What is rewritten in each architecture of transformers, and whether the numbers are eager's.

    python -m tools.sweep OUT.jsonl --jobs 2                  # tries all that OUT.jsonl has not
    python -m tools.sweep OUT.jsonl --table docs/models.md    # the page that users read
    python -m tools.sweep OUT.jsonl --summary                 # what needs looking into
    python -m tools.sweep GPU.jsonl --jobs 14 --device cuda --inner inductor --length 205   # what kernels compute

One step of a tiny random model (:mod:`tools.sweep.configs`), eager and with ``backend="mst"``, in a process of
its own with a time limit; where mst fails, the plain compiler behind it says whether that is mst's fault. Each
architecture is a line of JSON, appended when it is done; of several lines the last counts. A sweep that was cut
short goes on where it was; ``--redo crash,wrong`` tries those again. It takes some ten seconds an architecture and a
core, thrice that with Inductor, and is no part of CI. On a GPU what counts are lengths that are no multiple of 8, of
heads more than 1,024 numbers long: Inductor lays those out otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Asked whether there is a GPU in another way, no forked process could use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

from tools.sweep.attempt import Outcome, Way, attempt
from tools.sweep.configs import FAMILIES, LENGTH, architectures
from tools.sweep.jobs import sweep
from tools.sweep.page import line, page, summary


def load(path: Path) -> dict[tuple[str, str], Outcome]:
    """The last line of each architecture, by family and name."""
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = (Outcome(**json.loads(line)) for line in lines)
    return {(outcome.family, outcome.name): outcome for outcome in outcomes}


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
    parser.add_argument(
        "--device", default="cpu", help='"cuda": torch\'s first; float32 alone is tried there'
    )
    parser.add_argument("--inner", default="aot_eager", choices=("aot_eager", "inductor"))
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="tokens of a sequence (default: %(default)s)"
    )
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
        # Warms what every process would import and cache anew; not beside a GPU, which Dynamo would touch.
        if args.device == "cpu":
            attempt("llama", "causal")
            torch._dynamo.reset()
        way = Way(args.device, args.inner, args.length)
        for outcome in sweep(_pending(args, known), args.family, way, args.jobs, args.timeout):
            with args.out.open("a") as out:
                out.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            print(line(outcome), flush=True)
    print(summary(list(load(args.out).values())))


if __name__ == "__main__":
    main()
