"""RUN TIME: the custom operators that a training step runs.

A step never reaches the proof: nothing here imports ``rows``, edits a graph or knows an FX type; what puts an operator into a graph
is a pass. Importing this package registers all of them, and ``mst_fx/__init__`` does.
"""

import mst_fx.ranks.collectives
import mst_fx.ranks.gradients  # noqa: F401
from mst_fx.ops import (
    arena,
    attention,
    biased,
    buffer,
    chunks,
    dropout,
    embedding,
    experts,
    gate,
    layer,
    loop,
    loop_over,
    masked,
    offload,
    port,
    row_sums,
    scaled,
)

__all__ = [
    "arena", "attention", "biased", "buffer", "chunks", "dropout", "embedding", "experts", "gate", "layer", "loop", "loop_over",
    "masked", "offload", "port", "row_sums", "scaled",
]  # fmt: skip
