"""The parser of the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mst_fx.cli import typed
from mst_fx.errors import did_you_mean
from mst_fx.version import __version__

_DESCRIPTION = 'Says what torch.compile(model, backend="mst") does to a model, and does it to scripts.'
_CODES = """\
Exit codes: 0; 1 for a defect of mst-fx; 2 for a mistake in the command line; 3 for a refusal under --option strict=true;
4 if a program of yours raised. Of mst-fx run: the script's own.
"""
_EPILOG = f"""\
MODEL is one of
  LlamaForCausalLM       a model or config class of transformers; small sizes, unless --full-size is given
  llama3-8b              a short name, as of mst-fx fit
  path/to/config.json    a config, as a file or in a folder
  Qwen/Qwen2.5-7B        a config on the Hugging Face hub
  module:function        your own: a function that returns (fn_or_module, args, kwargs)
  file.py:function       the same, by the file's name

A model's full size is traced without its memory, with chunks as on a GPU (--device cpu: as on a CPU), in bfloat16. Weights are
random. A function gets of --seq, --batch, --dtype, --checkpointing and --set what its signature names.

  mst-fx explain LlamaForCausalLM --set num_hidden_layers=4 --seq 4096
  mst-fx explain llama3-8b --seq 32K --checkpointing
  mst-fx diff BertForMaskedLM --batch 4 --seq 512 --option chunk_rows=128

{_CODES}"""
_FIT_EPILOG = """\
MODEL is one of
  llama3-8b              a short name: llama3-8b, llama3-70b, mistral-7b, qwen2-7b, gemma2-9b and others
  LlamaForCausalLM       a model or config class of transformers, with the sizes of its defaults; --set changes them
  path/to/config.json    a config, as a file or in a folder
  Qwen/Qwen2.5-7B        a config on the Hugging Face hub

  mst-fx fit llama3-8b --memory 80GiB --device h100
  mst-fx fit llama3-8b --memory 24GiB --lora 16 --seq 16K,64K
  mst-fx fit llama3-8b --memory 47GiB --host 128GiB --park
"""
_RUN_EPILOG = f"""\
Inside of the script torch.compile means mst, and accelerate, which Hugging Face's Trainer trains with, compiles the model if
the script does not say how. MST_FX=0 before the same line runs it without mst-fx.

  mst-fx run --report train.py --lr 1e-4
  mst-fx run --option memory=70GiB -m package.train config.yaml
  torchrun --nproc-per-node 8 -m mst_fx run train.py
  accelerate launch -m mst_fx run train.py

{_CODES}"""
_EXPLAINING = (
    ("explain", "print a table of what is rewritten and what is refused, and why"),
    ("diff", "print the rewritten nodes, before and after, and the bodies of the loops"),
    ("doctor", "say why little was saved, and what to do about it"),
)
_FIT = "say what would fit on a device, and how long a step would take"
_RUN = "run a script in which torch.compile means mst"


class Parser(argparse.ArgumentParser):
    """Says what was meant, and the usage of the command that was typed.

    Attributes:
        commands: the parser of each.
    """

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.commands: dict[str, Parser] = {}

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """
        Raises:
            SystemExit: for a mistake, and after --help and --version.
        """
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            parser = self.commands.get(arguments.command, self)
            hint = did_you_mean(unknown[0].partition("=")[0], re.findall(r"--[a-z-]+", parser.format_usage()))
            parser.error(f"there is no {' '.join(unknown)}{hint}")
        return arguments

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    top = Parser("mst-fx", description=_DESCRIPTION, epilog=_CODES)
    top.add_argument("--version", action="version", version=f"mst-fx {__version__}")
    commands = top.add_subparsers(dest="command", metavar="{run,explain,diff,doctor,fit}")
    run = commands.add_parser("run", help=_RUN, description=f"{_RUN.capitalize()}.", epilog=_RUN_EPILOG)
    _add_run(run)
    for name, text in _EXPLAINING:
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.", epilog=_EPILOG)
        _add_explaining(command, name)
        top.commands[name] = command
    fit = commands.add_parser("fit", help=_FIT, description=f"{_FIT.capitalize()}.", epilog=_FIT_EPILOG)
    _add_fit(fit)
    top.commands |= {"run": run, "fit": fit}
    return top


def _add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the mst backend, as memory=70GiB or passes=mlp,vocab",
    )


def _add_run(run: argparse.ArgumentParser) -> None:
    _add_option(run)
    run.add_argument("--report", action="store_true", help="print on stderr, at the end, what was rewritten")
    run.add_argument(
        "--report-to", type=Path, metavar="FILE", help="write that to FILE, as JSON if it is .json"
    )
    run.add_argument(
        "--only-own", action="store_true", help="accelerate compiles only where the script says so"
    )
    run.add_argument("--quiet", action="store_true", help="warnings alone: no line for each compiled graph")
    run.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module, as of python -m")
    run.add_argument("script", metavar="SCRIPT", help="a file, or with -m a module")
    run.add_argument("args", nargs=argparse.REMAINDER, metavar="…", help="its arguments")


def _add_explaining(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("model", metavar="MODEL", help="a model's name or config, or module:function")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the model's config"
    )
    command.add_argument("--batch", type=typed.count, metavar="N", help="sequences a batch (1)")
    command.add_argument(
        "--seq", type=typed.count, metavar="N", help="tokens a sequence, as 32K (1K; of a full size 32K)"
    )
    command.add_argument(
        "--dtype", type=typed.dtype, metavar="TYPE", help="of the weights (fp32; of a full size bf16)"
    )
    command.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    command.add_argument("--no-labels", action="store_true", help="call it without labels: no loss")
    command.add_argument("--full-size", action="store_true", help="keep the sizes of the config's defaults")
    command.add_argument(
        "--device", type=typed.device, metavar="NAME", help="with chunks as there: cpu, cuda"
    )
    _add_option(command)
    command.add_argument("--verbose", action="store_true", help="log what the passes do; show tracebacks")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    if name == "diff":
        output.add_argument(
            "--html", type=Path, metavar="FILE", help="write a page with the graphs side by side instead"
        )
    if name == "doctor":
        command.add_argument(
            "--as-is", action="store_true", help="run it as it is, a function that compiles by itself"
        )


def _add_fit(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("model", metavar="MODEL", help="a model's config, by name, class or path")
    fit.add_argument("--memory", required=True, metavar="BYTES", help="of the device, as 80GiB")
    fit.add_argument(
        "--host", metavar="BYTES", help="of the host that parked states and a plan may use, as 128GiB"
    )
    fit.add_argument(
        "--park",
        nargs="?",
        const="256MiB",
        metavar="BUCKET",
        help="the optimizer's states are on the host (mst_fx.park), and come in buckets of so many bytes (256MiB)",
    )
    fit.add_argument("--device", default="h100", help="whose seconds are said: h200, h100, a100 (h100)")
    fit.add_argument("--optimizer", default="adamw", help="adamw, adamw8bit or sgd (adamw)")
    fit.add_argument("--lora", type=int, default=0, metavar="RANK", help="PEFT's LoRA on all linear layers")
    fit.add_argument(
        "--dtype",
        type=typed.dtype,
        default="bfloat16",
        metavar="TYPE",
        help="of parameters and states (bf16)",
    )
    fit.add_argument("--batch", type=typed.count, default=1, metavar="N", help="sequences a batch (1)")
    fit.add_argument(
        "--seq",
        default="",
        metavar="N,…",
        help="tokens a sequence, as 16K,64K; without it the longest are searched",
    )
    fit.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the model's config"
    )
    fit.add_argument("--json", action="store_true", help="print JSON")
    fit.add_argument("--verbose", action="store_true", help="log what the passes do; show tracebacks")
