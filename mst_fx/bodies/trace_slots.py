"""A slot region traced into a body, which proves all of it row-wise: a function of some slots, whichever they are.

Row inputs of the body are, in this order: the rows that slots pick, what each slot has, the slots' keys. Shared inputs come behind
them, last of all where the slots of each key end in the chunk. Products become :mod:`mst_fx.graph.grouped`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mst_fx.bodies.body import BODIES, Body, BodyConfig, OutputMeta, TensorMeta
from mst_fx.bodies.trace import meta_of, traced_on
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.fill import call
from mst_fx.graph.modes import Context, autocast_contexts
from mst_fx.graph.sizes import expression, settled, static_sizes
from mst_fx.graph.spelling import COPIES, PERMUTES, operation
from mst_fx.graph.values import tensor_value, tensors_of, value
from mst_fx.rows.fold import Folder, fold_rank, read_operand
from mst_fx.rows.frames import Read, factors
from mst_fx.rows.labels import Row, is_same_size
from mst_fx.rows.routing import picked
from mst_fx.rows.slots import SlotRegion
from mst_fx.rows.tracer import SlotTracer
from mst_fx.torch_api.tensors import tree_leaves

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Picked:
    """A stack of matrices of which each slot picks its own, and which only a product may read."""

    stack: torch.Tensor


def trace_slots(
    region: SlotRegion, contexts: Mapping[fx.Node, Context], config: BodyConfig, known: dict[str, Body]
) -> Body:
    """Traces a slot region to ATen, as a function of ``n`` slots, and proves it row-wise on the way.

    Args:
        contexts: the modes of each node.
        known: bodies by the structure of their region, shared between the graphs of one capture.

    Raises:
        Refusal: if an operator has no row-wise rule, or the result depends on the number of slots.
    """
    signature = _signature(region, contexts, config)
    if signature not in known:
        known[signature] = BODIES.the_one(_Tracing(region, contexts).body(config))
    return known[signature]


class _Tracing:
    """One region on fakes of ``n`` slots."""

    def __init__(self, region: SlotRegion, contexts: Mapping[fx.Node, Context]) -> None:
        self.region, self.contexts = region, contexts
        self.by_row, self.by_slot = region.reading(Read.ROW), region.reading(Read.SLOT)
        self.shared = region.reading(Read.SHARED)
        sizes = static_sizes([*region.nodes, *region.inputs, *self.by_row, *self.by_slot, *self.shared])
        self.sizes = sizes | {region.experts}
        self.folder = Folder(region.slots, self.sizes)
        self.tracer = SlotTracer(self.folder.n)

    def body(self, config: BodyConfig) -> Body:
        metas = [*map(self._row_meta, self.by_row), *map(self._slot_meta, self.by_slot)]
        key, result = tensor_value(self.region.key), tensor_value(self.region.result)
        assert key is not None and result is not None
        metas.append(TensorMeta((), (), key.dtype, key.device))
        shared_metas = [meta_of(tensor_value(node)) for node in self.shared]
        shared_metas.append(TensorMeta((self.region.experts,), (1,), torch.int32, key.device))
        folder = self.folder
        with folder.mode:
            fakes = [meta.empty(folder.n) for meta in metas]
            fakes += [folder.shared(tensor_value(node)) for node in self.shared]  # type: ignore[arg-type]
            fakes.append(shared_metas[-1].empty())
        gm = traced_on(folder, self.tracer, self._replay, fakes)
        scale_before_product(gm.graph)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        rest = tuple(gm.graph.output_node().args[0][0].meta["val"].shape[1:])  # type: ignore[index, union-attr]
        output = OutputMeta(False, rest, result.dtype, result.device)
        return Body(gm, metas, shared_metas, [output], config, self.sizes)

    def _row_meta(self, node: fx.Node) -> TensorMeta:
        fake = tensor_value(node)
        assert fake is not None
        return TensorMeta(self._known(fake.shape[1:]), (), fake.dtype, fake.device)

    def _slot_meta(self, node: fx.Node) -> TensorMeta:
        fake = tensor_value(node)
        assert fake is not None
        rest = fake.shape[fold_rank(fake.shape, self.region.slots) :]
        return TensorMeta(self._known(rest), (), fake.dtype, fake.device)

    @staticmethod
    def _known(shape: Any) -> tuple[int, ...]:
        sizes = settled(shape)
        if any(isinstance(size, torch.SymInt) for size in sizes):
            raise Refusal(f"slots have the dynamic shape {tuple(sizes)}")
        return sizes

    # On fakes

    def _replay(self, n: Any, *flat: torch.Tensor) -> list[torch.Tensor]:
        given = dict(zip([*self.by_row, *self.by_slot, self.region.key], flat, strict=False))
        ends, shared = flat[-1], dict(zip(self.shared, flat[len(given) : -1], strict=True))
        for x in given.values():
            self.tracer.set_label(x, Row(0))
        env: dict[fx.Node, Any] = {}
        for node, (read, source) in self.region.inputs.items():
            env[node] = shared[source] if read is Read.SHARED else self._as_read(node, given[source], n)
        for node in self.region.views:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), functools.partial(read_operand, env))
            env[node] = call(node.op, node.target, args, kwargs)
        order = (*self.region.nodes, *self.region.same)
        for node in self._in_order(order):
            if node in self.region.same:
                env[node] = self._shaped(node, env[self.region.same[node]], n)
            else:
                with autocast_contexts(self.contexts[node].autocast):
                    env[node] = self._run(node, env, ends, n)
                self._check(node, env[node])
        result = env[self.region.result]
        label = self.tracer.label(result)
        if not isinstance(label, Row):
            raise Refusal("the result of a slot does not depend on it")
        return [torch.reshape(result, (n, *result.shape[label.dim + 1 :]))]

    def _in_order(self, nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
        wanted = set(nodes)
        return [node for node in self.region.combine.graph.nodes if node in wanted]

    def _as_read(self, node: fx.Node, x: torch.Tensor, n: Any) -> torch.Tensor:
        """What is read of each slot, in the shape of the node that reads it, and in its type if that is another one of its key."""
        fake = tensor_value(node)
        assert fake is not None
        return self._shaped(node, x if x.dtype == fake.dtype else x.to(fake.dtype), n)

    def _shaped(self, node: fx.Node, x: torch.Tensor, n: Any) -> torch.Tensor:
        fake = tensor_value(node)
        assert fake is not None
        shape = self.folder.folded_shape(fake, n)
        assert shape is not None
        folded = torch.reshape(x, shape)
        self.tracer.set_label(folded, Row(fold_rank(fake.shape, self.region.slots) - 1))
        return folded

    def _run(self, node: fx.Node, env: dict[fx.Node, Any], ends: torch.Tensor, n: Any) -> Any:
        if node in self.region.products:
            return self._product(node, env, ends)
        operands = [env[operand] for operand in node.all_input_nodes if operand in env]
        if any(isinstance(operand, _Picked) for operand in operands):
            return self._of_picked(node, operands)
        found = picked(node)
        if found is not None and found[0] in self.shared:
            table = env[found[0]]
            return _Picked(table) if table.ndim == 3 else aten.index.Tensor(table, [env[found[1]]])
        return self.folder.run_node(node, functools.partial(read_operand, env), None, n)

    @staticmethod
    def _of_picked(node: fx.Node, operands: list[Any]) -> _Picked:
        """A transpose of all matrices that were picked is one of the stack."""
        if len(operands) == 1 and operation(node) in COPIES:
            return operands[0]  # type: ignore[no-any-return]
        if len(operands) == 1 and (operation(node) in PERMUTES or node.target is getattr):
            before, after = value(node.args[0]), value(node)  # type: ignore[arg-type]
            if list(map(str, after.shape)) == [str(before.shape[d]) for d in (0, 2, 1)]:
                return _Picked(operands[0].stack.mT)
        raise Refusal(f"{node.name} reads a matrix for each slot", Cause.EXPERTS)

    def _product(self, node: fx.Node, env: dict[fx.Node, Any], ends: torch.Tensor) -> torch.Tensor:
        left, right = (env[operand] for operand in factors(node))
        grouped = torch.ops.mst_fx.grouped_mm.default
        if isinstance(right, torch.Tensor) and isinstance(left, torch.Tensor):
            return grouped(left, right, ends)  # type: ignore[no-any-return]
        if isinstance(left, _Picked) and isinstance(right, torch.Tensor) and is_same_size(right.shape[2], 1):
            return grouped(right.squeeze(2), left.stack.mT, ends).unsqueeze(2)  # type: ignore[no-any-return]
        if isinstance(right, _Picked) and isinstance(left, torch.Tensor) and is_same_size(left.shape[1], 1):
            return grouped(left.squeeze(1), right.stack, ends).unsqueeze(1)  # type: ignore[no-any-return]
        raise Refusal(f"{node.name} multiplies more than one row of each slot", Cause.EXPERTS)

    def _check(self, node: fx.Node, found: Any) -> None:
        """What a node gives is the fold of its value."""
        if isinstance(found, _Picked):
            return
        fakes, results = tensors_of(node), tree_leaves(found)
        for fake, result in zip(fakes, results, strict=True):
            shape, label = self.folder.folded_shape(fake), self.tracer.label(result)
            same = (
                shape is not None
                and len(shape) == result.ndim
                and all(map(is_same_size, shape, result.shape))
            )
            if not same or fake.dtype != result.dtype or not isinstance(label, Row):
                raise Refusal(f"{node.name} gives {tuple(result.shape)} for each slot, not {shape}")
            if label.dim != fold_rank(fake.shape, self.region.slots) - 1:
                raise Refusal(f"{node.name} moves the slots")


def scale_before_product(graph: fx.Graph) -> None:
    """``grouped_mm(x, stack) * scale`` of a scale a slot is ``grouped_mm(x * scale, stack)``.

    So no gradient needs what the product gives, and the backward pass need not make it again.
    """
    for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        for product, scale in (node.args, node.args[::-1]):
            if not isinstance(product, fx.Node) or not isinstance(scale, fx.Node):
                continue
            if product.target is not torch.ops.mst_fx.grouped_mm.default or len(product.users) > 1:
                continue
            fakes = [each.meta["val"] for each in (node, product, scale, product.args[0])]  # type: ignore[union-attr]
            is_scale = fakes[2].ndim == 2 and is_same_size(fakes[2].shape[1], 1)
            if not is_scale or len({fake.dtype for fake in fakes}) > 1:
                continue
            with graph.inserting_before(node):
                scaled = graph.call_function(aten.mul.Tensor, (product.args[0], scale))
                scaled.meta["val"] = fakes[3]
                new = graph.call_function(product.target, (scaled, *product.args[1:]))  # type: ignore[arg-type]
                new.meta["val"] = fakes[0]
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            graph.erase_node(product)
            break


def _signature(region: SlotRegion, contexts: Mapping[fx.Node, Context], config: BodyConfig) -> str:
    """The region up to the names of its nodes."""
    before = [*region.inputs, *dict.fromkeys(source for _, source in region.inputs.values()), region.key]
    names = {node: f"%in{index}" for index, node in enumerate(dict.fromkeys(before))}
    inside = (*region.views, *region.nodes, *region.same)
    names |= {node: f"%{index}" for index, node in enumerate(inside)}

    def described(node: fx.Node) -> str:
        return repr([(str(t.shape), str(t.stride()), str(t.dtype), str(t.device)) for t in tensors_of(node)])

    def named(node: fx.Node) -> Any:
        return fx.node.map_arg(names.get(node, str(value(node))), lambda n: n)

    lines = [repr((config, torch.is_autocast_enabled("cpu"), expression(region.slots), region.experts))]
    lines += [f"{names[n]} {read} {names[s]} {described(n)}" for n, (read, s) in region.inputs.items()]
    for node in inside:
        args = fx.node.map_arg((node.args, node.kwargs), named)
        is_product = node in region.products
        lines.append(repr((node.op, node.target, args, contexts[node].autocast, is_product, described(node))))
    lines.append(repr((names[region.result], names[region.key])))
    return "\n".join(lines)
