"""What an optimizer has of its states on the device, and how long it steps, against one that is parked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import mst_fx
from mst_fx.fit.forecast import state_bytes
from mst_fx.fit.parked import Stepping, stepping
from mst_fx.plan.costs import Device
from tools.meters.cpu import measure_cpu

_SIZES = (40, 2, 3, 2, 9, 2, 2, 4, 20, 8)
_BUCKET = 10 * 8 * 1024


def _parameters() -> list[Tensor]:
    return [torch.nn.Parameter(torch.zeros(1024 * size, dtype=torch.float32)) for size in _SIZES]


def _foretold(parameters: Sequence[Tensor], host: int, size: int | None = _BUCKET) -> Stepping:
    return stepping(parameters, [state_bytes(p, "adamw") for p in parameters], host, size)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.4, 0.0])
def test_states_are_where_a_parked_optimizer_has_them(share: float) -> None:
    """Between steps, and at the highest moment of one, by the meter of torch's allocator, which does not see the arena."""
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters, fused=True)
    every = sum(state_bytes(p, "adamw") for p in parameters)
    host = max(int(share * every), 8)
    parking = mst_fx.park(optimizer, host_memory=host, bucket=_BUCKET)
    foretold = _foretold(parameters, host)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with measure_cpu() as measured:
            optimizer.step()
    assert parking.bytes == foretold.host
    parking.remove()
    assert foretold.resident + foretold.host == every
    on_device = foretold.peak - foretold.resident
    assert measured.peak_bytes == pytest.approx(on_device, abs=4 * len(parameters))  # steps are counted, too


def test_seconds_of_copies_and_updates() -> None:
    parameters = [torch.zeros(1000) for _ in range(20)]
    device = Device(1.0, 1.0, bandwidth=1e6, link=1e6)
    update, copies = 20 * 7 * 4000 / 1e6, 20 * 2 * 4000 / 1e6
    assert _foretold(parameters, 0).seconds(device) == pytest.approx(update), "nothing is copied"
    bucket = 2 * 4000 / 1e6
    in_buckets = _foretold(parameters, 10**9, 8000).seconds(device)
    assert in_buckets == pytest.approx(update + 2 * bucket), "copies are hidden but for the first and last"
    slow = Device(1.0, 1.0, bandwidth=1e9, link=1e6)
    assert _foretold(parameters, 10**9, 8000).seconds(slow) == pytest.approx(copies + bucket, rel=0.01)
    whole = _foretold(parameters, 10**9, None)
    assert len(whole.buckets) == 1 and whole.peak == 20 * 8000
    assert whole.seconds(slow) == pytest.approx(2 * copies, rel=0.01), "there, and then back"
