"""Gradients of embeddings, some columns at a time."""

from __future__ import annotations

import pytest
import torch

from mst_fx.ops import embedding

_ROWS, _VOCABULARY, _WIDTH = 5000, 700, 200


@pytest.mark.parametrize("padding", [-1, 3])
def test_gradient_of_some_columns_at_a_time_is_the_whole_one(padding: int) -> None:
    torch.manual_seed(0)
    tangent = torch.randn(2, _ROWS // 2, _WIDTH).to(torch.bfloat16)
    indices = torch.randint(0, _VOCABULARY, (2, _ROWS // 2))
    truth = torch.nn.functional.embedding(indices, torch.eye(_VOCABULARY, dtype=torch.float64))
    truth = truth.flatten(0, 1).T @ tangent.flatten(0, 1).double()
    if padding >= 0:
        truth[padding] = 0
    whole = embedding.gradient(tangent, indices, _VOCABULARY, padding, _WIDTH)
    for columns in (64, 72, _WIDTH):
        found = embedding.gradient(tangent, indices, _VOCABULARY, padding, columns)
        assert found.is_contiguous() and torch.equal(found, whole)
    assert float((whole.double() - truth).norm() / truth.norm()) < 2e-2


@pytest.mark.parametrize("rows", [1000, 8192, 32768, 131072, 2**20])
@pytest.mark.parametrize(("vocabulary", "width"), [(128256, 4096), (32000, 2048), (151936, 896)])
def test_columns_are_as_many_as_scratch_allows(rows: int, vocabulary: int, width: int) -> None:
    columns = embedding.columns_at_once(rows, vocabulary, width, torch.bfloat16)
    taken = embedding.scratch_bytes(rows, vocabulary, width, torch.bfloat16)
    assert 0 < columns <= width and (columns == width or columns % 64 == 0)
    assert taken <= embedding._SCRATCH or columns == 64
    # All at once if that takes little; else not many times fewer than could be.
    all_at_once = embedding._bytes_of_sums(rows, vocabulary, width)
    assert (columns == width) == (all_at_once <= embedding._SCRATCH)
    assert columns == width or taken > embedding._SCRATCH / 2
