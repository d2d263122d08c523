"""All ranks start the same collectives in the same order, however many rows each has. Three processes with gloo.

NCCL runs them in the order in which they are started: ranks that differ wait for each other, or take one gradient for another. What ranks have
differs by a row a sequence; here it decides whether there is a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.backends import debugging

from mst_fx.plan.joint_graph import is_under_way
from mst_fx.torch_api import inductor
from tests import apart
from tests.helpers import SMALL_CHUNKS, ToyLM, loss_of, relative_error, token_batch, worst_error
from tests.models import ACCEPTED, inputs_of

_RANKS = 3


class Toy(nn.Module):
    """Of its 4 heads the ranks have 2, 1 and 1; with ``mlp_first`` each layer's MLP is called before attention: as a loop it makes its gradients in
    front of that one's exchanges, otherwise behind them."""

    def __init__(self, order: str = "pre", mlp_first: bool = False) -> None:
        super().__init__()
        self.lm, self.mlp_first = ToyLM(order), mlp_first
        for block in self.lm.blocks:
            block.attention.heads = 4  # type: ignore[union-attr, assignment]

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        if not self.mlp_first:
            return self.lm(ids, labels)
        x = self.lm.embed(ids)
        for block in self.lm.blocks:
            widened = block.mlp(block.norm2(x))  # type: ignore[operator, union-attr]
            x = x + block.attention(block.norm1(x)) + widened  # type: ignore[operator, union-attr]
        return nn.functional.cross_entropy(self.lm.head(self.lm.norm(x)).flatten(0, 1), labels.flatten())


def _llama() -> nn.Module:
    """Checkpointed; of 2 heads of keys one goes to two ranks."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "use_cache": False}
    model: Any = ACCEPTED["llama"].build(**sizes).double()
    model.gradient_checkpointing_enable()
    return model  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and its chunks: of one sequence of 61 tokens the ranks have 21, 20 and 20 rows, of two twice as many.

    Attributes:
        is_gathered: the embedding's gradient is made of all ranks' rows.
    """

    name: str
    build: Callable[[], nn.Module]
    chunk_rows: int
    sequences: int = 1
    tokens: int = 61
    is_gathered: bool = False
    vocab_chunk_rows: int = 8
    is_averaged: bool = True
    bar: float = 1e-12

    def __str__(self) -> str:
        return self.name

    @property
    def has_all_loops(self) -> bool:
        return self.name.endswith("loops")

    def batch(self) -> dict[str, Tensor]:
        if self.build is _llama:
            return inputs_of(ACCEPTED["llama"], self.sequences, self.tokens)
        return token_batch(self.sequences, self.tokens)


def _bfloat16() -> nn.Module:
    """Of 96 words."""
    return Toy().bfloat16()


def _tied() -> nn.Module:
    toy = _bfloat16()
    toy.lm.head.weight = toy.lm.embed.weight  # type: ignore[union-attr]
    return toy


_mlp_first = functools.partial(Toy, mlp_first=True)
_CASES = (
    Case("loops", Toy, 8),
    Case("loops on one rank", Toy, 20),
    # Two ranks could make the sum of the loss again in the backward pass, where nobody wants it, and one could not.
    Case("a loss that is a loop on one rank", _mlp_first, 8, vocab_chunk_rows=20, is_averaged=False),
    Case("two sequences", functools.partial(Toy, "post"), 40, sequences=2),
    Case("MLPs first", _mlp_first, 20),
    Case("llama", _llama, 20, bar=1e-6),
    Case("llama with loops", _llama, 8, bar=1e-6),
    Case("16 bits with loops", _bfloat16, 8, tokens=93, is_gathered=True),
    Case("16 bits, two sequences with loops", _bfloat16, 8, sequences=2, tokens=48, is_gathered=True),
    Case("16 bits, uneven shares with loops", _bfloat16, 8),
    Case("16 bits, more tokens than words with loops", _bfloat16, 8, tokens=99),
    Case("16 bits, the head's weight with loops", _tied, 8, tokens=93),
)
_RUN = (_CASES[2], _CASES[4], _CASES[6])
_IN_16_BITS = _CASES[7:]


def _seeded(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build().train()


def _calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Each collective that a graph starts: operator and group, what goes to each rank and comes from it, or shape, which result it is, and how many
    products come behind it."""
    (results,) = graph.output_node().args
    assert isinstance(results, (list, tuple))
    found: list[tuple[Any, ...]] = []
    products = [node for node in graph.nodes if node.target is torch.ops.aten.mm.default]
    for node in graph.nodes:
        if products and node is products[0]:
            products.pop(0)
        if is_under_way(node):
            name, *_ = str(node.target.overloadpacket).split(".")[1:]
            x = node.args[0].meta["val"]
            if name == "all_to_all_single":
                found.append((name, node.args[3], str(x.dtype), list(node.args[1]), list(node.args[2])))
                continue
            means = {node, *node.users}
            means |= {
                user
                for each in node.users
                for user in each.users
                if user.target is torch.ops.aten.div.Tensor and user.args[1] == _RANKS
            }
            which = [at for at, result in enumerate(results) if result in means]
            found.append((name, node.args[-1], str(x.dtype), tuple(x.shape), which, len(products)))
    return found


def _compiled(case: Case) -> nn.Module:
    torch._dynamo.reset()
    model = _seeded(case)
    options: Any = {**SMALL_CHUNKS, "chunk_rows": case.chunk_rows, "vocab_chunk_rows": case.vocab_chunk_rows}
    options |= {"inner": "aot_eager", "sequence_parallel": dist.new_group()}
    model.compile(backend="mst", options={**options, "average_gradients": case.is_averaged})
    return model


class Stop(Exception):
    """In the place of a step."""


def _started(case: Case) -> list[list[tuple[Any, ...]]]:
    """The collectives of the forward and of the backward graph; neither is run, or ranks that differ would wait."""
    graphs: list[list[tuple[Any, ...]]] = []
    as_traced: Any = debugging.boxed_nop

    def recorded(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        graphs.append(_calls(gm.graph))
        run = as_traced(gm, *args, **kwargs)

        def stop(_: Any) -> Any:
            raise Stop

        stop._boxed_call = run._boxed_call  # type: ignore[attr-defined]
        return stop

    at_once = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with at_once, pytest.MonkeyPatch.context() as patch:
        patch.setattr(debugging, "boxed_nop", recorded)
        patch.setattr(inductor, "boxed_nop", recorded)
        with pytest.raises(Stop):
            _compiled(case)(**case.batch())
    return graphs


def _step(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    model = _compiled(case)
    loss = loss_of(model(**case.batch()))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _record(rank: int) -> dict[str, Any]:
    return {case.name: _started(case) for case in _CASES}


def _run(rank: int) -> dict[str, Any]:
    return {case.name: _step(case) for case in (*_RUN, *_IN_16_BITS)}


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return apart.results_of_ranks(_record, count=_RANKS)


@pytest.fixture(scope="module")
def run() -> list[dict[str, Any]]:
    return apart.results_of_ranks(_run, count=_RANKS, timeout=150)


def _check_same(calls: tuple[Any, ...]) -> None:
    """Of a collective on each rank that they are one."""
    assert None not in calls and len({call[:3] for call in calls}) == 1, calls
    if calls[0][0] == "all_to_all_single":
        for one, other in itertools.product(range(_RANKS), repeat=2):
            assert calls[one][4][other] == calls[other][3][one], calls
    else:
        assert len({(call[3], *call[4]) for call in calls}) == 1, calls


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_collectives_have_one_order(case: Case, recorded: list[dict[str, Any]]) -> None:
    forwards, backwards = zip(*(each[case.name] for each in recorded), strict=True)
    for calls in (*itertools.zip_longest(*forwards), *itertools.zip_longest(*backwards)):
        _check_same(calls)
    names = [call[0] for call in backwards[0]]
    averages = [at for at, call in enumerate(backwards[0]) if call[0] == "all_reduce" and call[4]]
    all_rows = [at for at, name in enumerate(names) if name == "all_gather_into_tensor"]
    assert len(all_rows) == case.is_gathered
    assert len(averages) == (len([*case.build().parameters()]) - len(all_rows) if case.is_averaged else 0)
    if case.is_averaged:  # among exchanges where all ranks have loops, behind them elsewhere
        assert ("all_to_all_single" in names[averages[0] :]) == case.has_all_loops


@pytest.mark.slow
def test_averages_start_behind_what_a_layer_makes_again(recorded: list[dict[str, Any]]) -> None:
    """Started in front of it, they would hold up its exchanges: of queries, of keys with values, and of what attention gives."""
    for _, backward in (each["llama with loops"] for each in recorded):
        names = [call[0] for call in backward if call[0] == "all_to_all_single" or call[4]]
        assert names.index("all_reduce") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loops", "16 bits with loops"])
def test_products_hide_the_last_averages(name: str, recorded: list[dict[str, Any]]) -> None:
    """Those of the first layer's MLP, norm and projection of attention, behind the last exchange."""
    for _, backward in (each[name] for each in recorded):
        last = max(at for at, call in enumerate(backward) if call[0] == "all_to_all_single")
        assert [call[0] for call in backward[last + 1 :] if call[5] > 0] == ["all_reduce"] * 6
        rest = [call[0] for call in backward[last + 7 :]]
        assert rest == (
            ["all_reduce"] * 5 if name == "loops" else ["all_gather_into_tensor"] + ["all_reduce"] * 4
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", _IN_16_BITS, ids=str)
def test_gradients_of_embeddings_in_16_bits(case: Case, run: list[dict[str, Any]]) -> None:
    """As near to those of 64 bits as one process in 16 comes, but for one rounding more."""
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        model = _seeded(case).to(dtype)
        loss_of(model(**case.batch())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    (true, plain), name = gradients, "lm.embed.weight"
    for _, found in (each[case.name] for each in run):
        assert relative_error(found[name], true[name]) <= relative_error(plain[name], true[name]) + 2**-9
        assert worst_error(found, true) <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("case", _RUN, ids=str)
def test_numbers_are_those_of_one_process(case: Case, run: list[dict[str, Any]]) -> None:
    model = _seeded(case)
    loss = loss_of(model(**case.batch()))
    loss.backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    of_ranks = [each[case.name] for each in run]
    mean = {name: sum(gradients[name] for _, gradients in of_ranks) / _RANKS for name in truth}
    for found, gradients in of_ranks:
        assert relative_error(found, loss) <= case.bar
        assert worst_error(gradients if case.is_averaged else mean, truth) <= case.bar
