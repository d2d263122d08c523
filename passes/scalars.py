"""Numbers that change from step to step as tensors of one element, so that a loop takes them as an input.

Before, where Dynamo keeps a Python number symbolic (a temperature, a scale that is annealed)::

    t = l_temperature_.item(); y = logits / t

After, while regions are looked for::

    t = l_temperature_.item(); number = ones((), float64) * t; y = logits / number

What no loop took and no deferred logits need is put back. Written into a body, the number's value would be a
guard: one compilation a value. As an input without dimensions, float64 and on the CPU, it is what torch makes of a
Python number in these operators anyway: it does not count for the type of the result, nor is it rounded to a
16-bit type before it is used. The product with 1 is of the form that AOTAutograd keeps dynamic
(``tensorify_python_scalars``); a tensor input that is read as such it would specialise.

A ``leaky_relu`` whose slope changes is written out, as Inductor does. Left as numbers are those of operators that
need one (``alpha=``, ``eps=``, ``label_smoothing=``), of which AOTAutograd makes constants too, and wherever the type
of the result would be another one. A loop that needs such a number takes its value of the first step, with a guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mst_fx.context import PassContext
from mst_fx.graph.edit import add_call, eliminate_dead_code
from mst_fx.graph.fill import fake_mode_of
from mst_fx.graph.numbers import number_as_tensor
from mst_fx.graph.sizes import SIXTEEN_BITS
from mst_fx.graph.spelling import ARITHMETIC, COMPARISONS, is_of_mst, operation
from mst_fx.graph.subgraphs import graphs_of, subgraphs
from mst_fx.graph.values import is_plain, tensor_value, tensors_of, value
from mst_fx.torch_api.symbols import expression, hint_of


def is_changing(context: PassContext) -> bool:
    """Whether a graph of the program reads a number that changes."""
    return any(_is_changing(value(node)) for graph in graphs_of(context.gm) for node in graph.nodes)


def has_numbers(context: PassContext) -> bool:
    """Whether tensors stand for numbers."""
    return bool(context.shared.numbers)


def put_in(context: PassContext) -> bool:
    """Lets the row-wise operators of a program read numbers that change as tensors."""
    return _for_all(context.gm, functools.partial(_numbers_to_tensors, context.shared.numbers))


def take_out(context: PassContext) -> bool:
    """Puts numbers back wherever neither a loop nor what is outside of the graph reads them."""
    return _for_all(context.gm, functools.partial(_tensors_to_numbers, context.shared.numbers))


def _for_all(gm: fx.GraphModule, change: Callable[[fx.Graph], bool]) -> bool:
    """Changes a graph and those that it refers to."""
    is_changed = change(gm.graph)
    for _, child in subgraphs(gm):
        is_changed |= _for_all(child, change)
        eliminate_dead_code(child.graph)
        child.recompile()
    return is_changed


def _numbers_to_tensors(marks: set[fx.Node], graph: fx.Graph) -> bool:
    made: dict[Any, fx.Node] = {}
    is_changed = False
    for node in list(graph.nodes):
        is_changed |= _write_out_slope(node)
    for node in list(graph.nodes):
        numbers = [operand for operand in node.all_input_nodes if _is_changing(value(operand))]
        dtype = _type_of_numbers(node, numbers) if numbers else None
        mode = fake_mode_of(tensors_of(node))
        if dtype is None or mode is None:
            continue
        for number in numbers:
            if (number, dtype) not in made:
                with graph.inserting_before(node), mode:
                    chain = number_as_tensor(graph, number, dtype)
                made[number, dtype] = chain[-1]
                marks.update(chain)
            node.replace_input_with(number, made[number, dtype])
    return is_changed or bool(made)


def _tensors_to_numbers(marks: set[fx.Node], graph: fx.Graph) -> bool:
    is_changed = False
    for node in list(graph.nodes):
        if node not in marks:
            continue
        number = node.args[0].args[1] if node.target == "to" else node.args[1]
        for user in list(node.users):
            if user.op != "output" and user not in marks and not is_of_mst(user):
                user.replace_input_with(node, number)
                is_changed = True
    return is_changed


def _write_out_slope(node: fx.Node) -> bool:
    """``leaky_relu(x, slope)`` → ``where(x > 0, x, x * slope)``, as Inductor writes it, if the slope changes."""
    if node.target is not F.leaky_relu or len(node.args) != 2 or node.kwargs.get("inplace"):
        return False
    (x, slope), out = node.args, tensor_value(node)
    if not isinstance(x, fx.Node) or not isinstance(slope, fx.Node) or not _is_changing(value(slope)):
        return False
    if out is None or not is_plain(out):
        return False
    with node.graph.inserting_before(node), torch.set_grad_enabled(out.requires_grad):
        scaled = add_call(node.graph, torch.mul, x, slope)
        new = add_call(node.graph, torch.where, add_call(node.graph, torch.gt, x, 0), x, scaled)
    for added in (scaled, new.args[0], new):
        added.meta = {**node.meta, **added.meta}  # type: ignore[union-attr]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _is_changing(found: Any) -> bool:
    is_symbolic = isinstance(found, (torch.SymFloat, torch.SymInt)) and hint_of(found) is not None
    return is_symbolic and not expression(found).is_number


def _type_of_numbers(node: fx.Node, numbers: list[fx.Node]) -> torch.dtype | None:
    """The type of the tensors that may stand in an operator in the place of numbers; None if none may."""
    out = tensor_value(node)
    if out is None or not is_plain(out) or {"out", "rounding_mode"} & node.kwargs.keys():
        return None
    if any(found in numbers for key, found in node.kwargs.items() if key != "other"):
        return None
    tensors = [fake for operand in node.all_input_nodes for fake in tensors_of(operand) if fake.ndim]
    if operation(node) in COMPARISONS:
        return torch.float64 if any(fake.is_floating_point() for fake in tensors) else None
    if not out.is_floating_point():
        return None
    return _type_in_arithmetic(node, numbers, out, tensors)


def _type_in_arithmetic(
    node: fx.Node, numbers: list[fx.Node], out: torch.Tensor, tensors: list[torch.Tensor]
) -> torch.dtype | None:
    """:func:`_type_of_numbers` where the result is of a floating type.

    Args:
        tensors: the operands that have dimensions.
    """
    # The type of the result, whatever has no dimensions.
    decides = any(fake.dtype == out.dtype for fake in tensors)
    if operation(node) == "pow":
        # As a tensor, an exponent is rounded to 16 bits.
        is_float = all(isinstance(value(number), torch.SymFloat) for number in numbers)
        return torch.float64 if decides and is_float and out.dtype not in SIXTEEN_BITS else None
    if operation(node) in ("where", "masked_fill"):
        return torch.float64 if decides else None
    if operation(node) not in ARITHMETIC:
        return None
    if decides:
        return torch.float64
    # Integers and Booleans become what the number is.
    return out.dtype if tensors and out.dtype not in SIXTEEN_BITS else None
