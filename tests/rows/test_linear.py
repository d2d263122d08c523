"""What is said to be linear in the gradient is, by numbers; and what is not said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mst_fx.rows import linear
from mst_fx.rows.labels import tensors
from mst_fx.torch_api.modes import TorchDispatchMode

aten = torch.ops.aten
_X, _W = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

_LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "views": lambda g: g.view(2, 2, 6).permute(1, 0, 2).unsqueeze(0).squeeze(0).transpose(0, 1)[:, 1:].select(0, 0).expand(3, 1, 6),
    "sums": lambda g: (g.sum(), g.sum(0), -g, g.clone(), g.float(), torch.cat([g, g]), torch.stack([g, g])),
    "parts": lambda g: (*g.split(2), *g.split([1, 3]), *g.unbind(0), g.reshape(24).detach()),
    "products": lambda g: (g * _X, _X * g, g * 3, g @ _W, _W @ g, g.t() @ _X, g[None].bmm(_W[None]), g[0].dot(_X[0]), g.mv(_W[:, 0])),
    "quotients": lambda g: (g / (1 + _X.square()), g / 3),
    "pairs": lambda g: (g + g, g - 2 * g, torch.add(g, g, alpha=2)),
    "backwards": lambda g: (
        aten.silu_backward(g, _X), aten.gelu_backward(g, _X), aten.threshold_backward(g, _X, 0.0),
        aten.sigmoid_backward(g, _X.sigmoid()), aten.tanh_backward(g, _X.tanh()),
    ),
}  # fmt: skip
_OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "a square": lambda g: g * g,
    "a product of gradients": lambda g: g @ g.t(),
    "a quotient by it": lambda g: _X / g,
    "by its norm": lambda g: g / g.norm(),
    "a number more": lambda g: g + 1,
    "another more": lambda g: g + _X,
    "clamped": lambda g: g.clamp(-1, 1),
    "its sign": lambda g: g.sign(),
    "rounded": lambda g: g.round(),
    "in the other place": lambda g: aten.silu_backward(_X, g),
    "joined with another": lambda g: torch.cat([g, _X]),
}


class _Asked(TorchDispatchMode):
    """Asks of each operator that gets something made of the gradient."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.known: list[Tensor] = [gradient]
        self.refused: list[str] = []
        self.asked: set[Any] = set()

    def _depends(self, x: Any) -> bool:
        return any(x is known for known in self.known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(self._depends, tensors((args, kwargs)))):
            self.asked.add(func)
            if not linear.is_linear(func, args, kwargs or {}, self._depends):
                self.refused.append(str(func))
            self.known += tensors(out)
        return out


def _asked(form: Callable[[Tensor], Any]) -> _Asked:
    gradient = torch.randn(4, 6, dtype=torch.float64)
    with _Asked(gradient) as mode:
        form(gradient)
    return mode


@pytest.mark.parametrize("name", _LINEAR)
def test_linear(name: str) -> None:
    form = _LINEAR[name]
    assert _asked(form).refused == []
    a, b = torch.randn(2, 4, 6, dtype=torch.float64)
    for found, of_a, of_b in zip(*(map(_each, (form(2 * a + b), form(a), form(b)))), strict=True):
        assert torch.allclose(found, 2 * of_a + of_b, rtol=1e-5, atol=1e-5)


def _each(found: Any) -> list[Tensor]:
    return tensors(found)


@pytest.mark.parametrize("name", _OTHERS)
def test_not_linear(name: str) -> None:
    assert _asked(_OTHERS[name]).refused


def test_all_of_the_table_is_tried() -> None:
    table = linear._SUMS | linear._PRODUCTS | linear._FIRST | linear._PAIRS
    tried = set().union(*(_asked(form).asked for form in _LINEAR.values()))
    assert {str(func) for func in table - tried} <= {
        "aten.reshape.default",  # composite: views are what runs
        "aten.squeeze.default",
        "aten.alias.default",
        "aten._unsafe_view.default",
        "aten.mul.Scalar",
        "aten.div.Scalar",
    }
