"""How many rows a chunk has, and why.

MLP (MsT, arXiv 2407.15892, section 3): C = d_model rows. No throughput is lost while the weights a chunk
reads, d·I, are less than its activations, C·I.

Vocabulary: M = ceil(V / d) chunks, so that one chunk's logits take as much as the hidden rows do.

Floors: fewer rows do not keep the device busy. On an H200 a bf16 matmul is near its peak from 1,024
rows on (benchmarks of the loops: 512 rows cost 10 % and more, 4,096 rows 1 %); a CPU core from 256. A head's
floor is higher on a GPU: every chunk reads and writes the float32 sum of its weight's gradient, and that
takes 684 / C as long as the matmul that it adds (8 bytes at 4.3 TB/s against 2·C operations at 735 TFLOP/s):
62 % more was measured at 1,024 rows of Llama3-8B's head.

Attention: a chunk of queries makes a mask of chunk x reach, and reads up to a chunk too many keys.

Backward: a chunk holds about twice the values that the forward pass holds of it (of SwiGLU six times
C·I, not three), so it gets half the rows, unless those are too few. There the floor on a GPU is higher:
halving 4,096 rows costs 5 % of an MLP's backward time, as the accumulators are read and written twice
as often.
"""

from __future__ import annotations

import dataclasses

from mst_fx.options import ChunkRows

_LEAST_ROWS = {"cuda": 1024, "cpu": 256}
_LEAST_VOCAB_ROWS = {"cuda": 4096, "cpu": 256}
_LEAST_BACKWARD_ROWS = {"cuda": 4096, "cpu": 256}


@dataclasses.dataclass(frozen=True)
class Plan:
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


def _plan(rows: int, chunk_rows: int, why: str, device: str) -> Plan:
    half = -(-chunk_rows // 2)
    if half < _LEAST_BACKWARD_ROWS.get(device, 4096):
        return Plan(rows, chunk_rows, why, chunk_rows)
    return Plan(rows, chunk_rows, f"{why}; {half} in the backward pass", half)


def plan_mlp(rows: int, width: int, device: str, chosen: ChunkRows = "auto") -> Plan:
    """The chunks of a loop whose body widens rows of ``width`` elements (d_model)."""
    if chosen != "auto":
        return Plan(rows, chosen, "chunk_rows was given", chosen)
    least = _LEAST_ROWS.get(device, 1024)
    if width >= least:
        return _plan(rows, width, f"d_model = {width} rows", device)
    return _plan(rows, least, f"the least rows that keep a {device} busy", device)


def plan_attention(device: str, chosen: ChunkRows = "auto") -> int:
    """Queries a chunk."""
    return chosen if chosen != "auto" else _LEAST_ROWS.get(device, 1024)


def plan_vocab(rows: int, width: int, vocabulary: int, device: str, chosen: ChunkRows = "auto") -> Plan:
    """The chunks of a loop whose body projects rows of ``width`` elements to a ``vocabulary``."""
    if chosen != "auto":
        return Plan(rows, chosen, "vocab_chunk_rows was given", chosen)
    least = _LEAST_VOCAB_ROWS.get(device, 4096)
    chunks = -(-vocabulary // width)
    paper = -(-rows // chunks)
    if paper >= least:
        return _plan(rows, paper, f"ceil(V / d_model) = {chunks} chunks", device)
    return _plan(rows, least, f"the least rows that keep a {device} busy", device)
