"""Values of nodes: the fakes that Dynamo left, and the storages behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mst_fx.torch_api.fakes import FakeTensor
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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a fake stands for an ordinary strided tensor (a DTensor's does not)."""
    plain_type = type(tensor) in (FakeTensor, torch.Tensor, torch.nn.Parameter)
    return (
        plain_type
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and storage_key(tensor) is not None
    )


def is_parameter(found: Any) -> bool:
    """Whether the value of an input is a parameter."""
    return isinstance(found, torch.nn.Parameter)


def is_of_batch(found: Any) -> bool:
    """Whether an input is a tensor that comes with a batch: a plain one, and no parameter."""
    return isinstance(found, torch.Tensor) and not is_parameter(found) and is_plain(found)


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
