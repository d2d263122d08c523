"""Backward passes of attention and loops over the memory of operands that nobody reads again.

Before: ``q, k, v = attention_backward(tangent, out, sums, query, key, value, …)``: three new tensors. After, of a backward graph::

    found = auto_functionalized(attention_backward_over, tangent=tangent, …, over_tangent=tangent, over_key=key, over_value=None)
    q, k, v = found[3], found[4], found[2]

The gradient of the query lies where the tangent was, and those of keys and values where these were, if the backward pass itself has made
them; of a loop, one gradient of rows where a tangent was. Left as it is: what is given to the graph (what the forward pass has kept,
which a second backward pass reads again, and tangents from outside), what has another reader behind, shares its memory, or lies in it
otherwise than the gradient; and attention whose gradients one call of a kernel makes, where nothing would be gained.

``auto_functionalized`` gives what a copy of each ``over_…`` would have become. Inductor decides by an analysis of its own
(``fx_passes/reinplace.py``), in the last graph, whether the copy can be left out: were ours wrong, memory would be lost, and not the numbers,
but for one mistake of Inductor's (:func:`_has_run`).
So only Inductor gets such graphs: eager graphs have no pass that leaves copies out.

``torch._higher_order_ops.auto_functionalize``: what AOTAutograd makes of calls of operators that write to their operands; no
public way puts one into a graph. Tried with torch 2.11.0 (CPU) and 2.13.0 (CPU).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mst_fx.torch_api.attention import heads_at_once
from mst_fx.torch_api.symbols import hint_of

aten, mst = torch.ops.aten, torch.ops.mst_fx

# The most results of a loop's backward pass that writes over an operand (:mod:`mst_fx.ops.loop_over`).
MOST = 8
# The operands of attention over which gradients are written, in the order of the gradients, and whose gradients these are.
_OF_ATTENTION = {"tangent": "query", "key": "key", "value": "value"}
_KEPT = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr")  # of what is known of a call
# In what is known of a call of a graph: all that it gives has memory of its own.
GIVES_NEW = "mst_fx_gives_new"
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)

Order = Mapping[fx.Node, int]
IsGiven = Callable[[fx.Node], bool]


def write_over_dead_operands(graph: fx.Graph, own: Collection[fx.Node] = ()) -> None:
    """Lets the loops and attentions of a backward graph that goes to Inductor write over operands, where they may.

    Args:
        own: inputs of the graph whose memory is the graph's, since nobody else reads it again. To those that are written over the graph
            writes at its end, too: else Inductor would copy them first; the writing at the end it leaves out.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    targets = (mst.attention_backward.default, mst.loop_backward.default)
    calls = [node for target in targets for node in graph.find_nodes(op="call_function", target=target)]
    for node, dead in [(node, dead_operands(node, order, _is_input, own)) for node in calls]:
        if not dead:
            continue
        written = {dead[user.args[1]]: user for user in node.users if dead.get(user.args[1]) in own}  # type: ignore[arg-type]
        if node.target is mst.attention_backward.default:
            over = {f"over_{name}": dead.get(index) for index, name in enumerate(_OF_ATTENTION)}
            places = {index: len(_OF_ATTENTION) + index for index in dead}
            _write_over(graph, node, mst.attention_backward_over.default, over, places)
        else:
            ((result, tangent),) = dead.items()
            _write_over(
                graph,
                node,
                mst.loop_backward_over.default,
                {"over": tangent, "result": result},
                {result: MOST},
            )
        for operand, found in written.items():
            with graph.inserting_before(graph.output_node()):
                copy = graph.call_function(aten.copy_.default, (operand, found))
            copy.meta["val"] = operand.meta["val"]


def _is_input(node: fx.Node) -> bool:
    return node.op != "call_function"


def _write_over(
    graph: fx.Graph, node: fx.Node, target: OpOverload, over: dict[str, Any], places: Mapping[int, int]
) -> None:
    """Puts a call of another operator in the place of one.

    Args:
        over: what it is given besides.
        places: where the results that are written over operands are.
    """
    arguments: Any = _named(node) | over
    with graph.inserting_before(node):
        new = graph.call_function(auto_functionalized, (target,), arguments)
    new.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    for user in list(node.users):
        index: Any = user.args[1]
        user.args = (new, places.get(index, index))
    graph.erase_node(node)


def _named(node: fx.Node) -> dict[str, Any]:
    names = (each.name for each in node.target._schema.arguments)  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def dead_operands(
    node: fx.Node, order: Order, is_given: IsGiven, own: Collection[fx.Node] = ()
) -> dict[int, fx.Node]:
    """The operands over which a backward pass of attention, or of a loop, may write results, by the number of the result.

    Args:
        order: the place of each call of the graph, in the order in which they run.
        is_given: whether a node is none that the backward pass makes.
        own: as of :func:`write_over_dead_operands`.
    """
    given = _named(node)
    found = (_of_attention if node.target is mst.attention_backward.default else _of_loop)(given)
    return {
        index: operand for index, operand in found.items() if _is_dead(node, operand, order, is_given, own)
    }


def _of_attention(given: Mapping[str, Any]) -> dict[int, fx.Node]:
    """Operands that lie in memory as gradients ``[B, H, S, D]`` do that come out (:func:`mst_fx.torch_api.attention.empty_output`);
    none where one call of a kernel makes them all."""
    query, key = given["query"].meta["val"], given["key"].meta["val"]
    sizes = [hint_of(size) for size in (*query.shape[:3], key.shape[1])]
    if None in sizes or heads_at_once(*sizes) == sizes[1]:
        return {}
    found = {}
    for index, (name, of) in enumerate(_OF_ATTENTION.items()):
        _, heads, size, width = given[name].meta["val"].shape
        strides = (heads * size * width, width, heads * width, 1)
        if _lies_so(given[name], given[of], strides):
            found[index] = given[name]
    return found


def _of_loop(given: Mapping[str, Any]) -> dict[int, fx.Node]:
    """The first contiguous tangent that is like one of the row gradients."""
    needs, row_inputs = given["needs"], given["row_inputs"]
    if sum(needs) > MOST:
        return {}
    of = [x for x, need in zip(row_inputs, needs, strict=False) if need]
    for result, tangent in itertools.product(range(len(of)), given["tangents"]):
        shape = tangent.meta["val"].shape
        if shape and _lies_so(tangent, of[result], [math.prod(shape[i + 1 :]) for i in range(len(shape))]):
            return {result: tangent}
    return {}


def _lies_so(operand: fx.Node, like: fx.Node, strides: Sequence[Any]) -> bool:
    """Whether an operand has the strides, and the shape and the type of another one."""
    x, y = operand.meta["val"], like.meta["val"]
    if x.dtype != y.dtype or x.ndim != y.ndim:
        return False
    has_strides = zip(x.shape, x.stride(), strides, strict=True)
    return all(map(_is_known, map(operator.eq, x.shape, y.shape))) and all(
        _is_known(size == 1) or _is_known(found == wanted) for size, found, wanted in has_strides
    )


def _is_known(found: Any) -> bool:
    """Without a guard."""
    return statically_known_true(found)


def _is_dead(
    node: fx.Node, operand: fx.Node, order: Order, is_given: IsGiven, own: Collection[fx.Node]
) -> bool:
    """Whether nobody but a call reads the memory behind one of its operands from there on, and the backward pass has made it for that
    operand alone."""
    base = memory_of(operand)
    is_own = base in own and base is operand
    if not is_own and (is_given(base) or not is_made_new(base)):
        return False
    if not _is_known(base.meta["val"].numel() == operand.meta["val"].numel()):
        return False
    aliases = set(_aliases(base))
    if sum(x in aliases for x in leaves(node)) != 1:
        return False
    readers = (user for alias in aliases for user in alias.users if user not in aliases and user is not node)
    return all(_has_run(reader, node, order) for reader in readers)


def _has_run(reader: fx.Node, node: fx.Node, order: Order) -> bool:
    """Whether a reader has surely run when Inductor runs a call.

    Arithmetic may be put off until it is read: Inductor lets it run when a call is about to write to what it reads, but then
    registers it behind that call (``FallbackKernel.__init__``, ``MutationOutput``), and it reads what was written (torch 2.11 to 2.13).
    """
    waiting, seen = [reader], {reader}
    while waiting:
        reader = waiting.pop()
        if reader.op != "call_function" or order[reader] >= order[node]:
            return False
        if not _runs_at_once(reader):
            following = set(reader.users) - seen
            seen |= following
            waiting += following
    return True


def _runs_at_once(node: fx.Node) -> bool:
    """Whether Inductor puts a call off for nobody: kernels of others, and sums of more than it writes out as arithmetic
    (``config.unroll_reductions_threshold``)."""
    target = node.target
    if target is aten.sum.dim_IntList:
        source: Any = node.args[0]
        return _is_known(source.meta["val"].numel() > 8 * node.meta["val"].numel())
    return isinstance(target, OpOverload) and (target in PRODUCTS or target.namespace == "mst_fx")


def leaves(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of a call, as often as they are there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def memory_of(node: fx.Node) -> fx.Node:
    """The node that has made the memory behind a view."""
    while shows_operand(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _aliases(base: fx.Node) -> Iterator[fx.Node]:
    """A node and all that show its memory."""
    waiting = [base]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [user for user in node.users if shows_operand(user)]


def shows_operand(node: fx.Node) -> bool:
    """Whether the result of a call shows memory of its first operand, by its schema."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and shows_operand(node.args[0])
    if not isinstance(node.target, OpOverload):
        return False
    schema = node.target._schema
    may_show = any(result.alias_info is not None for result in schema.returns)
    return may_show or node.target is aten._unsafe_view.default


def is_made_new(node: fx.Node) -> bool:
    """Whether a call makes memory in any case: a product, an operator or a called graph of ours, or arithmetic of several tensors. (What copies,
    casts or pads might be left out, and be its operand.)"""
    source: Any = node.args[0] if node.target is operator.getitem else node
    if source.meta.get(GIVES_NEW):
        return True
    target = source.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    if target in PRODUCTS or target.namespace == "mst_fx":
        return True
    tensors = [n for n in source.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return torch.Tag.pointwise in target.tags and len(tensors) > 1
