"""What functions do with deferred logits, by the function: ask for metadata, write in place, or give out memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mst_fx.logits.uses import announces

METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_signed,
    torch.Tensor.is_inference,
    torch.Tensor.is_conj,
    torch.Tensor.is_neg,
    torch.Tensor.get_device,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_inference,
    torch.is_conj,
    torch.is_neg,
    torch.numel,
    *(
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "requires_grad",
            "is_leaf",
            "grad_fn",
            "output_nr",
            "_version",
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_sparse_csr",
            "is_quantized",
            "is_nested",
            "is_mkldnn",
            "is_mps",
            "is_mtia",
            "is_xla",
            "is_xpu",
            "is_vulkan",
            "is_maia",
            "is_meta",
            "itemsize",
            "nbytes",
            "is_ipu",
            "name",
            "names",
            "volatile",
            # None of a gradient: logits are no leaves, and what keeps theirs computes them.
            "grad",
            "_grad",
            "grad_dtype",
            "retains_grad",
            "_backward_hooks",
            "_post_accumulate_grad_hooks",
        )
        if hasattr(torch.Tensor, name)
    ),
    *(
        getattr(torch.Tensor, name)
        for name in ("__dir__", "has_names", "is_distributed", "is_shared", "_is_zerotensor")
        if hasattr(torch.Tensor, name)
    ),
}

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_WRITERS = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)}
# What gives out memory: nobody counts what is written there.
MEMORY: dict[Any, str] = {
    getattr(torch.Tensor, name): name
    for name in (
        "untyped_storage",
        "storage",
        "_typed_storage",
        "data_ptr",
        "__dlpack__",
        "numpy",
        "__array__",
    )
} | {getattr(torch.Tensor, name).__get__: name for name in ("data", "__cuda_array_interface__")}
ARRAYS: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}  # can be made read-only
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, type(None))


def writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to an argument, by its name and arguments; the name may not tell."""
    name = getattr(func, "__name__", "")
    in_place = name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
    return bool(in_place or kwargs.get("inplace") or kwargs.get("out") is not None)


def asked_for(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments whose own gradient a function asks for."""
    if func is torch.Tensor.retain_grad:
        return args[0]
    if func is torch.Tensor.register_hook:
        return None if announces(kwargs.get("hook", args[-1])) else args[0]
    if func is torch.autograd.grad:
        return kwargs.get("inputs", args[1] if len(args) > 1 else None)
    return kwargs.get("inputs") if func is torch.autograd.backward else None


def gives_memory(func: Any, results: Iterable[Any]) -> bool:
    """Whether a function gives out what no version counts writes to: memory, or what is neither a tensor nor plain."""
    return func in MEMORY or not all(isinstance(found, (Tensor, *_PLAIN)) for found in results)
