"""A region traced into a body, which proves all of it row-wise."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.body import BODIES, Body, BodyConfig, OutputMeta, TensorMeta
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.modes import autocast_contexts
from mst_fx.graph.sizes import settled, static_sizes
from mst_fx.graph.values import tensor_value, tensors_of, value
from mst_fx.rows.analysis import RowAnalysis
from mst_fx.rows.fold import Folder, check_guards, fold_rank, read_operand
from mst_fx.rows.labels import SUMMED, Row
from mst_fx.rows.region import Region
from mst_fx.rows.tracer import RowTracer
from mst_fx.torch_api.fakes import make_fx
from mst_fx.torch_api.modes import enable_python_dispatcher
from mst_fx.torch_api.ops import OpOverload, schema_of
from mst_fx.torch_api.tensors import tree_map_only


def trace_body(analysis: RowAnalysis, region: Region, config: BodyConfig, known: dict[str, Body]) -> Body:
    """Traces a region to ATen on folded rows and proves it row-wise on the way.

    Args:
        known: bodies by the structure of their region, shared between the graphs of one capture.

    Raises:
        Refusal: if an operator has no row-wise rule, or the result depends on the number of rows.
    """
    signature = _signature(analysis, region, config)
    if signature not in known:
        traced = _trace_region(analysis, region, config)
        known[signature] = BODIES.the_one(traced)
    return known[signature]


def _signature(analysis: RowAnalysis, region: Region, config: BodyConfig) -> str:
    """The region up to the names of its nodes."""
    names = {node: f"%{index}" for index, node in enumerate(region.nodes)}
    inputs = {(i.node, i.role): f"%in{index}" for index, i in enumerate(region.inputs)}

    def described(tensor: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            rank = fold_rank(tensor.shape, analysis.rows)
            return (rank, str(tensor.shape), str(tensor.stride()), str(tensor.dtype), str(tensor.device))
        return str(tensor)

    stopped = without_gradients(analysis, region)
    lines = [repr((config, torch.is_autocast_enabled("cpu")))]
    for operand in region.inputs:
        lines.append(repr((operand.role, [described(t) for t in tensors_of(operand.node)])))
    for node in region.nodes:
        roles = analysis.states[node].roles

        def named(operand: fx.Node, roles: Mapping[fx.Node, str] = roles) -> Any:
            if operand in names:
                return fx.node.map_arg(names[operand], lambda n: n)
            return inputs.get((operand, roles.get(operand, "")), str(value(operand)))

        args = fx.node.map_arg((node.args, node.kwargs), named)
        formula = analysis.states[node].formula
        modes = (analysis.contexts[node].autocast, node in stopped, formula and formula.key)
        lines.append(repr((node.op, node.target, args, modes, [described(t) for t in tensors_of(node)])))
    lines.append(repr([names[node] for node in (*region.row_outputs, *region.sums)]))
    return "\n".join(lines)


def without_gradients(analysis: RowAnalysis, region: Region) -> set[fx.Node]:
    """The nodes of a region that run without gradients while others, or the graph, run with them.

    A body is traced as a whole and differentiated later: there, what such a node gives is detached.

    Raises:
        Refusal: if a part lies in ``inference_mode``, and another does not.
    """
    modes = {analysis.contexts[node].inference for node in region.nodes}
    if len(modes) > 1:
        raise Refusal("lies partly in inference_mode", Cause.NO_GRAD)
    if modes == {True}:  # nothing has a gradient there, and nothing can be detached
        return set()
    without = {node for node in region.nodes if not analysis.contexts[node].grad}
    return without if torch.is_grad_enabled() or len(without) < len(region.nodes) else set()


def _trace_region(analysis: RowAnalysis, region: Region, config: BodyConfig) -> Body:
    stopped = without_gradients(analysis, region)
    sizes = static_sizes([*region.nodes, *(i.node for i in region.inputs)])
    folder = Folder(analysis.rows, sizes)
    tracer = RowTracer(folder.n, takes_declared=True)  # the analysis has seen to their gradients
    row_inputs = [i for i in region.inputs if i.role == "row"]
    shared_inputs = [i for i in region.inputs if i.role == "shared"]
    row_metas = [_row_meta(i.node, analysis.rows) for i in row_inputs]
    outs = (*region.row_outputs, *region.sums)

    def replay(n: Any, *flat: torch.Tensor) -> list[torch.Tensor]:
        env: dict[tuple[fx.Node, str], Any] = {}
        for operand, x in zip(row_inputs, flat, strict=False):
            tracer.set_label(x, Row(0))
            fake = tensor_value(operand.node)
            assert fake is not None
            folded = torch.reshape(x, folder.folded_shape(fake, n))  # type: ignore[arg-type]
            tracer.set_label(folded, Row(fold_rank(fake.shape, analysis.rows) - 1))
            env[operand.node, "row"] = folded
        env |= {(i.node, "shared"): x for i, x in zip(shared_inputs, flat[len(row_inputs) :], strict=True)}
        for node in region.nodes:
            roles = analysis.states[node].roles
            operands = {
                operand: env[operand, "row"] if (operand, role) not in env else env[operand, role]
                for operand, role in roles.items()
            }
            with autocast_contexts(analysis.contexts[node].autocast):
                read = functools.partial(read_operand, operands)
                found = folder.run_node(node, read, analysis.states[node].formula, n)
            env[node, "row"] = tree_map_only(torch.Tensor, torch.detach, found) if node in stopped else found
        return [_unfolded(env[node, "row"], tracer, n) for node in outs]

    with folder.mode:
        fakes = [meta.empty(folder.n) for meta in row_metas]
        fakes += [folder.shared(tensor_value(i.node)) for i in shared_inputs]  # type: ignore[arg-type]
    gm = traced_on(folder, tracer, replay, fakes)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    metas = [
        OutputMeta(node in region.sums, _rest(out, node in region.sums), out.dtype, out.device)
        for node, out in zip(outs, (n.meta["val"] for n in gm.graph.output_node().args[0]), strict=True)  # type: ignore[union-attr]
    ]
    shared_metas = [meta_of(tensor_value(i.node)) for i in shared_inputs]
    return Body(gm, row_metas, shared_metas, metas, config, sizes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


def traced_on(
    folder: Folder, tracer: RowTracer, replay: Any, fakes: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """The ATen graph of a function of ``n`` and of operands, traced, and so proved, under a tracer; nothing in it writes.

    Raises:
        Refusal: if something in it is not row-wise, or depends on ``n``.
    """
    with folder.mode, torch.no_grad(), enable_python_dispatcher():
        for fake in fakes:
            tracer.protect(fake)
        gm = make_fx(_under(tracer, replay))(folder.n, *fakes)
        if any(_writes(node) for node in gm.graph.nodes):  # to temporaries, as proved above
            gm = make_fx(torch.func.functionalize(gm, remove="mutations"))(folder.n, *fakes)
    if any(node.op == "get_attr" for node in gm.graph.nodes):
        raise Refusal("makes a tensor from Python numbers")
    check_guards(folder)
    return gm


def _under(tracer: RowTracer, function: Any) -> Any:
    def run(*args: Any) -> Any:
        with tracer:
            return function(*args)

    return run


def _unfolded(tensor: torch.Tensor, tracer: RowTracer, n: Any) -> torch.Tensor:
    """``[1, n, H]`` → ``[n, H]``; sums stay as they are."""
    label = tracer.label(tensor)
    if label is SUMMED:
        return tensor
    if not isinstance(label, Row):
        raise Refusal("an output of the region does not depend on its rows")
    return torch.reshape(tensor, (n, *tensor.shape[label.dim + 1 :]))


def _rest(tensor: torch.Tensor, is_sum: bool) -> tuple[int, ...]:
    return tuple(tensor.shape if is_sum else tensor.shape[1:])


def meta_of(tensor: torch.Tensor | None) -> TensorMeta:
    assert tensor is not None
    return TensorMeta(settled(tensor.shape), settled(tensor.stride()), tensor.dtype, tensor.device)


def _row_meta(node: fx.Node, rows: Any) -> TensorMeta:
    fake = tensor_value(node)
    assert fake is not None
    shape = settled(fake.shape[fold_rank(fake.shape, rows) :])
    return TensorMeta(shape, (), fake.dtype, fake.device)


def body_text(traced: Body) -> str:
    """The forward graph of a body, with shapes."""
    return traced.forward.print_readable(print_output=False)
