"""Caches: a second process compiles nothing anew, and chunks cost no compilation.

The times themselves are measured by ``tools/bench_compile.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench_compile import compile_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", ["mst", "enabled"])
def test_a_second_process_compiles_nothing_anew(way: str, tmp_path: Path) -> None:
    """Nor does it miss the bodies of loops whose graph it took from the cache."""
    cold = compile_run(way, 2, 4, tmp_path, checkpoint=True, timeout=300)
    assert cold.counters["fxgraph_cache_miss"] > 0  # the folder was empty
    assert not [name for name in cold.counters if "bypass" in name]
    warm = compile_run(way, 2, 4, tmp_path, checkpoint=True, timeout=300)
    assert warm.compiled_anew() == {}
    assert warm.counters["fxgraph_cache_hit"] > 0 and warm.counters["autograd_cache_hit"] > 0
    assert warm.loss == cold.loss
    assert warm.gradient_norm == pytest.approx(cold.gradient_norm, rel=1e-5)


def test_chunks_and_layers_share_bodies(tmp_path: Path) -> None:
    # Two kinds of MLP bodies each time: the last layer's takes the final norm with it.
    few = compile_run("mst", 2, 2, tmp_path / "few", timeout=300)
    many = compile_run("mst", 4, 16, tmp_path / "many", timeout=300)
    assert few.counters["fxgraph_cache_miss"] == many.counters["fxgraph_cache_miss"]
