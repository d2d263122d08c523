"""The cuts that torch's partitioner is given: made by the quicker algorithm, and those of its own."""

from __future__ import annotations

from typing import Any

import networkx
import pytest

from mst_fx.torch_api import quick_cuts
from tests.helpers import SMALL_CHUNKS, ToyLM, compile_mst, loss_of, token_batch


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_cuts_are_those_of_the_default(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[tuple[networkx.DiGraph, Any]] = []
    default, quick = networkx.minimum_cut, quick_cuts._quick_cut

    def noted(graph: networkx.DiGraph, *ends: str) -> Any:
        found = quick(graph, *ends)
        cuts.append((graph, found))
        return found

    monkeypatch.setattr(quick_cuts, "_quick_cut", noted)
    options = {**SMALL_CHUNKS, "inner": inner, "inductor": {"force_disable_caches": True}}
    loss_of(compile_mst(ToyLM("pre"), options)(**token_batch(2, 32))).backward()
    assert cuts and networkx.minimum_cut is default
    for graph, found in cuts:
        assert len(graph) > 100
        capacities = networkx.get_edge_attributes(graph, "capacity").values()
        assert all(each == float("inf") or isinstance(each, int) for each in capacities), "no flow rounds"
        assert found == default(graph, "source", "sink")
