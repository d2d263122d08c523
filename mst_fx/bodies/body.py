"""Bodies: a region as a function of one chunk, proved row-wise, differentiated and compiled.

A body is traced to ATen twice over: forward, from the region's nodes on folded rows under
:class:`~mst_fx.rows.rules.RowTracer` (which is the proof), and backward, by ``torch.autograd.grad`` under
``make_fx`` (which recomputes the forward inside). The number of rows is symbolic, so one compiled body
serves chunks of every size, all layers of equal structure and all graphs of the process; a second one is
compiled for chunks that the first one's indices of 32 bits do not reach.

Weight gradients leave the backward body as *terms*: where a gradient is a matmul of two values of the
body, the body returns the two and the loop adds their product to the accumulator in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import operator
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.decompositions import add_up_labels, body_decompositions
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.formula import named_in
from mst_fx.graph.values import SIXTEEN_BITS, sum_dtype, tensor_value, tensors_of, value
from mst_fx.rows.analysis import (
    Folder,
    RowAnalysis,
    RowGuards,
    autocast_contexts,
    check_guards,
    fold_rank,
    read_operand,
    settled,
    static_sizes,
)
from mst_fx.rows.region import Region
from mst_fx.rows.rules import SUMMED, Row, RowTracer
from mst_fx.torch_api.autograd import without_saved_tensors_hooks
from mst_fx.torch_api.fakes import make_fx
from mst_fx.torch_api.inductor import Compiled, compile_body
from mst_fx.torch_api.modes import enable_python_dispatcher, outside_of_kernels
from mst_fx.torch_api.ops import OpOverload, schema
from mst_fx.torch_api.tensors import tree_map_only
from mst_fx.version import __version__

aten = torch.ops.aten
prims = torch.ops.prims


@dataclasses.dataclass(frozen=True)
class BodyConfig:
    """How a body is compiled and accumulated; part of its key."""

    inner: str
    accumulate: str
    inductor: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class TensorMeta:
    """Shape, strides, dtype and device; of rows, those of one row (``shape`` without the rows)."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self, *rows: Any) -> torch.Tensor:
        if rows:
            return torch.empty((*rows, *self.shape), dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclasses.dataclass(frozen=True)
class OutputMeta:
    """One output of a body: rows (``shape`` is that of one row) or a sum over rows."""

    is_sum: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of a weight's gradient: ``left @ right`` or ``value``, transposed where so marked.

    ``left``, ``right`` and ``value`` are positions among the backward body's outputs.
    """

    left: int = -1
    right: int = -1
    left_transposed: bool = False
    right_transposed: bool = False
    value: int = -1
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class GradientPlan:
    """Where a backward body's outputs go.

    Attributes:
        first: position of the first row gradient; the forward outputs, if any, come before.
        terms: of each weight's gradient.
    """

    first: int
    terms: tuple[tuple[Term, ...], ...]


@dataclasses.dataclass
class CompiledBody:
    """A body's code, and what it assumes of its number of rows.

    Inductor indexes with 32 bits where the rows at hand allow it, and adds a guard to the shape environment.
    Dynamo's guards do not know a body's rows, so whoever runs it asks first.

    Attributes:
        run: takes a list of inputs, and empties it.
        plan: of a backward body.
    """

    run: Compiled
    guards: RowGuards
    plan: GradientPlan | None
    _taken: dict[int, bool] = dataclasses.field(default_factory=dict, init=False)

    def takes(self, rows: int) -> bool:
        if rows not in self._taken:
            self._taken[rows] = not self.guards.failed(rows)
        return self._taken[rows]


class Body:
    """A region as a function of one chunk of rows.

    Attributes:
        key: names the body by content; equal keys, same body.
        forward: ATen graph of ``(n, *rows, *shared)``, rows as ``[n, ...]``; outputs likewise.
        rows, shared, outputs: what goes in and comes out.
        formulas: the ``torch.autograd.Function``s inside.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        rows: Sequence[TensorMeta],
        shared: Sequence[TensorMeta],
        outputs: Sequence[OutputMeta],
        config: BodyConfig,
        avoid: set[int],
    ) -> None:
        self.forward = forward
        self.rows, self.shared, self.outputs = tuple(rows), tuple(shared), tuple(outputs)
        self.config = config
        self.formulas = named_in(forward)
        self._avoid = avoid
        self._compiled: dict[Any, list[CompiledBody]] = {}
        self._lock = threading.Lock()
        versions = (torch.__version__, __version__)
        content = repr((forward.code, self.rows, self.shared, self.outputs, config, versions))
        self.key = hashlib.sha256(content.encode()).hexdigest()[:32]

    def __deepcopy__(self, memo: Any) -> Body:
        return self

    def __reduce__(self) -> Any:
        return body, (self.key,)

    def accumulator_dtype(self, index: int) -> torch.dtype:
        """The type in which the gradient of shared input ``index`` is summed."""
        dtype = self.shared[index].dtype
        return dtype if self.config.accumulate == "weight" else sum_dtype(dtype)

    @functools.cached_property
    def inside_bytes_a_row(self) -> int:
        """Bytes a row of all values inside, but integers, which have no gradient: what training keeps of the
        un-chunked region."""
        outputs = set(self.forward.graph.output_node().all_input_nodes)
        total = 0
        for node in self.forward.graph.nodes:
            if node.op != "call_function" or node in outputs or node.target in _ALIASES:
                continue
            for tensor in tensors_of(node):
                sizes = [size for size in tensor.shape if isinstance(size, int)]
                if len(sizes) < tensor.ndim and (tensor.is_floating_point() or tensor.dtype == torch.bool):
                    total += math.prod(sizes) * tensor.element_size()
        return total

    def differentiable_for(self, needs: Sequence[bool]) -> tuple[bool, ...]:
        """Which outputs depend differentiably on the inputs that need gradients."""
        with self._fakes() as (n, *inputs), torch.enable_grad(), enable_python_dispatcher():
            leaves = _as_leaves(inputs, needs)
            return tuple(out.requires_grad for out in self.forward(n, *leaves))

    def reached_by(self, needs: Sequence[bool]) -> list[bool]:
        """Which of the inputs that need gradients get some: not those that are read behind a ``detach`` alone."""
        if not any(node.target is aten.detach.default for node in self.forward.graph.nodes):
            return list(needs)
        with self._fakes() as (n, *inputs), torch.enable_grad(), enable_python_dispatcher():
            leaves = _as_leaves(inputs, needs)
            outs = [out for out in self.forward(n, *leaves) if out.requires_grad]
            found, queue = {id(out) for out in outs}, [out.grad_fn for out in outs]
            seen = set(queue)
            while queue:
                function = queue.pop()
                found.add(id(getattr(function, "variable", None)))
                following = {f for f, _ in getattr(function, "next_functions", ()) if f is not None} - seen
                seen |= following
                queue += following
            return [need and id(leaf) in found for leaf, need in zip(leaves, needs, strict=True)]

    def compiled_forward(self, chunks: Collection[int]) -> CompiledBody:
        """``(n, *rows, *shared)`` → outputs.

        Args:
            chunks: the numbers of rows that it will be run on.
        """

        def build(n: Any, *inputs: torch.Tensor) -> CompiledBody:
            return self._compile(self._trace(self.forward, n, *inputs), None, n, *inputs)

        return self._once("forward", chunks, build)

    def compiled_backward(
        self, chunks: Collection[int], needs: Sequence[bool], tangents: Sequence[bool]
    ) -> CompiledBody:
        """``(n, *rows, *shared, *tangents)`` → row gradients and terms of weight gradients.

        Args:
            chunks: the numbers of rows that it will be run on.
            needs: which of ``(*rows, *shared)`` need a gradient.
            tangents: which outputs have a tangent.
        """

        def build(n: Any, *inputs: torch.Tensor) -> CompiledBody:
            given = [
                self._output_fake(meta, n) for meta, has in zip(self.outputs, tangents, strict=True) if has
            ]
            gradient = functools.partial(self._gradient, needs, tangents)
            return self._compile_gradient(gradient, needs, 0, n, *inputs, *given)

        return self._once(("backward", tuple(needs), tuple(tangents)), chunks, build)

    def compiled_with_grad(self, chunks: Collection[int], needs: Sequence[bool], output: int) -> CompiledBody:
        """Forward outputs, then the gradients of the scalar ``outputs[output]``, as one body."""

        def build(n: Any, *inputs: torch.Tensor) -> CompiledBody:
            gradient = functools.partial(self._forward_and_gradient, needs, output)
            return self._compile_gradient(gradient, needs, len(self.outputs), n, *inputs)

        return self._once(("with_grad", tuple(needs), output), chunks, build)

    def _once(self, key: Any, chunks: Collection[int], build: Callable[..., CompiledBody]) -> CompiledBody:
        """Code that takes all these numbers of rows, compiled if there is none.

        Args:
            build: compiles it from fakes of a number of rows, rows and shared inputs.

        Raises:
            RuntimeError: if Inductor assumes something of that number that does not hold for all of these.
        """

        def takes(compiled: CompiledBody) -> bool:
            return all(map(compiled.takes, chunks))

        with self._lock:
            known = self._compiled.setdefault(key, [])
            for compiled in filter(takes, known):
                return compiled
            for hint in [max(chunks)] if known else [None, max(chunks)]:
                with outside_of_kernels(), self._fakes(hint) as fakes:
                    known.append(build(*fakes))
                if takes(known[-1]):
                    return known[-1]
        raise RuntimeError(f"the code of a body does not hold for chunks of {sorted(chunks)} rows")

    # Tracing

    @contextlib.contextmanager
    def _fakes(self, hint: int | None = None) -> Iterator[list[Any]]:
        """Fake inputs in a mode of their own, which is active meanwhile: the number of rows comes first."""
        folder = Folder(1, self._avoid, hint)
        with without_saved_tensors_hooks(), folder.mode:
            rows = [meta.empty(folder.n) for meta in self.rows]
            yield [folder.n, *rows, *(meta.empty() for meta in self.shared)]

    def _output_fake(self, meta: OutputMeta, n: Any) -> torch.Tensor:
        shape = meta.shape if meta.is_sum else (n, *meta.shape)
        return torch.empty(shape, dtype=meta.dtype, device=meta.device)

    def _gradient(
        self, needs: Sequence[bool], has_tangent: Sequence[bool], n: Any, *inputs: torch.Tensor
    ) -> list[torch.Tensor]:
        count = len(self.rows) + len(self.shared)
        leaves, tangents = _as_leaves(inputs[:count], needs), list(inputs[count:])
        outs = self.forward(n, *leaves)
        return _gradients(leaves, needs, outs, has_tangent, tangents)

    def _forward_and_gradient(
        self, needs: Sequence[bool], output: int, n: Any, *inputs: torch.Tensor
    ) -> list[torch.Tensor]:
        leaves = _as_leaves(inputs, needs)
        outs = self.forward(n, *leaves)
        has_tangent = [index == output for index in range(len(outs))]
        grads = _gradients(leaves, needs, outs, has_tangent, [torch.ones_like(outs[output])])
        return [*(out.detach() for out in outs), *grads]

    def _trace(self, function: Any, *inputs: Any) -> fx.GraphModule:
        with enable_python_dispatcher():
            gm = make_fx(function, decomposition_table=body_decompositions(self.config.inner))(*inputs)
        add_up_labels(gm.graph)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    def _compile(
        self, gm: fx.GraphModule, plan: GradientPlan | None, n: torch.SymInt, *inputs: torch.Tensor
    ) -> CompiledBody:
        run = compile_body(gm, (n, *inputs), self.config.inner, dict(self.config.inductor))
        return CompiledBody(run, RowGuards(n), plan)

    def _compile_gradient(
        self, function: Any, needs: Sequence[bool], kept: int, *inputs: Any
    ) -> CompiledBody:
        with torch.enable_grad():
            gm = self._trace(function, *inputs)
        row_grads = sum(needs[: len(self.rows)])
        wide = [
            self.accumulator_dtype(index) != meta.dtype
            for index, (meta, need) in enumerate(zip(self.shared, needs[len(self.rows) :], strict=True))
            if need
        ]
        terms = _split_into_terms(gm, kept + row_grads, wide)
        return self._compile(gm, GradientPlan(kept, terms), *inputs)


def _as_leaves(inputs: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needs, strict=True)]


def _gradients(
    leaves: Sequence[torch.Tensor],
    needs: Sequence[bool],
    outs: Sequence[torch.Tensor],
    has_tangent: Sequence[bool],
    tangents: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    given = iter(tangents)
    pairs = [(out, next(given)) for out, has in zip(outs, has_tangent, strict=True) if has]
    pairs = [(out, tangent) for out, tangent in pairs if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in wanted]
    outputs, grad_outputs = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, grads, strict=True)
    ]


# Gradient terms

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_ALIASES = {
    *_VIEWS,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.detach.default,
    aten.alias.default,
    torch.ops.mst_fx.with_gradient.default,
    operator.getitem,
}
_CASTS = (aten._to_copy.default, prims.convert_element_type.default)


def _split_into_terms(gm: fx.GraphModule, first: int, wide: Sequence[bool]) -> tuple[tuple[Term, ...], ...]:
    """Replaces the weight gradients among a body's outputs by the values their terms are made of.

    Args:
        gm: outputs: ``first`` values to keep, then one gradient a weight.
        wide: for each weight, whether its accumulator is wider than the weight (float32).
    """
    output = gm.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    kept, gradients = values[:first], values[first:]
    positions: dict[fx.Node, int] = {}

    def position(node: fx.Node) -> int:
        if node not in positions:
            positions[node] = len(kept)
            kept.append(node)
        return positions[node]

    plan = []
    for gradient, is_wide in zip(gradients, wide, strict=True):
        terms = []
        for node, transposed in _summands(gradient, is_wide):
            if node.target is aten.mm.default:
                left, right = node.args
                if transposed:  # (left @ right).t() == right.t() @ left.t()
                    left, right = right, left
                a, a_transposed = _strip_transposes(left, transposed)  # type: ignore[arg-type]
                b, b_transposed = _strip_transposes(right, transposed)  # type: ignore[arg-type]
                terms.append(Term(position(a), position(b), a_transposed, b_transposed))
            else:
                summand = _in_float32(gm.graph, node) if is_wide else node
                terms.append(Term(value=position(summand), transposed=transposed))
        plan.append(tuple(terms))
    output.args = (kept,)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return tuple(plan)


def _summands(node: fx.Node, wide: bool, transposed: bool = False) -> list[tuple[fx.Node, bool]]:
    """The summands of a gradient, each with whether it must be transposed."""
    if _is_transpose(node):
        return _summands(node.args[0], wide, not transposed)  # type: ignore[arg-type]
    if node.target in _VIEWS and _shape(node) == _shape(node.args[0]):
        return _summands(node.args[0], wide, transposed)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and not node.kwargs:
        left, right = node.args
        if all(isinstance(part, fx.Node) and _shape(part) == _shape(node) for part in (left, right)):
            return [*_summands(left, wide, transposed), *_summands(right, wide, transposed)]  # type: ignore[arg-type]
    if wide and node.target in _CASTS and _is_narrowing(node):
        return _summands(node.args[0], wide, transposed)  # type: ignore[arg-type]
    return [(node, transposed)]


def _is_transpose(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.t.default:
        return True
    if node.target is aten.permute.default:
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and {d % 2 for d in node.args[1:]} == {0, 1}  # type: ignore[operator]


def _strip_transposes(node: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    while _is_transpose(node):
        node, transposed = node.args[0], not transposed  # type: ignore[assignment]
    return node, transposed


def _shape(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _is_narrowing(node: fx.Node) -> bool:
    source, out = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return source == torch.float32 and out in SIXTEEN_BITS


def _in_float32(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A 16-bit sum over rows, redone in float32 so that partial sums are not rounded."""
    if node.target in _VIEWS:
        source = _in_float32(graph, node.args[0])  # type: ignore[arg-type]
        if source is node.args[0]:
            return node
        return _derived(graph, node, (source, *node.args[1:]), node.kwargs)
    if node.target in _CASTS and _is_narrowing(node):
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.sum.dim_IntList and node.meta["val"].dtype in SIXTEEN_BITS:
        return _derived(graph, node, node.args, {**node.kwargs, "dtype": torch.float32})
    return node


def _derived(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    with graph.inserting_after(node):
        new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    new.meta["val"] = node.meta["val"].to(torch.float32)
    return new


# From regions to bodies

# Graphs name their bodies by key. What runs a graph keeps them alive: the compiled function and the autograd graphs
# that it makes (:func:`kept_alive`), or the module that :func:`~mst_fx.rewrite` returned.
_BODIES: weakref.WeakValueDictionary[str, Body] = weakref.WeakValueDictionary()


def body(key: str) -> Body:
    """The body a loop op names.

    Raises:
        RuntimeError: in a process that has not compiled the graph that holds the loop.
    """
    try:
        return _BODIES[key]
    except KeyError:
        raise RuntimeError(
            f"mst-fx has no body {key!r} in this process: the graph with this loop was compiled elsewhere"
        ) from None


def kept_alive(function: Callable[..., Any], bodies: Sequence[Body]) -> Callable[..., Any]:
    """A compiled graph that keeps the bodies of its loops alive.

    ``torch._dynamo.reset()`` forgets the function, and there may be backward passes of it to come: the autograd
    graphs of its results keep the bodies too.
    """
    if not bodies:
        return function

    def run(*args: Any) -> Any:
        results = function(*args)
        for result in results:
            if isinstance(result, torch.Tensor) and result.grad_fn is not None:
                result.grad_fn.metadata["mst_fx"] = bodies  # type: ignore[index]
        return results

    return run


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
        known[signature] = _BODIES.setdefault(traced.key, traced)
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
    tracer = RowTracer(folder.n)
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
            env[operand.node, "row"] = torch.reshape(x, folder.folded_shape(fake, n))  # type: ignore[arg-type]
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
        with torch.no_grad(), enable_python_dispatcher():
            for fake in fakes:
                tracer.protect(fake)
            gm = make_fx(_under(tracer, replay))(folder.n, *fakes)
            if any(_writes(node) for node in gm.graph.nodes):  # to temporaries, as proved above
                gm = make_fx(torch.func.functionalize(gm, remove="mutations"))(folder.n, *fakes)
    if any(node.op == "get_attr" for node in gm.graph.nodes):
        raise Refusal("makes a tensor from Python numbers")
    check_guards(folder)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    metas = [
        OutputMeta(node in region.sums, _rest(out, node in region.sums), out.dtype, out.device)
        for node, out in zip(outs, (n.meta["val"] for n in gm.graph.output_node().args[0]), strict=True)  # type: ignore[union-attr]
    ]
    shared_metas = [_meta(tensor_value(i.node)) for i in shared_inputs]
    return Body(gm, row_metas, shared_metas, metas, config, sizes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(schema(node.target).is_mutable)


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


def _meta(tensor: torch.Tensor | None) -> TensorMeta:
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
