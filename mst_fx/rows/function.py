"""The proof that a ``torch.autograd.Function`` is row-wise: of its forward graph, and of its backward graph.

Dynamo captures ``MyFunction.apply(x, w)`` as ``autograd_function_apply(forward, backward, x, w)``, where
``forward(*args)`` gives ``(results, saved)`` and ``backward(*gradients of results, *saved)`` gives the args'
gradients. Both run on folded rows, operator by operator, under the rules of :mod:`mst_fx.rows.rules`. A gradient must be
rows where the arg is, and a sum over rows where all rows share the arg.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.declared import is_declared
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.effects import has_effects
from mst_fx.graph.formula import FORMULAS, Formula
from mst_fx.graph.modes import Context, autocast_contexts, contexts
from mst_fx.graph.names import target_name
from mst_fx.graph.spelling import out_of_place
from mst_fx.graph.subgraphs import attribute
from mst_fx.graph.values import tensor_value, tensors_of, value
from mst_fx.graph.writes import writes_in_place
from mst_fx.rows.fold import Folder, check_guards, fold_rank
from mst_fx.rows.labels import SUMMED, Label, Row, is_same_size
from mst_fx.rows.tracer import GradientTracer, RowTracer, way_out
from mst_fx.torch_api.fakes import make_fx
from mst_fx.torch_api.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED
from mst_fx.torch_api.ops import schema_of
from mst_fx.torch_api.symbols import SYMBOLIC
from mst_fx.torch_api.tensors import tree_leaves

# In an older form of the operator both graphs begin with an unused context, and only the first args, those marked in
# the mask, have gradients.
_MASK = "args_tensor_mask"
_KEYWORDS = {"non_differentiable_idx", "saved_for_backward_idx", "dirty_idx", _MASK}
_UNKNOWN_FORM = "calls a torch.autograd.Function of an unknown form"


# No graph of a Function is differentiated; of autocast, fold.contexts tells (``torch.amp.custom_bwd``).
_MODES = (
    SET_GRAD_ENABLED,
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A tensor on folded rows: its shape, with the symbolic number of rows, and its label."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    label: Label

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def prove(node: fx.Node, roles: Mapping[fx.Node, str], folder: Folder, context: Context) -> Formula:
    """The Function of an ``autograd_function_apply`` node as a formula.

    Args:
        roles: how each tensor operand is read.
        folder: for this proof alone.
        context: the modes the node lies in.

    Raises:
        Refusal: names the operator that is not row-wise, and the graph it is in.
    """
    call = _Application(node)
    call.check()
    forward, backward = call.graphs()
    values = [value(each) if isinstance(each, fx.Node) else each for each in call.operands]
    kinds = [_operand(each, roles, folder) for each in call.operands]
    given = [known if kind is None else kind for kind, known in zip(kinds, values, strict=True)]
    proof = _Proof(folder, context)
    traced, results = proof.trace(forward, "forward", [*call.first, *given])
    outs, saved, is_tuple = _split_results(results)
    _check_results(outs, saved)
    gradient, found = proof.trace_backward(backward, [*call.first, *outs, *saved])
    grads = call.gradients(found)
    for kind, grad in zip(kinds, grads, strict=True):
        _check_gradient(kind, grad)
    check_guards(folder)
    has_gradient = tuple(
        grad is not None for kind, grad in zip(kinds, grads, strict=True) if kind is not None
    )
    row_dim = outs[0].label.dim
    return FORMULAS.the_one(Formula(traced, gradient, len(outs), row_dim, has_gradient, call.fixed, is_tuple))


@dataclasses.dataclass(frozen=True)
class _Application:
    """An ``autograd_function_apply`` node, in its newer or its older form."""

    node: fx.Node

    def check(self) -> None:
        """Refuses what is not known to be right."""
        if unknown := self.node.kwargs.keys() - _KEYWORDS:
            raise Refusal(
                f"calls a torch.autograd.Function with unknown {', '.join(sorted(unknown))}", Cause.OPAQUE
            )
        if self.node.kwargs.get("dirty_idx"):
            raise Refusal("is a torch.autograd.Function that writes to its argument", Cause.WRITTEN)

    def graphs(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The forward and the backward graph."""
        gm = self.node.graph.owning_module
        assert gm is not None
        forward, backward = (attribute(gm, str(each.target)) for each in self.node.args[:2])  # type: ignore[union-attr]
        return forward, backward

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.node.args[2:]

    @property
    def first(self) -> list[None]:
        """What both graphs are given before all else."""
        return [None] if _MASK in self.node.kwargs else []

    @property
    def fixed(self) -> frozenset[int]:
        """The results that have no gradient, by their position."""
        fixed: Any = self.node.kwargs.get("non_differentiable_idx") or ()
        return frozenset(fixed)

    def gradients(self, found: Any) -> list[Any]:
        """The gradient of each operand, from what the backward graph gives; None: it has none."""
        grads = list(found) if isinstance(found, (tuple, list)) else [found]
        if _MASK in self.node.kwargs:
            grads += [None] * (len(self.operands) - sum(self.node.kwargs[_MASK]))  # type: ignore[arg-type]
        if len(grads) != len(self.operands):
            raise Refusal(_UNKNOWN_FORM, Cause.OPAQUE)
        return grads


def _split_results(found: Any) -> tuple[list[Any], list[Any], bool]:
    """What a forward graph gives: the results, what is saved for the backward, and whether the results are a tuple."""
    if not (isinstance(found, (tuple, list)) and len(found) == 2):
        raise Refusal(_UNKNOWN_FORM, Cause.OPAQUE)
    outs, saved = found
    is_tuple = isinstance(outs, (tuple, list))
    return list(outs) if is_tuple else [outs], list(saved), is_tuple


def _operand(operand: Any, roles: Mapping[fx.Node, str], folder: Folder) -> _Kind | None:
    fake = tensor_value(operand) if isinstance(operand, fx.Node) else None
    if fake is None:
        return None
    if roles[operand] == "shared":
        return _Kind(tuple(folder.shared(fake).shape), fake.dtype, fake.device, None)
    shape = folder.folded_shape(fake)
    if shape is None:
        raise Refusal(f"{operand.name} has no rows in its leading dimensions")
    return _Kind(shape, fake.dtype, fake.device, Row(fold_rank(fake.shape, folder.rows) - 1))


def _check_results(outs: Sequence[Any], saved: Sequence[Any]) -> None:
    if not outs or not all(isinstance(out, _Kind) and isinstance(out.label, Row) for out in outs):
        raise Refusal("is a torch.autograd.Function that gives something else than rows")
    if not all(out.dtype.is_floating_point for out in outs):
        raise Refusal("is a torch.autograd.Function that gives integers")
    if any(isinstance(x, _Kind) and x.label is SUMMED for x in saved):
        raise Refusal("is a torch.autograd.Function that saves a sum over rows for its backward")


def _check_gradient(arg: _Kind | None, grad: Any) -> None:
    """Rows for rows, a sum over rows for what they share: gradients of chunks are put side by side, or added up."""
    if grad is None:
        return
    if arg is None:
        raise Refusal("in the backward of a torch.autograd.Function: gives a gradient of numbers")
    wanted = SUMMED if arg.label is None else arg.label
    if not isinstance(grad, _Kind) or grad.label != wanted or not _same_shape(grad.shape, arg.shape):
        what = "a sum over rows" if arg.label is None else "the rows of its gradient"
        raise Refusal(f"in the backward of a torch.autograd.Function: gives something else than {what}")
    if not (grad.dtype.is_floating_point and arg.dtype.is_floating_point):
        raise Refusal("in the backward of a torch.autograd.Function: gives a gradient of integers")


def _same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(is_same_size, left, right))


def _written_anew(node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
    """What a write in place gives, ``absmax += offset``, where nobody but the write reads what it writes to, nor what shares its memory."""
    target, function = node.args[0] if node.args else None, out_of_place(node.target)
    is_own = isinstance(target, fx.Node) and is_declared(target.target) and set(target.users) == {node}
    if not is_own or not callable(function):
        raise Refusal(f"{node.name} writes in place", Cause.WRITTEN)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
    return function(*args, **kwargs)


class _Proof:
    """Traces the graphs of a Function on folded rows."""

    def __init__(self, folder: Folder, context: Context) -> None:
        self.folder, self.context = folder, context

    def trace(self, gm: fx.GraphModule, name: str, given: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
        """The ATen graph of ``(n, *tensors of given)``, and what it gives: a :class:`_Kind` for each tensor."""
        tracer = (GradientTracer if name == "backward" else RowTracer)(self.folder.n, takes_declared=True)
        kinds = [each for each in given if isinstance(each, _Kind)]
        structure: list[Any] = []

        def run(n: Any, *fakes: torch.Tensor) -> list[torch.Tensor]:
            tensors = iter(fakes)
            values = [next(tensors) if isinstance(each, _Kind) else each for each in given]
            for fake, kind in zip(fakes, kinds, strict=True):
                tracer.set_label(fake, kind.label)
                tracer.protect(fake)
            with tracer:
                found = self._run(gm, values, tracer)
            structure.append(found)
            return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]

        try:
            with self.folder.mode, autocast_contexts(self.context.autocast):
                traced = make_fx(run)(self.folder.n, *(kind.empty() for kind in kinds))
        except Refusal as refusal:
            raise Refusal(f"in the {name} of a torch.autograd.Function: {refusal}", refusal.cause) from None
        except Exception as error:
            message = [*str(error).strip().splitlines(), repr(error)][0]
            raise Refusal(
                f"the {name} of a torch.autograd.Function does not run on folded rows: {message}"
            ) from None
        _check_trace(traced, name)
        return traced, _mapped(structure[-1], lambda leaf: self._kind(leaf, tracer))

    def trace_backward(self, gm: fx.GraphModule, given: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
        """The same for the backward graph, which may run in autocast, or after it."""
        devices = {kind.device.type for kind in given if isinstance(kind, _Kind)}
        found = self.trace(gm, "backward", given)
        with autocast_contexts(self.context.autocast):
            casting = [device for device in devices if torch.is_autocast_enabled(device)]
        if casting:
            context = dataclasses.replace(self.context, autocast=())
            with contextlib.ExitStack() as stack:
                for device in casting:
                    stack.enter_context(torch.autocast(device, enabled=False))
                other, _ = _Proof(self.folder, context).trace(gm, "backward", given)
            if other.code != found[0].code:
                raise Refusal(
                    "in the backward of a torch.autograd.Function: autocast changes what it gives",
                    Cause.AUTOCAST,
                )
        return found

    def _kind(self, leaf: torch.Tensor, tracer: RowTracer) -> _Kind:
        label = tracer.label(leaf)
        row_dim = label.dim if isinstance(label, Row) else None
        shape = tuple(self.folder.n if dim == row_dim else int(size) for dim, size in enumerate(leaf.shape))
        return _Kind(shape, leaf.dtype, leaf.device, label)

    def _run(self, gm: fx.GraphModule, values: Sequence[Any], tracer: RowTracer) -> Any:
        places = gm.graph.find_nodes(op="placeholder")
        if len(places) != len(values):
            raise Refusal("has an unknown form", Cause.OPAQUE)
        env, modes = dict(zip(places, values, strict=True)), contexts(gm.graph)

        def read(operand: fx.Node) -> Any:
            found = env[operand] if operand in env else value(operand)
            if isinstance(found, SYMBOLIC):
                raise Refusal(f"{operand.name} is a dynamic number")
            return found

        for node in gm.graph.nodes:
            if node.op == "output":
                return _mapped(node.args[0], lambda leaf: env.get(leaf, value(leaf)), fx.Node)
            if node.op in ("get_attr", "call_module"):
                raise Refusal(f"{node.target} is opaque", Cause.OPAQUE)
            if node.op == "placeholder" or node.target in _MODES:
                pass
            elif writes_in_place(node):
                with autocast_contexts(modes[node].autocast):
                    env[node] = _written_anew(node, read)
            elif has_effects(node):
                what = f"{node.name} ({target_name(node)})"
                raise Refusal(
                    f"{what} draws random numbers, or may have other effects{way_out(node.target)}",
                    Cause.OPAQUE,
                )
            elif tensors_of(node):
                with autocast_contexts(modes[node].autocast):
                    env[node] = self.folder.run_node(node, read)
            if node in env and tensors_of(node):
                self._check(node, env[node], tracer)
        raise Refusal("has an unknown form", Cause.OPAQUE)

    def _check(self, node: fx.Node, found: Any, tracer: RowTracer) -> None:
        """Refuses what is neither the fold of the node's value nor that value with its rows in one dimension."""
        fakes, results = tree_leaves(value(node)), tree_leaves(found)
        if len(fakes) != len(results):
            raise Refusal(f"{node.name} has another structure on folded rows")
        for fake, result in zip(fakes, results, strict=True):
            if not isinstance(fake, torch.Tensor):
                continue
            if (
                not isinstance(result, torch.Tensor)
                or fake.dtype != result.dtype
                or fake.device != result.device
            ):
                raise Refusal(f"{node.name} is something else on folded rows")
            label = tracer.label(result)
            if not self._is_fold(fake, result, label):
                raise Refusal(
                    f"{node.name} gives {tuple(result.shape)} on folded rows, not {tuple(fake.shape)}"
                )

    def _is_fold(self, fake: torch.Tensor, result: torch.Tensor, label: Label) -> bool:
        if not isinstance(label, Row):
            return _same_shape(fake.shape, result.shape)
        folded = self.folder.folded_shape(fake)
        if folded is not None and _same_shape(folded, result.shape):
            return label.dim == fold_rank(fake.shape, self.folder.rows) - 1
        # All rows in one dimension, wherever: nothing was folded away.
        if label.dim >= fake.ndim or fold_rank(fake.shape[label.dim : label.dim + 1], self.folder.rows) != 1:
            return False
        sizes = [self.folder.n if dim == label.dim else size for dim, size in enumerate(fake.shape)]
        return _same_shape(sizes, result.shape)


def _check_trace(traced: fx.GraphModule, name: str) -> None:
    for node in traced.graph.nodes:
        schema = schema_of(node.target)
        if node.op == "get_attr":
            raise Refusal(f"the {name} of a torch.autograd.Function makes a tensor from Python numbers")
        if schema is not None and schema.is_mutable:
            raise Refusal(
                f"the {name} of a torch.autograd.Function writes in place: {node.target}", Cause.WRITTEN
            )
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _mapped(tree: Any, function: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """Nested tuples and lists, with a function of their leaves of one kind."""
    if isinstance(tree, (tuple, list)):
        return tuple(_mapped(each, function, kind) for each in tree)
    return function(tree) if isinstance(tree, kind) else tree
