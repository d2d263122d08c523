"""Logits that are made only if somebody looks.

When a graph's loss consumes the logits in a loop and the graph also returns them, the graph returns
the rows the logits are computed from instead, and the caller gets a :class:`DeferredLogits` in their
place, which computes itself on first use.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

log = logging.getLogger("mst_fx")

# Called with "file:line in function" of whoever makes deferred logits compute themselves.
on_use: list[Callable[[str], None]] = []
_told: set[str] = set()
_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent))

_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.is_floating_point,
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
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_quantized",
            "is_nested",
            "is_mps",
            "is_xpu",
            "is_meta",
            "itemsize",
            "nbytes",
        )
    ),
}


_IS_LEAF = torch.Tensor.is_leaf.__get__  # type: ignore[attr-defined]


class DeferredLogits(torch.Tensor):
    """Logits ``[B, S, V]`` that hold what they are computed from, and no S×V storage.

    Shape, dtype, device and ``requires_grad`` are those of the logits; any other use computes them,
    once and differentiably.

    Raises:
        RuntimeError: on first use, if a weight was changed in place since the forward pass: the
            logits would be others than those the loss was computed from.
    """

    _compute: Callable[..., torch.Tensor] | None
    _inputs: tuple[torch.Tensor, ...]
    _value: torch.Tensor | None
    _versions: list[int]
    _grad_enabled: bool
    _autocast: tuple[str, torch.dtype, bool]

    @staticmethod
    def __new__(
        cls,
        compute: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> DeferredLogits:
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=grad
        )
        self._compute = compute
        self._inputs = tuple(inputs)
        self._versions = [_version(x) for x in inputs]
        self._value = None
        self._grad_enabled = torch.is_grad_enabled()
        kind = device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return self

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor ``[B, S, V]``, part of the autograd graph."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._value is None:
                self._check_versions()
                assert self._compute is not None
                kind, dtype, enabled = self._autocast
                with torch.set_grad_enabled(self._grad_enabled), torch.autocast(kind, dtype, enabled):
                    self._value = self._compute(*self._inputs)
                self._compute, self._inputs = None, ()
                _tell(_caller())
            return self._value

    def _check_versions(self) -> None:
        for x, version in zip(self._inputs, self._versions, strict=True):
            if _version(x) != version:
                raise RuntimeError(
                    "deferred logits are used for the first time after what they are computed from "
                    f"(a {x.dtype} tensor of shape {tuple(x.shape)}) was changed in place, as an "
                    "optimizer step does; use them before, or set the mst option logits='keep'"
                )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            state = "" if self._value is None else ", computed"
            return (
                f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}{state})"
            )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _IS_LEAF:
            (self,) = args
            return not self.requires_grad
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = _materialized((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _materialized((args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().__deepcopy__(memo)


def _version(x: torch.Tensor) -> int:
    """How often a tensor was written; inference tensors do not know (see :func:`defer_outputs`)."""
    return -1 if x.is_inference() else x._version


def _caller() -> str:
    """The innermost frame that is neither torch's nor ours."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _tell(place: str) -> None:
    for listener in on_use:
        listener(place)
    if place not in _told:
        _told.add(place)
        log.info("deferred logits are computed for %s", place)


def _materialized(tree: Any) -> Any:
    return tree_map_only(DeferredLogits, DeferredLogits.materialize, tree)


@dataclasses.dataclass(frozen=True)
class Deferral:
    """How the caller of a rewritten graph gets one of its outputs.

    Attributes:
        position: of the output.
        compute: the graph of the logits, a function of ``inputs``.
        inputs: for each: ("output", index) of the rewritten graph or ("argument", index).
        shape: ints, or ("output", index, dim): the size of an output's dimension.
        dtype, device: of the logits.
    """

    position: int
    compute: fx.GraphModule
    inputs: tuple[tuple[str, int], ...]
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def deferring(
    function: Callable[..., Any], deferrals: Sequence[Deferral], outputs: int
) -> Callable[..., Any]:
    """Wraps a compiled graph: puts deferred logits in place and drops the extra outputs.

    Args:
        outputs: how many outputs the graph had before the rewrite.
    """
    if not deferrals:
        return function

    def run(*args: Any) -> Any:
        # Dynamo may hand over its list of arguments to be emptied: keep what the logits need.
        kept = [
            [args[index] if kind == "argument" else None for kind, index in deferral.inputs]
            for deferral in deferrals
        ]
        return defer_outputs(function(*args), kept, deferrals, outputs)

    return run


def defer_outputs(
    results: Sequence[Any], kept: Sequence[Sequence[Any]], deferrals: Sequence[Deferral], outputs: int
) -> tuple[Any, ...]:
    new = list(results[:outputs])
    for deferral, arguments in zip(deferrals, kept, strict=True):
        inputs = [
            results[index] if kind == "output" else argument
            for (kind, index), argument in zip(deferral.inputs, arguments, strict=True)
        ]
        shape = [
            size if isinstance(size, int) else results[size[1]].shape[size[2]] for size in deferral.shape
        ]
        logits = DeferredLogits(deferral.compute, inputs, shape, deferral.dtype, deferral.device)
        seen = [kind == "argument" or index < outputs for kind, index in deferral.inputs]
        # What the caller could change without a trace is used at once.
        is_safe = not any(s and x.is_inference() for s, x in zip(seen, inputs, strict=True))
        new[deferral.position] = logits if is_safe else logits.materialize()
    return tuple(new)
