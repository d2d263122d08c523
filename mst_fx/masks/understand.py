"""What the mask of an attention says: a formula, its vectors, and what is known of them before the graph runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.levels import Level, all_levels
from mst_fx.graph.sizes import hint
from mst_fx.graph.values import tensor_value
from mst_fx.masks import formula, grouped, reach, sites
from mst_fx.masks.biases import NO_BIASES, NOT_HIDDEN, Biases, Splitter
from mst_fx.masks.formula import ADDS, Mask
from mst_fx.masks.given import as_given, check_given
from mst_fx.masks.reach import CAUSAL, FULL
from mst_fx.masks.read import NO_MASK, Read, read_mask, read_parts
from mst_fx.masks.sites import Site
from mst_fx.masks.words import form_name
from mst_fx.torch_api.modes import ENTER_AUTOCAST


@dataclasses.dataclass(frozen=True)
class Given:
    """What is known of a mask that another graph has made as vectors (:mod:`mst_fx.passes.mask_breaks`).

    Attributes:
        formula: as it is read in this graph.
        is_finite: see :func:`mst_fx.masks.reach.reach_of`.
        vectors: the names of its vectors' nodes, keys first.
        chunk: queries a chunk, of what follows.
        table: that of its reach, flat; () if it is not known.
        reach: the names of the nodes that are the table of its reach and its starts; () if these are known.
    """

    formula: Mask
    is_finite: bool
    vectors: tuple[str, ...]
    chunk: int
    table: tuple[int, ...]
    reach: tuple[str, ...]


# The meta key of a graph under which they are. No field of the context: this room lies below it and sees graphs only; and
# the names in them are names of this graph's nodes, so that they must go with it into each of its copies, as its meta does.
GIVEN = "mst_given_masks"


@dataclasses.dataclass(frozen=True)
class Understood:
    """A site whose mask is a formula.

    Attributes:
        mask: its mask, as it was read.
        chunk: queries a chunk.
        table: that of the mask's reach, where it is known before the graph runs.
        form: the mask in words, for the report.
        given: what the graph that made the mask says of it.
        biases: what is added to scores besides.
        vectors: these as nodes: for each key, and for each distance.
        why: what is done to the scores instead, and why the mask is no formula.
    """

    site: Site
    mask: Read
    chunk: int
    table: Tensor | None
    form: str
    given: Given | None = None
    biases: Biases = NO_BIASES
    vectors: tuple[fx.Node | None, fx.Node | None] = (None, None)
    why: str = ""

    @property
    def is_native(self) -> bool:
        """Whether torch's own kernel has the form of the mask."""
        return self.site.steps is None and _is_native(self.site, self.table) and self.biases.is_empty

    @property
    def is_biased(self) -> bool:
        """Whether it takes :mod:`mst_fx.ops.biased`: a bias, or scores hidden otherwise than by a sum."""
        return not self.is_native and (not self.biases.is_empty or self.biases.hiding != ADDS)

    @property
    def reach_key(self) -> tuple[Any, ...]:
        """What tells the reaches of two masks apart; its third part are the numbers of queries and keys, as text."""
        fake, other = tensor_value(self.site.query), tensor_value(self.site.key)
        assert fake is not None and other is not None
        sizes = (str(fake.shape[2]), str(other.shape[2]))
        return (self.mask.formula, self.mask.is_finite, sizes, self.mask.keys, self.mask.queries)


# What masks of the program's graph say, with their numbers of queries and keys.
Known = dict[tuple[fx.Node, int, int], Read]


def understand(site: Site, chunk: int, mutated: Collection[int], known: Known) -> Understood | None:
    """What a site's mask says; None: there is nothing to gain.

    Args:
        chunk: queries a chunk.
        mutated: the storages that some node of the program writes to.
        known: of the sites so far; is added to.

    Raises:
        Refusal: if the mask is not understood, or the site is of a kind that is left alone.
    """
    why = ""
    if site.steps is None:
        try:
            return _as_formula(site, chunk, mutated, known)
        except Refusal as refusal:
            given = as_given(site, mutated, _under_autocast(site))
            if given is None:
                raise
            site, why = given, f"no formula ({refusal}): "
    check_given(site, mutated)
    return Understood(site, NO_MASK, chunk, reach.native_table(FULL), "given", why=f"{why}{site.steps}")


def _as_formula(site: Site, chunk: int, mutated: Collection[int], known: Known) -> Understood | None:
    """A site whose mask and biases are formulas."""
    _check(site)
    if site.dropout or not _gains(site):
        return None
    query, key = tensor_value(site.query), tensor_value(site.key)
    assert query is not None and key is not None
    queries, keys = query.shape[2], key.shape[2]
    if site.causal:
        return Understood(site, NO_MASK, chunk, reach.native_table(CAUSAL), "causal")
    read, biases = _read(site, queries, keys, mutated, known)
    if site.behind != 1.0:
        if not biases.is_empty:
            raise Refusal(f"{site.out.name}: scores are scaled with a bias in them", Cause.SCORES)
        read = dataclasses.replace(read, fill=max(read.fill * site.behind, torch.finfo(query.dtype).min))
    given = _given(site, read, chunk)
    table = _table(site, read, (queries, keys), chunk, given)
    inside = [node for node in (*read.keys, *read.queries) if node.graph is not site.level.top.gm.graph]
    if inside and not (_is_native(site, table) and biases.is_empty):
        raise Refusal(f"{inside[0].name} of the mask is computed inside of a checkpointed layer", Cause.MASK)
    is_static = isinstance(queries, int) and isinstance(keys, int)
    form = form_name(read.formula, table, read.vectors if is_static else None, hint(queries))
    if not biases.is_empty:
        form = "bias" if form == "full" else f"bias, {form}"
    found = Understood(site, read, chunk, table, form, given, biases)
    if found.is_biased and (site.sinks is not None or site.cap is not None):  # which no biased attention has
        raise Refusal(f"{site.out.name}: scores hidden by a number in their place have sinks", Cause.SCORES)
    return found


def _read(site: Site, queries: Any, keys: Any, mutated: Collection[int], known: Known) -> tuple[Read, Biases]:
    """The mask and the biases of a site."""
    is_plain = not site.others and site.hidden == NOT_HIDDEN
    if site.mask is None and is_plain:
        return NO_MASK, NO_BIASES
    first: Refusal | None = None
    try:
        if is_plain and site.mask is not None and not _is_added_as_numbers(site):
            return _read_once(site.mask, site.level, queries, keys, mutated, known), NO_BIASES
    except Refusal as refusal:
        first = refusal
    query = tensor_value(site.query)
    assert query is not None
    splitter = Splitter(site.level, query.shape[1], queries, keys, mutated)
    try:
        splitter.split(
            [node for node in (site.mask, *site.others) if node is not None], site.hidden, not site.is_eager
        )
        biases = splitter.biases()
        if not biases.is_empty and (site.softcap or site.sinks is not None):
            raise Refusal(f"{site.out.name}: a bias beside sinks or capped scores", Cause.SCORES)
        _check_types(site, biases)
        return read_parts(splitter.masks, site.level, queries, keys, mutated), biases
    except Refusal:
        if first is not None and not _has_heads(site.mask):
            raise first from None
        raise


def _read_once(
    mask: fx.Node, level: Level, queries: Any, keys: Any, mutated: Collection[int], known: Known
) -> Read:
    """:func:`read_mask`; a mask of the program's graph is read once for all layers that are given it."""
    shared = level.resolve(mask)
    is_shared = shared.graph is level.top.gm.graph and isinstance(queries, int) and isinstance(keys, int)
    found = known.get((shared, queries, keys)) if is_shared else None
    found = found or read_mask(mask, level, queries, keys, mutated)
    return known.setdefault((shared, queries, keys), found) if is_shared else found


def _is_added_as_numbers(site: Site) -> bool:
    """Whether a Boolean mask is added to scores: 0 and 1."""
    fake = tensor_value(site.mask) if site.mask is not None else None
    return site.is_eager and fake is not None and fake.dtype == torch.bool


def _check_types(site: Site, biases: Biases) -> None:
    """Refuses a bias that torch's fused attention reads as if it were of the query's type (2.13, on a CPU)."""
    query, mask = tensor_value(site.query), tensor_value(site.mask) if site.mask is not None else None
    if site.is_eager or biases.is_empty or query is None or mask is None or _under_autocast(site):
        return
    if mask.dtype != query.dtype:
        raise Refusal(f"{site.out.name}: the bias has another type than the query", Cause.MASK)


def _has_heads(mask: fx.Node | None) -> bool:
    """Whether what is added may be a bias: it differs between heads, or has a gradient."""
    fake = tensor_value(mask) if mask is not None else None
    return fake is not None and (fake.requires_grad or (fake.ndim > 2 and fake.shape[-3] != 1))


def _table(site: Site, read: Read, sizes: tuple[Any, Any], chunk: int, given: Given | None) -> Tensor | None:
    """The table of the mask's reach, if it is known before the graph runs."""
    table = read.table(*sizes, chunk)
    if table is None and read.formula == formula.TRUE:
        if not _may_be_native(site):
            kind = "capped scores" if site.softcap else "scores with sinks that no kernel takes,"
            raise Refusal(
                f"{site.out.name}: {kind} without a mask, and the sequence is dynamic", Cause.SCORES
            )
        return reach.native_table(FULL)
    if table is None and given is not None and given.table:
        return torch.tensor(given.table).view(-1, 3)
    return table


def _check(site: Site) -> None:
    """Refuses what our kernels do not do."""
    if site.scale <= 0.0:  # torch's causal kernels give NaN (2.13, on a CPU), where with a mask they do not
        raise Refusal(f"{site.out.name}: the scale {site.scale} is not positive")
    fakes = map(tensor_value, (site.query, site.key, site.value, site.out))
    types = {fake.dtype for fake in fakes if fake is not None}
    if len(types) > 1 and site.dtype is None and not _under_autocast(site):
        raise Refusal(f"{site.out.name}: query, key, value and output have different types", Cause.SCORES)
    if not sites.have_same_heads(site):
        raise Refusal(f"{site.out.name}: query, key and value have other batches or heads", Cause.SCORES)
    if site.sinks is not None and sites.sinks_of_heads(site) is None:
        raise Refusal(f"{site.sinks.name}: attention sinks that may differ between queries", Cause.SCORES)
    if site.dropout and site.mask is not None:
        raise Refusal(f"{site.out.name}: attention weights are dropped at random", Cause.SCORES)


def _gains(site: Site) -> bool:
    """Whether there is something that another call of attention would not make, mask or repeated keys."""
    if site.causal:
        return site.mask is None and (grouped.is_grouped(site) or grouped.is_ours(site))
    return site.mask is not None or site.is_eager or grouped.is_grouped(site)


def _given(site: Site, read: Read, chunk: int) -> Given | None:
    """What is known of a mask that another graph has made, if the site's is that one and the whole of it."""
    vectors = (*read.keys, *read.queries)
    names = tuple(node.name for node in vectors)
    is_here = all(node.graph is site.level.top.gm.graph for node in vectors)
    for given in site.level.top.gm.meta.get(GIVEN, ()):
        same = (given.formula, given.is_finite, given.vectors, given.chunk)
        if is_here and same == (read.formula, read.is_finite, names, chunk):
            return given  # type: ignore[no-any-return]
    return None


def _is_native(site: Site, table: Tensor | None) -> bool:
    return table is not None and int(table[0, 0]) in (CAUSAL, FULL) and _may_be_native(site)


def _may_be_native(site: Site) -> bool:
    """Whether a kernel does what else there is than the mask: sinks need one that gives the sums of its softmax."""
    return not site.softcap and (site.sinks is None or grouped.is_ours(site))


def _under_autocast(site: Site) -> bool:
    fake = tensor_value(site.out)
    assert fake is not None
    enters = ENTER_AUTOCAST
    graphs = [level.gm.graph for level in all_levels(site.level.top)]
    return torch.is_autocast_enabled(fake.device.type) or any(
        graph.find_nodes(op="call_function", target=enters) for graph in graphs
    )
