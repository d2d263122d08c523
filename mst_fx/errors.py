"""The two ways in which mst-fx says no."""

from __future__ import annotations


class OptionError(ValueError):
    """A user's option is unknown or has a value of the wrong kind."""


class Refusal(Exception):
    """A place that looked like a bulge and is left alone; the message is the reason.

    Raised by analysis and passes, caught by the pass runner (:mod:`mst_fx.pipeline`) and by
    nobody else, except where a refusal about one node is a fact of the analysis. With
    ``strict=True`` it reaches the user.
    """
