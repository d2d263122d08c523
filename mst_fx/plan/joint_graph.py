"""A joint graph in its two halves, and the values that one has of the other."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import ATTENTION_KERNELS, operation
from mst_fx.torch_api.fakes import fake_mode_of
from mst_fx.torch_api.joint import is_backward_only, must_save
from mst_fx.torch_api.ops import OpOverload, schema_of
from mst_fx.torch_api.tensors import tree_leaves

aten = torch.ops.aten

# Of what is cheap to make again: no product of matrices, no loop, no attention. Pointwise operators have torch's tag.
_CHEAP = frozenset((
    aten.mean.dim, aten.sum.dim_IntList, aten.var_mean.correction, aten.amax.default, aten.cat.default, aten.clone.default,
    aten._to_copy.default, aten.constant_pad_nd.default, aten.slice_scatter.default, aten.full.default, aten.arange.default,
    aten.select_scatter.default, aten.scalar_tensor.default, aten.native_layer_norm.default, aten.slice_backward.default,
    aten._log_softmax.default, aten._softmax.default, aten.nll_loss_forward.default, aten.gather.default, aten.logsumexp.default,
    torch.ops.prims.convert_element_type.default, torch.ops.prims.view_of.default, torch.ops.prims.iota.default,
    *(getattr(aten, name).default for name in ("_fused_rms_norm",) if hasattr(aten, name)),
))  # fmt: skip


_ABOUT_VALUES = ("val", "tensor_meta", "stack_trace", "nn_module_stack")


@dataclasses.dataclass
class JointGraph:
    """What AOTAutograd has traced, before it is cut in two.

    Attributes:
        graph: its outputs are those of the forward pass, then a gradient, or None, for each of its inputs.
        is_of_all_ranks: one plan is made for all ranks that the graph exchanges something with.
        backward: the nodes that depend on an arriving gradient.
        outputs: the results of the forward pass.
    """

    graph: fx.Graph
    is_of_all_ranks: bool = False

    def __post_init__(self) -> None:
        inputs = self.graph.find_nodes(op="placeholder")
        self.backward = backward_of(self.graph.nodes)
        count = sum(node not in self.backward for node in inputs)
        results = tree_leaves(self.graph.output_node().args)
        cut = len(results) - count
        self.outputs = [node for node in results[: max(cut, 0)] if isinstance(node, fx.Node)]
        # (Where a mesh is an input, as of torch 2.13's DTensors, it stands there itself.)
        self.gradients = [
            node if isinstance(node, fx.Node) and tensor_of(node) is not None else None
            for node in results[cut:]
        ]
        given = [node for node in inputs if node not in self.backward]
        if cut < 0 or not all(map(_is_gradient_of, self.gradients, given)):
            raise Refusal(
                "the graph of both passes does not end in one gradient for each input", Cause.NO_LAYERS
            )

    @property
    def forward(self) -> list[fx.Node]:
        """The calls that depend on no gradient, in order: what only gradients read is among them."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n not in self.backward]

    @functools.cached_property
    def reads_written(self) -> set[fx.Node]:
        """The calls of the forward pass that read an input which the step writes to (a buffer): a second time they give
        something else. (torch's partitioner makes cheap ones again nonetheless, 2.13.)"""
        written = {
            node.args[0]
            for node in self.graph.nodes
            if node.op == "call_function"
            and isinstance(node.target, OpOverload)
            and schema_of(node.target).is_mutable
        }
        found: set[fx.Node] = set()
        for node in self.forward:
            if not written.isdisjoint(node.all_input_nodes):
                (written if is_view(node) else found).add(node)
        return found

    @property
    def kept_anyway(self) -> set[fx.Node]:
        """The calls of the forward pass that no plan makes again: what a selective policy of the user's keeps, what reads a buffer
        that the step writes to, and exchanges with ranks that may plan otherwise."""
        exchanges = () if self.is_of_all_ranks else filter(is_exchange, self.forward)
        return {node for node in self.forward if must_save(node)} | self.reads_written | set(exchanges)

    @property
    def trained_bytes(self) -> int:
        """Bytes of the gradients that come out."""
        return sum(bytes_of(node) for node in self.gradients if node is not None)

    def add_backward(self, *nodes: fx.Node) -> None:
        """Takes new calls in, as of the backward pass."""
        for node in nodes:
            is_backward_only(node)
            self.backward.add(node)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A new call, where the graph inserts, with its fake value."""
        node = self.graph.call_function(target, args)
        values: Any = fx.map_arg(args, lambda operand: operand.meta["val"])
        mode = fake_mode_of(tree_leaves(values))
        assert mode is not None
        with mode:
            node.meta["val"] = target(*values)
        return node

    def gate(self, value: fx.Node, after: fx.Node, like: fx.Node) -> fx.Node:
        """A call that gives a value when a gradient is there, and not before (:mod:`mst_fx.ops.gate`), where the graph inserts.

        Args:
            like: what the value is, or is a copy of: what is known of it holds for both.
        """
        new = self.graph.call_function(torch.ops.mst_fx.gate.default, (value, after))
        new.meta = {key: known for key, known in like.meta.items() if key in _ABOUT_VALUES}
        self.add_backward(new)
        return new

    def read_backward(self) -> list[tuple[fx.Node, fx.Node]]:
        """Which node of the backward pass reads which call of the forward pass, in order."""
        return [
            (user, node)
            for user in self.graph.nodes
            if user in self.backward
            for node in user.all_input_nodes
            if node.op == "call_function" and node not in self.backward
        ]


def backward_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Of a joint graph's nodes the arriving gradients, and what depends on one."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or (node.op != "output" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _is_gradient_of(gradient: fx.Node | None, given: fx.Node) -> bool:
    if gradient is None:
        return True
    found, of = tensor_of(gradient), tensor_of(given)
    return found is not None and of is not None and found.shape == of.shape


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    found = node.meta.get("val")
    return found if isinstance(found, torch.Tensor) else None


def bytes_of(node: fx.Node) -> int:
    """The bytes of a tensor, sizes by hint; 0 for what is none."""
    found = tensor_of(node)
    return 0 if found is None else hint(found.numel()) * found.element_size()


def is_view(node: fx.Node) -> bool:
    """Whether a call makes no memory of its own: a view, or one of several (of ``split``)."""
    target = node.target
    if target is operator.getitem:
        source = node.args[0]  # none of a call that is erased
        return isinstance(source, fx.Node) and is_view(source)
    return node.op == "call_function" and (
        getattr(target, "is_view", False)
        or target in (aten._unsafe_view.default, torch.ops.mst_fx.gate.default)
    )


def storage_of(node: fx.Node) -> fx.Node:
    """The node that made the memory behind a view."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def storages(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that made the memory behind some, each once, in order."""
    return list(dict.fromkeys(map(storage_of, nodes)))


def source_of(node: fx.Node) -> fx.Node:
    """The call of several results of which a node is one; otherwise itself."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def is_attention(node: fx.Node) -> bool:
    """Whether a call is attention, ours or torch's."""
    return operation(node) in ATTENTION_KERNELS


def is_attention_backward(node: fx.Node) -> bool:
    """Whether a call is the backward pass of attention."""
    name = operation(node)
    return name.endswith("_backward") and name.removesuffix("_backward") in ATTENTION_KERNELS


# Operators of mst_fx.ops.offload whose results are in the host's memory, and those that bring them back.
_TO_HOST = ("mst_fx::stash", "mst_fx::settle", "mst_fx::start_fetch")
_FROM_HOST = ("mst_fx::fetch", "mst_fx::start_fetch")


def is_of_host(node: fx.Node) -> bool:
    """Whether a value is in the host's memory because a plan sends it there."""
    return operation(source_of(node)) in _TO_HOST


def is_transfer(node: fx.Node) -> bool:
    """Whether a call brings back what a plan has sent to the host."""
    return operation(node) in _FROM_HOST


def is_cheap(node: fx.Node) -> bool:
    """Whether a call costs a pass over its operands, or nothing."""
    target = source_of(node).target
    if not isinstance(target, OpOverload):
        return node.target is operator.getitem
    return is_view(node) or torch.Tag.pointwise in target.tags or target in _CHEAP


def is_fused(node: fx.Node) -> bool:
    """Whether Inductor computes a value where it is read."""
    if not is_cheap(source_of(node)) or source_of(node) is not node:
        return False
    return all(user.op != "output" and is_cheap(user) for user in readers_of(node))


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, or a view of it."""
    for user in node.users:
        if is_view(user):
            yield from readers_of(user)
        else:
            yield user


def is_read_whole(node: fx.Node) -> bool:
    """Whether an operator that is not fused reads a value, so that it has to be made."""
    return any(not is_cheap(user) for user in node.users)


def is_exchange(node: fx.Node) -> bool:
    """Whether a call is a functional collective, or waits for one."""
    return operation(node).startswith("_c10d_functional::")


def is_wait(node: fx.Node) -> bool:
    """Whether a call waits for a functional collective, which writes to the memory that it is given, whatever its schema says."""
    return operation(node) == "_c10d_functional::wait_tensor"


def is_under_way(node: fx.Node) -> bool:
    """Whether a value is that of a collective that nobody has waited for."""
    return is_exchange(node) and not is_wait(node)


def is_light(node: fx.Node) -> bool:
    """Whether a call is cheap, or takes one of several results."""
    return node.target is operator.getitem or is_cheap(node)


def has_weight(node: fx.Node) -> bool:
    """Whether a call takes longer than a pass over its operands, and computes something."""
    return node.op == "call_function" and not is_light(node) and not is_exchange(node)


def _has_no_dropout(node: fx.Node) -> bool:
    """Whether a call that may drop out, as torch's attention kernels, does so with a probability of 0."""
    schema = schema_of(node.target).arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    found = [given.get(a.name, a.default_value) for a in schema if a.name == "dropout_p"]
    return found == [0.0]


def may_run_again(node: fx.Node) -> bool:
    """Whether a call gives the same a second time, and does nothing else: no random numbers. (Exchanges do, if all ranks make them.)"""
    target = source_of(node).target
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    is_random = torch.Tag.nondeterministic_seeded in target.tags and not _has_no_dropout(source_of(node))
    is_other = target.namespace.startswith(("_c10d", "c10d")) and not is_exchange(source_of(node))
    return not is_random and not schema_of(target).is_mutable and not is_other
