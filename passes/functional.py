"""Writes in place as new values, where nobody outside of the graph can see the tensor that is written to.

Before::

    t = y.clone(); m = t == -100; setitem(t, m, 0); v = t.view(-1); loss(logits, v)

After::

    t = y.clone(); m = t == -100; u = t.masked_fill(m, 0); v = u.view(-1); loss(logits, v)

Whoever read the tensor, or a view of it, after a write reads the new value. One storage is rewritten
wholly or not at all, and only if

- a call in this graph makes it (no input, parameter or buffer has it), and one output at most is a view of it;
- every view of it in the graph is of a kind known here, as is every write, and no sub-graph reads it;
- nothing in it has a gradient, or all its views and writes run with gradients on and no write goes through a
  ``detach``: a write that autograd does not see has no equal without it.

Who shares a storage with whom is read from the fakes, which Dynamo made by running the very calls.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

from torch import fx

from mst_fx.context import PassContext
from mst_fx.errors import Cause, Refusal
from mst_fx.graph.modes import contexts
from mst_fx.graph.names import target_name
from mst_fx.graph.spelling import (
    CHECKPOINTS,
    EXPANDS,
    SPLITS,
    TRANSPOSES,
    operation,
)
from mst_fx.graph.twins import IN_ORDER, Adder, inverse, storage, twin
from mst_fx.graph.values import is_plain, tensor_value, tensors_of
from mst_fx.graph.writes import writes_in_place
from mst_fx.torch_api.ops import HigherOrderOperator

log = logging.getLogger("mst_fx")


# Views that are made anew after a write, but through which nothing is written.
_READ_ONLY = EXPANDS | SPLITS | {"movedim", "mT", "diagonal"}
_VIEWS = IN_ORDER | TRANSPOSES | _READ_ONLY | {"detach", "permute", "narrow", "select", "slice"}


def run(context: PassContext) -> None:
    """Replaces writes in place by new values where nobody else can see the written tensor."""
    graph = context.graph
    done: set[int] = set()
    while (storage := _next_storage(graph, done)) is not None:
        done.add(storage)
        rewrite = _Rewrite(graph, storage)
        try:
            rewrite.make()
        except Refusal as refusal:
            log.debug("a write in place is left: %s", refusal)
            rewrite.undo()
        except Exception:  # a call does not run on fakes as it is made here; old nodes are as they were
            log.debug("a write in place is left", exc_info=True)
            rewrite.undo()
        else:
            rewrite.commit()


def _next_storage(graph: fx.Graph, done: set[int]) -> int | None:
    for node in graph.nodes:
        written = _written(node)
        fake = tensor_value(written) if written is not None else None
        if fake is not None and is_plain(fake) and storage(fake) not in done:
            return storage(fake)
    return None


def _written(node: fx.Node) -> fx.Node | None:
    """What a node writes to, if it is its first operand."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and writes_in_place(node) else None


class _Rewrite:
    """One storage's writes as new values: checked first, made beside the old nodes, put in their place last."""

    def __init__(self, graph: fx.Graph, storage: int) -> None:
        self.graph, self.storage = graph, storage
        self.modes = contexts(graph)
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.views = [node for node in graph.nodes if node.op != "output" and self._has(node)]
        self.parents: dict[fx.Node, fx.Node] = {}
        self.new: list[fx.Node] = []
        self.writers: list[fx.Node] = []
        # What stands for a view since the last write, and the readers to be changed.
        self.current: dict[fx.Node, fx.Node] = {}
        self.changes: list[tuple[fx.Node, fx.Node, fx.Node]] = []

    def _has(self, node: fx.Node) -> bool:
        return any(is_plain(fake) and storage(fake) == self.storage for fake in tensors_of(node))

    def make(self) -> None:
        """Makes the new values beside the old ones, which stay as they are.

        Raises:
            Refusal: the writes have to stay.
        """
        self._check()
        readers = {user for view in self.views for user in view.users}
        for node in sorted(readers, key=self.order.__getitem__):
            if writes_in_place(node) and self._is_view(node.args[0]):
                self._write(node)
                self.writers.append(node)
            else:
                for operand in node.all_input_nodes:
                    if operand in self.current and self.current[operand] is not operand:
                        self.changes.append((node, operand, self.current[operand]))

    def undo(self) -> None:
        for node in reversed(self.new):
            self.graph.erase_node(node)

    # Checks

    def _check(self) -> None:
        """Raises a Refusal where the writes have to stay."""
        root = self._root()
        for view in self.views:
            if view is not root:
                self._check_view(view)
        readers = {user for view in self.views for user in view.users}
        if any(self.modes[node].level for node in (*self.views, *readers)):
            raise Refusal(f"{root.name} is used inside of a torch.func transform", Cause.NOT_PLAIN)
        for reader in readers:
            self._check_reader(reader)
        (output,) = self.graph.find_nodes(op="output")
        if sum(self._is_view(node) for node in output.all_input_nodes) > 1:
            raise Refusal("several outputs of the graph share what is written to", Cause.WRITTEN)
        self._check_gradients()

    def _root(self) -> fx.Node:
        """The node that makes the storage."""
        first = self.views[0]
        if tensor_value(first) is None:  # a tuple: its member is what is written to
            members = [user for user in first.users if self._has(user)]
            if len(members) != 1 or any(user.target is not operator.getitem for user in first.users):
                raise Refusal(f"{first.name} is written to, and no tensor", Cause.WRITTEN)
            self.views.remove(first)
            maker, first = first, members[0]
        else:
            maker = first
        if maker.op not in ("call_function", "call_method") or first is not self.views[0]:
            raise Refusal(f"{first.name} is written to, and not made here", Cause.WRITTEN)
        is_graph = isinstance(maker.target, HigherOrderOperator)
        if is_graph and operation(maker) not in CHECKPOINTS:
            raise Refusal(f"{first.name} comes from a sub-graph", Cause.WRITTEN)
        return first

    def _is_view(self, node: Any) -> bool:
        return node is self.views[0] or (isinstance(node, fx.Node) and node in self.parents)

    def _check_view(self, view: fx.Node) -> None:
        parent = view.args[0] if view.args else None
        others = view.all_input_nodes[1:]
        if not isinstance(parent, fx.Node) or not self._is_view(parent):
            raise Refusal(f"{view.name} is no view of {self.views[0].name}", Cause.WRITTEN)
        known_index = view.target is operator.getitem
        if not known_index and not writes_in_place(view) and operation(view) not in _VIEWS:
            raise Refusal(f"{view.name} is a view of a kind not known here", Cause.WRITTEN)
        if not writes_in_place(view) and any(self._has(other) for other in others):
            raise Refusal(f"{view.name} is a view of two tensors", Cause.WRITTEN)
        if any(fake.dtype != tensors_of(parent)[0].dtype for fake in tensors_of(view)):
            raise Refusal(f"{view.name} is a view as another type", Cause.WRITTEN)
        self.parents[view] = parent

    def _check_reader(self, reader: fx.Node) -> None:
        if any(not is_plain(fake) for fake in tensors_of(reader)):
            raise Refusal(f"{reader.name} is no plain tensor", Cause.NOT_PLAIN)
        if isinstance(reader.target, HigherOrderOperator) or reader.op == "call_module":
            raise Refusal(f"{reader.name} calls a sub-graph", Cause.OPAQUE)
        if writes_in_place(reader) and twin(reader) is None:
            raise Refusal(
                f"{reader.name} ({target_name(reader)}) writes in a way not known here", Cause.WRITTEN
            )

    def _check_gradients(self) -> None:
        writers = [user for view in self.views for user in view.users if writes_in_place(user)]
        fakes = [fake for node in self.views for fake in tensors_of(node)]
        fakes += [
            fake for writer in writers for operand in writer.all_input_nodes for fake in tensors_of(operand)
        ]
        if not any(fake.requires_grad for fake in fakes):
            return
        if not all(self.modes[node].grad for node in (*self.views, *writers)):
            raise Refusal("is written to without gradients, and has some", Cause.NO_GRAD)
        for writer in writers:
            view = writer.args[0]
            while view in self.parents:
                if operation(view) == "detach":  # type: ignore[arg-type]
                    raise Refusal(f"{writer.name} writes behind autograd's back", Cause.WRITTEN)
                view = self.parents[view]  # type: ignore[index]

    # Writes

    def _write(self, node: fx.Node) -> None:
        """Adds the new values of the tensor and of its views that are read later, before the write."""
        written, make = node.args[0], twin(node)
        assert isinstance(written, fx.Node) and make is not None
        add = Adder(self.graph, node, self.modes[node], self.new)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._now)
        found = make(add, *args, **kwargs)
        fresh = {written: found}
        view = written
        while view in self.parents:
            parent = self.parents[view]
            found = inverse(add, view, self._now(parent), found)
            fresh[parent] = found
            view = parent
        for known in self.views:
            if self.order[known] >= self.order[node]:
                break
            if self._is_read_after(known, node):
                self._derive(add, known, fresh)
        self.current = fresh
        if node in self.parents:  # a write that returns what it wrote to
            fresh[node] = fresh[written]

    def _now(self, node: fx.Node) -> fx.Node:
        return self.current.get(node, node)

    def _is_read_after(self, view: fx.Node, node: fx.Node) -> bool:
        return any(self.order.get(user, -1) > self.order[node] for user in view.users)

    def _derive(self, add: Adder, view: fx.Node, fresh: dict[fx.Node, fx.Node]) -> fx.Node:
        """The view of the new value."""
        if view not in fresh:
            source = self._derive(add, self.parents[view], fresh)
            if writes_in_place(view):  # which returned what it wrote to
                fresh[view] = source
            else:
                fresh[view] = add(view.target, source, *view.args[1:], **view.kwargs)
        return fresh[view]

    def commit(self) -> None:
        """Puts the new values in the place of the old ones: what fails here fails the pass, whose copy of the graph is dropped."""
        for reader, old, new in self.changes:
            reader.replace_input_with(old, new)
        for node in sorted({*self.views[1:], *self.writers}, key=self.order.__getitem__, reverse=True):
            if node in self.writers or not (node.users or node.is_impure()):
                self.graph.erase_node(node)
        for node in reversed(self.new):
            if not node.users:
                self.graph.erase_node(node)
