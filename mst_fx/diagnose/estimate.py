"""An estimate of the memory of a step, from a walk over its graph.

Forward, each node makes the storages of its results, and what nobody reads any more and no backward step needs
is freed. Backward, nodes run in reverse, each with the gradients of its results and of its operands. What is
needed is what eager autograd saves: the operands of most operators, and nothing of those that only add or move.
A loop has one chunk's inside beside it (forward only, where it computes its gradient there); a checkpointed layer keeps its operands and has all of its own step
beside it in the backward pass.

It counts neither inputs nor parameters nor parameters' gradients, nor what has a size that depends on data. Inductor fuses, and so keeps less than
this; scratch of kernels and copies of gradients are not seen. A meter knows; this is for pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx

from mst_fx.diagnose.findings import Memory
from mst_fx.graph.sizes import hint
from mst_fx.graph.spelling import (
    ATTENTION,
    COPIES,
    EMBEDDINGS,
    EXPANDS,
    FLOAT_CASTS,
    PADS,
    PERMUTES,
    RESHAPES,
    SOFTMAXES,
    SPLITS,
    operation,
)
from mst_fx.graph.subgraphs import called_graph
from mst_fx.graph.values import is_plain, storage_key, tensors_of
from mst_fx.torch_api.symbols import hint_of

# Their backward passes need neither their operands nor their results …
_KEEP_NOTHING = (
    FLOAT_CASTS | COPIES | RESHAPES | PERMUTES | EXPANDS | SPLITS | PADS | EMBEDDINGS
    | {"add", "sub", "rsub", "neg", "sum", "mean", "cumsum", "squeeze", "unsqueeze", "flip", "roll", "rot90", "getitem"}
    | {"getattr", "select", "slice", "narrow", "diagonal", "cat", "stack", "hstack", "vstack", "repeat", "tile"}
    | {"tril", "triu", "mst_fx::embedding"}
)  # fmt: skip
# … or their operands alone where one of them is a number …
_KEEP_NOTHING_OF_NUMBERS = frozenset(("mul", "div"))
# … or their results only.
_KEEP_RESULT = SOFTMAXES | {
    "log_softmax", "tanh", "sigmoid", "exp", "exp2", "expm1", "sqrt", "rsqrt", "relu", "threshold", "reciprocal",
}  # fmt: skip
_ATTENTION = ATTENTION | {
    "mst_fx::attention",
    "mst_fx::biased_attention",
    "mst_fx::masked_attention",
}  # results and operands
_LOSSES = frozenset(("cross_entropy", "log_softmax"))
_LOOP_WITH_GRADIENT = "mst_fx::loop_with_grad"


def estimate_memory(gm: fx.GraphModule, chunk_bytes: Mapping[str, int]) -> Memory:
    """The bytes alive over the forward and backward pass of a Dynamo graph.

    Args:
        chunk_bytes: what one chunk's inside takes, by the key of the loop's body.
    """
    return _Walk(gm, chunk_bytes).run()


@dataclasses.dataclass
class _Walk:
    gm: fx.GraphModule
    chunk_bytes: Mapping[str, int]

    def __post_init__(self) -> None:
        self.calls = [n for n in self.gm.graph.nodes if n.op in ("call_function", "call_method")]
        self.given = {
            key
            for node in self.gm.graph.nodes
            if node.op in ("placeholder", "get_attr")
            for key in _storages(node)
        }
        self.sizes: dict[int, int] = {}
        self.made: dict[fx.Node, list[int]] = {}
        for node in self.calls:
            new = {
                key: size
                for key, size in _storages(node).items()
                if key not in self.given | self.sizes.keys()
            }
            if operation(node) == _LOOP_WITH_GRADIENT:
                new = {key: size for key, size in new.items() if key not in _weight_gradients(node)}
            self.sizes |= new
            self.made[node] = list(new)

    def run(self) -> Memory:
        output = self.gm.graph.output_node()
        leaving = {key for node in output.all_input_nodes for key in _storages(node)}
        has_gradient = any(t.requires_grad for node in output.all_input_nodes for t in tensors_of(node))
        saved = self._saved() if has_gradient else {}
        last: dict[int, fx.Node] = {}
        for node in self.calls:
            last |= dict.fromkeys(self._touched(node), node)
        forward, alive = [], 0
        for node in self.calls:
            alive += sum(self.sizes[key] for key in self.made[node])
            forward.append(alive + self._beside(node, backward=False))
            done = [key for key in self._touched(node) if last[key] is node]
            alive -= sum(self.sizes[key] for key in done if key not in saved and key not in leaving)
        kept = alive
        return Memory(
            tuple(forward), tuple(self._backward(saved, leaving, alive)) if has_gradient else (), kept
        )

    def _backward(self, saved: dict[int, fx.Node], leaving: set[int], alive: int) -> list[int]:
        points: list[int] = []
        gradients: set[int] = set()
        for node in reversed(self.calls):
            if not any(t.requires_grad for t in tensors_of(node)):
                continue
            operands = [o for o in node.all_input_nodes if any(t.requires_grad for t in tensors_of(o))]
            gradients |= {key for o in operands for key in _storages(o) if key in self.sizes}
            now = alive + sum(self.sizes[key] for key in gradients) + self._beside(node, backward=True)
            points.append(now)
            gradients -= set(self.made[node])
            done = [key for key, first in saved.items() if first is node and key not in leaving]
            alive -= sum(self.sizes[key] for key in done)
        return points

    def _saved(self) -> dict[int, fx.Node]:
        """Storages that the backward pass needs, each with the first node that does."""
        saved: dict[int, fx.Node] = {}
        for node in self.calls:
            name = operation(node)
            if not any(t.requires_grad for t in tensors_of(node)):
                continue
            if name in _ATTENTION:
                keys = self._touched(node)
            elif name in _KEEP_RESULT:
                keys = set(_storages(node))
            elif name in _KEEP_NOTHING or (name in _KEEP_NOTHING_OF_NUMBERS and _has_number(node)):
                keys = set()
            else:
                keys = self._touched(node) - set(self.made[node])
            for key in keys:
                if key in self.sizes:
                    saved.setdefault(key, node)
        return saved

    def _touched(self, node: fx.Node) -> set[int]:
        keys = {key for operand in node.all_input_nodes for key in _storages(operand)}
        return {key for key in keys | set(_storages(node)) if key in self.sizes}

    def _beside(self, node: fx.Node, backward: bool) -> int:
        """What a node needs beside its operands and results while it runs."""
        chunks = [self.chunk_bytes[x] for x in node.args if isinstance(x, str) and x in self.chunk_bytes]
        if chunks:
            return 0 if backward and operation(node) == _LOOP_WITH_GRADIENT else chunks[0]
        inner = called_graph(self.gm, node)
        if inner is not None:
            step = estimate_memory(inner, self.chunk_bytes)
            return step.peak if backward else max(step.forward, default=0) - step.kept
        if operation(node) in _LOSSES:
            return sum(sum(_storages(operand).values()) for operand in node.all_input_nodes[:1])
        return 0


def _storages(node: fx.Node) -> dict[int, int]:
    """The storages behind the tensors of a node, with their bytes (those of a view, where it is all there is)."""
    found: dict[int, int] = {}
    for tensor in tensors_of(node):
        key = storage_key(tensor) if is_plain(tensor) else None
        key = id(tensor) if key is None else key
        count = tensor.numel()
        is_known = hint_of(count) is not None
        found[key] = hint(count) * tensor.element_size() if is_known else 0
    return found


def _weight_gradients(node: fx.Node) -> set[int]:
    """The storages of a loop's results that are gradients of what all its chunks share."""
    shared: Any = node.args[1]
    shapes = [tensor.shape for operand in shared for tensor in tensors_of(operand)]
    found = {storage_key(t) for t in tensors_of(node) if t.ndim and t.shape in shapes}
    return {key for key in found if key is not None}


def _has_number(node: fx.Node) -> bool:
    return any(
        not tensors_of(x) if isinstance(x, fx.Node) else isinstance(x, (int, float)) for x in node.args[:2]
    )
