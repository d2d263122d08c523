"""Puts a loop in the place of a region."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.body import Body
from mst_fx.bodies.trace import without_gradients
from mst_fx.chunk_rows import ChunkSize
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.edit import add_call, copy_provenance
from mst_fx.graph.sizes import expression
from mst_fx.graph.values import VALUE, tensor_value
from mst_fx.graph.writes import writes_in_place
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.fold import fold_rank
from mst_fx.rows.region import Region
from mst_fx.torch_api.modes import SET_GRAD_ENABLED


def needs_gradient(region: Region) -> list[bool]:
    """Which inputs of a region need gradients: its row inputs, then its shared ones."""
    operands = [i.node for role in ("row", "shared") for i in region.inputs if i.role == role]
    fakes = [tensor_value(node) for node in operands]
    return [torch.is_grad_enabled() and fake is not None and fake.requires_grad for fake in fakes]


def scalar_with_gradient(region: Region, body: Body, needs: Sequence[bool]) -> int | None:
    """The output whose tangent is one scalar, if it is the only one with a gradient.

    float16 is left out: gradients of a sum over all rows, not yet scaled, may overflow. So is a body whose backward need not be linear
    in the tangent.
    """
    scalars = [index for index, meta in enumerate(body.outputs) if meta.is_sum and meta.shape == ()]
    dtypes = {x.dtype for x in (*body.row_metas, *body.shared)}
    if body.may_be_nonlinear or not scalars or torch.float16 in dtypes:
        return None
    differentiable = body.differentiable_for(needs)
    found = [index for index, is_differentiable in enumerate(differentiable) if is_differentiable]
    return found[0] if len(found) == 1 and found[0] in scalars else None


def replace_region(
    analysis: RowAnalysis,
    region: Region,
    body: Body,
    chunk_size: ChunkSize,
    gradient_of: int | None,
    needs: Sequence[bool],
) -> dict[fx.Node, fx.Node]:
    """Replaces a region's nodes by a loop op and the views around it.

    Before: ``x[B, S, H] → norm → linear → act → linear → add → y[B, S, H]``. After:
    ``x[B, S, H] → mst_fx.loop → y[B, S, H]``.

    Args:
        gradient_of: the scalar output whose gradients the forward loop computes; None: recompute.
        needs: which inputs get gradients, row inputs first.

    Returns:
        The new node of each output of the region. The region's nodes are erased, but for those that
        an output of the graph still names (logits that will be deferred).

    Raises:
        Refusal: before anything is changed, if the loop has no place in the graph's order.
    """
    graph = analysis.graph
    users_before = _users_before(analysis, region)
    outs = (*region.row_outputs, *region.sums)
    row_inputs = [i.node for i in region.inputs if i.role == "row"]
    lead = [_with_leading_sizes(row_inputs, node, analysis.rows) for node in outs]
    shapes = {
        node: _leading_sizes(analysis, region, node)
        for node, like in zip(outs, lead, strict=True)
        if like < 0 and node in region.row_outputs
    }

    anchor, stopped = region.nodes[-1], without_gradients(analysis, region)
    with graph.inserting_after(anchor):
        cursor = graph.call_function(int, (0,))  # marks the place; erased below
    with graph.inserting_before(cursor):
        loop = _add_loop(analysis, region, body, chunk_size, gradient_of, needs, lead)
        is_single = gradient_of is None and len(outs) == 1
        new = {}
        for index, node in enumerate(outs):
            found = loop if is_single else add_call(graph, operator.getitem, loop, index)
            new[node] = _as_before(node, found, shapes.get(node, []), node in stopped)
    copy_provenance(region.seed, loop)
    for node in users_before:
        cursor.prepend(node)
    _set_modes(analysis, region, anchor, cursor)
    graph.erase_node(cursor)
    _exchange(region, new)
    return new


def _as_before(node: fx.Node, current: fx.Node, sizes: list[Any], is_stopped: bool) -> fx.Node:
    """What a loop gives for an output of its region, with that output's leading sizes and without its gradient."""
    graph = node.graph
    if len(sizes) > 1:
        known = [s if isinstance(s, int) else add_call(graph, "size", s[0], s[1]) for s in sizes]
        current = add_call(graph, torch.unflatten, current, 0, known)
    if is_stopped and (fake := tensor_value(current)) is not None and fake.requires_grad:
        current = add_call(graph, "detach", current)
    current.meta = {**node.meta, **current.meta}
    return current


def _exchange(region: Region, new: dict[fx.Node, fx.Node]) -> None:
    """Lets the readers outside of a region read what replaces its outputs, and erases what nobody reads then."""
    inside = set(region.nodes)
    for old, node in new.items():
        old.replace_all_uses_with(node, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region.nodes):
        if not node.users:
            node.graph.erase_node(node)


def _add_loop(
    analysis: RowAnalysis,
    region: Region,
    body: Body,
    chunk_size: ChunkSize,
    gradient_of: int | None,
    needs: Sequence[bool],
    lead: list[int],
) -> fx.Node:
    """The loop op of a region, at the graph's insertion point."""
    graph = analysis.graph
    row_inputs, shared = ([i.node for i in region.inputs if i.role == role] for role in ("row", "shared"))
    # In inference_mode nothing has a gradient, and nothing can be detached.
    wanted = needs if analysis.contexts[region.nodes[0]].inference else needs_gradient(region)
    operands = [
        add_call(graph, "detach", node) if want and not need else node  # read under no_grad only
        for node, want, need in zip([*row_inputs, *shared], wanted, needs, strict=True)
    ]
    row_inputs, shared = operands[: len(row_inputs)], operands[len(row_inputs) :]
    if gradient_of is None:
        op = (
            torch.ops.mst_fx.loop
            if len(region.row_outputs) + len(region.sums) == 1
            else torch.ops.mst_fx.loop_list
        )
        return add_call(
            graph,
            op.default,
            row_inputs,
            shared,
            body.key,
            chunk_size.chunk_rows,
            chunk_size.backward_rows,
            lead,
        )
    no_port = -1
    args = (row_inputs, shared, list(needs), gradient_of, body.key, chunk_size.chunk_rows, lead, no_port)
    return add_call(graph, torch.ops.mst_fx.loop_with_grad.default, *args)


def _users_before(analysis: RowAnalysis, region: Region) -> list[fx.Node]:
    """Nodes that use the region's results and stand before its last node, in order: they must move."""
    inside = set(region.nodes)
    users_before: dict[fx.Node, None] = {}
    for node in analysis.graph.nodes:
        if node is region.nodes[-1]:
            break
        if node not in inside and any(
            operand in inside or operand in users_before for operand in node.all_input_nodes
        ):
            users_before[node] = None
    autocast = analysis.contexts[region.nodes[-1]].autocast
    for node in users_before:
        context = analysis.contexts.get(node)
        if writes_in_place(node):
            raise Refusal(f"{node.name} writes between the region's nodes and cannot be moved", Cause.WRITTEN)
        if context is None or context.autocast != autocast or context.level:
            raise Refusal(
                f"{node.name} stands between the region's nodes and cannot be moved", Cause.AUTOCAST
            )
    return list(users_before)


def _set_modes(analysis: RowAnalysis, region: Region, anchor: fx.Node, cursor: fx.Node) -> None:
    """Gives the nodes between two others the grad mode that each is to run in.

    The place behind a region's last node may lie under ``no_grad``, where a loop would have no gradient.
    """
    graph, place = analysis.graph, analysis.contexts[anchor]
    of_loop = dataclasses.replace(place, grad=any(analysis.contexts[node].grad for node in region.nodes))
    current, node = place.grad, anchor.next
    while node is not cursor:
        wanted = analysis.added(node, of_loop).grad
        if wanted != current:
            with graph.inserting_before(node):
                analysis.added(_grad_mode(graph, wanted), dataclasses.replace(place, grad=wanted))
        current, node = wanted, node.next
    if current != place.grad:
        with graph.inserting_before(cursor):
            analysis.added(_grad_mode(graph, place.grad), place)


def _grad_mode(graph: fx.Graph, enabled: bool) -> fx.Node:
    node = graph.call_function(SET_GRAD_ENABLED, (enabled,))  # as Dynamo writes it
    node.meta[VALUE] = None
    return node


def _with_leading_sizes(inputs: Sequence[fx.Node], node: fx.Node, rows: Any) -> int:
    """The first of the inputs whose rows unfold as those of a node; -1 if none does."""

    def leading(node: fx.Node) -> list[Any]:
        fake = tensor_value(node)
        assert fake is not None
        return [expression(size) for size in fake.shape[: fold_rank(fake.shape, rows)]]

    wanted = leading(node)
    return next((index for index, other in enumerate(inputs) if leading(other) == wanted), -1)


def _leading_sizes(analysis: RowAnalysis, region: Region, node: fx.Node) -> list[Any]:
    """The sizes the rows of an output unfold to: ints, or (node, dim) of an input with that size."""
    fake = tensor_value(node)
    assert fake is not None
    rank = fold_rank(fake.shape, analysis.rows)
    sizes: list[Any] = []
    for dim, size in enumerate(fake.shape[:rank]):
        if isinstance(size, torch.SymInt):
            sizes.append(_input_with_size(region, rank, dim, size))
        else:
            sizes.append(size)
    return sizes


def _input_with_size(region: Region, rank: int, dim: int, size: torch.SymInt) -> tuple[fx.Node, int]:
    for operand in region.inputs:
        fake = tensor_value(operand.node)
        if operand.role == "row" and fake is not None and fake.ndim >= rank:
            other = fake.shape[dim]
            if isinstance(other, torch.SymInt) and expression(other) == expression(size):
                return operand.node, dim
    raise Refusal(f"no input of the region has the dynamic size {size}")
