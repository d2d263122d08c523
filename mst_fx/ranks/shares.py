"""Who has what: shares of rows, and of heads, that differ by one at most."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence


def shares_of(count: int, ranks: int) -> list[int]:
    """⌈count/ranks⌉ for the first ranks, ⌊count/ranks⌋ for the others."""
    base, more = divmod(count, ranks)
    return [base + (rank < more) for rank in range(ranks)]


def firsts_of(shares: Sequence[int]) -> list[int]:
    """Where each share begins."""
    return [sum(shares[:rank]) for rank in range(len(shares))]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of one attention over the ranks: each rank's are neighbours.

    A head of keys and values goes to each rank of which a query head reads it: to several, where ranks outnumber those heads
    or a share straddles two groups of query heads.

    Attributes:
        queries, keys: how many heads of queries, and of keys and values.
        ranks: of the group; each has at least one head of queries.
    """

    queries: int
    keys: int
    ranks: int

    @functools.cached_property
    def shares(self) -> list[int]:
        """Heads of queries of each rank."""
        return shares_of(self.queries, self.ranks)

    @functools.cached_property
    def _reads(self) -> list[list[int]]:
        """For each rank the head of keys that each of its query heads reads."""
        firsts = firsts_of(self.shares)
        group = self.queries // self.keys
        return [
            [head // group for head in range(first, first + share)]
            for first, share in zip(firsts, self.shares, strict=True)
        ]

    @property
    def key_firsts(self) -> list[int]:
        """For each rank the first head of keys that it needs."""
        return [reads[0] for reads in self._reads]

    @property
    def key_shares(self) -> list[int]:
        """For each rank how many heads of keys it needs."""
        return [reads[-1] - reads[0] + 1 for reads in self._reads]

    def repeats(self, rank: int) -> list[int]:
        """How often each head of keys of a rank is repeated, so that attention groups them evenly; none, if it does already
        on *all* ranks: graphs of the same nodes for all."""
        counts = [[reads.count(head) for head in sorted(set(reads))] for reads in self._reads]
        return [] if all(len(set(each)) == 1 for each in counts) else counts[rank]
