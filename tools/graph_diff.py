"""Prints what mst-fx rewrites in a model: ``python tools/graph_diff.py LlamaForCausalLM``; as ``mst-fx diff``."""

from __future__ import annotations

import sys

from mst_fx.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["diff", *sys.argv[1:]]))
