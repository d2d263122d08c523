"""How many rows a chunk has, and why. The curves are in benchmarks/chunks-h200.md.

MLP (MsT, arXiv 2407.15892, section 3): C = d_model rows. No throughput is lost while the weights a chunk
reads, d·I, are less than its activations, C·I.

Vocabulary: M = ceil(V / d) chunks, so that one chunk's logits take as much as the hidden rows do; no more than d rows a chunk, or
the floor.

Floors: fewer rows do not keep the device busy. Of 65,536 rows of an MLP on an H200, forward and backward, chunks
of 4,096 take 1.00 to 1.09 times as long as the best size, of 2,048 1.05 to 1.38, of 1,024 1.14 to 2.51; the
small models pay most, whose kernels end before the next one is launched. 8,192 would save 1 to 3 % more of five
models, and cost 7 % of Llama3.2-1B. On a CPU core 256 rows are enough.

A head is slowed down by something else: every chunk reads and writes the float32 sum of its weight's gradient,
and that takes 684 / C as long as the matmul that it adds (8 bytes at 4.3 TB/s against 2·C operations at
735 TFLOP/s). 4,096 rows take 1.01 to 1.04 times as long as the best size, 2,048 1.03 to 1.07. Up to about d
rows, the peak does not grow with them: their logits take no more than the gradient that the sum is
rounded to at the end. Hence a floor of d, from 2,048 to 4,096, and d at most: beyond it, each further row takes the
device V more elements (at 262,144 tokens of Llama3-8B 1 GiB), for 1 to 4 % of the head's seconds, which attention dwarfs there.

Attention: a chunk of queries makes a mask of chunk x reach, and reads up to a chunk too many keys.

Backward: a chunk holds about twice the values that the forward pass holds of it (of SwiGLU six times
C·I, not three), so it gets half the rows, unless those are fewer than the floor.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from mst_fx.options import ChunkRows

_LEAST_ROWS = {"cuda": 4096, "cpu": 256}
_LEAST_VOCAB_ROWS = {"cuda": 2048, "cpu": 256}
_QUERIES = {"cuda": 1024, "cpu": 256}


_AS_ON: contextvars.ContextVar[str] = contextvars.ContextVar("as_on")


@contextlib.contextmanager
def as_on(device: str) -> Iterator[None]:
    """Inside of the block chunks are as on another type of device: what a step takes there is asked here."""
    token = _AS_ON.set(device)
    try:
        yield
    finally:
        _AS_ON.reset(token)


def _least(known: dict[str, int], device: str) -> int:
    return known.get(_AS_ON.get(device), known["cuda"])


def _busy(device: str) -> str:
    device = _AS_ON.get(device)
    return f"the least rows that keep a {'GPU' if device in ('cuda', 'meta') else device} busy"


@dataclasses.dataclass(frozen=True)
class ChunkSize:
    """Rows a chunk, how many chunks that makes at the captured number of rows, and why.

    Attributes:
        backward_rows: rows a chunk where the inside is recomputed for the gradients.
    """

    rows: int
    chunk_rows: int
    why: str
    backward_rows: int

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)


def _less_backward(rows: int, chunk_rows: int, why: str, device: str) -> ChunkSize:
    """Chunks of half the rows in the backward pass, where these are no fewer than the floor."""
    half = -(-chunk_rows // 2)
    if half < _least(_LEAST_ROWS, device):
        return ChunkSize(rows, chunk_rows, why, chunk_rows)
    return ChunkSize(rows, chunk_rows, f"{why}; {half} in the backward pass", half)


def mlp_chunk_size(rows: int, width: int, device: str, chosen: ChunkRows = "auto") -> ChunkSize:
    """The chunks of a loop whose body widens rows of ``width`` elements (d_model)."""
    if chosen != "auto":
        return ChunkSize(rows, chosen, "chunk_rows was given", chosen)
    least = _least(_LEAST_ROWS, device)
    if width >= least:
        return _less_backward(rows, width, f"d_model = {width} rows", device)
    return _less_backward(rows, least, _busy(device), device)


def queries_a_chunk(device: str, chosen: ChunkRows = "auto") -> int:
    """Queries a chunk."""
    return chosen if chosen != "auto" else _least(_QUERIES, device)


def vocab_chunk_size(
    rows: int, width: int, vocabulary: int, device: str, chosen: ChunkRows = "auto", changes: bool = False
) -> ChunkSize:
    """The chunks of a loop whose body projects rows of ``width`` elements to a ``vocabulary``.

    Args:
        changes: ``rows`` is that of one batch of several: no chunk's size follows from it, or short batches
            would take chunks as large as the longest one's.
    """
    if chosen != "auto":
        return ChunkSize(rows, chosen, "vocab_chunk_rows was given", chosen)
    chunks = -(-vocabulary // width)
    paper = -(-rows // chunks)
    least = max(_least(_LEAST_VOCAB_ROWS, device), min(width, _least(_LEAST_ROWS, device)))
    if paper < least or changes:
        return _less_backward(rows, least, _busy(device), device)
    most = max(width, least)
    if paper > most:
        return _less_backward(rows, most, f"d_model = {width} rows, or the least", device)
    return _less_backward(rows, paper, f"ceil(V / d_model) = {chunks} chunks", device)
