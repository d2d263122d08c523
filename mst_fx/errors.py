"""The ways in which mst-fx says no, and how it says that it failed itself."""

from __future__ import annotations

import difflib
import enum
import logging
from collections.abc import Iterable

log = logging.getLogger("mst_fx")


class OptionError(ValueError):
    """A user's option is unknown or has a value of the wrong kind."""


class SubjectError(ValueError):
    """The user named something that cannot be built or called; the message is one sentence."""


class ProgramError(Exception):
    """A user's own code raised while a command ran it; the message is one sentence."""


class BudgetError(MemoryError):
    """No memory plan fits into the budget; the message says how much is lacking."""


class GroupError(RuntimeError):
    """The ranks of a group cannot work on one sequence together: they were given different things, or a graph cannot be cut.

    All of them raise it; none goes on alone, which would be to wait forever.
    """


class Cause(str, enum.Enum):
    """Why a place was left as it was. Code asks for this; the reason beside it is for people."""

    UNPROVED = "unproved"  # an operator mixes tokens, or has no row-wise rule
    WRITTEN = "written-in-place"
    NO_GRAD = "no-grad"  # a part runs under no_grad, another does not
    AUTOCAST = "autocast"  # parts lie in different autocast regions
    OPAQUE = "opaque"  # no rule can look inside: a sub-graph, a module, an operator of another library
    NOT_PLAIN = "not-plain"  # a value is no plain tensor: a DTensor, a vmapped or sparse one
    EXPERTS = "experts"  # rows are multiplied with the weights of their experts
    UNKNOWN_ROWS = "unknown-rows"  # data decide how many rows there are
    IS_OUTPUT = "is-output"  # the wide result is an output of the graph
    NO_SAVING = "no-saving"  # what a loop would read or give is as wide as what it would not keep
    BREAK = "break"  # the wide result leaves the graph where Dynamo, or DDP's optimizer, broke it
    MASK_INPUT = "mask-input"  # the mask of attention is an input of the graph, made outside of it
    MASK = "mask"  # the mask of attention is not understood
    SCORES = "scores"  # attention that is not recognised
    NO_LAYERS = "no-layers"  # no tensors through which all rows of a graph pass, for the memory plan
    DEFECT = "defect"  # an exception of ours


class Refusal(Exception):
    """A place that looked like a bulge and is left alone; the message is the reason.

    Raised by analysis and passes, caught by the runner of stages (:mod:`mst_fx.runner`) and by
    nobody else, except where a refusal about one node is a fact of the analysis. With
    ``strict=True`` it reaches the user.

    Args:
        reason: in words that name the node.
        cause: the kind of reason.
    """

    def __init__(self, reason: str, cause: Cause = Cause.UNPROVED) -> None:
        super().__init__(reason)
        self.cause = cause


def defect(said: str, error: Exception) -> str:
    """Logs a defect of ours, which must not stop a training run; to be called where it is handled.

    Args:
        said: what came of it, as in "mst-fx …: the error".

    Returns:
        The error as text.
    """
    text = f"{type(error).__name__}: {error}"
    log.warning("mst-fx %s: %s", said, text)
    log.debug("the defect", exc_info=True)
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean chunk_rows?"``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
