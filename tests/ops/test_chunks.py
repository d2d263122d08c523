"""How loops go over rows, and what becomes of the results of chunks (:mod:`mst_fx.ops.chunks`)."""

from __future__ import annotations

import pytest
import torch

from mst_fx.masks.reach import PARTIAL, WHOLE
from mst_fx.ops.chunks import Chunk, Rows, Sum, WindowSum, by_offsets, by_reach, equal, sizes


@pytest.mark.parametrize(
    "rows, most, ends",
    [(0, 4, []), (3, 4, [3]), (4, 4, [4]), (10, 4, [4, 7, 10]), (9, 4, [3, 6, 9]), (5, 1, [1, 2, 3, 4, 5])],
)
def test_equal_chunks(rows: int, most: int, ends: list[int]) -> None:
    found = list(equal(rows, most))
    assert [chunk.end for chunk in found] == ends
    assert [chunk.start for chunk in found] == [0, *ends][: len(ends)]
    assert len(found) == -(-rows // most) and sizes(found) == {chunk.size for chunk in found}
    assert max(sizes(found), default=0) - min(sizes(found), default=0) <= 1


def test_chunks_by_reach() -> None:
    found = list(by_reach(10, 4, [[0, 4, PARTIAL], [2, 8, WHOLE], [10, 10, WHOLE]]))
    assert [(c.start, c.end) for c in found] == [(0, 4), (4, 8), (8, 10)]
    assert [(c.window.first, c.window.last, c.window.kind) for c in found][1] == (2, 8, WHOLE)
    assert [c.window.is_empty for c in found] == [False, False, True]
    with pytest.raises(ValueError):
        list(by_reach(10, 4, [[0, 4, PARTIAL]]))


def test_chunks_by_offsets() -> None:
    """They end where a group ends, and each row is in one of them."""
    offsets = [0, 3, 3, 12]
    found = list(by_offsets(offsets, 4))
    assert [(c.start, c.end, c.group) for c in found] == [(0, 3, 0), (3, 6, 2), (6, 9, 2), (9, 12, 2)]
    assert not list(by_offsets([0], 4)) and not list(by_offsets([0, 0], 4))


def test_rows_are_put_into_place() -> None:
    x = torch.randn(2, 5, 3)
    rows = Rows(torch.empty_like(x), rank=2)
    for chunk in equal(10, 4):
        rows.put(chunk, x.flatten(0, 1)[chunk.start : chunk.end])
    assert torch.equal(rows.result(), x)
    inner = Rows(torch.full((1, 2, 6, 3), 7.0).transpose(1, 2), dim=1)  # queries of [B, S, H, D], say
    inner.put(Chunk(0, 4), torch.ones(1, 4, 2, 3))
    inner.put_nothing(Chunk(4, 6))
    assert inner.result().sum() == 24 and not inner.result()[:, 4:].any()


def test_sums() -> None:
    """The first chunk is written over garbage; float32 inside, rounded once."""
    left, right = torch.randn(3, 4, 5).bfloat16(), torch.randn(3, 5, 6).bfloat16()
    total = Sum(torch.full((4, 6), float("nan")), torch.bfloat16)
    total.add_product(left[0], right[0])
    total.add_product(left[1], right[1])
    total.add(left[2].float() @ right[2].float())
    wanted = torch.einsum("cij,cjk->ik", left.float(), right.float())
    torch.testing.assert_close(total.result().float(), wanted.bfloat16().float(), rtol=2**-8, atol=1e-6)
    first = Sum(torch.full((2,), float("nan")), torch.float32)
    first.add(torch.ones(2))
    first.add(torch.ones(2))
    assert first.result().tolist() == [2.0, 2.0]
    nothing = Sum(torch.full((2,), float("nan")), torch.float32)
    assert nothing.result().tolist() == [0.0, 0.0]


def test_sums_over_windows() -> None:
    total = WindowSum(torch.full((2, 6), float("nan"), dtype=torch.float64), torch.float32, dim=1)
    for chunk in by_reach(4, 2, [[0, 4, PARTIAL], [3, 6, PARTIAL]]):
        total.add(chunk, torch.ones(2, chunk.window.last - chunk.window.first, dtype=torch.float64))
    assert total.result().tolist() == [[1, 1, 1, 2, 1, 1]] * 2 and total.result().dtype == torch.float32
