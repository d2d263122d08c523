"""What one chunk of a loop's body takes while it runs, from the body's graph.

Forward: each value that is not fused away. Backward: they are made again, and their gradients with them; but a gradient that a pointwise kernel
makes is written over what it is made of (:mod:`mst_fx.torch_api.written_in_place`): of a gated MLP's three wide values and their three
gradients three are there at once. Beside a value are its gradients

- that products give, where it is made of rows that go in (a norm's): the value itself is kept for the gradients of weights;
- where parts of it are read (``split``): elsewhere than the gradient is written;
- where a bias is trained: what sums up a bias's gradient is no pointwise kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import networkx
from torch import fx

from mst_fx.bodies.body import Body
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import PRODUCTS, operation
from mst_fx.plan.joint_graph import bytes_of, is_cheap, is_fused, is_view, readers_of, tensor_of


def made_a_row(run: Body) -> int:
    """Bytes a row of what a body makes."""
    return _bytes_a_row(run, _made(run))


def made_backward_a_row(run: Body, needs: Sequence[bool], dims: int = 2) -> int:
    """Bytes a row of what its backward pass makes, but for sums of weights.

    Args:
        needs: of ``(*row_inputs, *shared)``.
        dims: of a weight; what has fewer is a bias.
    """
    _, *inputs = run.forward.graph.find_nodes(op="placeholder")
    count = len(run.row_metas)
    rows = itertools.compress(inputs[:count], needs)
    trained = itertools.compress(zip(inputs[count:], run.shared, strict=True), needs[count:])
    biases = {node for node, meta in trained if len(meta.shape) < dims}
    made = [node for node in _made(run) if not _only_leaves(node)]
    gradients = [node for node in rows for _ in range(max(1, _products(node)))]
    gradients += _beside([node for node in made if _is_wide(run, node)], biases)
    return _bytes_a_row(run, [*made, *gradients])


def _beside(made: Sequence[fx.Node], biases: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The values that are there beside gradients of their size, as often as there are such gradients."""
    sources = {node: set(_sources(node, {*made, *biases})) for node in made}
    near = networkx.Graph([(node, source) for node, found in sources.items() for source in found])
    near.add_nodes_from(made)
    # A kernel writes over all that it reads, or over nothing.
    elsewhere = [node for node in near if node in biases or not _is_read_in_place(node)]
    with_gradients = set[fx.Node]().union(*(networkx.node_connected_component(near, x) for x in elsewhere))
    for node, found in sources.items():
        is_kept = is_cheap(node) and sources.keys().isdisjoint(found)
        yield from [node] * max(node in with_gradients, is_kept * _products(node))


def _made(run: Body) -> list[fx.Node]:
    graph = run.forward.graph
    leaving = set(graph.output_node().all_input_nodes)
    inner = [
        n for n in graph.nodes if n.op == "call_function" and n not in leaving and tensor_of(n) is not None
    ]
    return [n for n in inner if not is_view(n) and not is_fused(n)]


def _bytes_a_row(run: Body, nodes: Sequence[fx.Node]) -> int:
    return sum(map(bytes_of, nodes)) // traced_rows(run)


def traced_rows(run: Body) -> int:
    """The rows that a body was traced with, by hint."""
    return hint(run.forward.graph.find_nodes(op="placeholder")[0].meta["val"])


def _is_wide(run: Body, node: fx.Node) -> bool:
    """Whether a value has more than a number a row."""
    found = tensor_of(node)
    return found is not None and hint(found.numel()) > traced_rows(run)


def _only_leaves(node: fx.Node) -> bool:
    return all(user.op == "output" for user in readers_of(node))


def _is_product(node: fx.Node) -> bool:
    return operation(node) in PRODUCTS or operation(node) == "mst_fx::grouped_mm"


def _products(node: fx.Node) -> int:
    return sum(map(_is_product, readers_of(node)))


def _sources(node: fx.Node, among: Collection[fx.Node]) -> Iterator[fx.Node]:
    """What the kernel that makes a value reads, of some nodes; of a product its bias alone."""
    waiting = list(node.all_input_nodes)
    while waiting:
        operand = waiting.pop()
        if operand in among:
            if operand.op == "placeholder" or not _is_product(node):
                yield operand
        elif is_view(operand) or (is_fused(operand) and not _is_product(node)):
            waiting += operand.all_input_nodes


def _is_read_in_place(node: fx.Node) -> bool:
    """Whether all that is fused and reads a value reads each element of it for one of its own."""
    return all(
        bytes_of(user) == bytes_of(node) and _is_read_in_place(user)
        if is_view(user)
        else _is_of_same_size(user, node)
        for user in node.users
    )


def _is_of_same_size(user: fx.Node, node: fx.Node) -> bool:
    if user.op == "output" or not is_cheap(user):
        return _is_product(user)
    made, read = tensor_of(user), tensor_of(node)
    return made is not None and read is not None and hint(made.numel()) == hint(read.numel())
