"""``MST_FX=0``: the program as it is without mst-fx, for an A/B run of the same script."""

from __future__ import annotations

import os

from mst_fx.errors import OptionError

NAME = "MST_FX"


def is_off() -> bool:
    """Whether the environment switches mst-fx off.

    Raises:
        OptionError: for a value that is neither 0 nor 1.
    """
    value = os.environ.get(NAME, "1")
    if value not in ("0", "1", ""):
        raise OptionError(f"{NAME} is {value!r}; allowed: 0 (switched off) or 1")
    return value == "0"
