"""On a CUDA device: budgets hold by the allocator's count, and a plan has the bits of the step without one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from mst_fx.listeners import on_plan
from mst_fx.options import bytes_in
from mst_fx.report import MemoryPlan
from tests.helpers import compile_mst
from tools.bench.models import Shape, make_llama, text_tokens

pytestmark = pytest.mark.gpu

_SHAPE = Shape(hidden=1024, intermediate=4096, heads=8, kv_heads=4, vocabulary=8192, layers=6)
_LENGTH = 16384


def test_budgets_hold_and_more_is_never_slower() -> None:
    model = make_llama(_SHAPE, _LENGTH, "cuda", torch.bfloat16, checkpoint=False)
    ids = text_tokens(_LENGTH, _SHAPE.vocabulary).view(1, _LENGTH).cuda()

    def run(memory: Any) -> tuple[float, int, MemoryPlan | None]:
        plans: list[Any] = []
        model.zero_grad(set_to_none=True)
        compiled = compile_mst(model, {"memory": memory})
        with on_plan.listening(plans.append):
            compiled(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), torch.cuda.max_memory_allocated(), plans[0] if plans else None

    loss, free_peak, _ = run(None)
    truth = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(Exception, match="BudgetError") as error:
        run(1)
    missing = re.search(r"needs ([\d.]+ [MG]iB) more", str(error.value))
    assert missing is not None
    least = int(1.03 * (bytes_in(missing[1]) or 0))
    budgets = [least, (2 * least + free_peak) // 3, (least + 2 * free_peak) // 3, "auto"]
    made, peaks = [], []
    for budget in budgets:
        found, peak, plan = run(budget)
        assert plan is not None and (found == loss or "un-chunked" in str(plan))
        assert abs(found - loss) <= 1e-3 * loss
        assert peak <= plan.budget
        assert abs(peak - plan.peak) <= 0.05 * plan.peak
        for parameter, gradient in zip(model.parameters(), truth, strict=True):
            # Inductor fuses sums otherwise: not to the bit.
            error_of = (parameter.grad.float() - gradient.float()).norm() / gradient.float().norm()
            assert float(error_of) < 1e-2
        made.append(sum(each.layers * each.seconds for each in plan.layers))
        peaks.append(peak)
    assert made == sorted(made, reverse=True) and made[-1] < 0.5 * made[0]
    assert peaks[0] < 0.8 * peaks[-1]
