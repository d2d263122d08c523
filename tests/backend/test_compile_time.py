"""Caches: a second process compiles nothing anew, and neither layers nor chunks cost bodies.

The times themselves are measured by ``tools.bench.compile``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench.compile import compile_run

pytestmark = pytest.mark.slow


def _check_second_process(way: str, layers: int, cache: Path, checkpoint: bool) -> None:
    """It compiles nothing anew, nor does it miss the bodies of loops whose graph it took from the cache."""
    cold = compile_run(way, layers, 2, cache, checkpoint=checkpoint, timeout=300)
    assert cold.counters["fxgraph_cache_miss"] > 2  # the folder was empty: forward, backward and bodies
    assert not [name for name in cold.counters if "bypass" in name]
    warm = compile_run(way, layers, 2, cache, checkpoint=checkpoint, timeout=300)
    assert warm.compiled_anew() == {}
    assert warm.counters["fxgraph_cache_hit"] > 0 and warm.counters["autograd_cache_hit"] > 0
    assert warm.loss == cold.loss
    assert warm.gradient_norm == pytest.approx(cold.gradient_norm, rel=1e-5)


def test_bodies_are_compiled_once(tmp_path: Path) -> None:
    """By the next process, for another number of layers, of chunks."""
    _check_second_process("mst", 2, tmp_path, checkpoint=True)
    # Two kinds of MLP bodies each time: the last layer's takes the final norm with it.
    more = compile_run("mst", 3, 8, tmp_path, checkpoint=True, timeout=300)
    assert more.counters["fxgraph_cache_miss"] == 2  # forward and backward of another graph
    assert more.counters["fxgraph_cache_hit"] > 0


def test_a_second_process_that_enables(tmp_path: Path) -> None:
    _check_second_process("enabled", 1, tmp_path, checkpoint=False)
