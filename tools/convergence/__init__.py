"""Trains a small Qwen2 on real text, eagerly and in other ways, and holds the losses against what a seed changes.

    python -m tools.convergence --out benchmarks/convergence-h200 --picture docs/convergence-h200.png
    python -m tools.convergence --cpu --ranks --out benchmarks/convergence-cpu --picture docs/convergence-cpu.png

The first takes some minutes on one GPU; with ``--ranks`` it needs two. Writes ``OUT.json``, ``OUT.md`` and a picture.
The text is the source of Python's standard library, the tokenizer a BPE trained on it, both made in memory and always the
same; every twentieth file is held out. Random weights, AdamW with warm-up and a cosine; weights in float32, on a GPU under
bfloat16 autocast. The ways, from the same weights for a seed, and on the same batches in the same order for all:

- ``eager``;
- ``nudged``: eager, each weight of the start moved by its last bit: what rounding alone does to a run;
- ``mst``;
- ``plan``: mst with the option ``memory``, on a GPU the least of some shares of what the way ``mst`` took that will do;
- ``ranks``: mst on two processes that share each sequence (``sequence_parallel``), with ``--ranks``.

A seed chooses the weights. What seeds change, the spread of eager's losses over them, is what a way's gap to eager from
the same weights is held against. The held-out loss is computed eagerly for all ways.
"""
