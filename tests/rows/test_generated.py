# mypy: disable-error-code="operator,index,has-type,no-any-return,attr-defined,arg-type"
"""Generated row-wise bodies, half of them with something that mixes tokens: right or refused, never wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import mst_fx
from mst_fx.graph.names import target_name
from tests.direct import results, worst

WIDTH, INNER = 6, 24
_BAR = 1e-8
_OPTIONS = {"inner": "eager", "chunk_rows": 5}
Step = Callable[["Body", Tensor], Tensor]

# Each takes and gives [B, S, INNER] and looks at one row only.
ROWWISE: dict[str, Step] = {
    "gelu": lambda m, x: F.gelu(x),
    "silu_method": lambda m, x: x * x.sigmoid(),
    "shifted": lambda m, x: 0.5 * x + 1.0,
    "square": lambda m, x: x.tanh() ** 2,
    "buffer": lambda m, x: x * m.scale,
    "linear": lambda m, x: m.inner(x),
    "matmul": lambda m, x: x @ m.square,
    "matmul_transposed": lambda m, x: torch.matmul(x, m.square.t()),
    "flat_addmm": lambda m, x: torch.addmm(m.scale, x.reshape(-1, INNER), m.square).view(m.shape),
    "layer_norm": lambda m, x: F.layer_norm(x, (INNER,), m.scale),
    "rms_norm": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "softmax": lambda m, x: x.softmax(-1),
    "head_softmax": lambda m, x: x.view(*m.shape[:2], 4, 6).softmax(-1).flatten(2),
    "head_transposed": lambda m, x: x.view(*m.shape[:2], 4, 6).transpose(2, 3).reshape(m.shape),
    "flattened": lambda m, x: x.flatten(0, 1).sin().view(m.shape),
    "rotate": lambda m, x: torch.cat([-x[..., INNER // 2 :], x[..., : INNER // 2]], -1),
    "chunks": lambda m, x: torch.cat([(parts := x.chunk(2, -1))[0] * parts[1], parts[1]], -1),
    "stacked": lambda m, x: torch.stack([x[..., ::2], x[..., 1::2].relu()], -1).flatten(-2),
    "cumsum": lambda m, x: x.cumsum(-1) / INNER,
    "flip": lambda m, x: x.flip(-1),
    "roll": lambda m, x: x.roll(3, -1),
    "sort": lambda m, x: x.sort(-1).values,
    "centred": lambda m, x: x - x.mean(-1, keepdim=True),
    "where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "narrow_wide": lambda m, x: F.linear(F.linear(x, m.narrow), m.narrow.t()),
    "padded": lambda m, x: F.pad(x[..., 1:], (0, 1)),
}

# Each looks at other rows, or at where the row is.
MIXING: dict[str, Step] = {
    "cumsum": lambda m, x: x.cumsum(1) / m.shape[1],
    "softmax": lambda m, x: x.softmax(1),
    "flip": lambda m, x: x.flip(1),
    "flip_batch": lambda m, x: x.flip(0),
    "roll": lambda m, x: x.roll(1, 1),
    "roll_all": lambda m, x: torch.roll(x, 1),
    "mean": lambda m, x: x - x.mean(1, keepdim=True),
    "mean_all": lambda m, x: x - x.mean(),
    "max": lambda m, x: x - x.amax(1, keepdim=True),
    "convolution": lambda m, x: F.conv1d(x.transpose(1, 2), m.kernel, padding=1).transpose(1, 2),
    "shift": lambda m, x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "shift_cat": lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "sort": lambda m, x: x.sort(1).values,
    "gram": lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "swap": lambda m, x: x.transpose(0, 1).reshape(m.shape),
    "features_to_rows": lambda m, x: x.transpose(1, 2).reshape(m.shape),
    "merge_rows": lambda m, x: (
        x.reshape(m.shape[0], -1, 2 * INNER if m.shape[1] % 2 == 0 else INNER // 2)
        .softmax(-1)
        .reshape(m.shape)
    ),
    "first_row": lambda m, x: x + x[:, :1],
    "last_row": lambda m, x: x * x[:, -1].unsqueeze(1),
    "positions": lambda m, x: x * m.positions,
    "positions_of_all": lambda m, x: x * m.all_positions,
    "sequences": lambda m, x: x + m.sequences,
    "index": lambda m, x: x[:, m.order],
    "global_norm": lambda m, x: x / x.norm(),
    "batch_statistics": lambda m, x: (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-3).sqrt(),
    "every_other": lambda m, x: (
        x.reshape(-1, INNER).view(m.shape[1], m.shape[0], INNER).cumsum(0).view(m.shape)
    ),
}
# The function that mixes in some of these steps: no loop may take it, whatever is a bulge before and behind.
_NEVER_IN_A_LOOP = {
    "cumsum": "cumsum",
    "softmax": "softmax",
    "flip": "flip",
    "roll": "roll",
    "mean": "mean",
    "mean_all": "mean",
    "max": "amax",
    "convolution": "conv1d",
    "sort": "sort",
    "gram": "matmul",
}


class Body(nn.Module):
    """x + down(steps(up(x))): the steps run on [B, S, INNER]."""

    def __init__(self, shape: tuple[int, int], before: list[str], mixing: str, after: list[str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def random(*sizes: int) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(*sizes, generator=generator, dtype=torch.float64) / sizes[-1] ** 0.5
            )

        self.shape = (*shape, INNER)
        self.mixing_nodes: list[fx.Node] = []  # of the last trace
        self.steps: list[Step] = [ROWWISE[name] for name in before]
        self.steps += [MIXING[mixing]] if mixing else []
        self.steps += [ROWWISE[name] for name in after]
        self.up, self.down, self.square = random(INNER, WIDTH), random(WIDTH, INNER), random(INNER, INNER)
        self.narrow, self.scale, self.kernel = random(3, INNER), random(INNER), random(INNER, INNER, 3)
        self.inner = nn.Linear(INNER, INNER).double()
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.copy_(random(*parameter.shape))
        buffers = {
            "positions": torch.linspace(0, 1, shape[1], dtype=torch.float64)[None, :, None],
            "all_positions": torch.linspace(0, 1, shape[0] * shape[1], dtype=torch.float64).view(*shape, 1),
            "sequences": torch.linspace(0, 1, shape[0], dtype=torch.float64)[:, None, None],
            "order": torch.randperm(shape[1], generator=generator),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.linear(x, self.up)
        for step in self.steps:
            known: set[fx.Node] = set(wide.tracer.graph.nodes) if isinstance(wide, fx.Proxy) else set()
            wide = step(self, wide)
            if isinstance(wide, fx.Proxy) and step in MIXING.values():
                self.mixing_nodes = [node for node in wide.tracer.graph.nodes if node not in known]
        return x + F.linear(wide, self.down)


class Example:
    """A body and its input, compared with eager; whether it was rewritten."""

    def __init__(self, shape: tuple[int, int], before: list[str], mixing: str, after: list[str]) -> None:
        self.mixing = mixing if shape[1] > 1 else ""
        body = Body(shape, before, mixing, after)
        generator = torch.Generator().manual_seed(11)
        x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        gm = fx.symbolic_trace(body)
        new, report = mst_fx.rewrite(gm, [x], _OPTIONS)
        self.fired = bool(report.rewrites)
        assert (new is gm) == (not self.fired)
        if self.fired:  # otherwise it is the graph that was given
            assert worst(results(new, [x], new), results(gm, [x], gm)) <= _BAR
        mixer = _NEVER_IN_A_LOOP.get(mixing, "") if shape[1] > 1 else ""
        names = {node.name for node in body.mixing_nodes if mixer == target_name(node)}
        assert len(names) == (2 if mixer == "matmul" else bool(mixer)), "the mixing node was not found"
        assert names <= {node.name for node in new.graph.nodes}, "a loop took a node that mixes"


SHAPES = [(1, 12), (2, 7), (3, 6), (6, 6), (1, 24), (24, 1), (4, 24)]
_chain = st.lists(st.sampled_from(sorted(ROWWISE)), min_size=0, max_size=3)


# How many examples: of the profile, as in pytest --hypothesis-profile=long (1,000; longest: 10,000).
_settings = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # bodies are short: shrinking them takes minutes for nothing
)


def test_generated_bodies() -> None:
    """Two of five fire at least: a suite in which everything is refused would pass otherwise."""
    fired: list[bool] = []

    @_settings
    @given(shape=st.sampled_from(SHAPES), before=_chain, after=_chain)
    def each(shape: tuple[int, int], before: list[str], after: list[str]) -> None:
        fired.append(Example(shape, before, "", after).fired)

    each()
    assert len(fired) >= min(20, settings().max_examples) and sum(fired) >= 0.4 * len(fired)


@_settings
@given(
    shape=st.sampled_from(SHAPES),
    before=_chain,
    mixing=st.sampled_from(sorted(MIXING)),
    after=_chain,
)
@example(shape=(6, 6), before=["padded", "sort"], mixing="flip", after=["sort", "chunks"])  # a bulge in front
def test_generated_bodies_that_mix_tokens(
    shape: tuple[int, int], before: list[str], mixing: str, after: list[str]
) -> None:
    Example(shape, before, mixing, after)
