"""Every node knows its value: in graphs that Dynamo did not make, nodes run on fakes once.

Changes no call; what all other stages read.
"""

from __future__ import annotations

from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.fill import fill_values
from mst_fx.graph.subgraphs import is_graph
from mst_fx.graph.values import VALUE, value


def run(context: PassContext) -> None:
    """Fills in the values that are missing."""
    gm = context.gm
    nodes = [n for n in gm.graph.nodes if n.op not in ("output", "get_attr")]
    if any(value(n) is None and VALUE not in n.meta for n in nodes) and not _knows_values(gm):
        fill_values(gm, context.example_inputs)
    if any(n.op == "get_attr" and value(n) is None and not is_graph(gm, n) for n in gm.graph.nodes):
        fill_values(gm, context.example_inputs)


def _knows_values(gm: fx.GraphModule) -> bool:
    placeholders = gm.graph.find_nodes(op="placeholder")
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    known = [n for n in calls if VALUE in n.meta or "val" in n.meta]
    return all(VALUE in n.meta or "val" in n.meta for n in placeholders) and 2 * len(known) > len(calls)
