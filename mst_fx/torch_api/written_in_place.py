"""Results of a kernel in the place of its operands.

In the backward pass of a gated MLP one kernel reads gate, up and the gradient of their product, and writes the product and the gradients of gate
and up. Nobody else reads these operands, and yet six wide tensors are alive at once: Inductor writes a result over an operand only if one
operation reads it (``SchedulerNode.decide_inplace_update``: other readers must have run, and those of the same kernel have not). Inside of
:func:`written_in_place` all readers of one kernel are one reader, and three tensors are alive.

Right, because a pointwise kernel loads all elements before it stores any (``Kernel``: ``loads``, ``compute``, ``stores``), and each thread its
own: the indices of an operand are those of the result, and the result is made of the operand. So not of kernels with sums, whose loops load
again, with loads under a mask, or templates.

Private: the scheduler's nodes and buffers, ``V.kernel`` and its arguments. Tried with torch 2.11.0 (CUDA) and 2.13.0 (CPU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch._inductor import config, ir
from torch._inductor.codegen.common import BackendFeature
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.codegen.wrapper import can_match_buffer_size
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import BaseSchedulerNode, FusedSchedulerNode, SchedulerNode
from torch._inductor.virtualized import V

_decide: Any = BaseSchedulerNode.decide_inplace_update
_NOT_OVER = (ir.NoneLayout, ir.MultiOutputLayout, ir.MutationLayoutSHOULDREMOVE, ir.CommBufferLayout)


@contextlib.contextmanager
def written_in_place() -> Iterator[None]:
    """What is compiled inside of the block writes results over operands that one kernel alone reads."""
    with mock.patch.object(BaseSchedulerNode, "decide_inplace_update", _decide_for_kernel):
        yield


def _decide_for_kernel(node: Any) -> None:
    """``decide_inplace_update``: of the first operation of a kernel, for all of them."""
    kernel = _kernel_of(node)
    if not kernel or not _can_write_over(node):
        _decide(node)
        return
    decided = V.kernel.args.__dict__.setdefault("_mst_fx_decided", set())
    if kernel[0].get_name() in decided:
        return
    decided.add(kernel[0].get_name())
    for result, operand in _pairs(kernel):
        V.kernel.args.make_inplace(operand, result)
        V.kernel.inplace_update_buffers[result] = operand
        if isinstance(V.kernel, SIMDKernel):
            V.kernel.mutations |= {operand, result}


def _can_write_over(node: Any) -> bool:
    """What ``decide_inplace_update`` asks first."""
    is_kernel = hasattr(V.kernel, "args") and (
        not isinstance(V.kernel, SIMDKernel) or getattr(V.kernel, "mutations", None) is not None
    )
    has_feature = V.graph.has_feature(node.get_device(), BackendFeature.INPLACE_BUFFERS)
    return bool(is_kernel and config.inplace_buffers and has_feature)


def _kernel_of(node: Any) -> Sequence[Any]:
    """The operations that are fused with one, where all of them are pointwise; else none."""
    fused = node.scheduler.get_fused_node(node) if type(node) is SchedulerNode else None
    if type(fused) is not FusedSchedulerNode or not all(map(_is_pointwise, fused.snodes)):
        return ()
    return fused.snodes


def _is_pointwise(node: Any) -> bool:
    """Whether an operation loads each element of its operands once, and stores one of its result."""
    if type(node) is not SchedulerNode or node.is_reduction() or node.is_template():
        return False
    is_masked = bool(getattr(node._body, "subblocks", True))
    is_scan = node.is_split_scan() or isinstance(getattr(node.node, "data", None), ir.Scan | ir.Sort)
    return not (is_masked or is_scan or node.has_aliasing_or_mutation())


def _pairs(kernel: Sequence[Any]) -> list[tuple[str, str]]:
    """As many results as can be, each with the name of another operand that it is written over."""
    names = {node.get_name() for node in kernel}
    written = {node.get_name(): next(iter(node.read_writes.writes)) for node in kernel}
    results = [
        (node, buffer) for node in kernel for buffer in node.get_outputs() if _is_result(buffer, names)
    ]
    operands = _operands(kernel, names)
    if not results or not operands:
        return []
    may = [
        [
            name in made_of
            and _is_same_place(read, written[node.get_name()])
            and can_match_buffer_size(operand.node, buffer.node)
            for name, (operand, read) in operands.items()
        ]
        for node, buffer in results
        for made_of in [_made_of(node, kernel)]
    ]
    found = maximum_bipartite_matching(csr_matrix(may), perm_type="column")
    order = list(operands)
    return [(buffer.get_name(), order[at]) for (_, buffer), at in zip(results, found, strict=True) if at >= 0]


def _is_result(buffer: Any, names: set[str]) -> bool:
    """Whether a kernel gives a buffer, in memory of its own, to others."""
    made = buffer.node
    return (
        made.should_allocate()
        and not made.get_inputs_that_alias_output()
        and not made.get_mutation_names()
        and buffer.get_name() not in V.graph.removed_buffers
        and not isinstance(made.get_output_spec(), ir.CommBufferLayout)
        and not all(user.is_weak or user.get_name() in names for user in buffer.users)
    )


def _operands(kernel: Sequence[Any], names: set[str]) -> dict[str, tuple[Any, MemoryDep]]:
    """The buffers that nobody reads but a kernel, at the same indices everywhere, each with these."""
    reads: dict[str, set[Any]] = {}
    for node in kernel:
        for read in node.read_writes.reads:
            reads.setdefault(read.name, set()).add(read)
    scheduler = kernel[0].scheduler
    done = V.graph.removed_operations | scheduler.completed_operations
    hazard = getattr(scheduler, "has_cross_stream_hazard", None)  # from torch 2.13 on
    found = {}
    for name, places in reads.items():
        buffer = scheduler.name_to_buf.get(name)
        if buffer is None or len(places) != 1 or (hazard is not None and hazard(name, kernel[0])):
            continue
        (place,) = places
        is_of_kernel = buffer.defining_op_name() in names
        readers = {user.get_name() for user in buffer.users} - done
        if isinstance(place, MemoryDep) and not is_of_kernel and readers <= names and _may_go(buffer):
            found[name] = buffer, place
    return found


def _may_go(buffer: Any) -> bool:
    """Whether the memory of a buffer is the graph's own, and no other value's."""
    made, by = buffer.node, getattr(buffer.defining_op, "node", None)
    if made is None or isinstance(made.get_output_spec(), _NOT_OVER):
        return False
    shows_others = isinstance(by, ir.FallbackKernel | ir.MultiOutput) and made.get_inputs_that_alias_output()
    is_nothing = isinstance(by, ir.NopKernel)
    return not shows_others and not is_nothing and V.graph.wrapper_code.can_reuse(buffer)


def _is_same_place(read: MemoryDep, write: Any) -> bool:
    return isinstance(write, MemoryDep) and read.index == write.index and read.size == write.size


def _made_of(node: Any, kernel: Sequence[Any]) -> set[str]:
    """The names of what an operation of a kernel reads, and of what that is made of inside of it."""
    by = {buffer.get_name(): each for each in kernel for buffer in each.get_outputs()}
    found: set[str] = set()
    waiting = [node]
    while waiting:
        for read in waiting.pop().read_writes.reads:
            if read.name not in found:
                found.add(read.name)
                if read.name in by:
                    waiting.append(by[read.name])
    return found
