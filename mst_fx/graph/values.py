"""FX helpers: values of nodes, copies, names, and new nodes that know their values."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx.errors import Refusal
from mst_fx.torch_api.fakes import FakeTensor, fake_mode
from mst_fx.torch_api.fakes import fake_mode_of as fake_mode_of
from mst_fx.torch_api.symbols import hint_of
from mst_fx.torch_api.tensors import SIXTEEN_BITS as SIXTEEN_BITS
from mst_fx.torch_api.tensors import storage_id, tree_leaves

VALUE = "example_value"  # the meta key under which Dynamo keeps a node's fake value


def value(node: fx.Node) -> Any:
    """The fake value of a node: Dynamo's ``example_value``, or export's ``val``."""
    if VALUE in node.meta:
        return node.meta[VALUE]
    return node.meta.get("val")


def tensor_value(node: fx.Node) -> torch.Tensor | None:
    found = value(node)
    return found if isinstance(found, torch.Tensor) else None


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)]


def row_bytes(tensor: torch.Tensor, rows: int) -> int:
    """Bytes a row of a tensor that holds ``rows`` rows (sizes by hint)."""
    return hint(tensor.numel()) * tensor.element_size() // max(1, rows)


def hint(size: Any) -> int:
    """The size that a symbolic integer has at capture.

    Raises:
        Refusal: if it depends on data (how many tokens are picked), and is not known then.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not is_known(size):
        raise Refusal(f"the size {size} depends on data")
    return int(hint_of(size))


def is_known(size: Any) -> bool:
    """Whether a size has a value at capture."""
    return hint_of(size) is not None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of a type are summed: float32 for 16-bit ones."""
    return torch.float32 if dtype in SIXTEEN_BITS else dtype


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a fake stands for an ordinary strided tensor (a DTensor's does not)."""
    plain_type = type(tensor) in (FakeTensor, torch.Tensor, torch.nn.Parameter)
    return (
        plain_type
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and storage_key(tensor) is not None
    )


def storage_key(tensor: torch.Tensor) -> int | None:
    """What tells a tensor's storage from others; None if it has none to show: values inside of ``torch.vmap``
    and ``torch.func.grad``, sparse tensors, some subclasses."""
    try:
        return storage_id(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def storage_keys(node: fx.Node) -> set[int]:
    """The storages behind the tensors of a node that have one."""
    return {key for fake in tensors_of(node) if (key := storage_key(fake)) is not None}


def copy_tree(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a GraphModule and of the sub-GraphModules its graph names; parameters are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    new = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    new.meta.update(gm.meta)
    for old_node, node in zip(gm.graph.nodes, graph.nodes, strict=True):
        node.meta = dict(old_node.meta)
    for name, child in subgraphs(gm):
        new.set_submodule(name, copy_tree(child))
    return new


def subgraphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The sub-GraphModules that a graph refers to (bodies of ``tag_activation_checkpoint``)."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in seen:
            seen.add(node.target)
            child = attribute(gm, node.target)
            if isinstance(child, fx.GraphModule):
                yield node.target, child


def graphs_of(gm: fx.GraphModule) -> list[fx.Graph]:
    """A graph and all that it refers to."""
    return [gm.graph, *(graph for _, child in subgraphs(gm) for graph in graphs_of(child))]


def attribute(gm: torch.nn.Module, name: str) -> Any:
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part)
    return found


def is_graph(gm: torch.nn.Module, node: fx.Node) -> bool:
    """Whether a ``get_attr`` or ``call_module`` node names a graph."""
    return isinstance(attribute(gm, str(node.target)), fx.GraphModule)


def called_graph(gm: torch.nn.Module, node: fx.Node) -> fx.GraphModule | None:
    """The sub-GraphModule that a node calls with its other operands (a checkpointed layer); None for others."""
    body = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(body, fx.Node) or body.op != "get_attr":
        return None
    found = attribute(gm, str(body.target))
    return found if isinstance(found, fx.GraphModule) else None


def is_function(node: fx.Node) -> bool:
    """Whether a node applies a ``torch.autograd.Function``: a higher-order operator of its two graphs."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "autograd_function_apply"


def function_graphs(gm: fx.GraphModule) -> set[str]:
    """The names of the sub-graphs that are a ``torch.autograd.Function``'s."""
    return {str(each.target) for n in gm.graph.nodes if is_function(n) for each in n.all_input_nodes[:2]}


def function_text(node: fx.Node) -> list[str]:
    """What tells the graphs of two nodes that apply a ``torch.autograd.Function`` apart."""
    gm = node.graph.owning_module
    assert gm is not None
    lines = []
    for each in node.args[:2]:
        graph = attribute(gm, str(each.target)).graph  # type: ignore[union-attr]
        names = {inner: f"%{index}" for index, inner in enumerate(graph.nodes)}
        for inner in graph.nodes:
            args = fx.node.map_arg((inner.args, inner.kwargs), names.__getitem__)  # type: ignore[arg-type]
            kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(inner)]
            rest = [leaf for leaf in tree_leaves(value(inner)) if not isinstance(leaf, torch.Tensor)]
            lines.append(f"{inner.op} {inner.target!r} {args!r} {kinds} {rest}")
    return lines


def called_graphs(node: fx.Node) -> list[fx.GraphModule]:
    """All sub-GraphModules that a node calls, as operands (higher-order operators) or by itself."""
    gm = node.graph.owning_module
    names = [operand.target for operand in node.all_input_nodes if operand.op == "get_attr"]
    if node.op == "call_module":
        names.append(node.target)
    found = [attribute(gm, str(name)) for name in names] if gm is not None else []
    return [each for each in found if isinstance(each, fx.GraphModule)]


def add_call(graph: fx.Graph, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a ``call_function`` (or, for a string, ``call_method``) node with its fake value.

    The node goes to the graph's insertion point.
    """
    op = "call_method" if isinstance(target, str) else "call_function"
    fakes, fake_kwargs = fx.node.map_arg((args, kwargs), value)
    found = call(op, target, fakes, fake_kwargs)  # before there is a node: this may fail
    node = graph.create_node(op, target, args, kwargs)
    node.meta[VALUE] = found
    return node


def call(op: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Runs a node's target on values, in the fake mode of the first fake among them."""
    mode = fake_mode_of(tree_leaves((list(args), kwargs)))
    function: Callable[..., Any] = target
    if op == "call_method":
        function = operator.methodcaller(target, *args[1:], **kwargs)
        args, kwargs = args[:1], {}
    if mode is None:
        return function(*args, **kwargs)
    with mode:
        return function(*args, **kwargs)


def fill_values(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Gives every node of a graph that Dynamo did not make its fake value.

    Args:
        gm: any GraphModule; sub-GraphModules are filled when they are called.
        example_inputs: what ``gm`` is called with; tensors may be real or fake.
    """
    mode = fake_mode_of(example_inputs) or fake_mode(is_symbolic=True)

    def fake(found: Any) -> Any:
        if isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor):
            return mode.from_tensor(found, static_shapes=True)
        return found

    class Fill(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta[VALUE] = result
            return result

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            return fake(super().get_attr(target, args, kwargs))

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            child = attribute(self.module, target)
            if isinstance(child, fx.GraphModule):
                return Fill(child).run(*args)
            return super().call_module(target, args, kwargs)

    with mode:
        Fill(gm).run(*map(fake, example_inputs))


def module_path(node: fx.Node) -> str:
    """The path of the module a node comes from, e.g. ``model.layers.0.mlp`` ('' if unknown)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return clean_path(path if isinstance(path, str) else "")


def clean_path(path: str) -> str:
    """``L['self'].model.layers[0]._modules['mlp']`` → ``model.layers.0.mlp``.

    Wrappers name the model ``L['args'][0]`` (accelerate) or ``L['forward'].__self__`` (TRL).
    """
    path = re.sub(r"_modules\[['\"](\w+)['\"]\]", r"\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    path = path.replace(".__dict__._modules.", ".")
    path = re.sub(r"^(L|G)?\.?(self|fn|mod|model__|_orig_mod|args\.0|\w+\.__self__)?(\.|$)", "", path)
    return path.strip(".")


def common_path(paths: Iterable[str]) -> str:
    """The deepest module that holds all of ``paths``."""
    parts = [path.split(".") for path in paths if path]
    if not parts:
        return ""
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def target_name(node: fx.Node) -> str:
    """The name of what a node calls, as it is spelled in the graph."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
