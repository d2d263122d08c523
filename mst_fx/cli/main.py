"""The console script ``mst-fx``: reads what was typed, and imports what does it afterwards."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mst_fx.cli import typed
from mst_fx.cli.arguments import parser
from mst_fx.diagnose.configs import check_class, is_class_name, library
from mst_fx.errors import OptionError, ProgramError, Refusal, SubjectError

# The module of each command, which imports torch.
_COMMANDS = {"run": "program", "explain": "show", "diff": "show", "doctor": "show", "fit": "fit"}

MISTAKE, REFUSED, RAISED = 2, 3, 4  # exit codes; 1 is Python's own, for a defect of ours


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: the arguments, without the program's name; those of the process if not given.
    """
    made = parser()
    arguments = made.parse(argv)
    if arguments.command is None:
        print(made.format_help(), file=sys.stderr, end="")
        return MISTAKE
    if getattr(arguments, "verbose", False):
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        logging.getLogger("mst_fx").setLevel(logging.DEBUG)
    try:
        arguments.options = typed.options(getattr(arguments, "option", ()))
        typed.check_sizes(arguments)
        arguments.overrides = typed.pairs(getattr(arguments, "set", ()), "--set")
        for flag in ("html", "report_to"):
            _check_file(getattr(arguments, flag, None), f"--{flag.replace('_', '-')}")
        model = getattr(arguments, "model", "")
        if is_class_name(model):
            check_class(library(model), model)
        code: int = importlib.import_module(f"mst_fx.cli.{_COMMANDS[arguments.command]}").run(arguments)
        return code
    except (SubjectError, OptionError) as error:
        return _fail(str(error), MISTAKE)
    except ProgramError as error:
        return _fail(str(error), RAISED)
    except Refusal as refusal:
        return _fail(f"refused: {refusal}", REFUSED)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _check_file(path: Path | None, flag: str) -> None:
    """Asks before the work is done whether a file can be written after it.

    Raises:
        SubjectError: it cannot.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise SubjectError(f"{flag} {path}: {'is a folder' if path.is_dir() else 'there is no such folder'}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SubjectError(f"{flag} {path}: cannot be written")


def _fail(message: str, code: int) -> int:
    print(f"mst-fx: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
