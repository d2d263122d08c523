"""Lines of output: in colour on a terminal, plain in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mst_fx.errors import SubjectError

# Its style (a rich one; "" for none) and its text.
Line = tuple[str, str]


def write(lines: Sequence[Line]) -> None:
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
