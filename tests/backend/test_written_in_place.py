"""Results in the place of operands that one kernel alone reads: less memory and the same bits, and where they must not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor

from mst_fx.torch_api import written_in_place as in_place
from tests.helpers import GatedMLP, compile_mst
from tools.meters.cpu import measure_cpu

_ROWS, _IN, _WIDTH = 96, 8, 512
_WIDE = _ROWS * _WIDTH * 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that was compiled before, and buffers that go when they are dead, as mst-fx has them."""
    torch.compiler.reset()
    with inductor_config.patch(force_disable_caches=True, allow_buffer_reuse=False):
        yield


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is written over what, of all kernels that are compiled."""
    found: list[tuple[str, str]] = []
    of_kernel = in_place._pairs

    def noted(kernel: Any) -> list[tuple[str, str]]:
        some = of_kernel(kernel)
        found.extend(some)
        return some

    monkeypatch.setattr(in_place, "_pairs", noted)
    return found


def _given(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(size) / 4).to(dtype) for size in ((_ROWS, _IN), *[(_IN, _WIDTH)] * 3, (_WIDTH, _IN))]


def _run(function: Callable[..., Any], *given: Tensor, dynamic: bool = False) -> tuple[list[Tensor], int]:
    """Results, and the peak of a step that compiles nothing."""
    compiled = torch.compile(function, dynamic=dynamic)
    compiled(*given)
    with measure_cpu() as measured:
        found = compiled(*given)
    return list(found), measured.peak_bytes


def _compare(function: Callable[..., Any], *, dynamic: bool = False) -> tuple[int, int]:
    """The peaks without and with it: the bits are the same, and those of float64 but for rounding."""
    plain, before = _run(function, *_given(), dynamic=dynamic)
    torch.compiler.reset()
    with in_place.written_in_place():
        found, after = _run(function, *_given(), dynamic=dynamic)
    for x, y, truth in zip(found, plain, function(*_given(torch.float64)), strict=True):
        assert torch.equal(x, y)
        assert float((x.double() - truth).norm() / truth.norm()) < 1e-5
    return before, after


def _gated_gradient(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """What a gated MLP's backward pass makes of three wide values."""
    gate, up, tangent = x @ a, x @ b, x @ c
    share = torch.sigmoid(gate)
    product = gate * share * up
    of_up = tangent * gate * share
    of_gate = tangent * up * (share + gate * share * (1 - share))
    return product @ down, of_up @ down, of_gate @ down


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "changing sizes"])
def test_a_gated_mlp_holds_three_wide_values_in_the_place_of_six(
    dynamic: bool, pairs: list[tuple[str, str]]
) -> None:
    before, after = _compare(_gated_gradient, dynamic=dynamic)
    assert len(pairs) == len(dict(pairs)) == len({operand for _, operand in pairs}) == 3
    assert 6 * _WIDE <= before < 6.5 * _WIDE and 3 * _WIDE <= after < 3.5 * _WIDE


def _read_again(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    one, other = x @ a, x @ b
    return (one * other) @ down, (one + other) @ down, one @ down, other @ down


def _read_twice(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    one = x @ a
    return (one * one.flip(0)) @ down, (one * 2).sin() @ down


def _read_backwards(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    back = (x @ a).flip(0)
    return back.cos() @ down, back.sin() @ down


def _given_from_outside(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    return (a * b).sin(), (a + b).cos()


def _summed(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    one, other = x @ a, x @ b
    return (one / one.square().sum(-1, keepdim=True)) @ down, (one * other) @ down


def _under_a_mask(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    one, other = x @ a, x @ b
    return (F.pad(one[3:], (0, 0, 0, 3)) * other) @ down, (one + other) @ down


def _of_another_type(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    one, other = x @ a, x @ b
    return (one > other), (one < -other)


_NOT = [
    _read_again,
    _read_twice,
    _read_backwards,
    _given_from_outside,
    _summed,
    _under_a_mask,
    _of_another_type,
]


@pytest.mark.parametrize("function", _NOT, ids=lambda function: function.__name__.strip("_"))
def test_what_others_read_is_left_alone(
    function: Callable[..., tuple[Tensor, ...]], pairs: list[tuple[str, str]]
) -> None:
    plain = function(*_given())
    with in_place.written_in_place():
        given = _given()
        found, _ = _run(function, *given)
    assert not pairs
    assert all(torch.equal(x, y) for x, y in zip(given, _given(), strict=True))
    for x, y in zip(found, plain, strict=True):
        torch.testing.assert_close(x, y)


def test_a_result_is_made_of_what_it_is_written_over(pairs: list[tuple[str, str]]) -> None:
    """Only another result is made of the third and the fourth product, which nobody else reads."""

    def apart(x: Tensor, a: Tensor, b: Tensor, c: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        one, third, fourth = x @ a, x @ b, x @ c
        return (one * 2) @ down, (one + third * fourth) @ down, one @ down

    _compare(apart)
    assert len(pairs) == 1


def test_mst_fx_compiles_its_bodies_and_graphs_so(pairs: list[tuple[str, str]]) -> None:
    model, x = GatedMLP(_IN, _WIDTH), torch.randn(1, _ROWS, _IN, requires_grad=True)
    compile_mst(model, {"chunk_rows": 32})(x).sum().backward()
    assert len(pairs) >= 3
