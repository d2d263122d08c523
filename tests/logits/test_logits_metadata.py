"""What deferred logits say of themselves without being computed: every property, and methods that ask for no values."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mst_fx
from mst_fx.logits.snapshot import is_freed, snapshot
from mst_fx.logits.source import Source
from mst_fx.logits.tensor import DeferredLogits, deferred_logits
from tests.helpers import SMALL_CHUNKS, ToyLM, relative_error, token_batch

# Properties for which all values are computed, and why. A property that is new in torch must do without, or be
# put here.
NEEDS_VALUES = {
    "T": "a view of the values",
    "mT": "a view of the values",
    "H": "a view of the values",
    "mH": "a view of the values",
    "data": "shares the values, and no version",
    "_cdata": "an address, which must not change when the values come",
    "__cuda_array_interface__": "the address of the values",
}
# Properties of the Python object; the answers are another object's.
OF_THE_OBJECT = {"__class__", "__dict__", "__weakref__", "_python_dispatch"}

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "rows": lambda x: x[:, 3:5],
    "row": lambda x: x[:, -1],
    "cast": lambda x: x.float(),
    "copy": lambda x: x.clone(),
    "detached": lambda x: x.detach(),
}


@functools.cache
def _models() -> tuple[ToyLM, Callable[..., Any]]:
    """A model, and its rewritten graph, which runs without an outer compiler."""
    torch.manual_seed(0)
    model = ToyLM(layers=1)
    exported: Any = torch.export.export(model, tuple(_inputs())).module()
    rewritten, report = mst_fx.rewrite(exported, _inputs(), SMALL_CHUNKS)
    assert any(rewrite.deferred for rewrite in report.rewrites)
    return model, rewritten


def _inputs() -> list[Tensor]:
    return list(token_batch(2, 33).values())


def _pair(kind: str, grad: bool = True) -> tuple[DeferredLogits, Tensor]:
    """Deferred logits, or what was made from them, and the same of ordinary ones."""
    model, rewritten = _models()
    with torch.set_grad_enabled(grad):
        found, truth = (KINDS[kind](run(*_inputs())[1]) for run in (rewritten, model))
    assert type(found) is DeferredLogits and found._value is None
    return found, truth


def _properties() -> list[str]:
    kinds = (property, types.GetSetDescriptorType, types.MemberDescriptorType)
    found: dict[str, Any] = {}
    for owner in torch.Tensor.__mro__:
        for name, attribute in vars(owner).items():
            found.setdefault(name, attribute)
    return sorted(name for name, attribute in found.items() if isinstance(attribute, kinds))


def _answer(ask: Callable[[], Any]) -> Any:
    try:
        found = ask()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return type(error), str(error)
    if isinstance(found, Tensor):
        return "tensor", found.shape, found.dtype, found.device, found.requires_grad
    return (
        "a node" if isinstance(found, torch.autograd.graph.Node) or "Backward" in repr(type(found)) else found
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_properties_compute_nothing(kind: str, grad: bool) -> None:
    found, truth = _pair(kind, grad)
    names = _properties()
    assert {"shape", "_base", "_backward_hooks", "is_cuda", "grad"} < set(names)
    for name in names:
        if name not in NEEDS_VALUES and name not in OF_THE_OBJECT:
            answers = [_answer(functools.partial(getattr, x, name)) for x in (found, truth)]
            assert answers[0] == answers[1], name
            assert found._value is None, f"{name} computes"


@pytest.mark.parametrize("name", NEEDS_VALUES)
def test_properties_that_need_values(name: str) -> None:
    """None that could do without is in the list, and what they give is right."""
    found, truth = _pair("row")
    if not hasattr(torch.Tensor, name):
        pytest.skip("this torch has no such property")
    answers = [_answer(functools.partial(getattr, x, name)) for x in (found, truth)]
    assert found._value is not None
    if name == "data":
        assert relative_error(found.data, truth.data) <= 1e-9
    assert type(answers[0]) is type(answers[1])


# Calls that need no values; "whole" are those about the layout, which rows that are computed alone have for themselves.
_WHOLE: dict[str, Callable[[Any], Any]] = {
    "stride": lambda x: (x.stride(), x.stride(0), x.stride(-1)),
    "is_contiguous": lambda x: (x.is_contiguous(), x.is_contiguous(memory_format=torch.contiguous_format)),
    "storage_offset": lambda x: x.storage_offset(),
    "dim_order": lambda x: x.dim_order(),
}
_NAMES = (
    *(
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "size",
        "element_size",
        "get_device",
        "type",
        "has_names",
        "__len__",
    ),
    *("is_floating_point", "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "is_coalesced"),
    *("is_pinned", "is_shared", "is_distributed", "_is_view", "_is_zerotensor", "dense_dim", "sparse_dim"),
)
_ANY: dict[str, Callable[[Any], Any]] = {
    **{name: operator.methodcaller(name) for name in _NAMES if hasattr(torch.Tensor, name)},
    "__dir__": lambda x: set(dir(x)) >= set(dir(torch.Tensor)),
    "hash": lambda x: hash(x) == hash(x) and x in {x},
    "new": lambda x: x.new_zeros(2).tolist() + x.new_ones((1,)).tolist() + x.new_tensor([2.0]).tolist(),
    "new_full": lambda x: (x.new_full((2,), 3).tolist(), x.new_full((2,), 3).dtype, x.new_empty(3, 2).shape),
    "leaf hook": lambda x: x.register_post_accumulate_grad_hook(print),
    "real": lambda x: x.real,
    "size of": lambda x: x.size(-1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_compute_nothing(kind: str) -> None:
    found, truth = _pair(kind)
    calls = _ANY if kind.startswith("row") or kind == "detached" else {**_ANY, **_WHOLE}
    for name, call in calls.items():
        if kind == "detached" and name == "leaf hook":
            continue  # "can't register on a tensor that needs no gradient", in other words
        answers = [_answer(functools.partial(call, x)) for x in (found, truth)]
        assert answers[0] == answers[1], name
        assert found._value is None, f"{name} computes"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", _WHOLE)
def test_layouts_are_those_of_the_values(kind: str, name: str) -> None:
    """Also where rows that are computed alone lie closer than in the logits: a kernel would read past the end."""
    found, _ = _pair(kind)
    assert _WHOLE[name](found) == _WHOLE[name](found.materialize())


def test_values_that_come_in_another_layout() -> None:
    weight, hidden = torch.randn(5, 96), torch.randn(3, 33, 5, requires_grad=True)

    def compute(x: Tensor) -> Tensor:
        return (x.transpose(0, 1).contiguous() @ weight).transpose(0, 1)

    like = torch.empty(3, 33, 96, device="meta")
    logits = deferred_logits(Source(compute, [hidden], [True], like, hidden.device))
    strides = logits.stride()
    assert logits._value is None
    value = logits.materialize()
    assert value.stride() == strides == (33 * 96, 96, 1) != compute(hidden).stride()
    assert torch.equal(value, compute(hidden))
    (found,) = torch.autograd.grad(value.square().sum(), hidden)
    (truth,) = torch.autograd.grad(compute(hidden).square().sum(), hidden)
    assert relative_error(found, truth) <= 1e-6


# Hooks


_FSDP = "torch.distributed.fsdp._runtime_utils"


def _fsdp(hook: Callable[..., Any], module: str = _FSDP) -> Callable[..., Any]:
    hook.__module__ = module
    return hook


@pytest.mark.parametrize("module", [_FSDP, "deepspeed.runtime.utils"])
def test_hooks_that_announce_a_backward_pass(module: str) -> None:
    """FSDP's; tests/training/test_fsdp.py has the real ones. They are called for rows too, and no more rows are computed."""
    called: list[tuple[int, ...]] = []
    hook = _fsdp(lambda state, grad: called.append(tuple(grad.shape)), module)
    logits, _ = _pair("whole")
    logits.register_hook(functools.partial(hook, None))
    logits.register_hook(functools.partial(hook, None)).remove()
    row, gathered = logits[:, -1], logits[torch.tensor([0, 1]), torch.tensor([2, 3])]
    assert not called and logits._value is None
    row.sum().backward(retain_graph=True)
    assert called == [(2, 1, 96)] and logits._value is None
    gathered.sum().backward(retain_graph=True)
    assert called[1:] == [(1, 2, 96)]
    logits.exp().sum().backward(retain_graph=True)
    assert called[2:] == [(2, 33, 96)]
    logits.register_hook(functools.partial(hook, None))  # there are values now
    logits.sum().backward()
    assert called[3:] == [(2, 33, 96)] * 2


def test_hooks_by_the_way_of_autograd_functions() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    called: list[int] = []
    logits, _ = _pair("whole")
    logits.register_hook(_fsdp(lambda grad: called.append(grad.ndim)))
    Twice.apply(logits).sum().backward()  # type: ignore[no-untyped-call]
    assert called


def test_an_announced_hook_that_changes_the_gradient_is_an_error() -> None:
    logits, _ = _pair("whole")
    logits.register_hook(_fsdp(lambda grad: 2 * grad))
    with pytest.raises(RuntimeError, match="changes the gradient of deferred logits"):
        logits[:, -1].sum().backward()


def test_no_other_hook_of_torch_is_taken_for_one() -> None:
    """This one hands gradients to a user's function, which would lack the loss's part."""
    logits, _ = _pair("whole")
    with pytest.raises(RuntimeError, match="the gradient of deferred logits as a whole is not known"):
        torch.autograd.graph.register_multi_grad_hook([logits], lambda grads: None)


# What versions do not tell


def test_snapshots() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6).bfloat16())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        views = [weight, weight.detach().t(), weight.detach()[:, ::2]]
        known = [snapshot(x, is_exposed=True) for x in views]
        assert all(s.is_of(x) for s, x in zip(known, views, strict=True))
        preserving: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
        with preserving(weight), torch.no_grad():
            weight[1, 2] += 1  # what FSDP does when it gathers
        assert not any(s.is_of(x) for s, x in zip(known, views, strict=True))
        assert snapshot(weight, is_exposed=False).bits is None
    finally:
        dist.destroy_process_group()
    known = [snapshot(weight, is_exposed=True)]
    weight.data.neg_()
    assert not known[0].is_of(weight)
    assert not is_freed(weight) and not is_freed(torch.empty(0)) and not is_freed(3)
    weight.untyped_storage().resize_(0)
    assert is_freed(weight)
