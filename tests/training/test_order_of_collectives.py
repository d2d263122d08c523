"""All ranks start the same collectives in the same order, however many rows each has. Three processes with gloo.

NCCL runs them in the order in which they are started: ranks that differ wait for each other, or take one gradient for another. What ranks have
differs by a row a sequence; here it decides whether there is a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from datetime import timedelta
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


class Parallel(nn.Module):
    """Layers whose MLP is called before attention, in front of whose exchanges its gradients are made only if it is a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = ToyLM(order="parallel")

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.lm.embed(ids)
        for block in self.lm.blocks:
            widened = block.mlp(block.norm2(x))  # type: ignore[operator]
            x = x + block.attention(block.norm1(x)) + widened  # type: ignore[operator]
        return nn.functional.cross_entropy(self.lm.head(self.lm.norm(x)).flatten(0, 1), labels.flatten())


def _llama(**config: Any) -> nn.Module:
    """Of 4 heads the ranks have 2, 1 and 1; of 2 of keys one goes to two ranks."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "use_cache": False}
    model: Any = ACCEPTED["llama"].build(**{**sizes, **config}).double()
    return model  # type: ignore[no-any-return]


def _checkpointed() -> nn.Module:
    model: Any = _llama()
    model.gradient_checkpointing_enable()
    return model  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Case:
    """
    Attributes:
        chunk_rows: in "at the edge" the ranks have chunk_rows + 1, chunk_rows and chunk_rows rows.
    """

    name: str
    build: Callable[[], nn.Module]
    chunk_rows: int
    batch: Callable[[], dict[str, Tensor]] = functools.partial(token_batch, 1, 61)
    is_averaged: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    bar: float = 1e-12

    def __str__(self) -> str:
        return self.name


_tokens = functools.partial(inputs_of, ACCEPTED["llama"], 1, 61)
_CASES = (
    Case("loops", ToyLM, 8),
    Case("at the edge", ToyLM, 20),
    Case("at the edge, alone", ToyLM, 20, is_averaged=False),
    # (The sum of the loss is one that a backward pass could make again; of three ranks two would.)
    Case("loss at the edge", ToyLM, 8, is_averaged=False, options={"vocab_chunk_rows": 20}),
    Case("two sequences at the edge", lambda: ToyLM(order="post"), 40, functools.partial(token_batch, 2, 61)),
    Case("parallel", Parallel, 8),
    Case("parallel at the edge", Parallel, 20),
    Case("llama at the edge", _llama, 20, _tokens, bar=1e-6),
    Case("checkpointed at the edge", _checkpointed, 20, _tokens, bar=1e-6),
)


def _seeded(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build().train()


def _calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Each collective that a graph starts: operator and group, what goes to each rank and comes from it, or shape and which result it is."""
    (results,) = graph.output_node().args
    found: list[tuple[Any, ...]] = []
    for node in graph.nodes:
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
            found.append((name, node.args[-1], str(x.dtype), tuple(x.shape), which))
    return found


def _one(case: Case) -> dict[str, Any]:
    """The collectives of each compiled graph, and a step, or how it failed."""
    graphs: list[list[tuple[Any, ...]]] = []
    run_as_traced: Any = debugging.boxed_nop

    def recorded(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        graphs.append(_calls(gm.graph))
        return run_as_traced(gm, *args, **kwargs)

    torch._dynamo.reset()
    model = _seeded(case)
    group = dist.new_group(timeout=timedelta(seconds=15))
    options: Any = {
        **SMALL_CHUNKS,
        "chunk_rows": case.chunk_rows,
        "vocab_chunk_rows": case.chunk_rows,
        **case.options,
    }
    options |= {"inner": "aot_eager", "sequence_parallel": group, "average_gradients": case.is_averaged}
    model.compile(backend="mst", options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(debugging, "boxed_nop", recorded)
        patch.setattr(inductor, "boxed_nop", recorded)
        try:
            loss = loss_of(model(**case.batch()))
            loss.backward()
        except Exception as error:
            return {"graphs": graphs, "error": f"{type(error).__name__}: {error}"}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"graphs": graphs, "error": "", "loss": loss.detach(), "gradients": gradients}


def _rank(rank: int) -> dict[str, Any]:
    return {case.name: _one(case) for case in _CASES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return apart.results_of_ranks(_rank, count=_RANKS)


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
def test_collectives_have_one_order(case: Case, ranks: list[dict[str, Any]]) -> None:
    found = [each[case.name] for each in ranks]
    assert len({len(each["graphs"]) for each in found}) == 1
    for of_ranks in zip(*(each["graphs"] for each in found), strict=True):
        for calls in itertools.zip_longest(*of_ranks):
            _check_same(calls)
    forward, backward = found[0]["graphs"]
    names = [call[0] for call in (*forward, *backward)]
    assert names.count("all_reduce") >= 2  # the loss, and its gradient
    assert not any(each["error"] for each in found), found


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_numbers_are_those_of_one_process(case: Case, ranks: list[dict[str, Any]]) -> None:
    model = _seeded(case)
    loss = loss_of(model(**case.batch()))
    loss.backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = [each[case.name] for each in ranks]
    mean = {name: sum(each["gradients"][name] for each in found) / _RANKS for name in truth}
    for each in found:
        assert relative_error(each["loss"], loss) <= case.bar
        assert worst_error(each["gradients"] if case.is_averaged else mean, truth) <= case.bar
