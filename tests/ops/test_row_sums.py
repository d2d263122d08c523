"""Rows that are added up by the row that they are of."""

from __future__ import annotations

import pytest
import torch

from mst_fx.ops.row_sums import add_rows
from tests.helpers import relative_error

_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("width", [8, 1000, 2880])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("device", ["cpu", _CUDA])
def test_sums(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], width: int, is_deterministic: bool
) -> None:
    """What is there already stays; a row gets none, one or many; rows that lie crosswise in memory."""
    torch.manual_seed(0)
    narrow, wide = dtypes
    total = torch.randn(50, 2, width // 2, device=device, dtype=wide)
    rows = torch.randn(2, 300, width // 2, device=device, dtype=wide).to(narrow).transpose(0, 1)
    places = torch.randint(0, 40, (300,), device=device)
    truth = total.double().index_add_(0, places, rows.double())
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        add_rows(total, places, rows)
    finally:
        torch.use_deterministic_algorithms(before)
    assert relative_error(total, truth) <= 10 * torch.finfo(wide).eps


@pytest.mark.parametrize("device", ["cpu", _CUDA])
def test_no_rows(device: str) -> None:
    total = torch.ones(3, 4, device=device)
    add_rows(total, torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, 4, device=device))
    assert torch.equal(total, torch.ones(3, 4, device=device))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    total = torch.zeros(2**21 + 1, 1024, device="cuda")
    places = torch.tensor([2**21, 0, 2**21], device="cuda")
    rows = torch.ones(3, 1024, device="cuda", dtype=torch.bfloat16)
    add_rows(total, places, rows)
    assert total[-1].unique().tolist() == [2.0] and total[0].unique().tolist() == [1.0]
    assert not total[1:-1].any()
