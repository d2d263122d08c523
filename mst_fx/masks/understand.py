"""What the mask of an attention says: a formula, its vectors, and what is known of them before the graph runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mst_fx.errors import Cause, Refusal
from mst_fx.graph.levels import Level, all_levels
from mst_fx.graph.sizes import hint
from mst_fx.graph.values import tensor_value
from mst_fx.masks import formula, grouped, reach, sites
from mst_fx.masks.biases import NO_BIASES, NOT_HIDDEN, Biases, BooleanPart, Splitter
from mst_fx.masks.boolean import boolean_mask
from mst_fx.masks.constants import evaluated
from mst_fx.masks.formula import ADDS, Mask
from mst_fx.masks.given import as_given, check_given
from mst_fx.masks.reach import CAUSAL, FULL, Vectors
from mst_fx.masks.reader import Reader
from mst_fx.masks.sites import Site
from mst_fx.masks.words import form_name
from mst_fx.torch_api.modes import ENTER_AUTOCAST


@dataclasses.dataclass(frozen=True)
class Read:
    """A mask as it was read in a graph.

    Attributes:
        formula: of the vectors ``k0``, … and ``q0``, …
        fill: what is added to a masked score; 0: masked scores do not count at all.
        keys, queries: the nodes of these vectors.
        vectors: their values, if all are constants.
        tables: those that were asked for, by all that they depend on: layers have a mask in common.
    """

    formula: Mask
    fill: float = 0.0
    keys: tuple[fx.Node, ...] = ()
    queries: tuple[fx.Node, ...] = ()
    vectors: Vectors | None = None
    tables: dict[tuple[int, int, int, bool], Tensor] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def is_finite(self) -> bool:
        """See :func:`mst_fx.masks.reach.reach_of`."""
        return self.fill != 0.0

    def table(self, queries: Any, keys: Any, chunk: int) -> Tensor | None:
        """Its :attr:`~mst_fx.masks.reach.Reach.table`, if vectors and sizes are constants."""
        if self.vectors is None or not isinstance(queries, int) or not isinstance(keys, int):
            return None
        wanted = (queries, keys, chunk, self.is_finite)
        if wanted not in self.tables:
            self.tables[wanted] = reach.reach_of(self.formula, self.vectors, *wanted).table
        return self.tables[wanted]


NO_MASK = Read(formula.TRUE, vectors=Vectors((), ()))


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
        return _read_parts(splitter.masks, site, queries, keys, mutated), biases
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


def _read_parts(
    parts: Sequence[BooleanPart], site: Site, queries: Any, keys: Any, mutated: Collection[int]
) -> Read:
    """The formula of several masks, all of which must let a key through."""
    if not parts:
        return NO_MASK
    if len({part.batch_first for part in parts}) > 1:
        raise Refusal(f"{parts[0].node.name}: masks of different dimensions", Cause.MASK)

    def found(reader: Reader) -> Mask:
        masks = [(reader.read(part.node), part.negated) for part in parts]
        return formula.both(formula.negated(mask) if negated else mask for mask, negated in masks)

    read = _read_formula(found, parts[0].batch_first, parts[0].node.name, site.level, queries, keys, mutated)
    return dataclasses.replace(read, fill=parts[0].fill)


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


# The formula


def read_mask(node: fx.Node, level: Level, queries: Any, keys: Any, mutated: Collection[int]) -> Read:
    """The formula of a mask.

    Parts that constants make true, such as "the same document" of one document, are left out.

    Raises:
        Refusal: if the mask is not understood.
    """
    fake = tensor_value(node)
    if fake is None or fake.requires_grad:
        raise Refusal(f"{node.name}: the mask has a gradient", Cause.MASK)
    boolean = boolean_mask(node, level, queries, keys, mutated)

    def found(reader: Reader) -> Mask:
        return formula.TRUE if boolean.node is None else reader.read(boolean.node)

    read = _read_formula(found, boolean.batch_first, node.name, level, queries, keys, mutated)
    return dataclasses.replace(read, fill=boolean.fill)


def _read_formula(
    of: Callable[[Reader], Mask],
    batch_first: bool,
    name: str,
    level: Level,
    queries: Any,
    keys: Any,
    mutated: Collection[int],
) -> Read:
    """What a reader finds, without the parts that constants make true.

    Args:
        name: the mask's, for a refusal.
    """
    known: dict[fx.Node, Any] = {}
    limit = 64 * (hint(queries) + hint(keys))

    def constant(node: fx.Node) -> Any:
        return evaluated(node, known, limit, mutated)

    reader = Reader(queries, keys, level.resolve, constant, mutated, batch_first)
    found = of(reader)
    nodes = _Nodes(tuple(reader.key_nodes), tuple(reader.query_nodes), constant)

    def is_true(part: Mask) -> bool:
        alone = nodes.read(part)
        table = alone.table(queries, keys, queries) if alone.keys or alone.queries else None
        return table is not None and int(table[0, 0]) == FULL

    read = nodes.read(formula.both(part for part in formula.conjuncts(found) if not is_true(part)))
    if read.formula == formula.FALSE:
        raise Refusal(f"{name}: the mask lets nothing through", Cause.MASK)
    return read


@dataclasses.dataclass(frozen=True)
class _Nodes:
    """The nodes that the vectors of a formula name, and their values where they are constants."""

    keys: tuple[fx.Node, ...]
    queries: tuple[fx.Node, ...]
    constant: Callable[[fx.Node], Any]

    def read(self, part: Mask) -> Read:
        """A part of the formula by itself, with its vectors numbered from 0."""
        used = set(formula.vectors_in(part))
        places = [
            [index for index in range(len(nodes)) if f"{kind}{index}" in used]
            for kind, nodes in (("k", self.keys), ("q", self.queries))
        ]
        new = {
            f"{kind}{old}": f"{kind}{i}"
            for kind, own in zip("kq", places, strict=True)
            for i, old in enumerate(own)
        }
        keys = tuple(self.keys[index] for index in places[0])
        queries = tuple(self.queries[index] for index in places[1])
        return Read(formula.renamed(part, new), 0.0, keys, queries, self._vectors(keys, queries))

    def _vectors(self, keys: Sequence[fx.Node], queries: Sequence[fx.Node]) -> Vectors | None:
        values = [[self.constant(node) for node in nodes] for nodes in (keys, queries)]
        if not all(isinstance(found, Tensor) for part in values for found in part):
            return None
        return Vectors([as_vector(x, True) for x in values[0]], [as_vector(x, False) for x in values[1]])


def as_vector(vector: Any, is_key: bool, then: Callable[..., Any] | None = None) -> Any:
    """``[b, 1, 1, K]`` or ``[b, 1, Q, 1]``, with fewer dimensions too, → ``[b, K]`` or ``[b, Q]``.

    Args:
        then: makes a graph's nodes instead of tensors.
    """
    run: Callable[..., Any] = then or (lambda function, *args: function(*args))
    fake = tensor_value(vector) if isinstance(vector, fx.Node) else vector
    assert fake is not None
    if fake.ndim == 1 or (fake.ndim == 2 and not is_key):
        flat = vector if fake.ndim == 1 else run(torch.flatten, vector, 0, 1)
        return run(torch.unsqueeze, flat, 0)
    if fake.ndim == 2:
        return vector
    return (
        run(torch.flatten, vector, 0, fake.ndim - 2)
        if is_key
        else run(torch.flatten, vector, 1, fake.ndim - 1)
    )
