"""``python -m tools.convergence``: runs, as they end, into a table and a picture."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

import tools.convergence
from tools.bench.tables import numbers, write_results
from tools.convergence.compare import draw, table
from tools.convergence.runs import ON_CPU, ON_CUDA, RANKS, WAYS, Result, Setup, all_runs, parameters_of


def run(setup: Setup, ways: Sequence[str], seeds: Sequence[int], out: Path, picture: Path) -> list[Result]:
    """Trains; writes ``out``.json and .md after each run, so that an early end leaves what was before it, then the picture."""
    results: list[Result] = []
    facts = dataclasses.asdict(setup) | {"parameters": parameters_of(setup)}
    title = (
        f"Qwen2, {facts['parameters'] / 1e6:.1f} M weights, {setup.layers} layers, vocabulary {setup.vocabulary:,}, "
        f"{setup.seq:,} tokens a step, {setup.steps} steps, "
        f"{'bfloat16 autocast' if setup.device == 'cuda' else 'float32'}"
    )
    for result in all_runs(ways, seeds, setup):
        results.append(result)
        said = {key: value for key, value in result.items() if key not in ("losses", "plans")}
        print(f"{said}, last losses {result['losses'][-3:]}", flush=True)
        has_noise = sum(r["way"] == "eager" for r in results) >= 2
        text = f"{title}.\n\n{table(results)}" if has_noise else title
        write_results(out.parent, out.name, {"setup": facts, "runs": results}, text)
    draw(results, picture, title)
    print(table(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=tools.convergence.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="a small model on the CPU")
    parser.add_argument("--seq", type=int, help="tokens a step")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument(
        "--ranks", action="store_true", help="one way more: two processes share each sequence"
    )
    parser.add_argument("--memory", help="that the plan may take, as '2GiB'")
    parser.add_argument("--out", type=Path, default=Path("bench-out/convergence"))
    parser.add_argument("--picture", type=Path, help="OUT.png, if nothing is said")
    arguments = parser.parse_args()
    setup = ON_CPU if arguments.cpu else ON_CUDA
    given = {name: getattr(arguments, name) for name in ("seq", "steps", "memory")}
    setup = dataclasses.replace(setup, **{name: value for name, value in given.items() if value is not None})
    ways = [*arguments.ways.split(","), *([RANKS] if arguments.ranks else [])]
    if setup.device == "cuda" and torch.cuda.device_count() < (setup.world if arguments.ranks else 1):
        parser.error("too few GPUs; --cpu trains a small model without")
    if ways[0] != "eager" or len({*arguments.seeds}) < 2 or not {*ways} <= {*WAYS, RANKS}:
        parser.error(f"--ways begin with eager and are of {', '.join(WAYS)}; --seeds are two at least")
    out = arguments.out
    run(setup, ways, arguments.seeds, out, arguments.picture or out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    main()
