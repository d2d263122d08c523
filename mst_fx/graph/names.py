"""Names of nodes for people."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

from mst_fx.torch_api.ops import OpOverload


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


def plain_name(node: fx.Node) -> str:
    """The same without an overload: ``and_`` for ``operator.and_`` and for ``aten.and_``; of what calls nothing, its kind."""
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    return node.target.overloadpacket.__name__ if isinstance(node.target, OpOverload) else target_name(node)
