"""``python -m tools.bench``: :mod:`tools.bench.step`."""

from __future__ import annotations

from tools.bench.step import main

if __name__ == "__main__":
    main()
