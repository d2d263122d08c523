"""Bodies: a region as a function of one chunk, proved row-wise, differentiated and compiled.

A body is traced to ATen twice over: forward, from the region's nodes on folded rows under
:class:`~mst_fx.rows.tracer.RowTracer` (which is the proof), and backward, by ``torch.autograd.grad`` under
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
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.decompositions import add_up_labels, body_decompositions
from mst_fx.bodies.gradient import GradientPositions, as_leaves, gradients, split_into_terms
from mst_fx.declared import is_declared
from mst_fx.graph.formula import named_in
from mst_fx.graph.sizes import sum_dtype
from mst_fx.graph.values import tensors_of
from mst_fx.process import Named
from mst_fx.torch_api.autograd import without_saved_tensors_hooks
from mst_fx.torch_api.fakes import fake_mode, make_fx
from mst_fx.torch_api.inductor import Compiled, compile_body
from mst_fx.torch_api.modes import enable_python_dispatcher, outside_of_kernels
from mst_fx.torch_api.symbolic_rows import RowGuards, symbolic_rows
from mst_fx.version import __version__

aten = torch.ops.aten
_SOME_ROWS = 5


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

    def empty(self, *leading: Any) -> torch.Tensor:
        if leading:
            return torch.empty((*leading, *self.shape), dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclasses.dataclass(frozen=True)
class OutputMeta:
    """One output of a body: rows (``shape`` is that of one row) or a sum over rows."""

    is_sum: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass
class CompiledBody:
    """A body's code, and what it assumes of its number of rows.

    Inductor indexes with 32 bits where the rows at hand allow it, and adds a guard to the shape environment.
    Dynamo's guards do not know a body's rows, so whoever runs it asks first.

    Attributes:
        run: takes a list of inputs, and empties it.
        positions: of a backward body.
    """

    run: Compiled
    guards: RowGuards
    positions: GradientPositions | None
    _taken: dict[int, bool] = dataclasses.field(default_factory=dict, init=False)

    def takes(self, rows: int) -> bool:
        if rows not in self._taken:
            self._taken[rows] = not self.guards.failed(rows)
        return self._taken[rows]


class Body:
    """A region as a function of one chunk of rows.

    Attributes:
        key: names the body by content; equal keys, same body.
        forward: ATen graph of ``(n, *row_inputs, *shared)``, row inputs as ``[n, ...]``; outputs likewise.
        row_metas, shared, outputs: what goes in and comes out.
        formulas: the ``torch.autograd.Function``s inside.
        may_be_nonlinear: whether a backward inside was written by somebody (of these, or of declared operators): it need not be linear in
            the tangent (it may clip it, or round it).
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        row_metas: Sequence[TensorMeta],
        shared: Sequence[TensorMeta],
        outputs: Sequence[OutputMeta],
        config: BodyConfig,
        avoid: set[int],
    ) -> None:
        self.forward = forward
        self.row_metas, self.shared, self.outputs = tuple(row_metas), tuple(shared), tuple(outputs)
        self.config = config
        self.formulas = named_in(forward)
        self.may_be_nonlinear = bool(self.formulas) or any(
            is_declared(node.target) for node in forward.graph.nodes
        )
        self._avoid = avoid
        self._compiled: dict[Any, list[CompiledBody]] = {}
        self._lock = threading.Lock()
        versions = (torch.__version__, __version__)
        content = repr((forward.code, self.row_metas, self.shared, self.outputs, config, versions))
        self.key = hashlib.sha256(content.encode()).hexdigest()[:32]

    def __deepcopy__(self, memo: Any) -> Body:
        return self

    def __reduce__(self) -> Any:
        return body_of, (self.key,)

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
            if node.op != "call_function" or node in outputs or _is_alias(node.target):
                continue
            for tensor in tensors_of(node):
                sizes = [size for size in tensor.shape if isinstance(size, int)]
                if len(sizes) < tensor.ndim and (tensor.is_floating_point() or tensor.dtype == torch.bool):
                    total += math.prod(sizes) * tensor.element_size()
        return total

    def differentiable_for(self, needs: Sequence[bool]) -> tuple[bool, ...]:
        """Which outputs depend differentiably on the inputs that need gradients."""
        with self._some_rows() as inputs, torch.enable_grad(), enable_python_dispatcher():
            leaves = as_leaves(inputs, needs)
            return tuple(out.requires_grad for out in self.forward(_SOME_ROWS, *leaves))

    def gets_gradient(self, needs: Sequence[bool]) -> list[bool]:
        """Which of the inputs that need gradients get some: not those that are read behind a ``detach`` alone."""
        if not any(node.target is aten.detach.default for node in self.forward.graph.nodes):
            return list(needs)
        with self._some_rows() as inputs, torch.enable_grad(), enable_python_dispatcher():
            leaves = as_leaves(inputs, needs)
            outs = [out for out in self.forward(_SOME_ROWS, *leaves) if out.requires_grad]
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
        """``(n, *row_inputs, *shared)`` → outputs.

        Args:
            chunks: the numbers of rows that it will be run on.
        """

        def build(n: Any, *inputs: torch.Tensor) -> CompiledBody:
            return self._compile(self.trace(self.forward, n, *inputs), None, n, *inputs)

        return self._once("forward", chunks, build)

    def compiled_backward(
        self, chunks: Collection[int], needs: Sequence[bool], tangents: Sequence[bool]
    ) -> CompiledBody:
        """``(n, *row_inputs, *shared, *tangents)`` → row gradients and terms of weight gradients.

        Args:
            chunks: the numbers of rows that it will be run on.
            needs: which of ``(*row_inputs, *shared)`` need a gradient.
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

    def with_gradients(
        self,
        needs: Sequence[bool],
        has_tangent: Sequence[bool],
        n: Any,
        inputs: Sequence[torch.Tensor],
        tangents: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs of ``n`` rows, and the gradients of the inputs that need one, where gradients are enabled.

        Args:
            inputs: ``(*row_inputs, *shared)``.
            tangents: of the outputs that have one.
        """
        leaves = as_leaves(inputs, needs)
        outs = self.forward(n, *leaves)
        found = gradients(leaves, needs, outs, has_tangent, tangents)
        return [out.detach() for out in outs], found

    def trace(self, function: Any, *inputs: Any) -> fx.GraphModule:
        """Runs a function of the body's on fakes: the ATen operators that the body's compiler takes."""
        with enable_python_dispatcher():
            gm = make_fx(function, decomposition_table=body_decompositions(self.config.inner))(*inputs)
        add_up_labels(gm.graph)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    @contextlib.contextmanager
    def _fakes(self, hint: int | None = None) -> Iterator[list[Any]]:
        """Fake inputs in a mode of their own, which is active meanwhile: the number of rows comes first."""
        mode, n = symbolic_rows(self._avoid, hint)
        with without_saved_tensors_hooks(), mode:
            yield [n, *self._inputs(n)]

    @contextlib.contextmanager
    def _some_rows(self) -> Iterator[list[torch.Tensor]]:
        """Fake inputs of a number of rows, where any will do, in a mode of their own."""
        with without_saved_tensors_hooks(), fake_mode(is_symbolic=False):
            yield self._inputs(_SOME_ROWS)

    def _inputs(self, n: Any) -> list[torch.Tensor]:
        return [*(meta.empty(n) for meta in self.row_metas), *(meta.empty() for meta in self.shared)]

    def _output_fake(self, meta: OutputMeta, n: Any) -> torch.Tensor:
        shape = meta.shape if meta.is_sum else (n, *meta.shape)
        return torch.empty(shape, dtype=meta.dtype, device=meta.device)

    def _gradient(
        self, needs: Sequence[bool], has_tangent: Sequence[bool], n: Any, *inputs: torch.Tensor
    ) -> list[torch.Tensor]:
        count = len(self.row_metas) + len(self.shared)
        return self.with_gradients(needs, has_tangent, n, inputs[:count], inputs[count:])[1]

    def _forward_and_gradient(
        self, needs: Sequence[bool], output: int, n: Any, *inputs: torch.Tensor
    ) -> list[torch.Tensor]:
        leaves = as_leaves(inputs, needs)
        outs = self.forward(n, *leaves)
        has_tangent = [index == output for index in range(len(outs))]
        grads = gradients(leaves, needs, outs, has_tangent, [torch.ones_like(outs[output])])
        return [*(out.detach() for out in outs), *grads]

    def _compile(
        self, gm: fx.GraphModule, positions: GradientPositions | None, n: torch.SymInt, *inputs: torch.Tensor
    ) -> CompiledBody:
        run = compile_body(gm, (n, *inputs), self.config.inner, dict(self.config.inductor))
        return CompiledBody(run, RowGuards(n), positions)

    def _compile_gradient(
        self, function: Any, needs: Sequence[bool], first: int, *inputs: Any
    ) -> CompiledBody:
        with torch.enable_grad():
            gm = self.trace(function, *inputs)
        row_grads = sum(needs[: len(self.row_metas)])
        wide = [
            self.accumulator_dtype(index) != meta.dtype
            for index, (meta, need) in enumerate(zip(self.shared, needs[len(self.row_metas) :], strict=True))
            if need
        ]
        terms = split_into_terms(gm, first + row_grads, wide)
        return self._compile(gm, GradientPositions(first, terms), *inputs)


def _is_alias(target: Any) -> bool:
    """Whether an operator makes no memory of its own."""
    return target in _ALIASES or getattr(target, "is_view", False)


_ALIASES = (aten._unsafe_view.default, torch.ops.mst_fx.with_gradient.default, operator.getitem)


# Graphs name their bodies by key. What runs a graph keeps them alive: the compiled function and the autograd graphs
# that it makes (:func:`with_bodies_alive`), or the module that :func:`~mst_fx.rewrite` returned.
BODIES: Named[Body] = Named()


def body_of(key: str) -> Body:
    """The body a loop op names.

    Raises:
        RuntimeError: in a process that has not compiled the graph that holds the loop.
    """
    try:
        return BODIES[key]
    except KeyError:
        raise RuntimeError(
            f"mst-fx has no body {key!r} in this process: the graph with this loop was compiled elsewhere"
        ) from None


def with_bodies_alive(function: Callable[..., Any], bodies: Sequence[Any]) -> Callable[..., Any]:
    """A compiled graph that keeps the bodies of its loops, and its layers, alive.

    ``torch.compiler.reset()`` forgets the function, and there may be backward passes of it to come: the autograd
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
